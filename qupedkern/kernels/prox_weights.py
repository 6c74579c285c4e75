"""prox_weights in Triton: the nearest center and a pull toward it. Reads and writes x once; bound by memory for m <= 4, by the
search for the cell beyond. The operations and their order are eager's, without contraction: the same bits."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._launch import rows_of
from ._math import load_floats, narrow, nearest, prox, store_tile, tile_of


@triton.jit
def _prox_weights(
    x, centers, strength, out, n, blocks,
    L1: tl.constexpr, PER_ROW: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, ONE_ROW: tl.constexpr,
):  # fmt: skip
    row, start, left = tile_of(n, blocks, BLOCK, ONE_ROW)
    y = load_floats(x + start, left, BLOCK)
    t = tl.load(strength + row) if PER_ROW else tl.load(strength)
    moved = prox(y, nearest(y, centers + row * M, M), t, L1)
    store_tile(out + start, narrow(moved, out.dtype.element_ty), left, BLOCK)


def prox_weights(x: Tensor, centers: Tensor, strength: Tensor, norm: str, out: Tensor) -> None:
    if not x.numel():
        return
    cut = rows_of(x, centers)
    _prox_weights[cut.grid](
        x, centers, strength, out, cut.n, cut.blocks, norm == "l1", strength.numel() > 1, centers.shape[-1], cut.BLOCK,
        cut.groups == 1, num_warps=cut.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
