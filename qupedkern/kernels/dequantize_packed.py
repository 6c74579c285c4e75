"""dequantize_packed in Triton, and its gradient: a code out of two bytes of the stream, then as dequantize.

Reads `bits` bits and writes a value a weight: bound by memory, the bytes of neighbouring codes coming from cache. Where a row of
centers starts on a byte, whole words are read instead.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._bits import code_at, codes_of, grouping, load_words
from ._launch import BACKWARD_BYTES, rows
from ._math import center, load_floats, store_tile, tile_of
from ._sums import cell_partials, new_partials, sum_partials


@triton.jit
def _codes(
    packed, start, left, total, BITS: tl.constexpr, PER: tl.constexpr, BYTES: tl.constexpr, WIDTH: tl.constexpr,
    WORDS: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """int32 codes [BLOCK] from weight number `start` on, below M."""
    if WORDS:
        first = start // PER * BYTES
        words = load_words(packed + first, total - first, BLOCK // PER, BYTES, WIDTH)
        code = tl.reshape(codes_of(words, BITS, PER), (BLOCK,)).to(tl.int32)
    else:
        i = tl.arange(0, BLOCK)
        code = code_at(packed, start + i, i < left, total, BITS)
    return tl.minimum(code, M - 1)


@triton.jit
def _dequantize_packed(
    packed, centers, out, n, blocks, total, BITS: tl.constexpr, PER: tl.constexpr, BYTES: tl.constexpr,
    WIDTH: tl.constexpr, WORDS: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, ONE_ROW: tl.constexpr,
):  # fmt: skip
    row, start, left = tile_of(n, blocks, BLOCK, ONE_ROW)
    code = _codes(packed, start, left, total, BITS, PER, BYTES, WIDTH, WORDS, M, BLOCK)
    store_tile(out + start, center(code, centers + row * M, M), left, BLOCK)


def _stream(bits: int, n: int, groups: int) -> tuple[int, int, int, int, bool]:
    """BITS, PER, BYTES, WIDTH, WORDS"""
    per, size = grouping(bits)
    return bits, per, size, triton.next_power_of_2(size), groups == 1 or n % per == 0


def dequantize_packed(packed: Tensor, centers: Tensor, bits: int, shape: list[int], out: Tensor) -> None:
    if not out.numel():
        return
    m = centers.shape[-1]
    cut = rows(out.numel(), centers.numel() // m, out.element_size(), BACKWARD_BYTES)
    _dequantize_packed[cut.grid](
        packed, centers, out, cut.n, cut.blocks, packed.numel(), *_stream(bits, cut.n, cut.groups), m, cut.BLOCK,
        cut.groups == 1, num_warps=cut.num_warps,
    )  # fmt: skip


@triton.jit
def _dequantize_packed_backward(
    grad, packed, partials, n, blocks, total, BITS: tl.constexpr, PER: tl.constexpr, BYTES: tl.constexpr,
    WIDTH: tl.constexpr, WORDS: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, ONE_ROW: tl.constexpr,
):  # fmt: skip
    _, start, left = tile_of(n, blocks, BLOCK, ONE_ROW)
    code = _codes(packed, start, left, total, BITS, PER, BYTES, WIDTH, WORDS, M, BLOCK)
    cell_partials(partials, load_floats(grad + start, left, BLOCK), code, M)


def dequantize_packed_backward(
    grad: Tensor, packed: Tensor, centers: Tensor, bits: int, shape: list[int], out: Tensor
) -> None:
    if not grad.numel():
        out.zero_()
        return
    m = centers.shape[-1]
    cut = rows(grad.numel(), centers.numel() // m, grad.element_size(), BACKWARD_BYTES)
    partials = new_partials(grad, cut.programs, m)
    _dequantize_packed_backward[cut.grid](
        grad, packed, partials, cut.n, cut.blocks, packed.numel(), *_stream(bits, cut.n, cut.groups), m, cut.BLOCK,
        cut.groups == 1, num_warps=cut.num_warps,
    )  # fmt: skip
    sum_partials(partials, out, cut.groups)
