"""Bounds of quped_step and center_step: the error is carried through the formula, operation by operation.

Conventions as in tolerances.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qupedkern.ops import OPS
from qupedkern.ops._rows import column, midpoints, split_rows
from qupedkern.ops.assign import cell_codes

from .bounds import ROUNDOFF
from .row_tolerances import hard_quantize_backward, undecided
from .soft_tolerances import soft_quantize_backward


@dataclass(frozen=True)
class Rounded:
    """A value, how far a kernel's may be from it, and the arithmetic: each result rounds by u of it, or by eta.

    A fused multiply-add rounds once where these round twice, so the bounds hold with and without it.
    """

    value: Tensor
    error: Tensor
    u: float
    eta: float

    def _rounded(self, value: Tensor, error: Tensor) -> Rounded:
        error = error + self.u * (value.abs() + error) + self.eta
        largest = torch.finfo(torch.float64 if self.u == ROUNDOFF[torch.float64] else torch.float32).max
        error = torch.where(value.abs() + error > largest, math.inf, error)  # nothing is claimed past an overflow
        return Rounded(value, error.nan_to_num(nan=math.inf, posinf=math.inf), self.u, self.eta)

    def constant(self, number: float) -> Rounded:
        """A Python number as the kernel's type holds it."""
        value = torch.full_like(self.value, number)
        return Rounded(value, self.u * value.abs(), self.u, self.eta)

    def __add__(self, other: Rounded) -> Rounded:
        return self._rounded(self.value + other.value, self.error + other.error)

    def __sub__(self, other: Rounded) -> Rounded:
        return self._rounded(self.value - other.value, self.error + other.error)

    def __mul__(self, other: Rounded) -> Rounded:
        cross = self.value.abs() * other.error + other.value.abs() * self.error + self.error * other.error
        return self._rounded(self.value * other.value, cross)

    def __truediv__(self, other: Rounded) -> Rounded:
        value = self.value / other.value
        size = (other.value.abs() - other.error).clamp(min=0)
        return self._rounded(value, (self.error + value.abs() * other.error) / size)

    def sqrt(self) -> Rounded:
        """|sqrt(a + e) - sqrt(a)| <= min(sqrt(e), e / sqrt(a))."""
        root = self.value.sqrt()
        return self._rounded(root, torch.minimum(self.error.sqrt(), self.error / root))


def _optimizer(
    x: Rounded, g: Rounded, first: Rounded | None, second: Rounded | None, optimizer: str, lr: float, decay: float,
    beta1: float, beta2: float, eps: float, nesterov: bool, step: int,
) -> tuple[Rounded, Rounded | None, Rounded | None]:  # fmt: skip
    """The formulas of torch.optim's SGD and Adam on values with errors."""
    if decay != 0 and optimizer != "adamw":
        g = g + x.constant(decay) * x
    if optimizer == "sgd":
        if first is not None:
            first = g if step == 1 else first * x.constant(beta1) + x.constant(1 - beta2) * g
            g = g + x.constant(beta1) * first if nesterov else first
        return x - x.constant(lr) * g, first, None
    assert first is not None
    assert second is not None
    if decay != 0 and optimizer == "adamw":
        x = x * x.constant(1 - lr * decay)
    weight = x.constant(1 - beta1)
    # Past one half a linear interpolation starts from its other end; the larger of both bounds holds for either.
    first, other = first + weight * (g - first), g - x.constant(beta1) * (g - first)
    first = Rounded(first.value, torch.maximum(first.error, other.error), x.u, x.eta)
    second = x.constant(beta2) * second + x.constant(1 - beta2) * g * g
    size = second.sqrt() / x.constant((1 - beta2**step) ** 0.5) + x.constant(eps)
    return x + x.constant(-lr / (1 - beta1**step)) * first / size, first, second


