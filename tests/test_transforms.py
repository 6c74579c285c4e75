"""torch.compile, torch.export and torch.vmap see each op as one node, and change no bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import qupedkern as qk
from qupedkern.ops import OPS
from qupedkern.ops._define import mutated, tensors_of
from qupedkern.testing.harness import as_tuple, each, gradient_arguments, running_backends, same_bits, unshared
from qupedkern.testing.strategies import CALM, INPUTS, Limits

# A step of an optimizer writes its arguments and returns lists, which torch.compile cannot functionalize.
PUBLIC = [op for op in OPS if not op.endswith("_backward") and not mutated(op)]
BACKENDS = running_backends()
MOVES_CLOSE = Limits((torch.float32,), finite=True, numel=60)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def outputs_and_gradients(call: Callable[..., Any], op: str, args: tuple[Any, ...]) -> list[Tensor]:
    """Of call(*args), with fresh leaves where the op has a gradient."""
    wanted = gradient_arguments(op)
    args = unshared(op, args)
    args = tuple(
        each(lambda t: t.detach().clone().requires_grad_(), a) if i in wanted else a for i, a in enumerate(args)
    )
    outputs = as_tuple(call(*args))
    leaves = list(tensors_of([args[i] for i in wanted]))
    if not leaves:
        return list(outputs)
    return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(out) for out in outputs])]


@pytest.mark.parametrize("op", PUBLIC)
@settings(max_examples=1, database=None)
@given(st.data())
def test_compiled_calls_equal_eager_ones_and_another_backend_compiles_nothing_anew(
    op: str, data: st.DataObject
) -> None:
    args = data.draw(INPUTS[op](CALM))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *inputs: getattr(qk, op)(*inputs), fullgraph=True, backend=counter)
    for backend in BACKENDS:
        with qk.use_backend(backend):
            expected = outputs_and_gradients(getattr(qk, op), op, args)
            got = outputs_and_gradients(compiled, op, args)
        assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))
        assert counter.frame_count == 1


def test_one_graph_serves_every_sharpness_given_as_a_tensor() -> None:
    x, centers = torch.randn(33), torch.tensor([-1.0, 0.0, 1.0])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(qk.soft_quantize, fullgraph=True, backend=counter)
    for sharpness in (1.0, 3.5, 100.0):
        assert same_bits(compiled(x, centers, torch.tensor([sharpness])), qk.soft_quantize(x, centers, sharpness))
    assert counter.frame_count == 1


class Pipeline(torch.nn.Module):
    """Every op that could stand in a deployed model."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-2, 2, 30).reshape(5, 6))
        self.centers = torch.nn.Parameter(torch.tensor([-1.0, -0.2, 0.9]))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        soft = x @ qk.soft_quantize(self.weight, self.centers, 5.0).T
        hard = x @ qk.hard_quantize(self.weight, self.centers, True).T
        packed = qk.pack_codes(qk.assign(self.weight, self.centers), 2)
        stored = x @ qk.dequantize(qk.unpack_codes(packed, 2, self.weight.shape), self.centers).T
        return (
            soft,
            hard,
            stored,
            qk.distance(self.weight, self.centers),
            qk.distillation_loss(soft, hard.detach(), 2.0),
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_exported_module_gives_the_bits_of_the_module(backend: str) -> None:
    model, x = Pipeline(), torch.randn(4, 6)
    exported = torch.export.export(model, (x,)).module()
    with qk.use_backend(backend):
        assert all(same_bits(a, b) for a, b in zip(exported(x), model(x), strict=True))
        assert same_bits(model(x)[1], model(x)[2])  # packed weights are the hard weights


@st.composite
def batches(draw: st.DrawFn, op: str) -> tuple[list[tuple[Any, ...]], tuple[int | None, ...]]:
    """Up to three sets of arguments of one shape, and the in_dims that batch their tensors; centers may be shared."""
    args = draw(INPUTS[op](MOVES_CLOSE))
    size, shared = draw(st.integers(1, 3)), draw(st.booleans())
    position = 1  # of centers, in every op here
    cases, in_dims = [], []
    for i, value in enumerate(args):
        batched = isinstance(value, Tensor) and not (shared and i == position)
        in_dims.append(0 if batched else None)
    for k in range(size):
        turned = list(args)
        if isinstance(args[0], Tensor) and args[0].numel():
            turned[0] = args[0].reshape(-1).roll(k).reshape(args[0].shape)
        if not shared:
            turned[position] = (args[position] * (1 + k)).clamp(-(2.0**120), 2.0**120)
        cases.append(tuple(turned))
    return cases, tuple(in_dims)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["soft_quantize", "hard_quantize", "assign", "prox_weights", "dequantize"])
@given(st.data())
def test_vmap_over_models_equals_the_loop(op: str, backend: str, data: st.DataObject) -> None:
    cases, in_dims = data.draw(batches(op))
    stacked = [
        torch.stack(values) if dim == 0 else values[0]
        for values, dim in zip(zip(*cases, strict=True), in_dims, strict=True)
    ]
    with qk.use_backend(backend):
        loop = [getattr(qk, op)(*case) for case in cases]
        got = torch.vmap(getattr(qk, op), in_dims=in_dims)(*stacked)
    assert same_bits(got, torch.stack(loop))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 3])
def test_gradients_through_vmap_equal_the_loop(rows: int, backend: str) -> None:
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    centers = torch.linspace(-1, 1, 5).repeat(4, rows, 1).requires_grad_()
    functions = [
        lambda w, c: qk.soft_quantize(w, c, 4.0),
        lambda w, c: qk.hard_quantize(w, c, True),
        lambda w, c: qk.dequantize(qk.assign(w, c), c),
    ]
    for function in functions:
        with qk.use_backend(backend):
            got = torch.autograd.grad(
                torch.vmap(function)(x, centers).square().sum(), [x, centers], materialize_grads=True, allow_unused=True
            )
            loop = sum(function(w, c).square().sum() for w, c in zip(x, centers, strict=True))
            expected = torch.autograd.grad(loop, [x, centers], materialize_grads=True, allow_unused=True)
        for value, wanted in zip(got, expected, strict=True):
            assert same_bits(value, wanted)


def test_vmap_takes_one_sharpness_a_model() -> None:
    x, centers = torch.randn(3, 10), torch.tensor([-1.0, 0.3, 1.0])
    sharpness = torch.tensor([1.0, 5.0, 40.0])
    got = torch.vmap(qk.soft_quantize, in_dims=(0, None, 0))(x, centers, sharpness)
    loop = torch.stack([qk.soft_quantize(x[k], centers, sharpness[k]) for k in range(3)])
    assert same_bits(got, loop)
