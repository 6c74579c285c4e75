"""Ways to damage a packed model's file, from a flipped bit to a description that lies; all from one random generator."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

from packed_models import joined, parts

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 4, 7, 8, 9, 255, 256, 257, 2**31, 2**40, 2**62, 2**63, -(2**63), 10**18, 10**19,
    0.5, 1e308, float("nan"), float("inf"), "", "0", "zeros", "same", "linear", "conv2d", "embedding", "../../etc/passwd",
    "/dev/zero", "\x1b[31m\n", "\ud800", "\u202e", "x" * 5000, "U8", "F32", "BF16", "I64", "BOOL", [], [0], [1, 1], [-1],
    [2**40] * 2, [[]], {}, {"a": {}}, {"device": "cuda"}, [1] * 100, [10**18] * 3,
)  # fmt: skip


def nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside."""
    found = [path] if path else []
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        found += nodes(child, (*path, key))
    return found


def opened_up(file: bytes) -> tuple[dict[str, Any], bytes]:
    """The header with the JSON inside its metadata decoded, and the tensors."""
    header, body = parts(file)
    for key in ("layers", "aliases"):
        header["__metadata__"][key] = json.loads(header["__metadata__"][key])
    return header, body


def closed(header: dict[str, Any], body: bytes) -> bytes:
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict):
        for key in ("layers", "aliases"):
            if key in metadata and not isinstance(metadata[key], str):
                metadata[key] = json.dumps(metadata[key])
    return joined(header, body)


def hostile_header(file: bytes, rng: random.Random) -> bytes:
    """One value of the header, or of what its metadata says of the layers, replaced, removed, renamed, moved or doubled."""
    header, body = opened_up(file)
    for _ in range(rng.choice([1, 1, 1, 2])):
        places = nodes(header)
        if not places:
            break
        *path, key = rng.choice(places)
        parent = header
        for step in path:
            parent = parent[step]
        choice = rng.randrange(6)
        if choice <= 2:
            parent[key] = rng.choice(HOSTILE)
        elif choice == 3:
            del parent[key]
        elif choice == 4 and isinstance(parent, dict):
            parent[str(rng.choice((rng.choice(HOSTILE), rng.choice(list(parent)))))] = parent.pop(key)
        else:
            other = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
            parent[key], parent[other] = parent[other], parent[key]
    return closed(header, body)


def hostile_text(file: bytes, rng: random.Random) -> bytes:
    """What no dictionary can say: names twice, endless numbers, deep nesting, NaN, wrong UTF-8."""
    header, body = parts(file)
    inner = rng.random() < 0.5
    text = header["__metadata__"]["layers"] if inner else json.dumps(header)
    where = rng.choice([i for i, character in enumerate(text) if character in "{[:,"]) + 1
    put = rng.choice(
        ["[" * 60_000, '{"a":' * 60_000, "9" * 9000, "-", "NaN,", "Infinity", "1e999", '"5":1,"5":2,', "\0"]
    )
    text = text[:where] + put + text[where:]
    if inner:
        header["__metadata__"]["layers"] = text
        return joined(header, body)
    raw = text.encode()
    if rng.random() < 0.3:
        raw = raw[:where] + rng.choice([b"\xff", b"\xc3(", b"\xed\xa0\x80"]) + raw[where:]
    return struct.pack("<Q", len(raw)) + raw + body


def hostile_values(file: bytes, rng: random.Random) -> bytes:
    """Bytes of the tensors, the header untouched: codes out of range, centers not finite or out of order."""
    content = bytearray(file)
    (size,) = struct.unpack("<Q", file[:8])
    for _ in range(rng.choice([1, 1, 2, 16])):
        where = rng.randrange(8 + size, len(file))
        special = rng.choice([b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\xff\xff", b"\0\0\0\x80", rng.randbytes(4)])
        patch = rng.choice([bytes([rng.randrange(256)]), special])
        content[where : where + len(patch)] = patch
    return bytes(content[: len(file)])


def flipped(file: bytes, rng: random.Random) -> bytes:
    content = bytearray(file)
    for _ in range(rng.choice([1, 1, 2, 8])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def retyped(file: bytes, rng: random.Random) -> bytes:
    """A character of the header replaced by one that means something in JSON."""
    content = bytearray(file)
    (size,) = struct.unpack("<Q", file[:8])
    for _ in range(rng.choice([1, 1, 2])):
        content[8 + rng.randrange(size)] = rng.choice(b'0129-"[]{}:,.eE\\ \x00\xff')
    return bytes(content)


def cut(file: bytes, rng: random.Random) -> bytes:
    begin = rng.randrange(len(file))
    return file[:begin] + file[begin + rng.choice([1, 8, 64, len(file)]) :]


def spliced(file: bytes, rng: random.Random) -> bytes:
    """A stretch of the file, or random bytes, put somewhere else in it."""
    begin, where = rng.randrange(len(file)), rng.randrange(len(file) + 1)
    length = rng.choice([1, 4, 8, 100, 10**6])
    return file[:where] + rng.choice([file[begin : begin + length], rng.randbytes(min(length, 1000))]) + file[where:]


def mislaid(file: bytes, rng: random.Random) -> bytes:
    """Another length of the header."""
    (size,) = struct.unpack("<Q", file[:8])
    wrong = [0, 1, 2, size - 1, size + 1, size + 8, len(file), 2**24 + 1, 2**32, 2**63, 2**64 - 1, rng.randrange(2**20)]
    return struct.pack("<Q", rng.choice(wrong)) + file[8:]


MUTATIONS: dict[Callable[[bytes, random.Random], bytes], int] = {  # with how often each is drawn
    hostile_header: 10,
    hostile_values: 4,
    hostile_text: 3,
    retyped: 3,
    flipped: 2,
    cut: 1,
    spliced: 1,
    mislaid: 1,
}


def mutated(file: bytes, rng: random.Random) -> bytes:
    """One damage, now and then two on top of each other."""
    (damage,) = rng.choices(list(MUTATIONS), list(MUTATIONS.values()))
    content = damage(file, rng)
    if rng.random() < 0.1 and len(content) > 16:
        content = rng.choice([flipped, cut, spliced])(content, rng)
    return content
