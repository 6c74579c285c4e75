"""prox_centers: the proximal map of the centers, given the weights that are their members."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._call import call
from ._checks import check_centers, check_choice, check_norm, check_per_row, check_same_device, check_x_centers
from ._define import define_op, not_differentiable
from ._rows import cell_sum, column, split_rows
from .assign import cell_codes

METHODS = ("exact", "counted", "authors")


def _prepare(
    centers: Any, x: Any, strength: Any, norm: str = "l1", method: str = "exact", at: Any = None
) -> tuple[Tensor, Tensor, Tensor, str, str, Tensor | None]:
    norm = check_norm("prox_centers", norm)
    method = check_choice("prox_centers", "method", method, METHODS)
    x, centers = check_x_centers("prox_centers", x, centers)
    if at is not None:
        at = check_centers("prox_centers", at, x.numel(), name="at").to(centers.dtype)
        check_same_device("prox_centers", x=x, at=at)
        if at.shape != centers.shape:
            shapes = f"{tuple(centers.shape)}, got {tuple(at.shape)}"
            raise ValueError(f"prox_centers: at must have the shape of centers, {shapes}")
    strength = check_per_row("prox_centers", "strength", strength, x, centers)
    return centers, x, strength, norm, method, at


def _l1_exact(mu: Tensor, values: Tensor, codes: Tensor, t: Tensor) -> Tensor:
    """argmin_c 1/2 (c - mu_j)^2 + t sum_{S_j} |x_i - c| for every cell at once: mu [G, m], values and codes [G, n].

    With the members s_1 <= .. <= s_n of a cell in order, v_k = mu + t (n - 2k) falls with k and s_{k+1} rises, so
    k* = #{k : v_k > s_{k+1}} is a count, and the minimiser is max(v_k*, s_k*): the consistent interval, else the kink.
    """
    length = values.shape[1]
    order = values.argsort(dim=1, stable=True)
    order = order.gather(1, codes.gather(1, order).argsort(dim=1, stable=True))  # by cell, then by value
    s, cell = values.gather(1, order), codes.gather(1, order)
    count = torch.zeros_like(mu, dtype=torch.int64).scatter_add_(1, codes, torch.ones_like(codes))
    start = count.cumsum(1) - count
    rank = torch.arange(length, device=mu.device) - start.gather(1, cell)  # k of the interval left of s_{k+1}
    v = mu.gather(1, cell) + t * (count.gather(1, cell) - 2 * rank)
    k = torch.zeros_like(count).scatter_add_(1, cell, (v > s).long())
    kink = s.gather(1, (start + k - 1).clamp(min=0, max=max(length - 1, 0))) if length else mu
    at_interval = mu + t * (count - 2 * k)
    return torch.where(k > 0, torch.maximum(at_interval, kink), at_interval)


@define_op(
    "prox_centers(Tensor centers, Tensor x, Tensor strength, str norm, str method, Tensor? at) -> Tensor",
    allocate=lambda centers, x, strength, norm, method, at: centers.new_empty(centers.shape),
    prepare=_prepare,
)
def reference(centers: Tensor, x: Tensor, strength: Tensor, norm: str, method: str, at: Tensor | None) -> Tensor:
    values, mu = split_rows(x, centers)
    _, old = split_rows(x, centers if at is None else at)
    t = column(strength, like=mu)
    codes = cell_codes(values, old)
    if norm == "l2":
        n = torch.zeros_like(mu, dtype=torch.int64).scatter_add_(1, codes, torch.ones_like(codes))
        # mu + sum (x - mu) 2t / (1 + 2tn), in the form that neither overflows nor moves at t = 0
        moved = mu + cell_sum(values - mu.gather(1, codes), codes, mu.shape[1]) / (0.5 / t + n.clamp(min=1))
    elif method == "exact":
        moved = _l1_exact(mu, values, codes, t)
    else:
        own = old.gather(1, codes)
        side = (values > own).long() - (values < own).long()
        surplus = torch.zeros_like(mu, dtype=torch.int64).scatter_add_(1, codes, side)
        moved = mu + t * surplus if method == "counted" else mu - t * surplus
    return moved.sort(dim=1).values.to(centers.dtype).reshape(centers.shape)


not_differentiable("prox_centers", "it is a step of an optimizer and has no gradient; call it under torch.no_grad()")


def prox_centers(
    centers: Tensor,
    x: Tensor,
    strength: float | Tensor,
    norm: str = "l1",
    method: str = "exact",
    at: Tensor | None = None,
) -> Tensor:
    """Proximal map of t R(x, .) at mu = centers, the members S_j of each cell of `at` held fixed; rows come back sorted.

    l2:            c_j = (mu_j + 2t sum_{S_j} x) / (1 + 2t n_j), for every method
    l1, "exact":   c_j = argmin_c 1/2 (c - mu_j)^2 + t sum_{S_j} |x_i - c|, by a selection on the sorted members
    l1, "counted": c_j = mu_j + t (#{x_i > at_j} - #{x_i < at_j}) over S_j; cheap, but R may rise
    l1, "authors": "counted" with the opposite sign, as in the published code; it increases R and is here for comparison

    centers: [m] or [G, m], ascending rows.  x: [...] the weights.  strength: t >= 0 finite, a number, [1] or [G].
    at: the centers whose cells define the members, shaped like centers (default: centers). Algorithm 1 passes the old ones.
    A cell without members keeps mu_j. Returns new centers, shaped like `centers`, in the compute type.
    Raises TypeError or ValueError.
    QuPeD, Ozkara et al. 2021 (arXiv:2107.13892), Algorithm 1.
    """
    return call("prox_centers", *_prepare(centers, x, strength, norm, method, at))
