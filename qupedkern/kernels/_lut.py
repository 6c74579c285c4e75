"""Tiles of a packed weight for tl.dot, shared by lut_linear and its gradients: codes out of the stream, values out of the table.

The stream is read 16 bytes a thread where its rows allow it, in whole groups where they start on bytes, else two bytes a code.
One table is looked through in shared memory, many in cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._bits import RUN, aligned, code_at, load_runs, split_words
from ._crossovers import WRITTEN_OUT
from ._math import INTERPRETED, narrow, widen

BLOCK_N = 64  # rows of the weight a program
_PROGRAMS = 512  # that fill a device: four for each of the 132 multiprocessors of the largest, about
_LEAST_STEPS = 4  # a part: the loop must have something to overlap

# Rows of x up to which k is cut into parts (an estimate: not measured yet), and from which the weight is written out.
CROSSOVERS = {dtype: (64, rows) for dtype, rows in WRITTEN_OUT.items()}


@dataclass(frozen=True)
class Weight:
    """A packed weight [N, K]. length: weights a row of centers; grouping: 0 one table, 1 tables of whole rows, 2 others;
    words: 2 rows on 16 bytes and whole tiles, 1 rows on bytes, 0 neither. steps: tiles along k."""

    N: int
    K: int
    row_bytes: int
    length: int
    total: int
    bits: int
    m: int
    words: int
    grouping: int
    BLOCK_K: int

    @property
    def arguments(self) -> tuple[int, ...]:
        """N, K, row_bytes, length, total, BITS, M, WORDS, GROUPING"""
        return self.N, self.K, self.row_bytes, self.length, self.total, self.bits, self.m, self.words, self.grouping

    @property
    def warps(self) -> int:
        """Four where one table serves all; the addresses of many take registers."""
        return 8 if self.grouping else 4

    @property
    def steps(self) -> int:
        return -(-self.K // self.BLOCK_K)

    @property
    def part_steps(self) -> int:
        """Tiles along k a part: from the shape alone, so that a row's bits do not follow its batch."""
        parts = max(1, min(_PROGRAMS * BLOCK_N // max(self.N, 1), self.steps // _LEAST_STEPS))
        return max(-(-self.steps // parts), 1)


def weight_of(packed: Tensor, centers: Tensor, bits: int, shape: list[int], dtype: torch.dtype) -> Weight:
    """dtype: that of x, which decides how much of k a tile holds."""
    (N, K), m = shape, centers.shape[-1]
    groups = centers.numel() // m
    length = max(N * K // groups, 1)
    grouping = 0 if groups == 1 else 1 if K and length % K == 0 else 2
    # Operands of float32 products stay in registers. In a tile of the others a thread has a 16-byte word of codes; half of
    # one at 1 and 3 bits, where twice the tile would spill.
    half = 64 if bits in (4, 8) or dtype == torch.float16 else RUN
    block_k = 32 if dtype == torch.float32 else half
    row_bytes = K * bits // 8
    wide = row_bytes % 16 == 0 and K % block_k == 0 and aligned(packed) and (8 % bits == 0 or block_k % RUN == 0)
    words = 0 if K * bits % 8 else 2 if wide and K else 1
    return Weight(N, K, row_bytes, length, packed.numel(), bits, m, words, grouping, block_k)


@triton.jit
def tile_codes(
    packed, n, k, N, K, row_bytes, total, BITS: tl.constexpr, M: tl.constexpr, WORDS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """int32 codes [BLOCK_N, BLOCK_K], below M, from row n and column k on; anything outside of the weight."""
    PER: tl.constexpr = 8 // BITS if 8 % BITS == 0 else 8
    GROUPS: tl.constexpr = BLOCK_K // PER
    rows = (n + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    if WORDS == 0:
        columns = k + tl.arange(0, BLOCK_K)[None, :]
        code = code_at(packed, rows * K + columns, (rows < N) & (columns < K), total, BITS)
    else:
        here = rows < N
        start = packed + tl.minimum(rows, N - 1) * row_bytes
        group = k // PER + tl.arange(0, GROUPS)[None, :]
        if WORDS == 2 and 8 % BITS == 0:
            words = tl.load(start + group).to(tl.uint32)
        elif WORDS == 2:
            run = k // 128 + tl.arange(0, BLOCK_K // 128)[None, :]
            runs = (start + run * (16 * BITS)).to(tl.pointer_type(tl.uint32), bitcast=True)
            runs = tl.multiple_of(tl.reshape(runs, (BLOCK_N * BLOCK_K // 128,)), 16)
            words = tl.reshape(load_runs(runs, BITS), (BLOCK_N, GROUPS))
        else:
            here = here & (group < K // PER)
            if 8 % BITS == 0:
                words = tl.load(start + group, mask=here, other=0).to(tl.uint32)
            else:
                TYPE: tl.constexpr = tl.uint32 if BITS <= 4 else tl.uint64
                words = tl.zeros((BLOCK_N, GROUPS), TYPE)
                for j in tl.static_range(BITS):
                    words |= tl.load(start + group * BITS + j, mask=here, other=0).to(TYPE) << (8 * j)
        code = tl.reshape(split_words(words, BITS), (BLOCK_N, BLOCK_K))
    return tl.minimum(code, M - 1)


@triton.jit
def tile_values(
    code, centers, table, n, k, N, K, length, M: tl.constexpr, GROUPING: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The weights of codes [BLOCK_N, BLOCK_K], in the type of the table; table: all centers, where there is one row of them."""
    if GROUPING == 0:
        return tl.reshape(tl.gather(table, tl.reshape(code, (BLOCK_N * BLOCK_K,)), 0), (BLOCK_N, BLOCK_K))
    else:
        rows = (n + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        columns = k + tl.arange(0, BLOCK_K)[None, :]
        own = rows * K // length if GROUPING == 1 else (rows * K + columns) // length
        value = tl.load(centers + own * M + code, mask=(rows < N) & (columns < K), other=0.0)
        return narrow(value, table.dtype)


@triton.jit
def all_in(values, DTYPE: tl.constexpr):
    """Whether float32 values are numbers of DTYPE."""
    return tl.max(tl.abs(values - widen(narrow(values, DTYPE)))) == 0.0


@triton.jit
def tables_in(
    centers, n, N, K, length, DTYPE: tl.constexpr, M: tl.constexpr, TABLE: tl.constexpr, GROUPING: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Whether the centers of the program's rows are numbers of DTYPE; no, where looking would cost more than it saves."""
    i = tl.arange(0, TABLE)
    if GROUPING == 0:
        return all_in(tl.load(centers + i, mask=i < M, other=0.0), DTYPE)
    elif GROUPING == 1 and TABLE <= 32:
        rows = (n + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        here = (rows < N) & (i < M)[None, :]
        return all_in(tl.load(centers + rows * K // length * M + i[None, :], mask=here, other=0.0), DTYPE)
    else:
        return False


@triton.jit
def dot(w, x, acc):
    """acc + w x, in their type with float32 sums."""
    if INTERPRETED:
        return tl.dot(widen(w), widen(x), acc, input_precision="ieee")
    else:
        return tl.dot(w, x, acc, input_precision="ieee")


@triton.jit
def exact_dot(w, x, acc):
    """acc + w x of float32 w and any x, all products exact or rounded to float32."""
    if x.dtype == tl.bfloat16:
        high = narrow(w, tl.bfloat16)
        below = w - widen(high)
        middle = narrow(below, tl.bfloat16)
        acc = dot(high, x, acc)
        acc = dot(middle, x, acc)
        return dot(narrow(below - widen(middle), tl.bfloat16), x, acc)
    else:
        return dot(w, widen(x), acc)
