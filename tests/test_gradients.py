"""Gradients of every differentiable op: against finite differences, against autograd of the formula, and refusals elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import qupedkern as qk
from qupedkern.ops import OPS
from qupedkern.ops._define import tensors_of
from qupedkern.ops._rows import midpoints, split_rows
from qupedkern.testing.harness import as_tuple, each, gradient_arguments, kernels, run, same_bits
from qupedkern.testing.strategies import CALM, DOUBLE, HOSTILE, INPUTS
from qupedkern.testing.tolerances import BOUNDS, ROUNDOFF, SMALLEST, assert_close

DIFFERENTIABLE = [op for op in OPS if f"{op}_backward" in OPS]
KERNELS = [(op, backend) for op, backend in kernels() if op in DIFFERENTIABLE]
JUMPS = {"hard_quantize": 1e-4, "distance": 1e-4}  # finite differences must not step over a midpoint or a center
Case = st.DataObject


def away_from_jumps(op: str, args: tuple[Any, ...]) -> bool:
    if op not in JUMPS:
        return True
    values, c = split_rows(args[0], args[1])
    edges = torch.cat([midpoints(c), c], dim=1)
    return bool(((values[:, :, None] - edges[:, None, :]).abs() > JUMPS[op]).all())


def with_gradients(op: str, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Tensor]]:
    """The arguments, those with a gradient as fresh leaves, and these leaves."""
    wanted = gradient_arguments(op)
    args = tuple(
        each(lambda t: t.detach().clone().requires_grad_(), a) if i in wanted else a for i, a in enumerate(args)
    )
    return args, list(tensors_of([args[i] for i in wanted]))


def slopes(output: Any) -> Any:
    """A gradient for each output, shaped like it."""
    return each(
        lambda out: torch.linspace(-1, 2, max(out.numel(), 1), dtype=out.dtype)[: out.numel()].reshape(out.shape),
        output,
    )


@pytest.mark.parametrize("op", DIFFERENTIABLE)
@settings(max_examples=10)
@given(st.data())
def test_gradients_are_the_finite_differences(op: str, data: Case) -> None:
    args = data.draw(INPUTS[op](DOUBLE))
    assume(away_from_jumps(op, args))
    args, leaves = with_gradients(op, args)
    if op == "hard_quantize" and args[2]:  # straight through: by design not the derivative in x
        args[0].requires_grad_(False)
    assume(all(leaf.numel() for leaf in leaves))
    listed = [i for i, a in enumerate(args) if isinstance(a, list)]

    def function(*leaves: Tensor) -> Any:  # gradcheck knows no lists
        rest = iter(leaves)
        wanted = gradient_arguments(op)
        filled = [each(lambda _: next(rest), a) if i in wanted else a for i, a in enumerate(args)]
        return as_tuple(getattr(qk, op)(*filled))

    if not listed:
        assert torch.autograd.gradcheck(getattr(qk, op), args)
    elif leaves:
        assert torch.autograd.gradcheck(function, tuple(leaves))


@pytest.mark.parametrize("op", DIFFERENTIABLE)
@given(st.data())
def test_the_backward_op_is_autograd_of_the_formula(op: str, data: Case) -> None:
    """Each way is within the derived bound of the truth. The formula's clamp hides slopes where 1 - s is below m u."""
    args = OPS[op].prepare(*data.draw(INPUTS[op](DOUBLE)))
    if op == "hard_quantize":
        args = (*args[:2], False)  # straight through is no derivative
    args, leaves = with_gradients(op, args)
    result = OPS[op].reference(*args)
    output, *statistics = result if isinstance(result, tuple) else (result,)
    assume(leaves)
    grad = slopes(output)
    expected = torch.autograd.grad(output, leaves, grad, allow_unused=True, materialize_grads=True)
    plain = (grad, *(each(Tensor.detach, a) for a in (*args, *statistics)))
    got = as_tuple(OPS[f"{op}_backward"].reference(*plain))
    bounds = BOUNDS[f"{op}_backward"](*plain, u=ROUNDOFF[torch.float64], eta=SMALLEST[torch.float64])
    hidden = 0.0
    if op.endswith("soft_quantize"):
        for _, x, c, sharpness in zip(*plain, strict=True) if op.startswith("foreach") else [plain]:
            steepest = float(sharpness.max() * (c[..., -1] - c[..., 0]).max())
            hidden += 2 * (1 + steepest) * c.shape[-1] * ROUNDOFF[torch.float64] * max(x.numel(), 1)
    for value, wanted, bound in zip(got, expected, bounds, strict=True):
        allowed = torch.as_tensor(2 * bound + hidden, dtype=torch.float64).expand(wanted.shape)
        assert_close(value, wanted, allowed, f"{op}_backward")


