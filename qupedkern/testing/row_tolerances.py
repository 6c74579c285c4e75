"""Bounds of the ops that decide a cell or sum over cells. Conventions as in tolerances.py."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qupedkern.ops._rows import column, midpoints, split_rows
from qupedkern.ops.assign import cell_codes

from .bounds import ROUNDOFF, cell_total, largest_number


def undecided(x: Tensor, centers: Tensor, *, u: float, eta: float) -> Tensor:
    """Elements within 2 ulp (4u) of a midpoint, where float64 midpoints and rounded ones may disagree about the cell."""
    values, c = split_rows(x, centers)
    t = midpoints(c)[:, None, :]
    return ((values[..., None] - t).abs() <= 4 * u * t.abs() + 2 * eta).any(-1).reshape(x.shape)


def exact_where_decided(x: Tensor, centers: Tensor, *rest: Any, u: float, eta: float) -> tuple[Tensor]:
    """A decision is right or wrong: no error, and nothing claimed next to a midpoint (backends must agree there all the same)."""
    return (torch.where(undecided(x, centers, u=u, eta=eta), math.inf, 0.0),)


def exact(*args: Any, u: float, eta: float) -> tuple[float]:
    """Moves of bits: no error."""
    return (0.0,)


def _cells(x: Tensor, centers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values, c = split_rows(x, centers)
    codes = cell_codes(values, c)
    return values, codes, values - c.gather(1, codes)


def prox_weights(x: Tensor, centers: Tensor, strength: Tensor, norm: str, *, u: float, eta: float) -> tuple[Tensor]:
    """gap = y - q is off by u |gap|.

    l1: y - t rounds once; whether |gap| <= t may be decided wrongly within u |gap| of equality: u (|gap| + |result|).
    l2: share = t / (0.5 + t) is off by 2u, the product by u: u (4 |gap| share + |result|).
    Both results lie between y and q. Nothing is claimed where y - q overflows.
    """
    values, _, gap = _cells(x, centers)
    size = gap.abs()
    moved = torch.maximum(values.abs(), (values - gap).abs())
    t = column(strength, like=values)
    share = t / (0.5 + t)
    bound = u * ((size if norm == "l1" else 4 * size * share) + moved) + 2 * eta
    bound = torch.where(size * (1 + u) > largest_number(u), math.inf, bound).reshape(x.shape)
    bound = torch.where(torch.isfinite(x), bound, math.inf if norm == "l2" else 0.0)  # inf - inf is not a number
    return (torch.where(undecided(x, centers, u=u, eta=eta), math.inf, bound),)


def _cell_sum_bound(terms: Tensor, codes: Tensor, centers: Tensor, u: float, per_term: float = 0.0) -> Tensor:
    """(n_k + per_term) u sum|terms| over each cell; nothing claimed where that sum overflows."""
    m = centers.shape[-1]
    total = cell_total(terms.abs(), codes, m)
    count = cell_total(torch.ones_like(terms), codes, m)
    bound = torch.where(total > largest_number(u), math.inf, (count + per_term) * u * total)
    return bound.reshape(centers.shape)


def hard_quantize_backward(
    grad: Tensor, x: Tensor, centers: Tensor, straight_through: bool, *, u: float, eta: float
) -> tuple[float, Tensor]:
    """grad_x is a copy; grad_c_k sums n_k terms in any order: n_k u sum |g| over the cell."""
    values, c = split_rows(x, centers)
    return 0.0, _cell_sum_bound(grad.reshape(values.shape), cell_codes(values, c), centers, u)


def dequantize_backward(grad: Tensor, codes: Tensor, centers: Tensor, *, u: float, eta: float) -> tuple[Tensor]:
    """Sums over each code, as in hard_quantize_backward."""
    rows = centers.reshape(-1, centers.shape[-1]).shape[0]
    index = codes.reshape(rows, codes.numel() // rows).long()
    return (_cell_sum_bound(grad.reshape(index.shape), index, centers, u),)


def distance(x: Tensor, centers: Tensor, norm: str, *, u: float, eta: float) -> tuple[Tensor]:
    """N terms |gap| off by u, or gap^2 off by 3u, and N u sum|terms| for adding them in any order.

    Next to a midpoint the other center may be taken, whose gap differs by 2 |x - t| <= 8u |t|, |t| about |x|.
    """
    values, _, gap = _cells(x, centers)
    near = undecided(x, centers, u=u, eta=eta).reshape(values.shape)
    size, other = gap.abs(), torch.where(near, 9 * u * values.abs() + 4 * eta, 0.0)
    if norm == "l1":
        terms, flipped = size, other
    else:
        terms, flipped = size * size, other * (2 * size + other)
    total = terms.sum()
    bound = (values.numel() + 3) * u * total + flipped.sum() + values.numel() * eta
    return (torch.where(total > largest_number(u), math.inf, bound),)


def distance_backward(
    grad: Tensor, x: Tensor, centers: Tensor, norm: str, *, u: float, eta: float
) -> tuple[Tensor | float, Tensor]:
    """grad sign(gap) rounds nowhere; 2 grad gap rounds twice (2u). grad_c sums them over each cell.

    The sign of a gap is exact: floats a and b differ in float arithmetic where they differ at all. Nothing is claimed
    where 2 gap or a sum overflows.
    """
    values, codes, gap = _cells(x, centers)
    pull = grad * (gap.sign() if norm == "l1" else 2 * gap)
    if norm == "l2":
        pull = torch.where(2 * gap.abs() * (1 + u) > largest_number(u), math.inf, pull)
    bound_x = torch.where(pull.abs() > largest_number(u), math.inf, (3 * u * pull.abs() if norm == "l2" else 0.0) + eta)
    return bound_x.reshape(x.shape), _cell_sum_bound(pull, codes, centers, u, per_term=3) + values.shape[1] * eta


def prox_centers(
    centers: Tensor, x: Tensor, strength: Tensor, norm: str, method: str, at: Tensor | None, *, u: float, eta: float
) -> tuple[Tensor]:
    """Per center, then the largest of the row, because sorting moves no value further than that.

    l1: results are mu + t k for an integer k, |k| <= n_k, or a member: the candidates are off by 2u (|mu| + t n_k), and the
    proximal map of a convex function moves by no more than its argument does. The largest candidate bounds them all.
    l2: mu + sum (x - mu) / (1/(2t) + n): n_k u sum|x - mu| for the sum, u each for its terms, 3u for the quotient, u for the
    final addition. Nothing is claimed where t n_k or the sum overflows: strength times a count has left the domain.
    """
    values, mu = split_rows(x, centers)
    codes = cell_codes(values, split_rows(x, centers if at is None else at)[1])
    t = column(strength, like=mu)
    m = mu.shape[1]
    count = cell_total(torch.ones_like(values), codes, m)
    if norm == "l1":
        bound = 2 * u * (mu.abs() + t * count)
        reach = t * count + mu.abs()
    else:
        gaps = cell_total((values - mu.gather(1, codes)).abs(), codes, m)
        moved = gaps / (0.5 / t + count.clamp(min=1))
        bound = u * ((count + 5) * moved + mu.abs())
        reach = gaps
    bound = torch.where(
        (reach > largest_number(u)).any(1, keepdim=True), math.inf, bound.amax(1, keepdim=True) + 2 * eta
    )
    return (bound.expand_as(mu).reshape(centers.shape),)


def init_centers(
    x: Tensor, levels: int, num_groups: int, method: str, weights: Tensor | None, *, u: float, eta: float
) -> tuple[Tensor]:
    """linspace and quantile: (a (1 - w) + b w), w off by u: 5u max|x|.

    signed_mean: n additions and a quotient, (n + 1) u max|x|; nothing is claimed where its sum overflows.
    kmeans: of the squared error, which is what `objective` gives, since optima may tie. Either side is a partition chosen by
    float64 sums about the mean, off by n u64 of W, W A and W A^2 for A = max|x - mean| and W the sum of weights; so is a
    run's error second - first^2 / weight by 8n u64 W A^2, in each of `levels` runs, and by as much at each of 2 log n
    choices on the way. A center rounded by u |c| adds W (u max|x|)^2.
    """
    values = x.reshape(num_groups, -1)
    most, n = values.abs().amax(1, keepdim=True), values.shape[1]
    if method == "kmeans":
        w = torch.ones_like(values) if weights is None else weights.reshape(values.shape)
        mass, mean = w.sum(1), (w * values).sum(1, keepdim=True) / w.sum(1, keepdim=True)
        wide = ROUNDOFF[torch.float64]
        reach = (values - mean).abs().amax(1) + wide * most[:, 0]
        chain = 2 * levels * (8 * n) * (2 * math.log2(n + 1) + 2)
        return (chain * wide * mass * reach.square() + mass * (2 * u * most[:, 0] + 2 * eta).square(),)
    bound = {"linspace": 5, "quantile": 5, "signed_mean": n + 1}[method] * u * most + 2 * eta
    if method == "signed_mean":
        bound = torch.where(values.abs().sum(1, keepdim=True) > largest_number(u), math.inf, bound)
    bound = bound.expand(num_groups, levels)
    return (bound[0] if num_groups == 1 else bound,)
