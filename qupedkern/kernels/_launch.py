"""How work is cut: rows of weights into tiles of a fixed size, so that the order of every sum follows from the shape alone."""

from __future__ import annotations

from dataclasses import dataclass

import triton
from torch import Tensor

FORWARD_BYTES = 32  # of x a thread holds: two 16-byte loads in flight
BACKWARD_BYTES = 64  # in kernels that sum: longer tiles, fewer sums across threads
_WARP = 32


@dataclass(frozen=True)
class Rows:
    """G rows of n elements, each cut into tiles; program p has tile p % blocks of row p // blocks."""

    groups: int
    n: int
    blocks: int  # tiles a row
    BLOCK: int  # elements a tile, a power of two
    num_warps: int

    @property
    def programs(self) -> int:
        return self.groups * self.blocks

    @property
    def grid(self) -> tuple[int]:
        return (self.programs,)


def rows_of(x: Tensor, centers: Tensor, thread_bytes: int = FORWARD_BYTES, most_warps: int = 4) -> Rows:
    """Tiles for the elements of x, whose rows are those of centers. Rows shorter than a tile get a smaller one."""
    groups = centers.numel() // centers.shape[-1]
    return rows(x.numel(), groups, x.element_size(), thread_bytes, most_warps)


def rows(numel: int, groups: int, itemsize: int, thread_bytes: int = FORWARD_BYTES, most_warps: int = 4) -> Rows:
    n = numel // groups
    per_warp = _WARP * max(thread_bytes // itemsize, 1)
    block = max(_WARP * 16 // itemsize, min(per_warp * most_warps, triton.next_power_of_2(max(n, 1))))
    return Rows(groups, n, -(-n // block), block, max(1, block // per_warp))