def _prox(y: Rounded, c: Tensor, strength: Tensor, norm: str) -> tuple[Tensor, Tensor, Tensor]:
    """Where the cell of y is in doubt, and the bound of the moved weight; y [G, n], c [G, m].

    Within a cell the map moves no two points apart, so y's error passes through; it adds the roundings of prox_weights. A
    weight that is snapped for certain is its center exactly. Where |y - q| may be on either side of t the results differ
    by that doubt.
    """
    u, eta = y.u, y.eta
    t = midpoints(c)[:, None, :]
    doubt = ((y.value[..., None] - t).abs() <= y.error[..., None] + 4 * u * t.abs() + 2 * eta).any(-1)
    q = c.gather(1, cell_codes(y.value, c))
    gap = (y.value - q).abs()
    moved = torch.maximum(y.value.abs(), q.abs())
    pull = strength.expand_as(gap)
    share = pull / (0.5 + pull)
    bound = y.error + u * ((gap if norm == "l1" else 4 * gap * share) + moved) + 2 * eta
    if norm == "l1":
        slack = y.error + 2 * u * gap + 2 * eta
        bound = torch.where(gap + slack <= pull, 0.0, bound + torch.where(gap <= pull + slack, 2 * slack, 0.0))
    bound = torch.where(y.error.isinf() | ~y.value.isfinite(), math.inf, bound)
    return doubt | bound.isinf(), bound, q


def _one(
    x: Tensor, g: Rounded, first: Any, second: Any, c: Tensor, t: Tensor, norm: str, clamp: bool, options: Any
) -> Any:
    """Bounds of one tensor: x, first, second, counts, sums, distance, codes."""
    start = Rounded(x.clone(), torch.zeros_like(x), g.u, g.eta)
    y, first, second = _optimizer(start, g, first, second, *options)
    rows = split_rows(y.value, c)
    shaped = Rounded(rows[0], y.error.reshape(rows[0].shape), y.u, y.eta)
    doubt, bound, q = _prox(shaped, rows[1], column(t, like=rows[1]), norm)
    value = OPS["prox_weights"].reference(y.value, c, t, norm).reshape(rows[0].shape)
    value = value.clamp(-1, 1) if clamp else value
    mid = midpoints(rows[1])[
        :, None, :
    ]  # the new weight's cell: that of a clamped one, or of a center beside its midpoint
    near = (value[..., None] - mid).abs() <= bound[..., None] + 4 * y.u * mid.abs() + 2 * y.eta
    doubt = doubt | near.any(-1)
    q = rows[1].gather(1, cell_codes(value, rows[1]))
    gap = (value - q).abs()
    claimed = torch.where(doubt, math.inf, bound)
    on_edge = doubt | (gap <= claimed) & (claimed > 0)  # may lie on either side of its center, or on it
    m = rows[1].shape[1]
    undecided, sided = doubt.sum(1, keepdim=True).double(), on_edge.sum(1, keepdim=True).double()
    counts = torch.stack([undecided.expand(-1, m), sided.expand(-1, m), sided.expand(-1, m)], 1)
    n = value.shape[1]
    u, eta = y.u, y.eta
    terms = (claimed + u * gap).sum(1, keepdim=True) + n * u * gap.sum(1, keepdim=True) + n * eta
    sums = terms.nan_to_num(nan=math.inf, posinf=math.inf).expand(-1, m)
    error = claimed + u * gap + eta
    change = error if norm == "l1" else 2 * gap * error + error * error + u * gap * gap + eta
    size = gap if norm == "l1" else gap * gap
    distance = (change.sum() + value.numel() * u * (size + change).sum()).nan_to_num(nan=math.inf, posinf=math.inf)
    largest = torch.finfo(torch.float64 if u == ROUNDOFF[torch.float64] else torch.float32).max
    distance = torch.where(size.sum() + distance > largest, math.inf, distance) if size.numel() else distance
    codes = torch.where(doubt, math.inf, 0.0).reshape(x.shape)
    states = [state.error for state in (first, second) if state is not None]
    return claimed.reshape(x.shape), states, counts.reshape(*c.shape[:-1], 3, m), sums.reshape(c.shape), distance, codes


