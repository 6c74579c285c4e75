"""Exact k-means of one run of weighted numbers, in float64: the reference of init_centers(method="kmeans")."""

from __future__ import annotations

from typing import Any

import numpy as np


def kmeans_1d(row: np.ndarray, weights: np.ndarray, levels: int) -> np.ndarray:
    """The optimal centers of one run, ascending, float64 [levels]; repeated where it has fewer distinct values.

    Dynamic programming over the sorted distinct values u_1 < .. < u_N with their weights (Wang and Song 2011):
    D_k[j] = min_{i <= j} D_{k-1}[i-1] + cost(i, j), where cost is a segment's squared error from its mean. The best i
    never falls as j grows, so each layer is solved by bisection on j, a whole level of the bisection at a time.
    Time O(levels N log N), memory O(levels N). Values of weight 0 are left out.
    """
    order = np.lexsort((weights, row))  # by value, then by weight: sums do not depend on the order of the run
    order = order[weights[order] > 0]
    distinct, first = np.unique(row[order], return_index=True)
    counts = np.add.reduceat(weights[order], first)
    if len(distinct) <= levels:
        return np.concatenate([distinct, np.full(levels - len(distinct), distinct[-1])])
    shift = np.average(distinct, weights=counts)
    u = distinct - shift  # prefix sums lose less near zero
    prefix = [np.concatenate([[0.0], np.cumsum(counts * u**power)]) for power in (0, 1, 2)]

    def cost(i: np.ndarray, j: np.ndarray) -> np.ndarray:
        weight, total, squares = (p[j + 1] - p[i] for p in prefix)
        with np.errstate(divide="ignore", invalid="ignore"):  # beside large weights a small one may be lost
            error = squares - total * total / weight
        return np.where((weight > 0) & (error > 0), error, 0.0)

    size = len(u)
    best = cost(np.zeros(size, dtype=np.int64), np.arange(size))
    starts = np.zeros((levels, size), dtype=np.int64)  # starts[k, j]: first index of the last segment
    for k in range(1, levels):
        previous = np.concatenate([[np.inf], best[:-1]])
        best, starts[k] = _layer(previous, cost, k, size)
    edges = [size]
    for k in range(levels - 1, -1, -1):
        edges.append(int(starts[k, edges[-1] - 1]))
    ends, begins = edges[:-1][::-1], edges[:0:-1]
    return np.array([_mean(distinct[a:b], counts[a:b]) for a, b in zip(begins, ends, strict=True)])


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
    """About one of the values, over these alone: a difference of prefix sums would cancel. Never outside of them."""
    about = values[len(values) // 2]
    mean = about + (weights * (values - about)).sum() / weights.sum()
    return float(np.clip(mean, values[0], values[-1]))


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
