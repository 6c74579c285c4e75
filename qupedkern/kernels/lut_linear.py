"""lut_linear in Triton, and its gradients: tiles of codes become tiles of weights in registers and go straight into tl.dot.

Small batches are bound by the packed bytes and the look-ups, one a weight; large ones by the products, and there the weight is
written out once and multiplied by torch. Products are exact: a center that is a number of x's half type, as it is after
rounding, multiplies in that type with float32 sums; another is the sum of three bfloat16 numbers, or multiplies in float32,
never in tf32. Which it is, is seen on the device.

Up to a crossover k is cut into parts, so that few rows of x still fill the device; their number follows from the weight's shape
alone, and a second kernel adds them in order. No atomics. Rows of x do not see each other, but the instruction that adds may
depend on BLOCK_B, so a pinned batch regime keeps one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._lut import BLOCK_N, CROSSOVERS, all_in, dot, exact_dot, tables_in, tile_codes, tile_values, weight_of
from ._math import IN_REGISTERS, narrow
from ._packed import dequantize, sum_by_code
from ._sums import new_partials, sum_partials

_BATCHES = (16, 32, 64)  # rows of x a program, the smallest that holds them all
_CHUNK = 1024  # rows of x whose parts are kept at once
_ADDED = 1024  # outputs a program of the second kernel


class _Pinned:
    """Whether rows must have the same bits in every batch; told by the backend."""

    now = False


def set_batch_invariant(pinned: bool) -> None:
    _Pinned.now = pinned


@triton.jit
def _sum_tiles(
    x, packed, centers, table, n, b, first, last, B, N, K, row_bytes, length, total, BITS: tl.constexpr, M: tl.constexpr,
    WORDS: tl.constexpr, GROUPING: tl.constexpr, EXACT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_N, BLOCK_B]: the tiles first..last along k. EXACT: the table has x's type."""
    rows_of_x = (b + tl.arange(0, BLOCK_B)).to(tl.int64)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_B), tl.float32)
    for step in range(first, last):
        k = step * BLOCK_K
        code = tile_codes(packed, n, k, N, K, row_bytes, total, BITS, M, WORDS, BLOCK_N, BLOCK_K)
        w = tile_values(code, centers, table, n, k, N, K, length, M, GROUPING, BLOCK_N, BLOCK_K)
        columns = k + tl.arange(0, BLOCK_K)[:, None]
        inside = rows_of_x < B if WORDS == 2 else (rows_of_x < B) & (columns < K)
        part = tl.load(x + rows_of_x * K + columns, mask=inside, other=0.0)
        acc = dot(w, part, acc) if EXACT else exact_dot(w, part, acc)
    return acc


