"""foreach_soft_quantize in Triton, and its gradient: the tiles of all tensors in one launch for each type and number of centers.

The formulas and tiles are those of soft_quantize, and so are the bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._launch import BACKWARD_BYTES, FORWARD_BYTES
from ._math import LOG2_E, load_floats, narrow, store_tile
from ._soft import center_gradient, combine_shape, soft_gradient, soft_value
from ._sums import new_partials
from ._tables import TYPES, batches, pointer, tile_of_list, tiles

_Tensors = list[Tensor]


@triton.jit
def _foreach_soft_quantize(
    entries, work, DTYPE: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr
):
    tensor, row, start, left = tile_of_list(work, ALIGNED)
    entry = entries + tensor * 5  # x, out, centers, sharpness, whether that is one a row
    values = load_floats(pointer(entry, 0, DTYPE, ALIGNED) + start, left, BLOCK)
    P = tl.load(pointer(entry, 3, tl.float32, False) + row * tl.load(entry + 4))
    soft = soft_value(values, pointer(entry, 2, tl.float32, False) + row * M, P * LOG2_E, M)
    store_tile(pointer(entry, 1, DTYPE, ALIGNED) + start, narrow(soft, DTYPE), left, BLOCK)


def foreach_soft_quantize(x: _Tensors, centers: _Tensors, sharpness: _Tensors, out: _Tensors) -> None:
    for batch in batches(x, centers, (out,), FORWARD_BYTES):
        table = tiles(batch, (x, out, centers, sharpness), centers, (sharpness,))
        _foreach_soft_quantize[(table.programs,)](
            table.entries, table.work, TYPES[batch.dtype], batch.levels, batch.cut.BLOCK, batch.aligned,
            num_warps=batch.cut.num_warps,
        )  # fmt: skip


@triton.jit
def _foreach_soft_quantize_backward(
    entries, work, partials, DTYPE: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr
):
    tensor, row, start, left = tile_of_list(work, ALIGNED)
    entry = entries + tensor * 7  # x, grad, grad_x, centers, sharpness, grad_centers, whether sharpness is one a row
    values = load_floats(pointer(entry, 0, DTYPE, ALIGNED) + start, left, BLOCK)
    g = load_floats(pointer(entry, 1, DTYPE, ALIGNED) + start, left, BLOCK)
    P = tl.load(pointer(entry, 4, tl.float32, False) + row * tl.load(entry + 6))
    mine = partials + tl.program_id(0).to(tl.int64) * 2 * M
    to_x = soft_gradient(values, g, pointer(entry, 3, tl.float32, False) + row * M, P, mine, M)
    store_tile(pointer(entry, 2, DTYPE, ALIGNED) + start, narrow(to_x, DTYPE), left, BLOCK)


@triton.jit
def _foreach_centers(entries, lines, partials, M: tl.constexpr, WIDTH: tl.constexpr, HEIGHT: tl.constexpr):
    line = lines + tl.program_id(0).to(tl.int64) * 4
    row = tl.load(line + 1)
    entry = entries + tl.load(line) * 7
    P = tl.load(pointer(entry, 4, tl.float32, False) + row * tl.load(entry + 6))
    c = pointer(entry, 3, tl.float32, False) + row * M
    gradient = center_gradient(partials + tl.load(line + 2) * 2 * M, c, P, tl.load(line + 3), M, WIDTH, HEIGHT)
    i = tl.arange(0, WIDTH)
    tl.store(pointer(entry, 5, tl.float32, False) + row * M + i, gradient.to(tl.float32), mask=i < M)


def foreach_soft_quantize_backward(
    grad: _Tensors, x: _Tensors, centers: _Tensors, sharpness: _Tensors, grad_x: _Tensors, grad_centers: _Tensors
) -> None:
    for values, to in zip(x, grad_centers, strict=True):
        if not values.numel():
            to.zero_()
    for batch in batches(x, centers, (grad, grad_x), BACKWARD_BYTES):
        table = tiles(batch, (x, grad, grad_x, centers, sharpness, grad_centers), centers, (sharpness,))
        partials = new_partials(x[0], table.programs, 2 * batch.levels)
        _foreach_soft_quantize_backward[(table.programs,)](
            table.entries, table.work, partials, TYPES[batch.dtype], batch.levels, batch.cut.BLOCK, batch.aligned,
            num_warps=batch.cut.num_warps,
        )  # fmt: skip
        _foreach_centers[(table.lines.shape[0],)](
            table.entries, table.lines, partials, batch.levels, *combine_shape(batch.levels), num_warps=4
        )
