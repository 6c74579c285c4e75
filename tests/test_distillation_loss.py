"""Laws of the distillation loss T^2 KL(p_w || p)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qupedkern as qk
from qupedkern.testing.harness import same_bits, upcast
from qupedkern.testing.strategies import Limits, distillation_loss_inputs
from qupedkern.testing.tolerances import BOUNDS, ROUNDOFF, SECOND_ORDER, SMALLEST

DOUBLE = Limits((torch.float64,))
U, ETA = ROUNDOFF[torch.float64], SMALLEST[torch.float64]


def bound_of(*args: Any) -> float:
    return SECOND_ORDER * float(BOUNDS["distillation_loss"](*upcast(args), u=U, eta=ETA)[0])


@given(args=distillation_loss_inputs(DOUBLE))
def test_is_never_negative(args: tuple[Any, ...]) -> None:
    assert float(qk.distillation_loss(*args)) >= -bound_of(*args)


@given(args=distillation_loss_inputs(Limits()))
def test_is_exactly_zero_with_zero_gradient_where_student_and_teacher_agree(args: tuple[Any, ...]) -> None:
    logits = args[0].detach().clone().requires_grad_()
    loss = qk.distillation_loss(logits, logits.detach().clone(), args[2])
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert logits.grad is not None
    assert not bool(logits.grad.any())


@given(args=distillation_loss_inputs(DOUBLE), shift=st.floats(-50, 50))
def test_adding_a_number_to_all_logits_of_an_example_changes_nothing(args: tuple[Any, ...], shift: float) -> None:
    """Up to the bounds of both sides, and the rounding u |z + shift| / T of the shifted logits, each seen twice by a logarithm."""
    student, teacher, temperature = args
    moved = (student + shift, teacher, temperature)
    here, there = qk.distillation_loss(*args), qk.distillation_loss(*moved)
    largest = max(float(student.abs().max()) if student.numel() else 0.0, 1.0) + abs(shift)
    assert abs(float(here - there)) <= bound_of(*args) + bound_of(*moved) + 4 * U * largest * temperature


@given(args=distillation_loss_inputs(DOUBLE))
def test_equals_torchs_divergence(args: tuple[Any, ...]) -> None:
    """kl_div(batchmean) on the same softened predictions, within the bounds of two such computations."""
    student, teacher, temperature = args
    if not student.numel():
        assert float(qk.distillation_loss(*args)) == 0.0
        return
    log_p, log_pw = (torch.log_softmax(z.reshape(-1, z.shape[-1]) / temperature, -1) for z in (student, teacher))
    expected = temperature**2 * torch.nn.functional.kl_div(log_p, log_pw, reduction="batchmean", log_target=True)
    assert abs(float(qk.distillation_loss(*args) - expected)) <= 2 * bound_of(*args)


@given(args=distillation_loss_inputs(DOUBLE))
def test_gradients_of_an_example_add_up_to_zero(args: tuple[Any, ...]) -> None:
    student, teacher = (z.detach().clone().requires_grad_() for z in args[:2])
    qk.distillation_loss(student, teacher, args[2]).backward()
    plain = (torch.ones((), dtype=torch.float64), args[0].contiguous(), args[1].contiguous(), args[2])
    bounds = BOUNDS["distillation_loss_backward"](*plain, u=U, eta=ETA)
    for leaf, bound in zip((student, teacher), bounds, strict=True):
        assert leaf.grad is not None
        total = leaf.grad.sum(-1).abs()
        assert bool((total <= SECOND_ORDER * (bound.sum(-1) + leaf.shape[-1] * U * leaf.grad.abs().sum(-1))).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_an_empty_batch_gives_zero_and_scalars_are_of_the_compute_type(dtype: torch.dtype) -> None:
    loss = qk.distillation_loss(torch.zeros(0, 3, dtype=dtype), torch.zeros(0, 3, dtype=dtype))
    assert float(loss) == 0.0
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_detached_teacher_learns_nothing_and_an_attached_one_does() -> None:
    student, teacher = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    qk.distillation_loss(student, teacher.detach(), 2.0).backward()
    assert teacher.grad is None
    qk.distillation_loss(student.detach(), teacher, 2.0).backward()
    assert teacher.grad is not None
    assert bool(teacher.grad.any())


@given(args=distillation_loss_inputs(Limits((torch.float32,))))
def test_the_mean_is_over_the_batch_however_it_is_shaped(args: tuple[Any, ...]) -> None:
    student, teacher, temperature = args
    flat = [z.reshape(-1, z.shape[-1]) for z in (student, teacher)]
    assert same_bits(qk.distillation_loss(*flat, temperature), qk.distillation_loss(*args))
