"""pack_codes in Triton: a word of codes and its bytes at a time. Reads a byte and writes `bits` bits a code: bound by memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._bits import grouping, load_codes, store_words, words_of

_CODES = 4096  # a program


@triton.jit
def _pack_codes(
    codes, out, numel, total,
    BITS: tl.constexpr, PER: tl.constexpr, BYTES: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * GROUPS
    here = load_codes(codes + first * PER, numel - first * PER, GROUPS, PER)
    words = words_of(here, BITS, PER)
    store_words(out + first * BYTES, words, total - first * BYTES, GROUPS, BYTES, WIDTH)


def pack_codes(codes: Tensor, bits: int, out: Tensor) -> None:
    if not codes.numel():
        return
    per, size = grouping(bits)
    grid = (-(-codes.numel() // _CODES),)
    _pack_codes[grid](
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
