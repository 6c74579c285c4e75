"""Laws of the regularizer R(x, c)."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

import qupedkern as qk
from qupedkern.ops._rows import split_rows
from qupedkern.testing.harness import same_bits
from qupedkern.testing.strategies import Limits, distance_inputs
from qupedkern.testing.tolerances import ROUNDOFF

ROUND = Limits((torch.float32,), hostile=False, numel=300)
DOUBLE = Limits((torch.float64,), hostile=False, numel=300)
U = ROUNDOFF[torch.float64]


@given(args=distance_inputs(DOUBLE))
def test_is_the_sum_of_the_distances_to_the_nearest_centers(args: tuple[Any, ...]) -> None:
    """Every center tried for every weight; N u sum|terms| for either order of adding."""
    x, centers, norm = args
    values, c = split_rows(x, centers)
    nearest = (values[:, :, None] - c[:, None, :]).abs().amin(-1)
    expected = (nearest if norm == "l1" else nearest.square()).sum()
    decisions = (
        4 * U * float(values.abs().sum() if norm == "l1" else (values.abs() * nearest).sum())
    )  # ties in rounded midpoints
    got = qk.distance(*args)
    assert abs(float(got - expected)) <= 2 * (x.numel() + 3) * U * float(expected) + decisions


@given(args=distance_inputs(ROUND))
def test_is_zero_exactly_where_every_weight_is_a_center(args: tuple[Any, ...]) -> None:
    x, centers, norm = args
    settled = qk.hard_quantize(x, centers)
    assert float(qk.distance(settled, centers, norm)) == 0.0
    assert (float(qk.distance(x, centers, norm)) == 0.0) == torch.equal(x, settled)


@given(args=distance_inputs(ROUND), exponent=st.integers(-10, 10))
def test_scales_with_its_arguments_to_the_bit(args: tuple[Any, ...], exponent: int) -> None:
    """R(a x, a c) = a R(x, c) for l1 and a^2 R for l2; a power of two rounds nowhere."""
    x, centers, norm = args
    a = 2.0**exponent
    factor = a if norm == "l1" else a * a
    assert same_bits(qk.distance(a * x, a * centers, norm), factor * qk.distance(x, centers, norm))


@given(args=distance_inputs(DOUBLE))
def test_a_row_more_adds_its_own_distance(args: tuple[Any, ...]) -> None:
    x, centers, norm = args
    values, c = split_rows(x, centers)
    each = [float(qk.distance(row, own, norm)) for row, own in zip(values, c, strict=True)]
    assert abs(float(qk.distance(*args)) - sum(each)) <= 2 * (x.numel() + len(each)) * U * sum(each)


def test_gradients_pull_a_weight_and_its_center_together_with_equal_force() -> None:
    x = torch.tensor([-1.2, -1.0, 0.1, 0.6], requires_grad=True)
    centers = torch.tensor([-1.0, 0.5], requires_grad=True)
    qk.distance(x, centers).backward()
    assert x.grad is not None
    assert centers.grad is not None
    assert x.grad.tolist() == [-1.0, 0.0, -1.0, 1.0]
    assert centers.grad.tolist() == [1.0, 0.0]


def test_at_a_midpoint_the_lower_center_pulls() -> None:
    x, centers = torch.tensor([0.5], requires_grad=True), torch.tensor([0.0, 1.0], requires_grad=True)
    qk.distance(x, centers, "l2").backward()
    assert x.grad is not None
    assert centers.grad is not None
    assert x.grad.tolist() == [1.0]
    assert centers.grad.tolist() == [-1.0, 0.0]
