"""Files that are whole or absent: atomic writes, and nested state to and from one safetensors file. No pickle.

A tree is what torch's state dicts are made of: dicts (string or integer keys), lists, tuples, tensors, numbers,
strings, booleans and None. `flatten` takes the tensors out and leaves JSON behind; `unflatten` is its exact inverse.
"""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from torch import Tensor

from fl.errors import CheckpointError
from qupedkern.files import write_atomically

Tensors = dict[str, Tensor]
Json = Any  # what json.dumps takes: dicts with string keys, lists, numbers, strings, booleans, None

_METADATA_KEY = (
    "state"  # one key only: the order of several is not fixed in the file, and equal state must be equal bytes
)


def flatten(tree: Any, prefix: str = "") -> tuple[Tensors, Json]:
    """(tensors, rest): the tensors by their dotted path, and JSON in which each is replaced by its path.

    prefix: put before every path.  Raises TypeError for anything that is neither tensor nor plain data.
    """
    tensors: Tensors = {}

    def walk(node: Any, path: str) -> Json:
        if isinstance(node, Tensor):
            if path in tensors:
                raise TypeError(f"flatten: two tensors share the path {path!r}, rename one of their keys")
            tensors[path] = node
            return {"tensor": path}
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        if isinstance(node, dict):
            if not all(type(key) in (str, int) for key in node):
                raise TypeError(f"flatten: keys must be strings or integers, got {list(node)} at {path!r}")
            return {"items": [[key, walk(value, f"{path}.{key}" if path else str(key))] for key, value in node.items()]}
        if isinstance(node, (list, tuple)):
            kind = "tuple" if isinstance(node, tuple) else "list"
            return {kind: [walk(value, f"{path}.{i}" if path else str(i)) for i, value in enumerate(node)]}
        raise TypeError(f"flatten: needs tensors and plain data, got {type(node).__name__} at {path!r}")

    rest = walk(tree, prefix)
    return tensors, rest


def unflatten(tensors: Tensors, rest: Json) -> Any:
    """The tree that flatten took apart."""
    if not isinstance(rest, dict):
        return rest
    (kind, content), *_ = rest.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "items":
        return {key: unflatten(tensors, value) for key, value in content}
    values = [unflatten(tensors, value) for value in content]
    return tuple(values) if kind == "tuple" else values


def write_atomic(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write a file so that after a crash at any moment either the old content or all of the new is there.

    durable: also after a power cut. Without it the file survives the process, and make_durable must follow before anything
    is built on it: waiting for the disk once for many files is some ten times faster than once for each.
    """
    if durable:
        write_atomically(path, lambda temporary: Path(temporary).write_bytes(content))
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C too: whatever ends it, no half of a file stays
        temporary.unlink(missing_ok=True)
        raise


def make_durable(paths: Sequence[Path]) -> None:
    """Wait until the disk has these files, all of one folder, and their names: together, so that it can do them at once."""
    if not paths:
        return
    with ThreadPoolExecutor(min(16, len(paths))) as pool:
        list(pool.map(_sync, paths))
    if os.name == "posix":  # Windows cannot open folders
        _sync(paths[0].parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def tensors_to_bytes(tensors: Tensors) -> bytes:
    """Tensors as the bytes of a safetensors file, to be sent to another process."""
    return _serialized(tensors, {"names": json.dumps(list(tensors))})  # their order: the format has one of its own


def tensors_from_bytes(content: bytes) -> Tensors:
    """What tensors_to_bytes was given, in its order."""
    tensors = safetensors.torch.load(content)
    return {name: tensors[name] for name in json.loads(_metadata(content)["names"])}


def save_state(path: Path, tensors: Tensors, scalars: Json, *, durable: bool = True) -> None:
    """Write tensors and JSON-able scalars as one safetensors file, atomically; equal state gives equal bytes.

    durable: as in write_atomic.
    """
    content = _serialized(tensors, {_METADATA_KEY: json.dumps(scalars, sort_keys=True)})
    write_atomic(path, content, durable=durable)


def _serialized(tensors: Tensors, metadata: dict[str, str]) -> bytes:
    """A safetensors file's bytes. Through NumPy where it knows every dtype: a third of the time, for many small tensors."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if all(tensor.dtype != torch.bfloat16 for tensor in plain.values()):
        return safetensors.numpy.save({name: tensor.numpy() for name, tensor in plain.items()}, metadata)
    # copies: torch's writer refuses tensors that share memory
    return safetensors.torch.save({name: tensor.clone() for name, tensor in plain.items()}, metadata)


def _metadata(content: bytes) -> dict[str, str]:
    """A safetensors file's own, which its readers of bytes do not return."""
    length = int.from_bytes(content[:8], "little")
    found: dict[str, str] = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    return found


def load_state(path: Path) -> tuple[Tensors, Json]:
    """What save_state wrote. Raises CheckpointError for any other file."""
    with _refusing(path):
        content = path.read_bytes()
        return safetensors.torch.load(content), json.loads(_metadata(content)[_METADATA_KEY])


def check_state(path: Path) -> None:
    """Raise CheckpointError where load_state would: the header is read, and the length compared with it."""
    with _refusing(path), safetensors.safe_open(path, "pt") as file:
        json.loads((file.metadata() or {})[_METADATA_KEY])


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """One sentence for whatever is wrong with a state file."""
    try:
        yield
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"load: {path} must be a state file written by this package, got: {error}") from error