@pytest.mark.parametrize(("op", "backend"), KERNELS)
@given(st.data())
def test_autograd_calls_the_backward_op(op: str, backend: str, data: Case) -> None:
    args, leaves = with_gradients(op, data.draw(INPUTS[op](CALM)))
    with qk.use_backend(backend):
        output = getattr(qk, op)(*args)
        grad = slopes(output)
        got = torch.autograd.grad(as_tuple(output), leaves, as_tuple(grad))
    prepared = OPS[op].prepare(*args)
    with qk.use_backend(backend):
        result = getattr(torch.ops.qupedkern, op)(*prepared)
    statistics = result[1:] if isinstance(result, tuple) else ()
    expected = run(f"{op}_backward", (grad, *prepared, *statistics), backend)
    assert expected is not None
    for value, wanted in zip(got, expected, strict=True):
        assert same_bits(value, wanted.detach())


@given(INPUTS["hard_quantize"](HOSTILE))
def test_straight_through_hands_the_gradient_of_the_output_to_x(args: tuple[Any, ...]) -> None:
    x, centers, straight_through = args
    x = x.detach().clone().requires_grad_()
    output = qk.hard_quantize(x, centers, straight_through)
    (grad,) = torch.autograd.grad(output, x, torch.ones_like(output))
    assert torch.equal(grad, torch.full_like(x, float(straight_through)))


def test_gradients_reach_half_precision_leaves_in_their_own_type() -> None:
    x = torch.randn(33).bfloat16().requires_grad_()
    centers = torch.tensor([-1.0, 0.5], dtype=torch.bfloat16, requires_grad=True)
    qk.soft_quantize(x, centers, 3.0).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    assert centers.grad is not None
    assert centers.grad.dtype == torch.bfloat16


STEPS = {
    "prox_weights": lambda x, c: qk.prox_weights(x, c, 0.1),
    "prox_centers": lambda x, c: qk.prox_centers(c, x, 0.1),
}


@pytest.mark.parametrize("op", STEPS)
@pytest.mark.parametrize("backend", [b for op, b in kernels() if op == "prox_weights"])
def test_steps_of_an_optimizer_refuse_to_be_differentiated(op: str, backend: str) -> None:
    x, centers = torch.randn(8, requires_grad=True), torch.tensor([-1.0, 1.0], requires_grad=True)
    sentence = f"^{op}: it is a step of an optimizer and has no gradient; call it under torch.no_grad\\(\\)$"
    with qk.use_backend(backend):
        moved = STEPS[op](x, centers)
        with pytest.raises(RuntimeError, match=sentence):
            moved.sum().backward()
    with torch.no_grad():
        assert not STEPS[op](x, centers).requires_grad


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_second_derivatives_are_refused_with_a_sentence(op: str) -> None:
    x, c = torch.randn(6, requires_grad=True), torch.tensor([-1.0, 1.0], requires_grad=True)
    calls = {
        "soft_quantize": lambda: qk.soft_quantize(x, c, 2.0),
        "foreach_soft_quantize": lambda: qk.foreach_soft_quantize([x], [c], 2.0),
        "hard_quantize": lambda: qk.hard_quantize(x, c, True),
        "dequantize": lambda: qk.dequantize(torch.zeros(6, dtype=torch.uint8), c),
        "dequantize_packed": lambda: qk.dequantize_packed(torch.zeros(1, dtype=torch.uint8), c, 1, (1, 6)),
        "packed_embedding": lambda: qk.packed_embedding(
            torch.tensor([0]), torch.zeros(1, dtype=torch.uint8), c, 1, (1, 6)
        ),
        "distance": lambda: qk.distance(x, c),
        "lut_linear": lambda: qk.lut_linear(x, torch.zeros(2, dtype=torch.uint8), c, None, 1, (2, 6)).sum(),
        "distillation_loss": lambda: qk.distillation_loss(x, x.detach() / 2),
    }
    (output,) = as_tuple(calls[op]())
    weight = torch.ones_like(output, requires_grad=True)
    from_codes = ("dequantize", "dequantize_packed", "packed_embedding")
    leaves = [c] if op in from_codes else [x] if op == "distillation_loss" else [x, c]
    (gradient, *_) = torch.autograd.grad(output, leaves, weight, create_graph=True)
    with pytest.raises(RuntimeError, match=f"^{op}_backward: there is no second derivative$"):
        gradient.sum().backward()


def test_codes_and_first_centers_carry_no_gradient() -> None:
    x, centers = torch.randn(8, requires_grad=True), torch.tensor([-1.0, 1.0], requires_grad=True)
    assert not qk.assign(x, centers).requires_grad
    assert not qk.init_centers(x, 2).requires_grad
