"""dequantize in Triton, and its gradient. Forward: a byte read and a value written a weight; up to 4 centers are selected in
registers, more looked up in cache. Backward: a partial sum a center and tile."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._launch import BACKWARD_BYTES, rows
from ._math import center, load_floats, load_tile, store_tile, tile_of
from ._sums import cell_partials, new_partials, sum_partials


@triton.jit
def _dequantize(codes, centers, out, n, blocks, M: tl.constexpr, BLOCK: tl.constexpr, ONE_ROW: tl.constexpr):
    row, start, left = tile_of(n, blocks, BLOCK, ONE_ROW)
    code = tl.minimum(load_tile(codes + start, left, BLOCK).to(tl.int32), M - 1)
    store_tile(out + start, center(code, centers + row * M, M), left, BLOCK)


def dequantize(codes: Tensor, centers: Tensor, out: Tensor) -> None:
    if not codes.numel():
        return
    m = centers.shape[-1]
    cut = rows(codes.numel(), centers.numel() // m, out.element_size(), BACKWARD_BYTES)
    _dequantize[cut.grid](
        codes, centers, out, cut.n, cut.blocks, m, cut.BLOCK, cut.groups == 1, num_warps=cut.num_warps
    )


@triton.jit
def _dequantize_backward(grad, codes, partials, n, blocks, M: tl.constexpr, BLOCK: tl.constexpr, ONE_ROW: tl.constexpr):
    _, start, left = tile_of(n, blocks, BLOCK, ONE_ROW)
    code = tl.minimum(load_tile(codes + start, left, BLOCK).to(tl.int32), M - 1)
    g = load_floats(grad + start, left, BLOCK)
    cell_partials(partials, g, code, M)


def dequantize_backward(grad: Tensor, codes: Tensor, centers: Tensor, out: Tensor) -> None:
    if not codes.numel():
        out.zero_()
        return
    m = centers.shape[-1]
    cut = rows(codes.numel(), centers.numel() // m, grad.element_size(), BACKWARD_BYTES)
    partials = new_partials(grad, cut.programs, m)
    _dequantize_backward[cut.grid](
        grad, codes, partials, cut.n, cut.blocks, m, cut.BLOCK, cut.groups == 1, num_warps=cut.num_warps
    )
    sum_partials(partials, out, cut.groups)
