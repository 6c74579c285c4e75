"""prox_centers in Triton. "counted" and l2: one pass that counts members and adds their gaps, then a program a row of centers.

Exact l1 is a selection in each cell, by the bits of the floats: v(D) = mu + t (n - 2 D) falls with the number D of members below
a value y, so the largest y with v(D(y)) > y is found digit by digit from the top. A level reads x once and counts the next
digit of the members that share the digits found; counters are integers, so adding them atomically gives the same bits in any
order. Three levels for two centers, four up to sixteen: bound by memory and the search for the cell. Nothing is sorted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import BACKWARD_BYTES, rows
from ._math import center, code_of, load_floats, narrow, tile_of
from ._sums import cell_partials, new_partials, sum_partials

# Counters a row of centers: cells times digits. A warp of tl.histogram keeps them in registers; 4096 spill on sm_80.
_BINS = 2048
_MOST_ROWS = 16384  # whose counters stay below 256 MiB
_THREAD_BYTES = 64  # of x: a tile long enough to be worth its counters
_LOWEST = tl.constexpr(0x007FFFFF)  # the key of minus infinity


@triton.jit
def _key(value):
    """uint32 that rises with a float32; NaN last, both zeros the same."""
    bits = (value + 0.0).to(tl.uint32, bitcast=True)
    key = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(value == value, key, 0xFFFFFFFF)


@triton.jit
def _value(key):
    bits = tl.where((key >> 31) != 0, key & 0x7FFFFFFF, key ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _add_counts(counters, index, here, BINS: tl.constexpr):
    """Integers: the same totals in whatever order the programs come."""
    counted = tl.histogram(index, BINS, mask=here)
    tl.atomic_add(counters + tl.arange(0, BINS), counted, mask=counted != 0, sem="relaxed")


@triton.jit
def _count_digits(
    x, at, prefixes, counters, n, blocks, SHIFT: tl.constexpr, DIGIT: tl.constexpr, FIRST: tl.constexpr, M: tl.constexpr,
    BINS: tl.constexpr, BLOCK: tl.constexpr, ONE_ROW: tl.constexpr,
):  # fmt: skip
    row, start, left = tile_of(n, blocks, BLOCK, ONE_ROW)
    values = load_floats(x + start, left, BLOCK)
    code = code_of(values, at + row * M, M)
    key = _key(values)
    here = tl.arange(0, BLOCK) < left
    if not FIRST:
        here = here & ((key >> (SHIFT + DIGIT)) == tl.load(prefixes + row * M + code).to(tl.uint32, bitcast=True))
    digit = (key >> SHIFT).to(tl.int32) & ((1 << DIGIT) - 1)
    # int64 before the multiply: rows times counters pass 2^31
    _add_counts(counters + row.to(tl.int64) * BINS if not ONE_ROW else counters, (code << DIGIT) + digit, here, BINS)


@triton.jit
def _choose_digit(
    centers, strength, prefixes, ranks, members, counters, out, SHIFT: tl.constexpr, DIGIT: tl.constexpr,
    FIRST: tl.constexpr, PER_ROW: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """The next digit of every cell of a row of centers; behind the last one, the new centers."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, WIDTH)
    here = i < M
    digits = tl.arange(0, 1 << DIGIT)[None, :]
    place = counters + row * BINS + (i[:, None] << DIGIT) + digits
    count = tl.load(place)
    tl.store(place, tl.zeros_like(count))  # for the next level
    if FIRST:
        n, rank = tl.sum(count, axis=1), tl.zeros([WIDTH], tl.int32)
        prefix = tl.zeros([WIDTH], tl.uint32)
        tl.store(members + row * M + i, n, mask=here)
    else:
        n = tl.load(members + row * M + i, mask=here, other=0)
        rank = tl.load(ranks + row * M + i, mask=here, other=0)
        prefix = tl.load(prefixes + row * M + i, mask=here, other=0).to(tl.uint32, bitcast=True)
    mu = tl.load(centers + row * M + i, mask=here, other=0.0)
    t = tl.load(strength + row) if PER_ROW else tl.load(strength)
    below = tl.cumsum(count, axis=1) - count
    edge = ((prefix[:, None] << DIGIT) | digits.to(tl.uint32)) << SHIFT
    pull = mu[:, None] + t * (n[:, None] - 2 * (rank[:, None] + below)).to(tl.float32)
    holds = (edge <= _LOWEST) | (pull > _value(edge))
    chosen = tl.sum(holds.to(tl.int32), axis=1) - 1
    own = digits == chosen[:, None]
    prefix = (prefix << DIGIT) | chosen.to(tl.uint32)
    rank += tl.sum(tl.where(own, below, 0), axis=1)
    if SHIFT > 0:
        tl.store(prefixes + row * M + i, prefix.to(tl.int32, bitcast=True), mask=here)
        tl.store(ranks + row * M + i, rank, mask=here)
    else:
        kink = _value(prefix)
        equal = tl.sum(tl.where(own, count, 0), axis=1)
        # Of the members equal to the kink, the first `passed` still pull it up.
        passed = tl.zeros([WIDTH], tl.int32)
        for step in tl.static_range(31):
            more = passed + (1 << (30 - step))
            fits = (more <= equal) & (more > 0)
            still = mu + t * (n - 2 * (rank + more - 1)).to(tl.float32) > kink
            passed = tl.where(fits & still, more, passed)
        moved = mu + t * (n - 2 * (rank + passed)).to(tl.float32)
        moved = tl.where((passed > 0) & (kink > moved), kink, moved)
        moved = tl.sort(tl.where(here, moved, float("inf")))
        tl.store(out + row * M + i, narrow(moved, out.dtype.element_ty), mask=here)


