"""distillation_loss: temperature-scaled KL divergence from a teacher's to a student's predictions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._checks import check_float, check_same_device
from ._define import define_op, differentiable, not_differentiable
from ._rows import compute_dtype, row_sum


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


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Per example: log p and log p_w [N, K] at this temperature, and p_w (log p_w - log p) [N, K], 0 where p_w is."""
    dtype = compute_dtype(student)
    log_p, log_pw = (
        torch.log_softmax(z.reshape(-1, z.shape[-1]).to(dtype) / temperature, dim=-1) for z in (student, teacher)
    )
    p_w = log_pw.exp()
    return log_p, log_pw, torch.where(p_w > 0, p_w * (log_pw - log_p), 0.0)


@define_op(
    "distillation_loss(Tensor student_logits, Tensor teacher_logits, float temperature) -> Tensor",
    allocate=lambda student, teacher, temperature: student.new_empty((), dtype=compute_dtype(student)),
    prepare=_prepare,
)
def reference(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    _, _, terms = _divergence(student_logits, teacher_logits, temperature)
    examples = max(terms.shape[0], 1)
    return row_sum(terms.reshape(1, -1)).reshape(()) * (temperature**2 / examples)


@define_op(
    "distillation_loss_backward(Tensor grad, Tensor student_logits, Tensor teacher_logits, float temperature) -> (Tensor, Tensor)",
    allocate=lambda grad, student, teacher, temperature: (
        student.new_empty(student.shape),
        teacher.new_empty(teacher.shape),
    ),
)
def reference_backward(
    grad: Tensor, student_logits: Tensor, teacher_logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    log_p, log_pw, terms = _divergence(student_logits, teacher_logits, temperature)
    p, p_w = log_p.exp(), log_pw.exp()
    scale = grad * (temperature / max(terms.shape[0], 1))
    to_student = scale * (p - p_w)
    to_teacher = scale * (terms - p_w * terms.sum(-1, keepdim=True))
    return (
        to_student.to(student_logits.dtype).reshape(student_logits.shape),
        to_teacher.to(teacher_logits.dtype).reshape(teacher_logits.shape),
    )


differentiable("distillation_loss", wrt=("student_logits", "teacher_logits"))
not_differentiable("distillation_loss_backward", "there is no second derivative")


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(p_w || p), averaged over the batch: p = softmax(student / T), p_w = softmax(teacher / T).

    Gradients per example of the batch of N: student T (p - p_w) / N;  teacher T p_w (log p_w - log p - KL) / N.

    student_logits, teacher_logits: [..., classes], one float type and device; everything before classes is the batch.
    temperature: T > 0, the same on both sides.  Detach the teacher where it must not learn.
    Returns a scalar tensor, float64 for float64 logits and float32 otherwise; an empty batch gives 0.
    Raises TypeError or ValueError. Hinton et al. 2015 (arXiv:1503.02531), as coupled in QuPeD (arXiv:2107.13892).
    """
    return torch.ops.qupedkern.distillation_loss(*_prepare(student_logits, teacher_logits, temperature))
