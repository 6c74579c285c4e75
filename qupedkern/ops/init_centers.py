"""init_centers: where centers come from, given weights: exact 1-D k-means and three cheaper rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._checks import MAX_LEVELS, check_choice, check_float, check_int
from ._define import define_op
from ._rows import compute_dtype, row_sum

METHODS = ("kmeans", "linspace", "quantile", "signed_mean")


def _prepare(x: Any, levels: Any, num_groups: Any = 1, method: Any = "kmeans") -> tuple[Tensor, int, int, str]:
    x = check_float("init_centers", "x", x)
    levels = check_int("init_centers", "levels", levels, 2, MAX_LEVELS)
    num_groups = check_int("init_centers", "num_groups", num_groups, 1, max(x.numel(), 1))
    method = check_choice("init_centers", "method", method, METHODS)
    if x.numel() == 0 or x.numel() % num_groups:
        raise ValueError(f"init_centers: num_groups = {num_groups} must divide the {x.numel()} elements of x evenly")
    if method == "signed_mean" and levels != 2:
        raise ValueError(f"init_centers: method 'signed_mean' gives 2 levels, got levels = {levels}")
    return x.detach().contiguous(), levels, num_groups, method


@define_op(
    "init_centers(Tensor x, int levels, int num_groups, str method) -> Tensor",
    allocate=lambda x, levels, num_groups, method: x.new_empty(
        (levels,) if num_groups == 1 else (num_groups, levels), dtype=compute_dtype(x)
    ),
    prepare=_prepare,
)
def reference(x: Tensor, levels: int, num_groups: int, method: str) -> Tensor:
    values = x.reshape(num_groups, -1).to(compute_dtype(x))
    if not bool(values.isfinite().all()):
        raise ValueError("init_centers: x must be finite, got a NaN or an infinity")
    rule = {"kmeans": _kmeans, "linspace": _linspace, "quantile": _quantile, "signed_mean": _signed_mean}[method]
    centers = rule(values, levels).to(values.dtype)
    # Exact in real numbers; in floats a (1 - w) + b w and a mean can leave their order, or the range, by an ulp.
    centers = centers.clamp(min=values.amin(1, keepdim=True), max=values.amax(1, keepdim=True)).sort(dim=1).values
    return centers.reshape(levels) if num_groups == 1 else centers


def _linspace(values: Tensor, levels: int) -> Tensor:
    share = torch.linspace(0, 1, levels, dtype=values.dtype, device=values.device)
    return values.amin(1, keepdim=True) * (1 - share) + values.amax(1, keepdim=True) * share


def _quantile(values: Tensor, levels: int) -> Tensor:
    """The middle of each of m equally full parts: quantiles (k + 1/2) / m, linear between neighbours."""
    ordered = values.sort(dim=1).values
    share = (torch.arange(levels, device=values.device, dtype=torch.float64) + 0.5) / levels
    position = (share * values.shape[1] - 0.5).clamp(min=0, max=values.shape[1] - 1)
    below = position.floor().long()
    weight = (position - below).to(values.dtype)
    above = (below + 1).clamp(max=values.shape[1] - 1)
    return ordered[:, below] * (1 - weight) + ordered[:, above] * weight


def _signed_mean(values: Tensor, levels: int) -> Tensor:
    """Mean of the negative and of the other weights; a side without weights takes the other's mean."""
    negative = values < 0
    sides = [torch.where(side, values, 0.0) for side in (negative, ~negative)]
    counts = [side.sum(1) for side in (negative, ~negative)]
    low, high = (row_sum(v) / n.clamp(min=1) for v, n in zip(sides, counts, strict=True))
    low, high = torch.where(counts[0] > 0, low, high), torch.where(counts[1] > 0, high, low)
    return torch.stack([low, high], dim=1)


def _kmeans(values: Tensor, levels: int) -> Tensor:
    rows = values.cpu().double().numpy()
    return torch.from_numpy(np.stack([kmeans_1d(row, levels) for row in rows])).to(values.device)


