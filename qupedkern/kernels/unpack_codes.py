"""unpack_codes in Triton: the words of pack_codes, read. Reads `bits` bits and writes a byte a code: bound by memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._bits import codes_of, grouping, load_words, store_codes

_CODES = 4096  # a program


@triton.jit
def _unpack_codes(
    packed, out, numel, total,
    BITS: tl.constexpr, PER: tl.constexpr, BYTES: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * GROUPS
    words = load_words(packed + first * BYTES, total - first * BYTES, GROUPS, BYTES, WIDTH)
    store_codes(out + first * PER, codes_of(words, BITS, PER), numel - first * PER, GROUPS, PER)


def unpack_codes(packed: Tensor, bits: int, shape: list[int], out: Tensor) -> None:
    if not out.numel():
        return
    per, size = grouping(bits)
    grid = (-(-out.numel() // _CODES),)
    _unpack_codes[grid](
        packed,
        out,
        out.numel(),
        packed.numel(),
        bits,
        per,
        size,
        triton.next_power_of_2(size),
        _CODES // per,
        num_warps=4,
    )
