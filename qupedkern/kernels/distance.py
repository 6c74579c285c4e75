"""distance in Triton, and its gradient. Forward: reads x alone and leaves one partial sum a tile; bound by memory for m <= 4.
The backward is in _cells.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._cells import cell_gradient
from ._launch import BACKWARD_BYTES, rows_of
from ._math import load_floats, nearest, tile_of
from ._sums import new_partials, sum_partials


@triton.jit
def _distance(
    x, centers, partials, n, blocks, L1: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, ONE_ROW: tl.constexpr
):
    row, start, left = tile_of(n, blocks, BLOCK, ONE_ROW)
    values = load_floats(x + start, left, BLOCK)
    gap = values - nearest(values, centers + row * M, M)
    term = tl.abs(gap) if L1 else gap * gap
    tl.store(partials + tl.program_id(0), tl.sum(tl.where(tl.arange(0, BLOCK) < left, term, 0.0)))


def distance(x: Tensor, centers: Tensor, norm: str, out: Tensor) -> None:
    if not x.numel():
        out.zero_()
        return
    cut = rows_of(x, centers, BACKWARD_BYTES)
    partials = new_partials(x, cut.programs, 1)
    _distance[cut.grid](
        x, centers, partials, cut.n, cut.blocks, norm == "l1", centers.shape[-1], cut.BLOCK, cut.groups == 1,
        num_warps=cut.num_warps,
    )  # fmt: skip
    sum_partials(partials, out, 1)


def distance_backward(
    grad: Tensor, x: Tensor, centers: Tensor, norm: str, grad_x: Tensor, grad_centers: Tensor
) -> None:
    cell_gradient(grad, x, centers, norm, grad_x, grad_centers)
