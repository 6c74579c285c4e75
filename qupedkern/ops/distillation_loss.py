"""distillation_loss: temperature-scaled KL divergence from a teacher's to a student's predictions.

The op returns statistics [N, 5] beside the loss, so that its gradient is one pass over the logits: per example, in the
compute type, max z and log sum exp(z - max) of the student's z = logits / T, the same two of the teacher's, and the KL.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._call import call
from ._checks import check_float, check_same_device
from ._define import define_op, differentiable, not_differentiable
from ._rows import compute_dtype, row_sum

STATISTICS = 5  # per example


def _prepare(student_logits: Any, teacher_logits: Any, temperature: Any = 1.0) -> tuple[Tensor, Tensor, float]:
    op = "distillation_loss"
    student = check_float(op, "student_logits", student_logits)
    teacher = check_float(op, "teacher_logits", teacher_logits)
    check_same_device(op, student_logits=student, teacher_logits=teacher)
    if student.shape != teacher.shape or student.dim() == 0 or student.shape[-1] == 0:
        shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise ValueError(f"{op}: student_logits and teacher_logits must both be [..., classes], got {shapes}")
    if student.dtype != teacher.dtype:
        raise TypeError(f"{op}: both logits must have one type, got {student.dtype} and {teacher.dtype}")
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"{op}: temperature must be a number, got {type(temperature).__name__}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"{op}: temperature must be positive and finite, got {temperature}")
    return student.contiguous(), teacher.contiguous(), float(temperature)


def _softened(logits: Tensor, temperature: float) -> Tensor:
    """[N, K] logits / T in the compute type; the reciprocal is rounded once, so that every backend subtracts the same maxima."""
    return logits.reshape(-1, logits.shape[-1]).to(compute_dtype(logits)) * (1 / temperature)


def _normalizers(z: Tensor) -> tuple[Tensor, Tensor]:
    """[N, 1]: max z and log sum exp(z - max), the two parts of the log of the softmax's denominator; NaN both without one."""
    top = z.detach().amax(-1, keepdim=True)  # softmax does not depend on what is subtracted
    log_sum = row_sum((z - top).exp())[:, None].log()
    return torch.where(log_sum.isnan(), log_sum.detach(), top), log_sum


def _weighted(p_w: Tensor, factor: Tensor) -> Tensor:
    """p_w factor, and 0 where p_w is 0: a class the teacher rules out counts for nothing, whatever the student says."""
    return torch.where(p_w == 0, 0.0, p_w * factor)


def _allocate(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    dtype, examples = compute_dtype(student), student.numel() // student.shape[-1]
    return student.new_empty((), dtype=dtype), student.new_empty((examples, STATISTICS), dtype=dtype)


@define_op(
    "distillation_loss(Tensor student_logits, Tensor teacher_logits, float temperature) -> (Tensor, Tensor)",
    allocate=_allocate,
    prepare=_prepare,
)
def reference(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    z, z_w = _softened(student_logits, temperature), _softened(teacher_logits, temperature)
    (top, log_sum), (top_w, log_sum_w) = _normalizers(z), _normalizers(z_w)
    log_p, log_pw = (z - top) - log_sum, (z_w - top_w) - log_sum_w
    divergence = row_sum(_weighted(log_pw.exp(), log_pw - log_p))[:, None]
    loss = row_sum(divergence.T).reshape(()) * (temperature**2 / max(z.shape[0], 1))
    return loss, torch.cat([top, log_sum, top_w, log_sum_w, divergence], dim=1)


@define_op(
    "distillation_loss_backward(Tensor grad, Tensor student_logits, Tensor teacher_logits, float temperature, "
    "Tensor statistics) -> (Tensor, Tensor)",
    allocate=lambda grad, student, teacher, temperature, statistics: (
        student.new_empty(student.shape),
        teacher.new_empty(teacher.shape),
    ),
)
def reference_backward(
    grad: Tensor, student_logits: Tensor, teacher_logits: Tensor, temperature: float, statistics: Tensor
) -> tuple[Tensor, Tensor]:
    z, z_w = _softened(student_logits, temperature), _softened(teacher_logits, temperature)
    top, log_sum, top_w, log_sum_w, divergence = statistics.split(1, dim=1)
    log_p, log_pw = (z - top) - log_sum, (z_w - top_w) - log_sum_w
    p_w = log_pw.exp()
    scale = grad * (temperature / max(z.shape[0], 1))
    to_student = scale * (log_p.exp() - p_w)
    to_teacher = scale * _weighted(p_w, (log_pw - log_p) - divergence)
    return (
        to_student.to(student_logits.dtype).reshape(student_logits.shape),
        to_teacher.to(teacher_logits.dtype).reshape(teacher_logits.shape),
    )


differentiable("distillation_loss", wrt=("student_logits", "teacher_logits"), statistics=1)
not_differentiable("distillation_loss_backward", "there is no second derivative")


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(p_w || p), averaged over the batch: p = softmax(student / T), p_w = softmax(teacher / T).

    Gradients per example of the batch of N: student T (p - p_w) / N;  teacher T p_w (log p_w - log p - KL) / N.

    student_logits, teacher_logits: [..., classes], one float type and device; everything before classes is the batch.
    temperature: T > 0, the same on both sides.  Detach the teacher where it must not learn.
    Returns a scalar tensor, float64 for float64 logits and float32 otherwise; an empty batch gives 0. A logit may be -inf, a
    class of probability 0: it counts for nothing in the teacher, and makes the loss infinite in the student alone.
    Raises TypeError or ValueError. Hinton et al. 2015 (arXiv:1503.02531), as coupled in QuPeD (arXiv:2107.13892).
    """
    return call("distillation_loss", *_prepare(student_logits, teacher_logits, temperature))[0]
