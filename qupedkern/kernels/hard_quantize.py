"""hard_quantize in Triton, and its gradient. Forward: reads x, writes x's nearest center. Backward: writes grad or 0 and leaves
a partial sum a center and tile; bound by memory up to m = 4, by the m sums of a tile beyond."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._launch import BACKWARD_BYTES, rows_of
from ._math import code_of, load_floats, load_tile, narrow, nearest, store_tile, tile_of, widen
from ._sums import cell_partials, new_partials, sum_partials


@triton.jit
def _hard_quantize(x, centers, out, n, blocks, M: tl.constexpr, BLOCK: tl.constexpr, ONE_ROW: tl.constexpr):
    row, start, left = tile_of(n, blocks, BLOCK, ONE_ROW)
    values = load_floats(x + start, left, BLOCK)
    q = nearest(values, centers + row * M, M)
    store_tile(out + start, narrow(q, out.dtype.element_ty), left, BLOCK)


def hard_quantize(x: Tensor, centers: Tensor, straight_through: bool, out: Tensor) -> None:
    if not x.numel():
        return
    cut = rows_of(x, centers)
    _hard_quantize[cut.grid](
        x, centers, out, cut.n, cut.blocks, centers.shape[-1], cut.BLOCK, cut.groups == 1,
        num_warps=cut.num_warps, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _hard_quantize_backward(
    grad, x, centers, grad_x, partials, n, blocks,
    THROUGH: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, ONE_ROW: tl.constexpr,
):  # fmt: skip
    row, start, left = tile_of(n, blocks, BLOCK, ONE_ROW)
    values = load_floats(x + start, left, BLOCK)
    g = load_tile(grad + start, left, BLOCK)
    code = code_of(values, centers + row * M, M)
    cell_partials(partials, widen(g), code, M)
    store_tile(grad_x + start, g if THROUGH else tl.zeros_like(g), left, BLOCK)


def hard_quantize_backward(
    grad: Tensor, x: Tensor, centers: Tensor, straight_through: bool, grad_x: Tensor, grad_centers: Tensor
) -> None:
    if not x.numel():
        grad_centers.zero_()
        return
    cut = rows_of(x, centers, BACKWARD_BYTES)
    partials = new_partials(x, cut.programs, centers.shape[-1])
    _hard_quantize_backward[cut.grid](
        grad, x, centers, grad_x, partials, cut.n, cut.blocks, straight_through, centers.shape[-1], cut.BLOCK,
        cut.groups == 1, num_warps=cut.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    sum_partials(partials, grad_centers, cut.groups)