def kmeans_1d(row: np.ndarray, levels: int) -> np.ndarray:
    """The optimal centers of one run, ascending, float64 [levels]; repeated where it has fewer distinct values.

    Dynamic programming over the sorted distinct values u_1 < .. < u_N with their counts (Wang and Song 2011):
    D_k[j] = min_{i <= j} D_{k-1}[i-1] + cost(i, j), where cost is a segment's squared error from its mean. The best i
    never falls as j grows, so each layer is solved by bisection on j, a whole level of the bisection at a time.
    Time O(levels N log N), memory O(levels N).
    """
    distinct, counts = np.unique(row, return_counts=True)
    if len(distinct) <= levels:
        return np.concatenate([distinct, np.full(levels - len(distinct), distinct[-1])])
    shift = np.average(distinct, weights=counts)
    u = distinct - shift  # prefix sums lose less near zero
    prefix = [np.concatenate([[0.0], np.cumsum(counts * u**power)]) for power in (0, 1, 2)]

    def cost(i: np.ndarray, j: np.ndarray) -> np.ndarray:
        weight, total, squares = (p[j + 1] - p[i] for p in prefix)
        return np.maximum(squares - total * total / weight, 0.0)

    size = len(u)
    best = cost(np.zeros(size, dtype=np.int64), np.arange(size))
    starts = np.zeros((levels, size), dtype=np.int64)  # starts[k, j]: first index of the last segment
    for k in range(1, levels):
        previous = np.concatenate([[np.inf], best[:-1]])
        best, starts[k] = _layer(previous, cost, k, size)
    edges = [size]
    for k in range(levels - 1, -1, -1):
        edges.append(int(starts[k, edges[-1] - 1]))
    first = edges[:0:-1]  # of each segment; sums over it alone, where a difference of prefix sums would cancel
    return np.add.reduceat(counts * u, first) / np.add.reduceat(counts, first) + shift


def _layer(previous: np.ndarray, cost: Any, k: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """One layer of the program: for every j >= k the best start i in [k, j], by bisection with monotone starts."""
    best = np.full(size, np.inf)
    start = np.zeros(size, dtype=np.int64)
    spans = np.array([[k, size - 1, k, size - 1]])  # j from, j to, i from, i to
    while len(spans):
        j_from, j_to, i_from, i_to = spans.T
        j = (j_from + j_to) // 2
        widths = np.minimum(i_to, j) - i_from + 1
        offsets = np.concatenate([[0], np.cumsum(widths)[:-1]])
        i = np.arange(widths.sum()) - np.repeat(offsets - i_from, widths)
        candidates = previous[i] + cost(i, np.repeat(j, widths))
        best[j] = np.minimum.reduceat(candidates, offsets)
        winners = np.flatnonzero(candidates == np.repeat(best[j], widths))
        start[j] = i[winners[np.searchsorted(winners, offsets)]]
        left = np.stack([j_from, j - 1, i_from, start[j]], axis=1)
        right = np.stack([j + 1, j_to, start[j], i_to], axis=1)
        spans = np.concatenate([left, right])
        spans = spans[spans[:, 0] <= spans[:, 1]]
    return best, start


def init_centers(x: Tensor, levels: int, num_groups: int = 1, method: str = "kmeans") -> Tensor:
    """Centers for weights x: one ascending row per group.

    "kmeans":      argmin_c sum_i min_j (x_i - c_j)^2, the exact optimum in one dimension
    "linspace":    levels equal steps from min to max (the published recipe; a poor start, kept for comparison)
    "quantile":    quantiles (k - 1/2) / levels, k = 1..levels
    "signed_mean": mean of the negative and mean of the other weights, levels = 2

    x: [...], float, finite.  levels: m = 2..256.  num_groups: G, must divide the number of elements.
    Returns [m], or [G, m] for G > 1, float64 for float64 x and float32 otherwise. Fewer distinct weights than levels:
    repeated centers. Raises TypeError or ValueError, also for a value that is not finite.
    """
    return torch.ops.qupedkern.init_centers(*_prepare(x, levels, num_groups, method))
