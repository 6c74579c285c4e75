"""hard_quantize in Triton: reads x, writes x's nearest center; bound by memory up to m = 4. The backward is in _cells.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._cells import cell_gradient
from ._launch import rows_of
from ._math import load_floats, narrow, nearest, store_tile, tile_of


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


def hard_quantize_backward(
    grad: Tensor, x: Tensor, centers: Tensor, straight_through: bool, grad_x: Tensor, grad_centers: Tensor
) -> None:
    cell_gradient(grad, x, centers, "through" if straight_through else "stop", grad_x, grad_centers)
