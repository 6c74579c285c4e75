"""quped_step in Triton: gradients, optimizer, prox, codes and statistics of every weight of all tensors, in one launch.

Reads x, its gradients and the optimizer's state, writes x, state and codes: bound by memory for m <= 4, by the cells and the
counters beyond. Each tile leaves a histogram of (code, side of its center) and its partial sums; a second kernel adds those of
a row of centers in order, a third the distances of a tensor. The operations are eager's, without contraction.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._bits import pack
from ._launch import BACKWARD_BYTES
from ._math import center, code_of, load_tile, nearest, prox, store_tile
from ._optimizers import adam, sgd
from ._soft import center_gradient, column_totals, combine_shape, soft_gradient
from ._sums import cell_partials, new_partials
from ._tables import batches, pointer, tile_of_list, tiles

_Tensors = list[Tensor]
# x, grad, quantized_grad, first, second, codes, centers, sharpness, strength, center_grad, counts, sums, distance; then
# whether sharpness and strength are one a row.
_FIELDS = 15


@triton.jit
def _quped_step(
    entries, work, histograms, center_partials, sum_partials, distances,
    rate, decay, beta1, weight1, beta2, weight2, root, eps, shrink,
    CHAIN: tl.constexpr, HAS_GRAD: tl.constexpr, ADAM: tl.constexpr, DECAY: tl.constexpr, DECOUPLED: tl.constexpr,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, FIRST_STEP: tl.constexpr, L1: tl.constexpr, CLAMP: tl.constexpr,
    CODES: tl.constexpr, M: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
    FIELDS: tl.constexpr,
):  # fmt: skip
    tensor, row, start, left = tile_of_list(work, ALIGNED)
    entry = entries + tensor * FIELDS
    program = tl.program_id(0).to(tl.int64)
    inside = tl.arange(0, BLOCK) < left
    c = pointer(entry, 6, tl.float32, False) + row * M
    at = pointer(entry, 0, tl.float32, ALIGNED) + start
    x = load_tile(at, left, BLOCK)
    if CHAIN == "none":
        g = load_tile(pointer(entry, 1, tl.float32, ALIGNED) + start, left, BLOCK)
    else:
        through = load_tile(pointer(entry, 2, tl.float32, ALIGNED) + start, left, BLOCK)
        if CHAIN == "soft":
            P = tl.load(pointer(entry, 7, tl.float32, False) + row * tl.load(entry + 13))
            through = soft_gradient(x, through, c, P, center_partials + program * 2 * M, M)
        else:
            cell_partials(center_partials, through, code_of(x, c, M), M)
        g = through
        if HAS_GRAD:
            g = load_tile(pointer(entry, 1, tl.float32, ALIGNED) + start, left, BLOCK)
            if CHAIN != "hard":
                g += through
    first = pointer(entry, 3, tl.float32, ALIGNED) + start
    if ADAM:
        second = pointer(entry, 4, tl.float32, ALIGNED) + start
        y, moment, square = adam(
            x, g, load_tile(first, left, BLOCK), load_tile(second, left, BLOCK), rate, decay, beta1, weight1, beta2,
            weight2, root, eps, shrink, DECAY, DECOUPLED,
        )  # fmt: skip
        store_tile(first, moment, left, BLOCK)
        store_tile(second, square, left, BLOCK)
    else:
        old = load_tile(first, left, BLOCK) if MOMENTUM and not FIRST_STEP else g
        y, moment = sgd(x, g, old, rate, decay, beta1, weight2, DECAY, MOMENTUM, NESTEROV, FIRST_STEP)
        if MOMENTUM:
            store_tile(first, moment, left, BLOCK)
    t = tl.load(pointer(entry, 8, tl.float32, False) + row * tl.load(entry + 14))
    moved = prox(y, nearest(y, c, M), t, L1)
    if CLAMP:
        moved = tl.where(moved > 1.0, 1.0, tl.where(moved < -1.0, -1.0, moved))
    store_tile(at, moved, left, BLOCK)
    code = code_of(moved, c, M)
    own = center(code, c, M)
    gap = moved - own
    side = tl.where(moved > own, 1, tl.where(moved < own, 2, 0))
    counted = tl.histogram(
        tl.where(inside, code * 3 + side, BINS - 1), BINS
    )  # 3 M < BINS: the last bin is for what is not there
    tl.store(histograms + program * BINS + tl.arange(0, BINS), counted)
    tl.store(distances + program, tl.sum(tl.where(inside, tl.abs(gap) if L1 else gap * gap, 0.0)))
    if not L1:
        cell_partials(sum_partials, tl.where(inside, gap, 0.0), code, M)
    if CODES:
        store_tile(pointer(entry, 5, tl.uint8, ALIGNED) + start, code.to(tl.uint8), left, BLOCK)


@triton.jit
def _counted(histograms, blocks, at, here, BINS: tl.constexpr, WIDTH: tl.constexpr, HEIGHT: tl.constexpr):
    """int64 [WIDTH]: the sum over blocks of bin at[k]."""
    found = tl.zeros([WIDTH], tl.int64)
    for first in range(0, blocks, HEIGHT):
        block = (first + tl.arange(0, HEIGHT)).to(tl.int64)
        mask = (block[:, None] < blocks) & here[None, :]
        found += tl.sum(tl.load(histograms + block[:, None] * BINS + at[None, :], mask=mask, other=0).to(tl.int64), 0)
    return found


@triton.jit
def _quped_rows(
    entries, lines, histograms, center_partials, sum_partials, CHAIN: tl.constexpr, L1: tl.constexpr, M: tl.constexpr,
    BINS: tl.constexpr, WIDTH: tl.constexpr, HEIGHT: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    line = lines + tl.program_id(0).to(tl.int64) * 4
    row, program, blocks = tl.load(line + 1), tl.load(line + 2), tl.load(line + 3)
    entry = entries + tl.load(line) * FIELDS
    i = tl.arange(0, WIDTH)
    here = i < M
    mine = histograms + program * BINS
    above = _counted(mine, blocks, 3 * i + 1, here, BINS, WIDTH, HEIGHT)
    below = _counted(mine, blocks, 3 * i + 2, here, BINS, WIDTH, HEIGHT)
    members = _counted(mine, blocks, 3 * i, here, BINS, WIDTH, HEIGHT) + above + below
    counts = pointer(entry, 10, tl.int64, False) + row * 3 * M + i
    tl.store(counts, members, mask=here)
    tl.store(counts + M, above, mask=here)
    tl.store(counts + 2 * M, below, mask=here)
    if not L1:
        sums = column_totals(sum_partials + program * M, blocks, i, here, M, WIDTH, HEIGHT)
        tl.store(pointer(entry, 11, tl.float32, False) + row * M + i, sums.to(tl.float32), mask=here)
    if CHAIN != "none":
        if CHAIN == "soft":
            P = tl.load(pointer(entry, 7, tl.float32, False) + row * tl.load(entry + 13))
            c = pointer(entry, 6, tl.float32, False) + row * M
            gradient = center_gradient(center_partials + program * 2 * M, c, P, blocks, M, WIDTH, HEIGHT)
        else:
            gradient = column_totals(center_partials + program * M, blocks, i, here, M, WIDTH, HEIGHT)
        tl.store(pointer(entry, 9, tl.float32, False) + row * M + i, gradient.to(tl.float32), mask=here)


@triton.jit
def _quped_distances(entries, spans, distances, BLOCK: tl.constexpr, FIELDS: tl.constexpr):
    tensor = tl.program_id(0).to(tl.int64)
    program, count = tl.load(spans + tensor * 2), tl.load(spans + tensor * 2 + 1)
    found = tl.zeros([BLOCK], tl.float64)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        found += tl.load(distances + program + i, mask=i < count, other=0.0).to(tl.float64)
    tl.store(pointer(entries + tensor * FIELDS, 12, tl.float32, False), tl.sum(found).to(tl.float32))


def quped_step(
    x: _Tensors, grad: _Tensors, quantized_grad: _Tensors, first: _Tensors, second: _Tensors, centers: _Tensors,
    sharpness: _Tensors, strength: _Tensors, chain: str, optimizer: str, norm: str, lr: float, weight_decay: float,
    beta1: float, beta2: float, eps: float, nesterov: bool, step: int, clamp: bool, codes: bool, pack_bits: int,
    center_grad: _Tensors, counts: _Tensors, sums: _Tensors, distance: Tensor, coded: _Tensors,
) -> None:  # fmt: skip
    for i, weights in enumerate(x):
        if not weights.numel():
            for outputs in (center_grad, counts, sums):
                if outputs:
                    outputs[i].zero_()
            distance[i].zero_()
    plain = [torch.empty(v.shape, dtype=torch.uint8, device=v.device) for v in x] if pack_bits and codes else coded
    adaptive = optimizer != "sgd"
    # As torch's optimizers: in float64, rounded once. SGD's beta2 is its dampening.
    numbers = (
        -lr / (1 - beta1**step) if adaptive else -lr, weight_decay, beta1, 1 - beta1, beta2, 1 - beta2,
        (1 - beta2**step) ** 0.5 if adaptive else 1.0, eps, 1 - lr * weight_decay,
    )  # fmt: skip
    l1 = norm == "l1"
    beside = [tensors for tensors in (grad, quantized_grad, first, second, plain) if tensors]
    scalars = [distance[i : i + 1] for i in range(len(x))]
    for batch in batches(x, centers, beside, BACKWARD_BYTES):
        columns = (x, grad, quantized_grad, first, second, plain, centers, sharpness, strength)
        table = tiles(batch, (*columns, center_grad, counts, sums, scalars), centers, (sharpness, strength))
        m, programs = batch.levels, table.programs
        bins = triton.next_power_of_2(3 * m + 1)
        histograms = torch.empty((programs, bins), dtype=torch.int32, device=x[0].device)
        center_partials = new_partials(x[0], programs, {"none": 0, "soft": 2 * m}.get(chain, m))
        sum_partials, distances = new_partials(x[0], programs, 0 if l1 else m), new_partials(x[0], programs, 1)
        _quped_step[(programs,)](
            table.entries, table.work, histograms, center_partials, sum_partials, distances, *numbers, chain, bool(grad),
            adaptive, weight_decay != 0, optimizer == "adamw", bool(first), nesterov, step == 1, l1, clamp, codes, m, bins,
            batch.cut.BLOCK, batch.aligned, _FIELDS, num_warps=batch.cut.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
        _quped_rows[(table.lines.shape[0],)](
            table.entries, table.lines, histograms, center_partials, sum_partials, chain, l1, m, bins, *combine_shape(m),
            _FIELDS, num_warps=4,
        )  # fmt: skip
        _quped_distances[(table.spans.shape[0],)](table.entries, table.spans, distances, 1024, _FIELDS, num_warps=4)
    if pack_bits and codes:
        for index, packed in zip(plain, coded, strict=True):
            pack(index, pack_bits, packed)


def quped_step_unsupported(x: _Tensors, *rest: Any) -> str | None:
    for weights in x:
        if weights.dtype != torch.float32:
            return f"weights must be float32, got {weights.dtype}"
    return None
