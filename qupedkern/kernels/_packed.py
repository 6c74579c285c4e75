"""A packed weight to its values, and sums over its codes: what dequantize_packed and lut_linear share."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._bits import code_at, load_codes
from ._launch import BACKWARD_BYTES, Rows, rows
from ._math import center, load_floats, store_tile, tile_of
from ._sums import cell_partials, new_partials, sum_partials


@triton.jit
def _codes(
    packed, start, left, total, BITS: tl.constexpr, WORDS: tl.constexpr, M: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """int32 codes [BLOCK] from weight number `start` on, below M."""
    if WORDS:
        first = start * BITS // 8
        code = load_codes(packed + first, total - first, BITS, BLOCK, False)  # a thread has too few codes for runs
    else:
        i = tl.arange(0, BLOCK)
        code = code_at(packed, start + i, i < left, total, BITS)
    return tl.minimum(code, M - 1)


@triton.jit
def _dequantize_packed(
    packed, centers, out, n, blocks, total, BITS: tl.constexpr, WORDS: tl.constexpr, M: tl.constexpr,
    BLOCK: tl.constexpr, ONE_ROW: tl.constexpr,
):  # fmt: skip
    row, start, left = tile_of(n, blocks, BLOCK, ONE_ROW)
    code = _codes(packed, start, left, total, BITS, WORDS, M, BLOCK)
    store_tile(out + start, center(code, centers + row * M, M), left, BLOCK)


@triton.jit
def _dequantize_packed_backward(
    grad, packed, partials, n, blocks, total, BITS: tl.constexpr, WORDS: tl.constexpr, M: tl.constexpr,
    BLOCK: tl.constexpr, ONE_ROW: tl.constexpr,
):  # fmt: skip
    _, start, left = tile_of(n, blocks, BLOCK, ONE_ROW)
    code = _codes(packed, start, left, total, BITS, WORDS, M, BLOCK)
    cell_partials(partials, load_floats(grad + start, left, BLOCK), code, M)


def _stream(packed: Tensor, bits: int, cut: Rows) -> tuple[int, int, bool]:
    """total, BITS, WORDS: every row of centers starts with a group."""
    return packed.numel(), bits, cut.groups == 1 or cut.n * bits % 8 == 0


def dequantize(packed: Tensor, centers: Tensor, bits: int, out: Tensor) -> None:
    """Every element of out, in the type of centers."""
    if not out.numel():
        return
    m = centers.shape[-1]
    cut = rows(out.numel(), centers.numel() // m, out.element_size(), BACKWARD_BYTES)
    _dequantize_packed[cut.grid](
        packed, centers, out, cut.n, cut.blocks, *_stream(packed, bits, cut), m, cut.BLOCK, cut.groups == 1,
        num_warps=cut.num_warps,
    )  # fmt: skip


def sum_by_code(grad: Tensor, packed: Tensor, bits: int, out: Tensor) -> None:
    """out, shaped like centers: the sum of grad over each code of each row of centers."""
    if not grad.numel():
        out.zero_()
        return
    m = out.shape[-1]
    cut = rows(grad.numel(), out.numel() // m, grad.element_size(), BACKWARD_BYTES)
    partials = new_partials(grad, cut.programs, m)
    _dequantize_packed_backward[cut.grid](
        grad, packed, partials, cut.n, cut.blocks, *_stream(packed, bits, cut), m, cut.BLOCK, cut.groups == 1,
        num_warps=cut.num_warps,
    )  # fmt: skip
    sum_partials(partials, out, cut.groups)