def _exact(centers: Tensor, x: Tensor, strength: Tensor, at: Tensor, out: Tensor) -> None:
    m = centers.shape[-1]
    width = triton.next_power_of_2(m)
    levels = -(-32 // ((_BINS // width).bit_length() - 1))
    digit = -(-32 // levels)  # bits of a level, the last of which may have fewer
    bins = width << digit
    cut = rows(x.numel(), centers.numel() // m, 4, _THREAD_BYTES, 8)
    counters = torch.zeros((cut.groups, bins), dtype=torch.int32, device=x.device)
    state = torch.empty((3, cut.groups, m), dtype=torch.int32, device=x.device)
    prefixes, ranks, members = state
    for level in range(levels):
        bits = min(digit, 32 - level * digit)
        shift = 32 - level * digit - bits
        if cut.n:
            _count_digits[cut.grid](
                x, at, prefixes, counters, cut.n, cut.blocks, shift, bits, level == 0, m, bins, cut.BLOCK,
                cut.groups == 1, num_warps=cut.num_warps, enable_fp_fusion=False,
            )  # fmt: skip
        _choose_digit[(cut.groups,)](
            centers, strength, prefixes, ranks, members, counters, out, shift, bits, level == 0, strength.numel() > 1,
            m, width, bins, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit
def _count_members(
    x, at, centers, partials, counters, n, blocks, L2: tl.constexpr, M: tl.constexpr, BINS: tl.constexpr,
    BLOCK: tl.constexpr, ONE_ROW: tl.constexpr,
):  # fmt: skip
    """Counters (cell, side of its center), and for l2 the sums of x - mu by cell."""
    row, start, left = tile_of(n, blocks, BLOCK, ONE_ROW)
    values = load_floats(x + start, left, BLOCK)
    code = code_of(values, at + row * M, M)
    here = tl.arange(0, BLOCK) < left
    if L2:
        side = tl.zeros_like(code)
        gap = values - center(code, centers + row * M, M)
        cell_partials(partials, tl.where(here, gap, 0.0), code, M)
    else:
        own = center(code, at + row * M, M)
        side = tl.where(values > own, 1, tl.where(values < own, 2, 0))
    _add_counts(counters + row.to(tl.int64) * BINS if not ONE_ROW else counters, code * 4 + side, here, BINS)


@triton.jit
def _move_centers(
    centers, strength, sums, counters, out, METHOD: tl.constexpr, PER_ROW: tl.constexpr, M: tl.constexpr,
    WIDTH: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, WIDTH)
    here = i < M
    mu = tl.load(centers + row * M + i, mask=here, other=0.0)
    t = tl.load(strength + row) if PER_ROW else tl.load(strength)
    mine = counters + row * BINS + i * 4
    if METHOD == "l2":
        n = tl.load(mine, mask=here, other=0).to(tl.float32)
        total = tl.load(sums + row * M + i, mask=here, other=0.0)
        moved = mu + tl.div_rn(total, tl.div_rn(0.5, t) + tl.maximum(n, 1.0))
    else:
        surplus = tl.load(mine + 1, mask=here, other=0) - tl.load(mine + 2, mask=here, other=0)
        step = t * surplus.to(tl.float32)
        moved = mu + step if METHOD == "counted" else mu - step
    moved = tl.sort(tl.where(here, moved, float("inf")))
    tl.store(out + row * M + i, narrow(moved, out.dtype.element_ty), mask=here)


def prox_centers(
    centers: Tensor, x: Tensor, strength: Tensor, norm: str, method: str, at: Tensor | None, out: Tensor
) -> None:
    at = centers if at is None else at
    if norm == "l1" and method == "exact":
        _exact(centers, x, strength, at, out)
        return
    m, l2 = centers.shape[-1], norm == "l2"
    cut = rows(x.numel(), centers.numel() // m, x.element_size(), BACKWARD_BYTES)
    width = triton.next_power_of_2(m)
    counters = torch.zeros((cut.groups, 4 * width), dtype=torch.int32, device=x.device)
    partials, sums = (new_partials(x, count, m if l2 else 0) for count in (cut.programs, cut.groups))
    if cut.n:
        _count_members[cut.grid](
            x, at, centers, partials, counters, cut.n, cut.blocks, l2, m, 4 * width, cut.BLOCK, cut.groups == 1,
            num_warps=cut.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    if l2:
        sum_partials(partials, sums, cut.groups)
    _move_centers[(cut.groups,)](
        centers, strength, sums, counters, out, "l2" if l2 else method, strength.numel() > 1, m, max(width, 2),
        4 * width, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip


def prox_centers_unsupported(
    centers: Tensor, x: Tensor, strength: Tensor, norm: str, method: str, at: Tensor | None
) -> str | None:
    groups = centers.numel() // centers.shape[-1]
    if x.numel() // max(groups, 1) >= 2**31:
        return "rows of 2**31 weights and more are left to eager, whose counters are wider"
    if norm == "l1" and method == "exact" and groups > _MOST_ROWS:
        return (
            f"the exact method with more than {_MOST_ROWS} rows of centers is left to eager, which sorts, got {groups}"
        )
    return None