@triton.jit
def _lut_linear(
    x, packed, centers, bias, out, done, B, part_steps, N, K, row_bytes, length, total, BITS: tl.constexpr, M: tl.constexpr,
    WORDS: tl.constexpr, GROUPING: tl.constexpr, TABLE: tl.constexpr, HAS_BIAS: tl.constexpr, PARTS: tl.constexpr,
    UNLESS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """PARTS: out is float32 [parts, B, N]. UNLESS: nothing is to do where `done` holds 1."""
    if UNLESS:  # noqa: SIM102  (else there is no pointer to load from)
        if tl.load(done) != 0:
            return
    n, b, part = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_B, tl.program_id(2)
    first = part * part_steps
    last = tl.minimum(first + part_steps, tl.cdiv(K, BLOCK_K))
    i = tl.arange(0, TABLE)
    table = tl.load(centers + i, mask=i < M, other=0.0)
    HALF: tl.constexpr = x.dtype.element_ty
    if HALF != tl.float32:  # noqa: SIM300
        if tables_in(centers, n, N, K, length, HALF, M, TABLE, GROUPING, BLOCK_N):
            acc = _sum_tiles(
                x, packed, centers, narrow(table, HALF), n, b, first, last, B, N, K, row_bytes, length, total, BITS, M,
                WORDS, GROUPING, True, BLOCK_N, BLOCK_B, BLOCK_K,
            )  # fmt: skip
        else:
            acc = _sum_tiles(
                x, packed, centers, table, n, b, first, last, B, N, K, row_bytes, length, total, BITS, M, WORDS,
                GROUPING, False, BLOCK_N, BLOCK_B, BLOCK_K,
            )  # fmt: skip
    else:
        acc = _sum_tiles(
            x, packed, centers, table, n, b, first, last, B, N, K, row_bytes, length, total, BITS, M, WORDS, GROUPING,
            False, BLOCK_N, BLOCK_B, BLOCK_K,
        )  # fmt: skip
    rows = (n + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    rows_of_x = (b + tl.arange(0, BLOCK_B)).to(tl.int64)[None, :]
    here = (rows_of_x < B) & (rows < N)
    if PARTS:
        tl.store(out + (part.to(tl.int64) * B + rows_of_x) * N + rows, acc, mask=here)
    else:
        if HAS_BIAS:
            acc += tl.load(bias + rows, mask=rows < N, other=0.0)
        tl.store(out + rows_of_x * N + rows, narrow(acc, out.dtype.element_ty), mask=here)


@triton.jit
def _add_parts(partials, bias, out, numel, N, parts, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = i < numel
    mine = partials + i
    total = tl.load(mine, mask=here, other=0.0)
    for _ in range(1, parts):
        mine += numel
        total += tl.load(mine, mask=here, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + i % N, mask=here, other=0.0)
    tl.store(out + i, narrow(total, out.dtype.element_ty), mask=here)


@triton.jit
def _all_in(centers, bias, done, count, N, HALF: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """done = 1 where centers and bias are numbers of type HALF."""
    i = tl.arange(0, BLOCK)
    wrong = 0
    for first in range(0, count, BLOCK):
        wrong += tl.where(all_in(tl.load(centers + first + i, mask=first + i < count, other=0.0), HALF), 0, 1)
    if HAS_BIAS:
        for first in range(0, N, BLOCK):
            wrong += tl.where(all_in(tl.load(bias + first + i, mask=first + i < N, other=0.0), HALF), 0, 1)
    tl.store(done, tl.where(wrong == 0, 1, 0))


def lut_linear(
    x: Tensor, packed: Tensor, centers: Tensor, bias: Tensor | None, bits: int, shape: list[int], out: Tensor
) -> None:
    if not out.numel():
        return
    N, K = shape
    rows = out.numel() // N
    few, many = CROSSOVERS[x.dtype]
    x, out = x.view(rows, K), out.view(rows, N)
    done = None
    if not _Pinned.now and rows >= many and K:
        done = _written_out(x, packed, centers, bias, bits, shape, out)
        if done is None:
            return
    _in_tiles(x, packed, centers, bias, bits, shape, out, done, _Pinned.now or rows <= few)


def _in_tiles(
    x: Tensor, packed: Tensor, centers: Tensor, bias: Tensor | None, bits: int, shape: list[int], out: Tensor,
    done: Tensor | None, parted: bool,
) -> None:  # fmt: skip
    weight = weight_of(packed, centers, bits, shape, x.dtype)
    steps = weight.part_steps if parted else max(weight.steps, 1)
    parts = max(-(-weight.steps // steps), 1)
    size = _BATCHES[0] if _Pinned.now else next((size for size in _BATCHES if size >= len(x)), _BATCHES[-1])
    for rows, to in zip(x.split(_CHUNK), out.split(_CHUNK), strict=True) if parts > 1 else ((x, out),):
        sums = new_partials(rows, parts, to.numel()) if parts > 1 else to
        _lut_linear[(-(-weight.N // BLOCK_N), -(-len(rows) // size), parts)](
            rows, packed, centers, bias, sums, done, len(rows), steps, *weight.arguments, max(16, 1 << bits),
            bias is not None, parts > 1, done is not None, BLOCK_N, size, weight.BLOCK_K, num_warps=weight.warps,
        )  # fmt: skip
        if parts > 1:
            _add_parts[(-(-to.numel() // _ADDED),)](
                sums, bias, to, to.numel(), weight.N, parts, bias is not None, _ADDED, num_warps=4
            )


def _written_out(
    x: Tensor, packed: Tensor, centers: Tensor, bias: Tensor | None, bits: int, shape: list[int], out: Tensor
) -> Tensor | None:
    """The weight in the type of x, multiplied by torch. The result is right where that type holds centers and bias, which is
    found on the device: the flag returned; None where it always is."""
    weight = torch.empty(shape, dtype=x.dtype, device=x.device)
    dequantize(packed, centers.to(x.dtype), bits, weight)
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias.to(x.dtype), x, weight.t(), out=out)
    if x.dtype == torch.float32:
        return None
    done = torch.empty(1, dtype=torch.int32, device=x.device)
    half = tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16
    _all_in[(1,)](centers, bias, done, centers.numel(), shape[0], half, bias is not None, 1024, num_warps=4)
    return done


def lut_linear_unsupported(
    x: Tensor, packed: Tensor, centers: Tensor, bias: Tensor | None, bits: int, shape: list[int]
) -> str | None:
    return _too_many(x, shape)


def _too_many(x: Tensor, shape: list[int]) -> str | None:
    most = 65535 * _BATCHES[0]  # programs a launch has along its second axis
    if x.numel() > most * max(shape[1], 1):
        return f"more than {most} rows of x are left to eager, got {x.numel() // max(shape[1], 1)}"
    return None


@triton.jit
def _lut_linear_x(
    grad, packed, centers, grad_x, B, N, K, row_bytes, length, total, BITS: tl.constexpr, M: tl.constexpr, WORDS: tl.constexpr,
    GROUPING: tl.constexpr, TABLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_x[b, k] = sum over n of grad[b, n] W[n, k]: the forward with the tiles transposed."""
    k, b = tl.program_id(0) * BLOCK_K, tl.program_id(1) * BLOCK_B
    rows_of_x = (b + tl.arange(0, BLOCK_B)).to(tl.int64)[None, :]
    i = tl.arange(0, TABLE)
    table = tl.load(centers + i, mask=i < M, other=0.0)
    acc = tl.zeros((BLOCK_K, BLOCK_B), tl.float32)
    for n in range(0, N, BLOCK_N):
        code = tile_codes(packed, n, k, N, K, row_bytes, total, BITS, M, WORDS, BLOCK_N, BLOCK_K)
        w = tile_values(code, centers, table, n, k, N, K, length, M, GROUPING, BLOCK_N, BLOCK_K)
        rows = n + tl.arange(0, BLOCK_N)[:, None]
        g = tl.load(grad + rows_of_x * N + rows, mask=(rows_of_x < B) & (rows < N), other=0.0)
        acc = exact_dot(tl.trans(w), g, acc)
    columns = k + tl.arange(0, BLOCK_K)[:, None]
    tl.store(
        grad_x + rows_of_x * K + columns, narrow(acc, grad_x.dtype.element_ty), mask=(rows_of_x < B) & (columns < K)
    )


@triton.jit
def _lut_linear_centers(
    grad, x, packed, out, B, N, K, row_bytes, length, total, BITS: tl.constexpr, M: tl.constexpr, WORDS: tl.constexpr,
    GROUPING: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of grad^T x, the gradient of the weight: its sums by code as partials [tiles, M] or [N, tiles along k, M], or, where
    tables serve other cuts, the tile itself."""
    n, k = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_K
    rows = (n + tl.arange(0, BLOCK_N)).to(tl.int64)
    columns = k + tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for b in range(0, B, BLOCK_B):
        at = (b + tl.arange(0, BLOCK_B)).to(tl.int64)
        g = tl.load(grad + at[None, :] * N + rows[:, None], mask=(at[None, :] < B) & (rows[:, None] < N), other=0.0)
        part = tl.load(
            x + at[:, None] * K + columns[None, :], mask=(at[:, None] < B) & (columns[None, :] < K), other=0.0
        )
        acc = dot(g, part, acc)
    here = (rows[:, None] < N) & (columns[None, :] < K)
    if GROUPING == 2:
        tl.store(out + rows[:, None] * K + columns[None, :], acc, mask=here)
    else:
        code = tile_codes(packed, n, k, N, K, row_bytes, total, BITS, M, WORDS, BLOCK_N, BLOCK_K)
        acc = tl.where(here, acc, 0.0)
        tiles = tl.num_programs(1)
        if GROUPING == 0:
            mine = out + (tl.program_id(0).to(tl.int64) * tiles + tl.program_id(1)) * M
        else:
            mine = out + (rows * tiles + tl.program_id(1)) * M
        if M <= IN_REGISTERS:
            for j in tl.static_range(M):
                _store_sum(mine + j, acc, code == j, rows < N, GROUPING)
        else:
            for j in range(M):
                _store_sum(mine + j, acc, code == j, rows < N, GROUPING)


@triton.jit
def _store_sum(to, values, where, here, GROUPING: tl.constexpr):
    chosen = tl.where(where, values, 0.0)
    if GROUPING == 0:
        tl.store(to, tl.sum(chosen))
    else:
        tl.store(to, tl.sum(chosen, axis=1), mask=here)


def lut_linear_backward(
    grad: Tensor, x: Tensor, packed: Tensor, centers: Tensor, bias: Tensor | None, bits: int, shape: list[int],
    grad_x: Tensor, grad_centers: Tensor, grad_bias: Tensor,
) -> None:  # fmt: skip
    (N, K), rows = shape, grad.numel() // max(shape[0], 1)
    if not grad.numel() or not x.numel():
        grad_x.zero_()
        grad_centers.zero_()
    if not grad.numel():
        grad_bias.zero_()
        return
    if bias is not None:
        sum_partials(grad.view(rows, N), grad_bias, 1)
    if not x.numel():
        return
    weight = weight_of(packed, centers, bits, shape, x.dtype)
    size = next((size for size in _BATCHES if size >= rows), _BATCHES[-1])
    along_n, along_k = -(-N // BLOCK_N), weight.steps
    _lut_linear_x[(along_k, -(-rows // size))](
        grad, packed, centers, grad_x, rows, *weight.arguments, max(16, 1 << bits),
        BLOCK_N // 2 if x.dtype == torch.float32 else BLOCK_N, size, weight.BLOCK_K, num_warps=weight.warps,
    )  # fmt: skip
    to = new_partials(x, *{0: (along_n * along_k, weight.m), 1: (N * along_k, weight.m), 2: (N, K)}[weight.grouping])
    _lut_linear_centers[(along_n, along_k)](
        grad, x, packed, to, rows, *weight.arguments, BLOCK_N, 32, weight.BLOCK_K, num_warps=weight.warps
    )
    if weight.grouping == 2:
        sum_by_code(to, packed, bits, grad_centers)
    else:
        sum_partials(to, grad_centers, grad_centers.numel() // weight.m)


def lut_linear_backward_unsupported(
    grad: Tensor, x: Tensor, packed: Tensor, centers: Tensor, bias: Tensor | None, bits: int, shape: list[int]
) -> str | None:
    return _too_many(x, shape)
