"""The bit stream of pack_codes on the device, read and written in groups: PER codes fill exactly BYTES bytes.

PER = 8 / bits codes a byte where bits divides 8, else 8 codes in `bits` bytes. Groups are held as integers of 32 bits, or of 64
where they are longer. Streams of whole bytes a group load as they are; the others, where the address allows, sixteen groups at
a time: `bits` loads of 16 bytes a thread, whose words are shifted together in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._math import load_tile, store_tile

BLOCK = 4096  # codes a program packs or unpacks
RUN = 128  # codes of a run of sixteen groups: `bits` loads of 16 bytes


@triton.jit
def split_words(words, BITS: tl.constexpr):
    """int32 codes [..., PER] of groups [...], which fill a row of the last dimension each."""
    PER: tl.constexpr = 8 // BITS if 8 % BITS == 0 else 8
    places = (tl.arange(0, PER) * BITS).to(words.dtype)
    return ((tl.expand_dims(words, -1) >> places) & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def _lanes(four):
    """The four columns of [Q, 4], each [Q]; four neighbours of a thread, so nothing moves."""
    even, odd = tl.split(tl.reshape(four, (four.shape[0], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _group(words, BITS: tl.constexpr, I: tl.constexpr):
    """The I-th group of a run, of 8 BITS bits, out of its words."""
    TYPE: tl.constexpr = tl.uint32 if BITS <= 4 else tl.uint64
    FIRST: tl.constexpr = 8 * BITS * I // 32
    AT: tl.constexpr = 8 * BITS * I % 32
    group = words[FIRST].to(TYPE) >> AT
    if AT + 8 * BITS > 32:
        group |= words[FIRST + 1].to(TYPE) << (32 - AT)
    if AT + 8 * BITS > 64:
        group |= words[FIRST + 2].to(TYPE) << (64 - AT)
    return group & ((1 << (8 * BITS)) - 1)


@triton.jit
def load_runs(words, BITS: tl.constexpr):
    """Groups [16 Q] of the Q runs at the uint32 pointers `words` [Q], multiples of 16 bytes; for bits that do not divide 8."""
    found = ()
    for i in tl.static_range(BITS):
        found = found + _lanes(tl.load(words[:, None] + (4 * i + tl.arange(0, 4))[None, :]))
    groups = ()
    for i in tl.static_range(16):
        groups = groups + (_group(found, BITS, i),)  # type: ignore[assignment]  # noqa: RUF005  (Triton has no starred tuples)
    eight = ()
    for i in tl.static_range(8):  # joined from the highest bit of the group's number down, so that they end in order
        eight = eight + (tl.join(groups[i], groups[i + 8]),)  # type: ignore[assignment]  # noqa: RUF005
    quarter = ()
    for i in tl.static_range(4):
        quarter = quarter + (tl.join(eight[i], eight[i + 4]),)  # type: ignore[assignment]  # noqa: RUF005
    half = (tl.join(quarter[0], quarter[2]), tl.join(quarter[1], quarter[3]))  # type: ignore[misc]
    return tl.reshape(tl.join(half[0], half[1]), (16 * words.shape[0],))


@triton.jit
def _load_bytes(packed, left, BITS: tl.constexpr, GROUPS: tl.constexpr):
    """Groups [GROUPS], a byte at a time, 0 past the `left` bytes that exist."""
    TYPE: tl.constexpr = tl.uint32 if BITS <= 4 else tl.uint64
    at = tl.arange(0, GROUPS) * BITS
    group = tl.zeros([GROUPS], TYPE)
    for j in tl.static_range(BITS):
        byte = tl.load(packed + at + j, mask=at + j < left, other=0)
        group |= byte.to(TYPE) << (8 * j)
    return group


@triton.jit
def load_codes(packed, left, BITS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """int32 codes [BLOCK] of the stream from the byte `packed` on, 0 past the `left` bytes that exist. WIDE: packed is a
    multiple of 16."""
    PER: tl.constexpr = 8 // BITS if 8 % BITS == 0 else 8
    GROUPS: tl.constexpr = BLOCK // PER
    if 8 % BITS == 0:
        groups = load_tile(packed, left, GROUPS).to(tl.uint32)
    elif WIDE:
        if left >= GROUPS * BITS:
            words = tl.multiple_of(packed.to(tl.pointer_type(tl.uint32), bitcast=True), 16)
            groups = load_runs(words + tl.arange(0, GROUPS // 16) * (4 * BITS), BITS)
        else:
            groups = _load_bytes(packed, left, BITS, GROUPS)
    else:
        groups = _load_bytes(packed, left, BITS, GROUPS)
    return tl.reshape(split_words(groups, BITS), (BLOCK,))


@triton.jit
def code_at(packed, place, here, total, BITS: tl.constexpr):
    """int32 code number `place` (int64, any shape) of the stream, 0 where not `here`: each lies within two bytes."""
    byte = (place * BITS) >> 3
    word = tl.load(packed + byte, mask=here, other=0).to(tl.int32)
    if 8 % BITS != 0:
        word |= tl.load(packed + byte + 1, mask=here & (byte + 1 < total), other=0).to(tl.int32) << 8
    return (word >> ((place * BITS) & 7).to(tl.int32)) & ((1 << BITS) - 1)


@triton.jit
def _pack(codes, out, numel, total, BITS: tl.constexpr, BLOCK: tl.constexpr):
    PER: tl.constexpr = 8 // BITS if 8 % BITS == 0 else 8
    BYTES: tl.constexpr = 1 if 8 % BITS == 0 else BITS
    TYPE: tl.constexpr = tl.uint32 if BYTES <= 4 else tl.uint64
    GROUPS: tl.constexpr = BLOCK // PER
    first = tl.program_id(0).to(tl.int64) * BLOCK
    here = tl.reshape(load_tile(codes + first, numel - first, BLOCK), (GROUPS, PER)).to(TYPE)
    kept = here & ((1 << BITS) - 1)
    groups = tl.sum(kept << (tl.arange(0, PER) * BITS)[None, :].to(kept.dtype), axis=1)
    start = first * BITS // 8
    if BYTES == 1:
        store_tile(out + start, groups.to(tl.uint8), total - start, GROUPS)
    else:
        at = tl.arange(0, GROUPS) * BYTES
        for j in tl.static_range(BYTES):
            tl.store(out + start + at + j, (groups >> (8 * j)).to(tl.uint8), mask=at + j < total - start)


@triton.jit
def _unpack(packed, out, numel, total, BITS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    start = first * BITS // 8
    codes = load_codes(packed + start, total - start, BITS, BLOCK, WIDE)
    store_tile(out + first, codes.to(tl.uint8), numel - first, BLOCK)


def aligned(packed: Tensor) -> bool:
    """Whether words of 16 bytes may be read from its start on."""
    return packed.data_ptr() % 16 == 0


def pack(codes: Tensor, bits: int, out: Tensor) -> None:
    """uint8 codes into the stream `out`, which has just their length."""
    if codes.numel():
        grid = (-(-codes.numel() // BLOCK),)
        _pack[grid](codes, out, codes.numel(), out.numel(), bits, BLOCK, num_warps=4)


def unpack(packed: Tensor, bits: int, out: Tensor) -> None:
    """The stream's codes, as many as `out` has. One warp a program: a thread's 128 codes are whole words of 16 bytes."""
    if out.numel():
        grid = (-(-out.numel() // BLOCK),)
        _unpack[grid](packed, out, out.numel(), packed.numel(), bits, aligned(packed), BLOCK, num_warps=1)
