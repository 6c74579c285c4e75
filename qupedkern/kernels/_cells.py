"""Gradients through the nearest center, shared by hard_quantize and distance: one for each weight, and their sums by cell.

Bound by memory up to m = 4, by the m sums of a tile beyond.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._launch import BACKWARD_BYTES, rows_of
from ._math import center, code_of, load_floats, narrow, sign, store_tile, tile_of
from ._sums import cell_partials, new_partials, sum_partials


@triton.jit
def _cell_gradient(
    grad, x, centers, grad_x, partials, n, blocks,
    KIND: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, ONE_ROW: tl.constexpr,
):  # fmt: skip
    row, start, left = tile_of(n, blocks, BLOCK, ONE_ROW)
    values = load_floats(x + start, left, BLOCK)
    c = centers + row * M
    code = code_of(values, c, M)
    if KIND == "through" or KIND == "stop":  # grad is one a weight and goes to its center
        to_centers = load_floats(grad + start, left, BLOCK)
        to_x = to_centers if KIND == "through" else tl.zeros_like(to_centers)
    else:  # grad is one number, of the distance; what pulls a weight to its center pulls that back
        gap = values - center(code, c, M)
        to_x = tl.load(grad) * (sign(gap) if KIND == "l1" else 2 * gap)
        to_centers = tl.where(tl.arange(0, BLOCK) < left, -to_x, 0.0)
    cell_partials(partials, to_centers, code, M)
    store_tile(grad_x + start, narrow(to_x, grad_x.dtype.element_ty), left, BLOCK)


def cell_gradient(grad: Tensor, x: Tensor, centers: Tensor, kind: str, grad_x: Tensor, grad_centers: Tensor) -> None:
    """kind: "through" or "stop", of values at the nearest center; "l1" or "l2", of the distance to it."""
    if not x.numel():
        grad_centers.zero_()
        return
    cut = rows_of(x, centers, BACKWARD_BYTES)
    partials = new_partials(x, cut.programs, centers.shape[-1])
    _cell_gradient[cut.grid](
        grad, x, centers, grad_x, partials, cut.n, cut.blocks, kind, centers.shape[-1], cut.BLOCK, cut.groups == 1,
        num_warps=cut.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    sum_partials(partials, grad_centers, cut.groups)
