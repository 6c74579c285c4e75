"""Losses of one client, or of each client of a stack: [] for logits [B, classes], [K] for logits [K, B, classes]."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import qupedkern as qk


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """The mean cross-entropy of each client's batch. y: int64 [B] or [K, B]."""
    if logits.dim() == 2:
        return F.cross_entropy(logits, y)
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean(1)


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """qk.distillation_loss of each client's batch, in one call."""
    if student.dim() == 2:
        return qk.distillation_loss(student, teacher, temperature)
    return _Distillations.apply(student, teacher, temperature)


def squared_norm(values: Tensor, size: int) -> Tensor:
    """|values|^2: [] for one client, and [K] for a stack of K = size, whose values are joined along the first dimension."""
    return values.square().sum() if size == 1 else values.square().view(size, -1).sum(1)


def total_loss(losses: Tensor) -> Tensor:
    """The scalar to differentiate: clients share no parameter, so each gets the gradient of its own loss."""
    return losses if losses.dim() == 0 else losses.sum()


def mean_losses(losses: list[Tensor]) -> tuple[float, tuple[float, ...]]:
    """(mean over the steps, and clients; each client's of a stack): an Update's `loss` and `each`."""
    each = torch.stack(losses).mean(0).cpu()  # at once: each number fetched by itself waits for a GPU
    return float(each.mean()), tuple(each.tolist()) if each.dim() else ()


class _Distillations(torch.autograd.Function):
    """The op averages over all K B examples; a client's own mean is K times its share of that."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        ctx.temperature = temperature
        student, teacher = student.contiguous(), teacher.contiguous()
        _, statistics = torch.ops.qupedkern.distillation_loss(student, teacher, temperature)
        ctx.save_for_backward(student, teacher, statistics)
        divergences = statistics[:, -1].view(student.shape[:2])  # KL of each example
        return divergences.mean(1) * temperature**2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        student, teacher, statistics = ctx.saved_tensors
        whole = grads[0].new_full((), len(student))
        backward = torch.ops.qupedkern.distillation_loss_backward
        to_student, to_teacher = backward(whole, student, teacher, ctx.temperature, statistics)
        own = grads[0].view(-1, 1, 1)
        return to_student * own, to_teacher * own, None
