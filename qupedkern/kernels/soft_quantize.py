"""soft_quantize in Triton, and its gradient: a sum of m - 1 sigmoids an element, centers in registers up to m = 16.

Two special functions a sigmoid: bound by memory for m = 2, by special functions and issue beyond. The backward leaves, a tile,
the sums A_j of g s_j and B_j of g s_j (1 - s_j); a second kernel adds them in order and combines them to grad_centers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._launch import BACKWARD_BYTES, rows_of
from ._math import LOG2_E, load_floats, narrow, store_tile, tile_of
from ._soft import center_gradient, combine_shape, soft_gradient, soft_value
from ._sums import new_partials


@triton.jit
def _soft_quantize(
    x, centers, sharpness, out, n, blocks,
    PER_ROW: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, ONE_ROW: tl.constexpr,
):  # fmt: skip
    row, start, left = tile_of(n, blocks, BLOCK, ONE_ROW)
    values = load_floats(x + start, left, BLOCK)
    P = tl.load(sharpness + row) if PER_ROW else tl.load(sharpness)
    soft = soft_value(values, centers + row * M, P * LOG2_E, M)
    store_tile(out + start, narrow(soft, out.dtype.element_ty), left, BLOCK)


def soft_quantize(x: Tensor, centers: Tensor, sharpness: Tensor, out: Tensor) -> None:
    if not x.numel():
        return
    cut = rows_of(x, centers)
    _soft_quantize[cut.grid](
        x, centers, sharpness, out, cut.n, cut.blocks, sharpness.numel() > 1, centers.shape[-1], cut.BLOCK,
        cut.groups == 1, num_warps=cut.num_warps,
    )  # fmt: skip


@triton.jit
def _soft_quantize_backward(
    grad, x, centers, sharpness, grad_x, partials, n, blocks,
    PER_ROW: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, ONE_ROW: tl.constexpr,
):  # fmt: skip
    row, start, left = tile_of(n, blocks, BLOCK, ONE_ROW)
    values = load_floats(x + start, left, BLOCK)
    g = load_floats(grad + start, left, BLOCK)
    P = tl.load(sharpness + row) if PER_ROW else tl.load(sharpness)
    mine = partials + tl.program_id(0).to(tl.int64) * 2 * M
    to_x = soft_gradient(values, g, centers + row * M, P, mine, M)
    store_tile(grad_x + start, narrow(to_x, grad_x.dtype.element_ty), left, BLOCK)


@triton.jit
def _soft_quantize_centers(
    partials, centers, sharpness, grad_centers, blocks,
    PER_ROW: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, HEIGHT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    P = tl.load(sharpness + row) if PER_ROW else tl.load(sharpness)
    gradient = center_gradient(partials + row * blocks * 2 * M, centers + row * M, P, blocks, M, WIDTH, HEIGHT)
    i = tl.arange(0, WIDTH)
    value = narrow(gradient.to(tl.float32), grad_centers.dtype.element_ty)
    tl.store(grad_centers + row * M + i, value, mask=i < M)


def soft_quantize_backward(
    grad: Tensor, x: Tensor, centers: Tensor, sharpness: Tensor, grad_x: Tensor, grad_centers: Tensor
) -> None:
    if not x.numel():
        grad_centers.zero_()
        return
    m, per_row = centers.shape[-1], sharpness.numel() > 1
    cut = rows_of(x, centers, BACKWARD_BYTES)
    partials = new_partials(x, cut.programs, 2 * m)
    _soft_quantize_backward[cut.grid](
        grad, x, centers, sharpness, grad_x, partials, cut.n, cut.blocks, per_row, m, cut.BLOCK, cut.groups == 1,
        num_warps=cut.num_warps,
    )  # fmt: skip
    _soft_quantize_centers[(cut.groups,)](
        partials, centers, sharpness, grad_centers, cut.blocks, per_row, m, *combine_shape(m), num_warps=4
    )
