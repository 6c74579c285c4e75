"""lut_linear in Triton: tiles of codes become tiles of weights in registers and go straight into tl.dot, the weights on the left.

Small batches are bound by the packed bytes and the look-ups, one a weight; large ones by the products. bfloat16: a float32
center is the sum of three bfloat16 numbers, so three products with float32 sums are exact; where one table serves all weights
and holds bfloat16 numbers, as it does after rounding, one is. float32 and float16 multiply in float32, never in tf32.

Each output is one sum over k in an order fixed by BLOCK_K: no split, no atomics. Rows of x do not see each other, but the
instruction that adds may depend on BLOCK_B, so a pinned batch regime keeps one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._bits import code_at
from ._math import INTERPRETED, narrow, widen

_BATCHES = (16, 32, 64)  # rows of x a program, the smallest that holds them all
_BLOCK_N = 64


class _Pinned:
    """Whether rows must have the same bits in every batch; told by the backend."""

    now = False


def set_batch_invariant(pinned: bool) -> None:
    _Pinned.now = pinned


@triton.jit
def _weights(
    packed, centers, table, n, step, N, K, row_bytes, length, total, BITS: tl.constexpr, M: tl.constexpr, BYTES: tl.constexpr,
    GROUPING: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_N, BLOCK_K] of the step-th BLOCK_K columns. BYTES: rows start on bytes and codes do not straddle them."""
    rows = (n + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    columns = step * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    place = rows * K + columns
    here = (rows < N) & (columns < K)
    if BYTES:
        PER: tl.constexpr = 8 // BITS
        byte = step * (BLOCK_K // PER) + tl.arange(0, BLOCK_K // PER)[None, :]
        word = tl.load(packed + rows * row_bytes + byte, mask=(rows < N) & (byte < row_bytes), other=0).to(tl.int32)
        split = (word[:, :, None] >> (BITS * tl.arange(0, PER))[None, None, :]) & ((1 << BITS) - 1)
        code = tl.reshape(split, (BLOCK_N, BLOCK_K))
    else:
        code = code_at(packed, place, here, total, BITS)
    code = tl.minimum(code, M - 1)
    if GROUPING == 0:
        return tl.reshape(tl.gather(table, tl.reshape(code, (BLOCK_N * BLOCK_K,)), 0), (BLOCK_N, BLOCK_K))
    elif GROUPING == 1:
        return tl.load(centers + (rows * K // length) * M + code, mask=here, other=0.0)
    else:
        return tl.load(centers + (place // length) * M + code, mask=here, other=0.0)


@triton.jit
def _product(w, x, acc):
    """acc + w x, in the type of x with float32 sums."""
    if INTERPRETED:
        return tl.dot(widen(w), widen(x), acc, input_precision="ieee")
    else:
        return tl.dot(w, x, acc, input_precision="ieee")


@triton.jit
def _lut_linear(
    x, packed, centers, bias, out, B, N, K, row_bytes, length, total, BITS: tl.constexpr, M: tl.constexpr, TABLE: tl.constexpr,
    BYTES: tl.constexpr, GROUPING: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N
    b = (tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)[None, :]
    HALF: tl.constexpr = x.dtype.element_ty == tl.bfloat16
    i = tl.arange(0, TABLE)
    table = tl.load(centers + i, mask=i < M, other=0.0)
    rest = table - widen(narrow(table, tl.bfloat16))
    # Only one table can be looked through here; many are taken to need all three parts.
    exact = (tl.max(tl.abs(rest)) == 0.0) if GROUPING == 0 else False
    acc = tl.zeros((BLOCK_N, BLOCK_B), tl.float32)
    for step in range(0, tl.cdiv(K, BLOCK_K)):
        w = _weights(
            packed, centers, table, n, step, N, K, row_bytes, length, total, BITS, M, BYTES, GROUPING, BLOCK_N, BLOCK_K
        )
        columns = step * BLOCK_K + tl.arange(0, BLOCK_K)[:, None]
        part = tl.load(x + b * K + columns, mask=(b < B) & (columns < K), other=0.0)
        if HALF:
            high = narrow(w, tl.bfloat16)
            acc = _product(high, part, acc)
            if not exact:
                below = w - widen(high)
                middle = narrow(below, tl.bfloat16)
                acc = _product(middle, part, acc)
                acc = _product(narrow(below - widen(middle), tl.bfloat16), part, acc)
        else:
            acc = _product(w, widen(part), acc)
    rows = (n + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias + rows, mask=rows < N, other=0.0)
    tl.store(out + b * N + rows, narrow(acc, out.dtype.element_ty), mask=(b < B) & (rows < N))


def lut_linear(
    x: Tensor, packed: Tensor, centers: Tensor, bias: Tensor | None, bits: int, shape: list[int], out: Tensor
) -> None:
    if not out.numel():
        return
    N, K = shape
    B, m = out.numel() // N, centers.shape[-1]
    groups = centers.numel() // m
    length = max(N * K // groups, 1)
    grouping = 0 if groups == 1 else 1 if K and length % K == 0 else 2
    block_b = _BATCHES[0] if _Pinned.now else next((size for size in _BATCHES if size >= B), _BATCHES[-1])
    grid = (-(-N // _BLOCK_N), -(-B // block_b))
    _lut_linear[grid](
        x, packed, centers, bias, out, B, N, K, K * bits // 8, length, packed.numel(), bits, m, max(16, 1 << bits),
        8 % bits == 0 and K * bits % 8 == 0, grouping, bias is not None, _BLOCK_N, block_b,
        64 if x.dtype == torch.bfloat16 else 32, num_warps=4,
    )  # fmt: skip


def lut_linear_unsupported(
    x: Tensor, packed: Tensor, centers: Tensor, bias: Tensor | None, bits: int, shape: list[int]
) -> str | None:
    return (
        f"at most 65535 blocks of {_BATCHES[0]} rows of x fit a launch"
        if x.numel() > 65535 * 16 * max(shape[1], 1)
        else None
    )
