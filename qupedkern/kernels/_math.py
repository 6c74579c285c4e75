"""Device functions shared by kernels: tiles of rows, cells and nearest centers, the sigmoid, rounding. Forward and backward alike.

`c` is a pointer to the row's M centers, ascending. Up to IN_REGISTERS of them are held in registers, compared one by one;
more are searched in memory, in cache after the first tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

IN_REGISTERS = tl.constexpr(16)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _probe():
    pass


INTERPRETED = tl.constexpr(not isinstance(_probe, triton.runtime.JITFunction))


@triton.jit
def tile_of(n, blocks, BLOCK: tl.constexpr, ONE_ROW: tl.constexpr):
    """row, first element of this program's tile in the whole tensor, elements of the row from there on."""
    program = tl.program_id(0)
    if ONE_ROW:
        start = program.to(tl.int64) * BLOCK
        return 0, start, n - start
    row = program // blocks
    start = (program % blocks).to(tl.int64) * BLOCK
    return row, row.to(tl.int64) * n + start, n - start


@triton.jit
def load_tile(pointer, left, BLOCK: tl.constexpr):
    """[BLOCK] elements from pointer on, 0 past the `left` that exist. A full tile needs no mask, so its loads are wide."""
    i = tl.arange(0, BLOCK)
    if left >= BLOCK:
        values = tl.load(pointer + i)
    else:
        values = tl.load(pointer + i, mask=i < left, other=0)
    return values


@triton.jit
def store_tile(pointer, values, left, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    if left >= BLOCK:
        tl.store(pointer + i, values)
    else:
        tl.store(pointer + i, values, mask=i < left)


@triton.jit
def widen(value):
    """To float32, exactly. The interpreter loses bfloat16's denormals where hardware keeps them, so there it is spelled out."""
    if INTERPRETED and value.dtype == tl.bfloat16:
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def load_floats(pointer, left, BLOCK: tl.constexpr):
    """load_tile in float32"""
    return widen(load_tile(pointer, left, BLOCK))


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """float32 to dtype, to nearest even. The interpreter truncates to bfloat16, so there it is spelled out."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        rounded = tl.where(value == value, rounded, tl.full(rounded.shape, 0x7FC0, tl.uint16))
        return rounded.to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)


@triton.jit
def midpoint(below, above):
    return 0.5 * below + 0.5 * above


@triton.jit
def _count_below(x, c, M: tl.constexpr, MIDPOINTS: tl.constexpr):
    """int32 #{j in 1..M-1 : x > t_j}, or #{j in 0..M-2 : x > c_j}: a binary search over ascending values."""
    count = tl.zeros(x.shape, tl.int32)
    STEPS: tl.constexpr = 8 if M > 128 else (7 if M > 64 else (6 if M > 32 else 5))
    for k in tl.static_range(STEPS):
        next_count = count + (1 << (STEPS - 1 - k))
        above = tl.minimum(next_count, M - 1)
        value = tl.load(c + above - 1)
        if MIDPOINTS:
            value = midpoint(value, tl.load(c + above))
        count = tl.where((next_count < M) & (x > value), next_count, count)
    return count


@triton.jit
def code_of(x, c, M: tl.constexpr):
    """int32 index of the nearest center: a tie goes down, of equal centers the first is taken, NaN gives 0."""
    if M <= IN_REGISTERS:
        code = tl.zeros(x.shape, tl.int32)
        below = tl.load(c)
        for j in tl.static_range(1, M):
            above = tl.load(c + j)
            # No x is past infinity: a center equal to the one before it owns nothing.
            edge = tl.where(above > below, midpoint(below, above), float("inf"))
            code = tl.where(x > edge, j, code)
            below = above
        return code
    else:
        own = tl.load(c + _count_below(x, c, M, True))
        return _count_below(own, c, M, False)


@triton.jit
def nearest(x, c, M: tl.constexpr):
    """The nearest center itself; NaN stays NaN."""
    if M <= IN_REGISTERS:
        below = tl.load(c)
        q = tl.zeros(x.shape, tl.float32) + below
        for j in tl.static_range(1, M):
            above = tl.load(c + j)
            q = tl.where(x > midpoint(below, above), above, q)
            below = above
    else:
        q = tl.load(c + _count_below(x, c, M, True))
    return tl.where(x == x, q, x)


@triton.jit
def center(code, c, M: tl.constexpr):
    """c[code], of a code that is in range."""
    if M <= 4:
        value = tl.zeros(code.shape, c.dtype.element_ty) + tl.load(c)
        for j in tl.static_range(1, M):
            value = tl.where(code == j, tl.load(c + j), value)
        return value
    else:
        return tl.load(c + code)


@triton.jit
def sigmoid(z):
    """1 / (1 + 2^-z): two special functions and three more instructions. An overflow of 2^-z gives 0, NaN stays NaN."""
    root = tl.rsqrt(1.0 + tl.exp2(-z))
    return root * root


@triton.jit
def sigmoid_and_density(z):
    """s = 1 / (1 + 2^-z) and h = s (1 - s), both without cancellation: from 2^-|z|, which never overflows."""
    e = tl.exp2(-tl.abs(z))
    root = tl.rsqrt(1.0 + e)
    larger = root * root
    smaller = e * larger
    return tl.where(z > 0, larger, smaller), larger * smaller


@triton.jit
def sign(value):
    """-1, 0 or 1; NaN stays NaN."""
    return tl.where(value > 0, 1.0, tl.where(value < 0, -1.0, tl.where(value == 0, 0.0, value)))


@triton.jit
def prox(y, q, t, L1: tl.constexpr):
    """The proximal map of prox_weights, y in the cell of q. Callers forbid contraction: these are eager's bits."""
    gap = y - q
    if L1:
        return tl.where(tl.abs(gap) <= t, q, y - t * sign(gap))
    else:
        moved = y - gap * tl.div_rn(t, 0.5 + t)
        past = tl.where(gap > 0, moved < q, moved > q)
        return tl.where(past, q, moved)
