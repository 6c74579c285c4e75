"""Second kernels of sums: each program of the first left its partial sums, these add them in the order of the programs.

No atomics, so the bits of a sum follow from the shape alone. Partials are float32 [programs, columns], those of a row of
centers in a run; they are added in float64, which costs nothing beside the first kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._math import IN_REGISTERS, narrow

_TILE = 2048  # partials read at once


def new_partials(like: Tensor, programs: int, columns: int) -> Tensor:
    return torch.empty((programs, columns), dtype=torch.float32, device=like.device)


@triton.jit
def _sum_partials(partials, out, blocks, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, HEIGHT: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float64)
    for first in range(0, blocks, HEIGHT):
        block = first + tl.arange(0, HEIGHT)
        at = (row * blocks + block[:, None]) * COLUMNS + column[None, :]
        here = (block[:, None] < blocks) & (column[None, :] < COLUMNS)
        total += tl.sum(tl.load(partials + at, mask=here, other=0.0).to(tl.float64), axis=0)
    value = narrow(total.to(tl.float32), out.dtype.element_ty)
    tl.store(out + row * COLUMNS + column, value, mask=column < COLUMNS)


def sum_partials(partials: Tensor, out: Tensor, groups: int) -> None:
    """out[r, k] = sum of partials[program, k] over the programs of row r, rounded once to the type of out."""
    programs, columns = partials.shape
    width = min(triton.next_power_of_2(columns), 32)
    grid = (groups, -(-columns // width))
    _sum_partials[grid](partials, out, programs // groups, columns, width, _TILE // width, num_warps=4)


@triton.jit
def cell_partials(partials, values, code, M: tl.constexpr):
    """Leave this program's sum of values over each code: partials[program, k], k < M."""
    mine = partials + tl.program_id(0).to(tl.int64) * M
    if M <= IN_REGISTERS:
        for k in tl.static_range(M):
            tl.store(mine + k, tl.sum(tl.where(code == k, values, 0.0)))
    else:
        for k in range(M):
            tl.store(mine + k, tl.sum(tl.where(code == k, values, 0.0)))
