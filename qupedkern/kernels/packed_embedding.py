"""packed_embedding in Triton, and its gradient. Forward: a program a row looked up and block of it; reads the bytes of those rows,
writes values: bound by memory. Indices outside the table are clamped.

Backward: with one row of centers a partial sum a code and tile of grad. With more, each row looked up leaves a partial sum for
each code of each row of centers it meets; a second kernel adds those of a row of centers in the order of the indices, and equal
ones in the order of the lookups, found by a stable sort.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._bits import code_at
from ._launch import BACKWARD_BYTES, rows
from ._math import narrow, widen
from ._sums import cell_partials, new_partials, sum_partials

_BLOCK = 1024  # values a program, at most
_TILE = 2048  # partials read at once


@triton.jit
def _packed_embedding(
    indices, packed, centers, out, count, width, blocks, length, total,
    BITS: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, ONE_ROW: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    lookup = (program // blocks).to(tl.int64)
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    here = column < width
    index = tl.minimum(tl.maximum(tl.load(indices + lookup), 0), count - 1)
    place = index * width + column
    code = tl.minimum(code_at(packed, place, here, total, BITS), M - 1)
    at = code if ONE_ROW else place // length * M + code
    tl.store(out + lookup * width + column, tl.load(centers + at, mask=here), mask=here)


def packed_embedding(
    indices: Tensor, packed: Tensor, centers: Tensor, bits: int, shape: list[int], out: Tensor
) -> None:
    if not out.numel():
        return
    (count, width), m = shape, centers.shape[-1]
    groups = centers.numel() // m
    block = min(triton.next_power_of_2(width), _BLOCK)
    blocks = -(-width // block)
    _packed_embedding[(indices.numel() * blocks,)](
        indices, packed, centers, out, count, width, blocks, count * width // groups, packed.numel(), bits, m, block,
        groups == 1, num_warps=max(1, block // 256),
    )  # fmt: skip


@triton.jit
def _packed_embedding_backward(
    grad,
    indices,
    packed,
    partials,
    numel,
    count,
    width,
    total,
    BITS: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of centers: tiles of grad as it lies."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = i < numel
    index = tl.minimum(tl.maximum(tl.load(indices + i // width, mask=here, other=0), 0), count - 1)
    code = tl.minimum(code_at(packed, index * width + i % width, here, total, BITS), M - 1)
    cell_partials(partials, widen(tl.load(grad + i, mask=here, other=0.0)), code, M)


@triton.jit
def _lookup_partials(
    grad, indices, packed, partials, count, width, pieces, length, total,
    BITS: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row looked up, cut where rows of centers begin: the sums over each code of one piece."""
    program = tl.program_id(0).to(tl.int64)
    lookup, piece = program // pieces, program % pieces
    index = tl.minimum(tl.maximum(tl.load(indices + lookup), 0), count - 1)
    start = index * width
    line = start // length + piece  # the piece's row of centers
    first = tl.maximum(line * length - start, 0)
    last = tl.minimum((line + 1) * length - start, width)
    k = tl.arange(0, WIDTH)
    sums = tl.zeros([WIDTH], tl.float32)
    for begin in range(first, last, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        here = column < last
        code = tl.minimum(code_at(packed, start + column, here, total, BITS), M - 1)
        g = widen(tl.load(grad + lookup * width + column, mask=here, other=0.0))
        for j in range(M):
            sums += tl.where(k == j, tl.sum(tl.where(code == j, g, 0.0)), 0.0)
    tl.store(partials + program * M + k, sums, mask=k < M)


@triton.jit
def _add_lookups(
    partials, order, ordered, starts, ends, out, width, pieces, length,
    M: tl.constexpr, WIDTH: tl.constexpr, HEIGHT: tl.constexpr,
):  # fmt: skip
    """The sums of one row of centers: the pieces of the lookups starts..ends in the order of their indices."""
    line = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float64)
    end = tl.load(ends + line)
    for first in range(tl.load(starts + line), end, HEIGHT):
        at = first + tl.arange(0, HEIGHT)
        here = at < end
        lookup = tl.load(order + at, mask=here, other=0)
        piece = line - tl.load(ordered + at, mask=here, other=0) * width // length
        place = (lookup * pieces + piece)[:, None] * M + k[None, :]
        total += tl.sum(
            tl.load(partials + place, mask=here[:, None] & (k < M)[None, :], other=0.0).to(tl.float64), axis=0
        )
    tl.store(out + line * M + k, narrow(total.to(tl.float32), out.dtype.element_ty), mask=k < M)


def packed_embedding_backward(
    grad: Tensor, indices: Tensor, packed: Tensor, centers: Tensor, bits: int, shape: list[int], out: Tensor
) -> None:
    if not grad.numel():
        out.zero_()
        return
    (count, width), m = shape, centers.shape[-1]
    groups = centers.numel() // m
    if groups == 1:
        cut = rows(grad.numel(), 1, grad.element_size(), BACKWARD_BYTES)
        partials = new_partials(grad, cut.programs, m)
        _packed_embedding_backward[cut.grid](
            grad, indices, packed, partials, grad.numel(), count, width, packed.numel(), bits, m, cut.BLOCK,
            num_warps=cut.num_warps,
        )  # fmt: skip
        sum_partials(partials, out, 1)
        return
    length = count * width // groups
    pieces = (width + length - 2) // length + 1  # rows of centers that a row of the table can meet
    columns = triton.next_power_of_2(m)
    partials = new_partials(grad, indices.numel() * pieces, m)
    _lookup_partials[(len(partials),)](
        grad, indices, packed, partials, count, width, pieces, length, packed.numel(), bits, m, columns,
        min(triton.next_power_of_2(min(width, length)), _BLOCK), num_warps=4,
    )  # fmt: skip
    ordered, order = indices.flatten().clamp(0, count - 1).sort(stable=True)
    lines = torch.arange(groups, device=indices.device)
    first, last = lines * length // width, ((lines + 1) * length - 1) // width  # rows of the table with values of each
    _add_lookups[(groups,)](
        partials, order, ordered, torch.searchsorted(ordered, first), torch.searchsorted(ordered, last, right=True),
        out, width, pieces, length, m, columns, max(1, _TILE // columns), num_warps=4,
    )  # fmt: skip
