"""Bounds of distillation_loss and its gradient. Conventions as in tolerances.py."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .bounds import EXP_FLOOR, largest_number


def _softened(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return tuple(z.reshape(-1, z.shape[-1]) / temperature for z in (student, teacher))  # type: ignore[return-value]


def _finite_size(*values: Tensor) -> Tensor:
    """The largest finite magnitude of each row, [N, 1]; 0 without one. Infinite logits are exact."""
    rows = torch.cat(values, dim=1)
    return torch.where(torch.isfinite(rows), rows.abs(), 0.0).amax(-1, keepdim=True)


def _no_class(p: Tensor, factor: Tensor) -> Tensor:
    return torch.where(p == 0, 0.0, p * factor)


def _most_likely(log_p: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """Where e, the error of log p, is no longer small, and the largest p it leaves possible: first order holds elsewhere only."""
    rough = (e > 0.01).expand_as(log_p)
    return rough, torch.where(rough, torch.maximum(log_p.exp(), (log_p + e).clamp(max=0.0).exp()), log_p.exp())


def distillation_loss(
    student: Tensor, teacher: Tensor, temperature: float, *, u: float, eta: float
) -> tuple[Tensor, Tensor]:
    """z = logits (1 / T) is off by 2u|z| (so is max z), z - max by u 2a more, a = max|z| of the example.

    log p moves by no more than twice the largest error of z - max, the part that max itself adds cancelling: 8ua; exp adds
    3u, the sum of K of them K u (what falls below the normal numbers is less), log sum and the last difference
    u (2a + 2 log K): e = u (10a + K + 3 + 2 log K). log sum exp(z - max) is off by less than e, max by 2u|max|.
    KL = sum p_w (log p_w - log p) = sum p_w ((z_w - max_w) - (z - max)) - (log sum_w - log sum), whichever is summed: p_w is
    off by e + 2u relative, the bracket by 2e + u; (K + 4) u of the sum of |terms| and of |log sum_w - log sum|. A p_w below
    the normal numbers may be 0: FLOOR times the bracket. Loss: T^2 / N times their sum, (N + 5) u more.
    Nothing is claimed where 2a, the reach of z - max, overflows, nor of the loss where the sum of the divergences does.
    """
    z, z_w = _softened(student, teacher, temperature)
    log_p, log_pw = (torch.log_softmax(v, -1) for v in (z, z_w))
    top, top_w = z.amax(-1, keepdim=True), z_w.amax(-1, keepdim=True)
    log_sum, log_sum_w = (torch.logsumexp(v - t, -1, keepdim=True) for v, t in ((z, top), (z_w, top_w)))
    examples, classes = z.shape
    reach = _finite_size(z, z_w)
    e = u * (10 * reach + classes + 3 + 2 * math.log(classes))
    p_w, ratio = log_pw.exp(), (log_pw - log_p).abs()
    rough, most = _most_likely(log_pw, e)
    vanishing = rough | (p_w <= 2 * EXP_FLOOR[u])
    gone = torch.isinf(ratio) & (most > 0) & vanishing  # the term is infinite, or 0 where p_w is
    size = torch.where(torch.isinf(ratio), 0.0, _no_class(p_w, ratio))  # an infinite term is infinite exactly
    floors = torch.where((p_w == 0) | torch.isinf(ratio), 0.0, EXP_FLOOR[u] * ratio)
    far = _no_class(most, torch.where(torch.isinf(ratio), 0.0, ratio) + 2 * e)
    errors = torch.where(rough, far, size * (e + 4 * u) + p_w * (2 * e)) + floors
    total = size.sum(-1, keepdim=True) + torch.where(log_sum_w == log_sum, 0.0, (log_sum_w - log_sum).abs())
    off = errors.sum(-1, keepdim=True) + (classes + 4) * u * total + (classes + 1) * eta
    unclaimed = gone.any(-1, keepdim=True) | (2 * reach > largest_number(u))
    off = torch.where(unclaimed, math.inf, off)
    loss = (off.sum() + (examples + 5) * u * total.sum()) * temperature**2 / max(examples, 1) + 2 * eta
    loss = torch.where(size.sum() > largest_number(u), math.inf, loss)
    tops = [2 * u * torch.where(torch.isinf(t), 0.0, t.abs()) + 2 * eta for t in (top, top_w)]
    logs = torch.where(2 * reach > largest_number(u), math.inf, e.expand_as(top))
    return loss, torch.cat([tops[0], logs, tops[1], logs, off], dim=1)


def distillation_loss_backward(
    grad: Tensor, student: Tensor, teacher: Tensor, temperature: float, statistics: Tensor, *, u: float, eta: float
) -> tuple[Tensor, Tensor]:
    """Student: g T / N (p - p_w).  Teacher: g T / N p_w (log p_w - log p - KL). The statistics are what was given.

    log p = (z - max) - log sum: 2u|z|, then u of each difference, of which the first is at most |log p| + log sum:
    e = u (2|z| + 2|log p| + log sum), for each class its own. exp: e + 3u relative, and FLOOR where it may give 0; 4u for g T / N
    and its product, u for each difference. Nothing is claimed where a difference or g T overflows, where p does because huge
    statistics were rounded, nor where p_w may be 0 beside an infinite or undefined bracket.
    """
    z, z_w = _softened(student, teacher, temperature)
    top, log_sum, top_w, log_sum_w, divergence = statistics.split(1, dim=1)
    log_p, log_pw = (z - top) - log_sum, (z_w - top_w) - log_sum_w
    e, e_w = (
        torch.where(torch.isinf(v), 0.0, u * (2 * v.abs() + 2 * logs.abs() + total.abs()))
        for v, logs, total in ((z, log_p, log_sum), (z_w, log_pw, log_sum_w))
    )
    p, p_w = log_p.exp(), log_pw.exp()
    scale = grad.abs() * temperature / max(z.shape[0], 1)
    floor = EXP_FLOOR[u]
    (rough, most), (rough_w, most_w) = _most_likely(log_p, e), _most_likely(log_pw, e_w)
    p_off, pw_off = (
        torch.where(far, top, _no_class(q, error + 3 * u))
        for far, top, q, error in ((rough, most, p, e), (rough_w, most_w, p_w, e_w))
    )
    to_student = p_off + pw_off + 2 * floor + 5 * u * (p - p_w).abs()
    pull = log_pw - log_p - divergence
    bracket = e + e_w + 2 * u * (log_pw - log_p).abs() + u * pull.abs()
    to_teacher = torch.where(
        rough_w, _no_class(most_w, bracket + pull.abs()), _no_class(p_w, bracket + (e_w + 8 * u) * pull.abs())
    ) + torch.where(p_w == 0, 0.0, floor * pull.abs())
    largest = largest_number(u)
    steep = (2 * _finite_size(z, z_w, statistics) > largest) | torch.isinf(p) | torch.isinf(p_w)
    gone = ~torch.isfinite(pull) & (most_w > 0) & (rough_w | (p_w <= 2 * floor))
    unclaimed = (steep, steep | gone | (pull.abs() > largest) & torch.isfinite(pull))
    results = []
    for part, without in zip((to_student, to_teacher), unclaimed, strict=True):
        bound = torch.where(
            without | (grad.abs() * max(temperature, 1.0) > largest), math.inf, scale * part + 4 * eta * (1 + scale)
        )
        results.append(bound.reshape(student.shape))
    return results[0], results[1]
