"""Many tensors in one launch: a table of pointers and a list of tiles, both int64 on the device.

The tables are made on the host and kept for the next call with the same tensors, so that a training step whose memory stays
where it is copies nothing; a graph must be captured after such a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Rows, rows_of

_ALIGNED = 16  # bytes of the widest load
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Tiles:
    """entries: int64 [tensors, fields]: pointers, then whether each scalar is one a row.

    work: int64 [programs, 4]: tensor, row, first element of the tile in the tensor, elements of the row from there on.
    lines: int64 [rows of centers, 4]: tensor, row, its first program, its number of programs.
    spans: int64 [tensors, 2]: first program of a tensor, its number of programs.
    """

    entries: Tensor
    work: Tensor
    lines: Tensor
    spans: Tensor

    @property
    def programs(self) -> int:
        return self.work.shape[0]


@dataclass(frozen=True)
class Batch:
    """Tensors that one launch can take: of one type and number of centers, cut alike, so that each has the tiles it has alone."""

    dtype: torch.dtype
    levels: int
    cut: Rows
    aligned: bool
    members: tuple[int, ...]


def batches(
    x: Sequence[Tensor], centers: Sequence[Tensor], beside: Sequence[Sequence[Tensor]], thread_bytes: int
) -> list[Batch]:
    """The tensors that have elements, in batches. beside: lists of tensors that are cut as x is."""
    found: dict[tuple[torch.dtype, int, int, bool], list[int]] = {}
    cuts = {}
    for i, (values, c) in enumerate(zip(x, centers, strict=True)):
        if values.numel():
            cut = rows_of(values, c, thread_bytes)
            whole = cut.groups == 1 or cut.n * values.element_size() % _ALIGNED == 0
            aligned = whole and all(t.data_ptr() % _ALIGNED == 0 for t in (values, *(tensors[i] for tensors in beside)))
            key = (values.dtype, c.shape[-1], cut.BLOCK, aligned)
            found.setdefault(key, []).append(i)
            cuts[key] = cut
    return [Batch(key[0], key[1], cuts[key], key[3], tuple(members)) for key, members in found.items()]


@lru_cache(maxsize=256)
def _tiles(
    pointers: tuple[tuple[int, ...], ...], shapes: tuple[tuple[int, ...], ...], BLOCK: int, device: torch.device
) -> Tiles:
    """shapes: elements, rows, and for each scalar whether there is one a row."""
    entries: list[list[int]] = []
    work: list[list[int]] = []
    lines: list[list[int]] = []
    spans: list[list[int]] = []
    for tensor, (addresses, (numel, groups, *per_row)) in enumerate(zip(pointers, shapes, strict=True)):
        n = numel // groups
        blocks = -(-n // BLOCK)
        entries.append([*addresses, *per_row])
        spans.append([len(work), groups * blocks])
        for row in range(groups):
            lines.append([tensor, row, len(work), blocks])
            work += [[tensor, row, row * n + b * BLOCK, n - b * BLOCK] for b in range(blocks)]

    def table(values: list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(device)

    return Tiles(table(entries), table(work), table(lines), table(spans))


def tiles(
    batch: Batch, columns: Sequence[Sequence[Tensor]], centers: Sequence[Tensor], scalars: Sequence[Sequence[Tensor]]
) -> Tiles:
    """The tables of a batch. columns: lists whose members' pointers become the fields of an entry, in this order; an empty list
    leaves null pointers. scalars: lists of [1] or [G]; for each a field more that says which, 0 or 1."""
    pointers = tuple(tuple(column[i].data_ptr() if column else 0 for column in columns) for i in batch.members)
    shapes = tuple(
        (
            columns[0][i].numel(),
            centers[i].numel() // batch.levels,
            *(int(bool(scalar) and scalar[i].numel() > 1) for scalar in scalars),
        )
        for i in batch.members
    )
    return _tiles(pointers, shapes, batch.cut.BLOCK, columns[0][batch.members[0]].device)


@triton.jit
def pointer(entry, FIELD: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The FIELD-th pointer of an entry."""
    found = tl.load(entry + FIELD).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def tile_of_list(work, ALIGNED: tl.constexpr):
    """tensor, row, first element of this program's tile, elements of the row from there on."""
    mine = work + tl.program_id(0).to(tl.int64) * 4
    start = tl.load(mine + 2)
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    return tl.load(mine), tl.load(mine + 1), start, tl.load(mine + 3)
