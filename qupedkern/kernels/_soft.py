"""S and its gradient on tiles, shared by soft_quantize, its list form and the weight step."""

from __future__ import annotations

import triton
import triton.language as tl

from ._math import IN_REGISTERS, LOG2_E, midpoint, sigmoid, sigmoid_and_density


@triton.jit
def soft_value(values, c, k, M: tl.constexpr):
    """S of float32 values; k = P log2 e, so that the sigmoid's exponential is a power of two."""
    first = tl.load(c)
    below = first
    soft = tl.zeros(values.shape, tl.float32) + first
    if M <= IN_REGISTERS:
        for j in tl.static_range(1, M):
            above = tl.load(c + j)
            soft += (above - below) * sigmoid(k * (values - midpoint(below, above)))
            below = above
    else:
        for j in range(1, M):
            above = tl.load(c + j)
            soft += (above - below) * sigmoid(k * (values - midpoint(below, above)))
            below = above
    # Exact in real numbers; in floats the sum can pass the ends. min and max drop a NaN on hardware.
    clamped = tl.minimum(tl.maximum(soft, first), below)
    return tl.where(soft == soft, clamped, soft)


@triton.jit
def _midpoint_terms(values, g, slope, below, above, k, mine, j, M: tl.constexpr):
    """One midpoint's part of the slope d S / d x / P; its two sums are stored as partials j and M + j."""
    s, h = sigmoid_and_density(k * (values - midpoint(below, above)))
    tl.store(mine + j, tl.sum(g * s))
    tl.store(mine + M + j, tl.sum(g * h))
    return slope + (above - below) * h


@triton.jit
def soft_gradient(values, g, c, P, mine, M: tl.constexpr):
    """Gradient for x of a tile; leaves [A_1 .. A_m, B_1 .. B_m] at `mine`, A_1 = sum g and B_1 unused. g is 0 past the row."""
    k = P * LOG2_E
    tl.store(mine, tl.sum(g))
    slope = tl.zeros(values.shape, tl.float32)
    below = tl.load(c)
    if M <= IN_REGISTERS:
        for j in tl.static_range(1, M):
            above = tl.load(c + j)
            slope = _midpoint_terms(values, g, slope, below, above, k, mine, j, M)
            below = above
    else:
        for j in range(1, M):
            above = tl.load(c + j)
            slope = _midpoint_terms(values, g, slope, below, above, k, mine, j, M)
            below = above
    return g * P * slope


@triton.jit
def column_totals(partials, blocks, at, here, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, HEIGHT: tl.constexpr):
    """float64 [WIDTH]: the sum over blocks of column at[k], 0 where k is not here."""
    found = tl.zeros([WIDTH], tl.float64)
    for first in range(0, blocks, HEIGHT):
        block = (first + tl.arange(0, HEIGHT)).to(tl.int64)
        mask = (block[:, None] < blocks) & here[None, :]
        found += tl.sum(
            tl.load(partials + block[:, None] * COLUMNS + at[None, :], mask=mask, other=0.0).to(tl.float64), 0
        )
    return found


@triton.jit
def center_gradient(partials, c, P, blocks, M: tl.constexpr, WIDTH: tl.constexpr, HEIGHT: tl.constexpr):
    """float64 [WIDTH >= M]: A_k - A_{k+1} - (P/2)(d_k B_k + d_{k+1} B_{k+1}) of one row's partials [blocks, 2 M]."""
    i = tl.arange(0, WIDTH)
    inner = (i > 0) & (i < M)
    last = i + 1 < M
    rising = column_totals(partials, blocks, i, i < M, 2 * M, WIDTH, HEIGHT)
    rising_next = column_totals(partials, blocks, i + 1, last, 2 * M, WIDTH, HEIGHT)
    bump = column_totals(partials, blocks, M + i, inner, 2 * M, WIDTH, HEIGHT)
    bump_next = column_totals(partials, blocks, M + i + 1, last, 2 * M, WIDTH, HEIGHT)
    own = tl.load(c + i, mask=i < M, other=0.0).to(tl.float64)
    d = tl.where(inner, own - tl.load(c + i - 1, mask=inner, other=0.0).to(tl.float64), 0.0)
    d_next = tl.where(last, tl.load(c + i + 1, mask=last, other=0.0).to(tl.float64) - own, 0.0)
    return rising - rising_next - 0.5 * P.to(tl.float64) * (d * bump + d_next * bump_next)


def combine_shape(levels: int) -> tuple[int, int]:
    """WIDTH, HEIGHT of the tiles in which partials are added."""
    width = triton.next_power_of_2(levels)
    return width, max(1, 512 // width)
