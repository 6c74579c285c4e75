"""The bit stream of pack_codes on the device: PER codes fill exactly BYTES bytes, and are read and written as one word.

PER = 8 / bits codes a byte where bits divides 8, else 8 codes in `bits` bytes. A program has GROUPS such groups.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._math import load_tile, store_tile

_CODES = 4096  # a program packs


def grouping(bits: int) -> tuple[int, int]:
    """PER, BYTES"""
    return (8 // bits, 1) if 8 % bits == 0 else (8, bits)


@triton.jit
def shifts(BITS: tl.constexpr, PER: tl.constexpr):
    return (tl.arange(0, PER) * BITS)[None, :].to(tl.uint64)


@triton.jit
def words_of(codes, BITS: tl.constexpr, PER: tl.constexpr):
    """uint64 [GROUPS] from codes [GROUPS, PER]; what does not fit into BITS is cut off."""
    kept = codes.to(tl.uint64) & ((1 << BITS) - 1)
    return tl.sum(kept << shifts(BITS, PER), axis=1)


@triton.jit
def codes_of(words, BITS: tl.constexpr, PER: tl.constexpr):
    """uint8 [GROUPS, PER] from uint64 words [GROUPS]"""
    return ((words[:, None] >> shifts(BITS, PER)) & ((1 << BITS) - 1)).to(tl.uint8)


@triton.jit
def load_codes(codes, left, GROUPS: tl.constexpr, PER: tl.constexpr):
    """[GROUPS, PER] codes, 0 past the `left` that exist; read as one run, so that loads are wide."""
    return tl.reshape(load_tile(codes, left, GROUPS * PER), (GROUPS, PER))


@triton.jit
def store_codes(out, codes, left, GROUPS: tl.constexpr, PER: tl.constexpr):
    store_tile(out, tl.reshape(codes, (GROUPS * PER,)), left, GROUPS * PER)


@triton.jit
def load_words(packed, left, GROUPS: tl.constexpr, BYTES: tl.constexpr, WIDTH: tl.constexpr):
    """uint64 [GROUPS] of BYTES bytes each, 0 past the `left` bytes that exist; WIDTH: BYTES as a power of two."""
    if BYTES == 1:
        return load_tile(packed, left, GROUPS).to(tl.uint64)
    else:
        j = tl.arange(0, WIDTH)[None, :]
        at = tl.arange(0, GROUPS)[:, None] * BYTES + j
        byte = tl.load(packed + at, mask=(j < BYTES) & (at < left), other=0)
        return tl.sum(byte.to(tl.uint64) << (8 * j).to(tl.uint64), axis=1)


@triton.jit
def store_words(packed, words, left, GROUPS: tl.constexpr, BYTES: tl.constexpr, WIDTH: tl.constexpr):
    if BYTES == 1:
        store_tile(packed, words.to(tl.uint8), left, GROUPS)
    else:
        j = tl.arange(0, WIDTH)[None, :]
        at = tl.arange(0, GROUPS)[:, None] * BYTES + j
        byte = (words[:, None] >> (8 * j).to(tl.uint64)).to(tl.uint8)
        tl.store(packed + at, byte, mask=(j < BYTES) & (at < left))


@triton.jit
def code_at(packed, place, here, total, BITS: tl.constexpr):
    """int32 code number `place` (int64, any shape) of the stream, 0 where not `here`: each lies within two bytes."""
    byte = (place * BITS) >> 3
    word = tl.load(packed + byte, mask=here, other=0).to(tl.int32)
    if 8 % BITS != 0:
        word |= tl.load(packed + byte + 1, mask=here & (byte + 1 < total), other=0).to(tl.int32) << 8
    return (word >> ((place * BITS) & 7).to(tl.int32)) & ((1 << BITS) - 1)


@triton.jit
def _pack(
    codes, out, numel, total,
    BITS: tl.constexpr, PER: tl.constexpr, BYTES: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * GROUPS
    here = load_codes(codes + first * PER, numel - first * PER, GROUPS, PER)
    words = words_of(here, BITS, PER)
    store_words(out + first * BYTES, words, total - first * BYTES, GROUPS, BYTES, WIDTH)


def pack(codes: Tensor, bits: int, out: Tensor) -> None:
    """uint8 codes into the stream `out`, which has just their length."""
    if not codes.numel():
        return
    per, size = grouping(bits)
    grid = (-(-codes.numel() // _CODES),)
    _pack[grid](
        codes,
        out,
        codes.numel(),
        out.numel(),
        bits,
        per,
        size,
        triton.next_power_of_2(size),
        _CODES // per,
        num_warps=4,
    )
