"""assign in Triton. A program a tile, centers in registers up to m = 16. Reads x, writes a byte: bound by memory for m <= 4,
by the two comparisons and selections a center beyond."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._launch import rows_of
from ._math import code_of, load_floats, store_tile, tile_of


@triton.jit
def _assign(x, centers, out, n, blocks, M: tl.constexpr, BLOCK: tl.constexpr, ONE_ROW: tl.constexpr):
    row, start, left = tile_of(n, blocks, BLOCK, ONE_ROW)
    values = load_floats(x + start, left, BLOCK)
    code = code_of(values, centers + row * M, M)
    store_tile(out + start, code.to(tl.uint8), left, BLOCK)


def assign(x: Tensor, centers: Tensor, out: Tensor) -> None:
    if not x.numel():
        return
    cut = rows_of(x, centers)
    _assign[cut.grid](
        x, centers, out, cut.n, cut.blocks, centers.shape[-1], cut.BLOCK, cut.groups == 1,
        num_warps=cut.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
