"""distillation_loss in Triton, and its gradient: a program an example, its classes, up to 4,096, in registers.

Reads both logits once and writes five numbers an example; a second kernel adds the divergences in order. The
gradient is one pass over the logits with those numbers. Small: bound by its launches, of which there are two and one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._math import narrow, widen

_MOST = 4096  # classes a program holds at once

LOG2_E_HIGH = tl.constexpr(1.44269502162933349609375)  # log2 e = high + low, high in float32
LOG2_E_LOW = tl.constexpr(1.925963033500011e-08)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _exp(z):
    """exp(z) = 2^(z log2 e), the whole part split off: the argument of exp2 is small and keeps its bits."""
    whole = tl.floor(z * LOG2_E_HIGH + 0.5)
    rest = tl.fma(z, LOG2_E_HIGH, -whole) + z * LOG2_E_LOW
    value = tl.exp2(rest) * tl.exp2(whole)
    return tl.where(tl.abs(z) < 200.0, value, tl.where(z > 0, float("inf"), tl.where(z < 0, 0.0, z)))


@triton.jit
def _log(value):
    return tl.log2(value) * LN_2


@triton.jit
def _softened(logits, inside, reciprocal):
    """float32 logits / T of an example, -inf past its classes."""
    return tl.where(inside, widen(tl.load(logits, mask=inside, other=0.0)) * reciprocal, float("-inf"))


@triton.jit
def _normalizers(z):
    """max z and log sum exp(z - max), both NaN for an example without a softmax. Hardware's max drops a NaN, hence the count."""
    top = tl.max(tl.where(z == z, z, float("-inf")))
    wrong = tl.max((z != z).to(tl.int32)) > 0
    log_sum = _log(tl.sum(_exp(z - top)))
    log_sum = tl.where(wrong, float("nan"), log_sum)
    return tl.where(log_sum == log_sum, top, float("nan")), log_sum


@triton.jit
def _statistics(student, teacher, statistics, classes, reciprocal, BLOCK: tl.constexpr):
    example = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    z = _softened(student + example * classes + i, i < classes, reciprocal)
    z_w = _softened(teacher + example * classes + i, i < classes, reciprocal)
    top, log_sum = _normalizers(z)
    top_w, log_sum_w = _normalizers(z_w)
    log_p, log_pw = (z - top) - log_sum, (z_w - top_w) - log_sum_w
    p_w = tl.where(i < classes, _exp(log_pw), 0.0)
    divergence = tl.sum(tl.where(p_w == 0, 0.0, p_w * (log_pw - log_p)))
    mine = statistics + example * 5
    tl.store(mine, top)
    tl.store(mine + 1, log_sum)
    tl.store(mine + 2, top_w)
    tl.store(mine + 3, log_sum_w)
    tl.store(mine + 4, divergence)


@triton.jit
def _loss(statistics, loss, examples, scale, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, examples, BLOCK):
        i = (first + tl.arange(0, BLOCK)).to(tl.int64)
        total += tl.load(statistics + i * 5 + 4, mask=i < examples, other=0.0).to(tl.float64)
    tl.store(loss, tl.sum(total).to(tl.float32) * scale)


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float, loss: Tensor, statistics: Tensor) -> None:
    examples, classes = statistics.shape[0], student.shape[-1]
    if not examples:
        loss.zero_()
        return
    block = triton.next_power_of_2(classes)
    warps = max(1, min(8, block // 256))
    _statistics[(examples,)](student, teacher, statistics, classes, 1 / temperature, block, num_warps=warps)
    _loss[(1,)](statistics, loss, examples, temperature**2 / examples, 1024, num_warps=4)


@triton.jit
def _distillation_loss_backward(
    grad, student, teacher, statistics, to_student, to_teacher, classes, reciprocal, factor, BLOCK: tl.constexpr
):
    example = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    at = example * classes + i
    mine = statistics + example * 5
    z, z_w = _softened(student + at, i < classes, reciprocal), _softened(teacher + at, i < classes, reciprocal)
    log_p = (z - tl.load(mine)) - tl.load(mine + 1)
    log_pw = (z_w - tl.load(mine + 2)) - tl.load(mine + 3)
    p_w = _exp(log_pw)
    scale = tl.load(grad) * factor
    pull = p_w * ((log_pw - log_p) - tl.load(mine + 4))
    tl.store(to_student + at, narrow(scale * (_exp(log_p) - p_w), to_student.dtype.element_ty), mask=i < classes)
    back = scale * tl.where(p_w == 0, 0.0, pull)
    tl.store(to_teacher + at, narrow(back, to_teacher.dtype.element_ty), mask=i < classes)


def distillation_loss_backward(
    grad: Tensor, student: Tensor, teacher: Tensor, temperature: float, statistics: Tensor, to_student: Tensor,
    to_teacher: Tensor,
) -> None:  # fmt: skip
    examples, classes = statistics.shape[0], student.shape[-1]
    if not examples:
        return
    block = triton.next_power_of_2(classes)
    _distillation_loss_backward[(examples,)](
        grad, student, teacher, statistics, to_student, to_teacher, classes, 1 / temperature, temperature / examples,
        block, num_warps=max(1, min(8, block // 256)),
    )  # fmt: skip


def distillation_loss_unsupported(student: Tensor, teacher: Tensor, temperature: float) -> str | None:
    return _too_many(student)


def distillation_loss_backward_unsupported(
    grad: Tensor, student: Tensor, teacher: Tensor, temperature: float, statistics: Tensor
) -> str | None:
    return _too_many(student)


def _too_many(logits: Tensor) -> str | None:
    if logits.shape[-1] > _MOST:
        return f"more than {_MOST} classes are left to eager, got {logits.shape[-1]}"
    return None