def quped_step(
    x: list[Tensor], grad: list[Tensor], quantized_grad: list[Tensor], first: list[Tensor], second: list[Tensor],
    centers: list[Tensor], sharpness: list[Tensor], strength: list[Tensor], chain: str, optimizer: str, norm: str,
    lr: float, weight_decay: float, beta1: float, beta2: float, eps: float, nesterov: bool, step: int, clamp: bool,
    codes: bool, pack_bits: int, *, u: float, eta: float,
) -> tuple[Any, ...]:  # fmt: skip
    """The total gradient's error, the optimizer's, the prox's, and what they make doubtful: cells, sides, sums.

    A weight whose error reaches a midpoint may take either center: nothing is claimed about it, nor about the sums of its
    row; counts may be off by the number of such weights, those of a side also by weights that may lie on their center.
    """
    options = (optimizer, lr, weight_decay, beta1, beta2, eps, nesterov, step)
    center_bounds, per_tensor = [], []
    for i, (v, c) in enumerate(zip(x, centers, strict=True)):

        def rounded(tensor: Tensor, error: Tensor | float = 0.0) -> Rounded:
            return Rounded(tensor, torch.as_tensor(error, dtype=tensor.dtype).expand_as(tensor), u, eta)

        total = rounded(grad[i]) if grad else None
        if chain != "none":
            if chain == "soft":
                args = (quantized_grad[i], v, c, sharpness[i])
                value = OPS["soft_quantize_backward"].reference(*args)[0]
                bound_x, bound_c = soft_quantize_backward(*args, u=u, eta=eta)
            else:
                value, bound_x = quantized_grad[i], torch.zeros_like(v)
                _, bound_c = hard_quantize_backward(quantized_grad[i], v, c, False, u=u, eta=eta)
                beside = undecided(v, c, u=u, eta=eta).reshape(split_rows(v, c)[0].shape).any(1, keepdim=True)
                bound_c = torch.where(beside, math.inf, bound_c.reshape(beside.shape[0], -1)).reshape(c.shape)
            center_bounds.append(bound_c)
            if chain != "hard":
                chained = rounded(value, bound_x)
                total = chained if total is None else total + chained
        assert total is not None
        moments = (rounded(first[i]) if first else None, rounded(second[i]) if second else None)
        per_tensor.append(_one(v, total, *moments, c, strength[i], norm, clamp, options))
    columns = [list(column) for column in zip(*per_tensor, strict=True)] or [[] for _ in range(6)]
    written, kept, counts, sums, distances, coded = columns
    if codes and pack_bits:  # a code in doubt leaves its byte, and a byte has neighbours: all or nothing
        coded = [math.inf if bool(bound.isinf().any()) else 0.0 for bound in coded]
    return (
        *center_bounds,
        *counts,
        *(sums if norm == "l2" else ()),
        torch.stack(list(distances)) if distances else 0.0,
        *(coded if codes else ()),
        *written,
        *(states[0] for states in kept if states),
        *(states[1] for states in kept if len(states) > 1),
    )


def center_step(
    centers: list[Tensor], center_grad: list[Tensor], counts: list[Tensor], sums: list[Tensor], strength: list[Tensor],
    rate: Tensor, norm: str, method: str, clip: float, *, u: float, eta: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Each center through its formula, then the largest of the row: sorting moves no value further than that."""
    bounds = []
    for i, c in enumerate(centers):
        old = Rounded(c.clone(), torch.zeros_like(c), u, eta)
        gradient = center_grad[i].clamp(-clip, clip) if center_grad else torch.zeros_like(c)
        clipped = Rounded(gradient, u * gradient.abs(), u, eta)
        moved = old - Rounded(rate[i].expand_as(c), torch.zeros_like(c), u, eta) * clipped
        if method != "none":
            t = Rounded(strength[i].reshape(*[-1] * (c.dim() - 1), 1).expand_as(c), torch.zeros_like(c), u, eta)
            members, above, below = (Rounded(k.double(), u * k.double().abs(), u, eta) for k in counts[i].unbind(-2))
            if norm == "l2":
                total = Rounded(sums[i], torch.zeros_like(c), u, eta) + members * (old - moved)
                once = Rounded(members.value.clamp(min=1), members.error, u, eta)
                share = t.constant(0.5) / t + once
                still = torch.isinf(share.value)  # t = 0: the quotient is 0
                step = total / Rounded(torch.where(still, 1.0, share.value), share.error, u, eta)
                zero = torch.zeros_like(c)
                moved = moved + Rounded(
                    torch.where(still, zero, step.value), torch.where(still, zero, step.error), u, eta
                )
            else:
                moved = moved + t * (above - below)
        error = moved.error.amax(-1, keepdim=True).expand_as(c)
        bounds.append(error)
    return tuple(bounds)
