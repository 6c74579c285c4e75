"""init_centers: where centers come from, given weights: exact 1-D k-means (_kmeans.py) and three cheaper rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._call import call
from ._checks import MAX_LEVELS, check_choice, check_float, check_int, check_same_device
from ._define import define_op
from ._kmeans import kmeans_1d
from ._rows import compute_dtype, row_sum

METHODS = ("kmeans", "linspace", "quantile", "signed_mean")


def _prepare(
    x: Any, levels: Any, num_groups: Any = 1, method: Any = "kmeans", weights: Any = None
) -> tuple[Tensor, int, int, str, Tensor | None]:
    x = check_float("init_centers", "x", x)
    levels = check_int("init_centers", "levels", levels, 2, MAX_LEVELS)
    num_groups = check_int("init_centers", "num_groups", num_groups, 1, max(x.numel(), 1))
    method = check_choice("init_centers", "method", method, METHODS)
    if x.numel() == 0 or x.numel() % num_groups:
        raise ValueError(f"init_centers: num_groups = {num_groups} must divide the {x.numel()} elements of x evenly")
    if method == "signed_mean" and levels != 2:
        raise ValueError(f"init_centers: method 'signed_mean' gives 2 levels, got levels = {levels}")
    return x.detach().contiguous(), levels, num_groups, method, _check_weights(weights, x, method)


def _check_weights(weights: Any, x: Tensor, method: str) -> Tensor | None:
    if weights is None:
        return None
    weights = check_float("init_centers", "weights", weights)
    if method != "kmeans":
        raise ValueError(f"init_centers: weights are for method 'kmeans', got method {method!r}; leave them out")
    if weights.shape != x.shape:
        raise ValueError(
            f"init_centers: weights must have the shape of x, {tuple(x.shape)}, got {tuple(weights.shape)}"
        )
    check_same_device("init_centers", x=x, weights=weights)
    return weights.detach().contiguous()


@define_op(
    "init_centers(Tensor x, int levels, int num_groups, str method, Tensor? weights) -> Tensor",
    allocate=lambda x, levels, num_groups, method, weights: x.new_empty(
        (levels,) if num_groups == 1 else (num_groups, levels), dtype=compute_dtype(x)
    ),
    prepare=_prepare,
)
def reference(x: Tensor, levels: int, num_groups: int, method: str, weights: Tensor | None) -> Tensor:
    values = x.reshape(num_groups, -1).to(compute_dtype(x))
    if not bool(values.isfinite().all()):
        raise ValueError("init_centers: x must be finite, got a NaN or an infinity")
    if method == "kmeans":
        centers = _kmeans(values, levels, weights).to(values.dtype)
    else:
        rule = {"linspace": _linspace, "quantile": _quantile, "signed_mean": _signed_mean}[method]
        centers = rule(values, levels)
    # Exact in real numbers; in floats a (1 - w) + b w and a mean can leave their order, or the range, by an ulp.
    centers = centers.clamp(min=values.amin(1, keepdim=True), max=values.amax(1, keepdim=True)).sort(dim=1).values
    return centers.reshape(levels) if num_groups == 1 else centers


def _kmeans(values: Tensor, levels: int, weights: Tensor | None) -> Tensor:
    mass = torch.ones_like(values) if weights is None else weights.reshape(values.shape).to(compute_dtype(weights))
    if not bool((mass.isfinite() & (mass >= 0)).all()):
        raise ValueError("init_centers: weights must be finite and not negative, got one that is not")
    if not bool((mass > 0).any(1).all()):
        raise ValueError("init_centers: weights must have a positive entry in every row, got a row of zeros")
    rows = zip(values.cpu().double().numpy(), mass.cpu().double().numpy(), strict=True)
    return torch.from_numpy(np.stack([kmeans_1d(row, w, levels) for row, w in rows])).to(values.device)


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


def init_centers(
    x: Tensor, levels: int, num_groups: int = 1, method: str = "kmeans", weights: Tensor | None = None
) -> Tensor:
    """Centers for weights x: one ascending row per group.

    "kmeans":      argmin_c sum_i w_i min_j (x_i - c_j)^2, the exact optimum in one dimension
    "linspace":    levels equal steps from min to max (the published recipe; a poor start, kept for comparison)
    "quantile":    quantiles (k - 1/2) / levels, k = 1..levels
    "signed_mean": mean of the negative and mean of the other weights, levels = 2

    x: [...], float, finite.  levels: m = 2..256.  num_groups: G, must divide the number of elements.
    weights: w, shaped like x, float, finite, >= 0, not all 0 in a group; None: 1 (with "kmeans" only). For example a diagonal
    of the Fisher information, so that what the loss feels is what is kept.
    Returns [m], or [G, m] for G > 1, float64 for float64 x and float32 otherwise. Fewer distinct weights than levels:
    repeated centers. Raises TypeError or ValueError, also for a value that is not finite.
    Exact k-means: Wang and Song 2011 (doi:10.32614/RJ-2011-015).
    """
    return call("init_centers", *_prepare(x, levels, num_groups, method, weights))
