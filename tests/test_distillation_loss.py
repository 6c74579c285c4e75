"""Laws of the distillation loss T^2 KL(p_w || p)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qupedkern as qk
from qupedkern.ops import OPS
from qupedkern.testing.harness import running_backends, same_bits, upcast
from qupedkern.testing.strategies import Limits, distillation_loss_inputs
from qupedkern.testing.tolerances import BOUNDS, ROUNDOFF, SECOND_ORDER, SMALLEST, assert_close

DOUBLE = Limits((torch.float64,), finite=True)
U, ETA = ROUNDOFF[torch.float64], SMALLEST[torch.float64]


def bound_of(*args: Any) -> float:
    return SECOND_ORDER * float(BOUNDS["distillation_loss"](*upcast(args), u=U, eta=ETA)[0])


@given(args=distillation_loss_inputs(DOUBLE))
def test_is_never_negative(args: tuple[Any, ...]) -> None:
    assert float(qk.distillation_loss(*args)) >= -bound_of(*args)


@given(args=distillation_loss_inputs(Limits(finite=True)))
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
    plain = (args[0].contiguous(), args[1].contiguous(), args[2])
    statistics = torch.ops.qupedkern.distillation_loss(*plain)[1]
    bounds = BOUNDS["distillation_loss_backward"](torch.ones((), dtype=torch.float64), *plain, statistics, u=U, eta=ETA)
    for leaf, bound in zip((student, teacher), bounds, strict=True):
        assert leaf.grad is not None
        total = leaf.grad.sum(-1).abs()
        assert bool((total <= SECOND_ORDER * (bound.sum(-1) + leaf.shape[-1] * U * leaf.grad.abs().sum(-1))).all())


@given(args=distillation_loss_inputs(Limits((torch.float32,), finite=True)))
def test_gradients_are_within_the_bounds_of_both_passes(args: tuple[Any, ...]) -> None:
    """Beside the backward op's own error that of its statistics: E = that of max and log sum in a log p, and KL's."""
    student, teacher = (z.detach().clone().contiguous().requires_grad_() for z in args[:2])
    qk.distillation_loss(student, teacher, args[2]).backward()
    u, eta = ROUNDOFF[torch.float32], SMALLEST[torch.float32]
    wide = (args[0].double().contiguous(), args[1].double().contiguous(), args[2])
    grad, statistics = torch.ones((), dtype=torch.float64), OPS["distillation_loss"].reference(*wide)[1]
    expected = OPS["distillation_loss_backward"].reference(grad, *wide, statistics)
    bounds = BOUNDS["distillation_loss_backward"](grad, *wide, statistics, u=u, eta=eta)
    off = BOUNDS["distillation_loss"](*wide, u=u, eta=eta)[1].split(1, dim=1)
    e, e_w, classes = off[0] + off[1], off[2] + off[3], student.shape[-1]
    z, z_w = (v.reshape(-1, classes) / args[2] for v in wide[:2])
    log_p, log_pw = z.log_softmax(-1), z_w.log_softmax(-1)
    scale, p_w = args[2] / max(z.shape[0], 1), log_pw.exp()
    pull = (log_pw - log_p - statistics[:, 4:]).abs()
    moved = (log_p.exp() * e + p_w * e_w, p_w * (e + e_w + off[4] + e_w * pull))
    for leaf, wanted, bound, more in zip((student, teacher), expected, bounds, moved, strict=True):
        assert leaf.grad is not None
        assert_close(leaf.grad, wanted, SECOND_ORDER * (bound + scale * more.reshape(bound.shape)), "gradient")


@given(args=distillation_loss_inputs(Limits((torch.float32, torch.bfloat16, torch.float16), finite=True)))
def test_the_statistics_make_every_row_of_probabilities_add_up_to_one(args: tuple[Any, ...]) -> None:
    student, teacher, temperature = args[0].contiguous(), args[1].contiguous(), args[2]
    u, eta = ROUNDOFF[torch.float32], SMALLEST[torch.float32]
    _, kept = torch.ops.qupedkern.distillation_loss(student, teacher, temperature)
    off = BOUNDS["distillation_loss"](student.double(), teacher.double(), temperature, u=u, eta=eta)[1]
    for logits, column in ((student, 0), (teacher, 2)):
        z = logits.double().reshape(-1, logits.shape[-1]) / temperature
        log_total = torch.logsumexp(z - kept[:, column, None].double(), -1) - kept[:, column + 1].double()
        assert bool((log_total.abs() <= SECOND_ORDER * (off[:, column] + off[:, column + 1])).all())


@pytest.mark.parametrize("backend", running_backends())
def test_a_class_that_both_rule_out_counts_for_nothing(backend: str) -> None:
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    gone = torch.tensor([1, 4])
    kept = torch.tensor([0, 2, 3, 5, 6])
    masked = [z.index_fill(1, gone, -torch.inf).requires_grad_() for z in (student, teacher)]
    left = [z[:, kept].clone().requires_grad_() for z in (student, teacher)]
    with qk.use_backend(backend):
        losses = [qk.distillation_loss(*pair, 2.0) for pair in (masked, left)]
        for loss in losses:
            loss.backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-7)  # other lanes, other order of the sums
    for whole, part in zip(masked, left, strict=True):
        assert whole.grad is not None
        assert not bool(whole.grad[:, gone].any())
        torch.testing.assert_close(whole.grad[:, kept], part.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", running_backends())
def test_what_the_student_alone_rules_out_costs_infinitely_much_and_nan_is_not_lost(backend: str) -> None:
    student, teacher = torch.randn(3, 5), torch.randn(3, 5)
    ruled_out = student.clone()
    ruled_out[1, 2] = -torch.inf
    with qk.use_backend(backend):
        assert float(qk.distillation_loss(ruled_out, teacher)) == torch.inf
        assert bool(torch.isfinite(qk.distillation_loss(student, ruled_out)))
        for broken in (torch.nan, torch.inf):
            for side in (0, 1):
                logits = [student.clone(), teacher.clone()]
                logits[side][0, 3] = broken
                assert bool(qk.distillation_loss(*logits).isnan())
        nothing = teacher.clone()
        nothing[2] = -torch.inf
        assert bool(qk.distillation_loss(student, nothing).isnan())


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
