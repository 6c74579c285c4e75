"""foreach_soft_quantize: what is special to a list of tensors. Values and gradients are tried with every op's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given

import qupedkern as qk
from qupedkern.testing.harness import kernels, run, same_bits
from qupedkern.testing.strategies import HOSTILE, INPUTS

BACKENDS = pytest.mark.parametrize("backend", [b for op, b in kernels() if op == "foreach_soft_quantize"])


@BACKENDS
@pytest.mark.parametrize("threads", [1, 2, 3])
@given(args=INPUTS["foreach_soft_quantize_backward"](HOSTILE))
def test_each_tensor_has_the_bits_it_has_alone(backend: str, threads: int, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    grad, x, centers, sharpness = args
    soft = run("foreach_soft_quantize", (x, centers, sharpness), backend)
    gradients = run("foreach_soft_quantize_backward", args, backend)
    if soft is None or gradients is None:
        return
    for i in range(len(x)):
        one = (x[i], centers[i], sharpness[i])
        (alone,) = run("soft_quantize", one, backend) or ()
        to_x, to_centers = run("soft_quantize_backward", (grad[i], *one), backend) or ()
        assert same_bits(soft[i], alone)
        assert same_bits(gradients[i], to_x)
        assert same_bits(gradients[len(x) + i], to_centers)


def test_one_number_is_the_sharpness_of_all() -> None:
    xs = [torch.linspace(-1, 1, n) for n in (5, 9)]
    centers = [torch.tensor([-0.5, 0.5]), torch.tensor([-1.0, 0.0, 1.0])]
    got = qk.foreach_soft_quantize(xs, centers, 7.0)
    assert all(torch.equal(s, qk.soft_quantize(x, c, 7.0)) for s, x, c in zip(got, xs, centers, strict=True))


def test_no_tensors_give_none() -> None:
    assert qk.foreach_soft_quantize([], [], []) == []


def test_only_the_tensors_that_need_a_gradient_get_one() -> None:
    xs = [torch.linspace(-1, 1, 6).requires_grad_(), torch.linspace(-1, 1, 6)]
    centers = [torch.tensor([-0.5, 0.5]), torch.tensor([-0.5, 0.5], requires_grad=True)]
    sum(s.sum() for s in qk.foreach_soft_quantize(xs, centers, [3.0, 4.0])).backward()
    assert xs[0].grad is not None
    assert xs[1].grad is None
    assert centers[0].grad is None
    assert centers[1].grad is not None
