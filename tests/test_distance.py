"""Laws of the regularizer R(x, c)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native_modules import ISAS, NEEDS_A_BUILD, call, cpp, reference

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


@NEEDS_A_BUILD
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("levels", [2, 5, 17])
def test_every_instruction_set_and_number_of_threads_gives_the_same_bits(
    levels: int, norm: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(levels)
    c = torch.randn(3, levels, generator=generator).sort(-1).values
    x = torch.randn(3, 33_001, generator=generator).to(dtype)
    grad = torch.tensor(1.25)
    calls = [(cpp._import(isa), threads) for isa in ISAS for threads in (1, 3)]
    for op, args in (("distance", (x, c, norm)), ("distance_backward", (grad, x, c, norm))):
        first, *others = (call(module, op, *args, threads=threads) for module, threads in calls)
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@NEEDS_A_BUILD
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_native_slopes_are_eagers_bit_for_bit_and_nan_pulls_nowhere(norm: str) -> None:
    c = torch.tensor([[-1.0, 0.0, 0.0, 2.0], [0.5, 0.5, 0.5, 0.5]])
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 0.5, -1.0, 1e-45])
    x = torch.cat([special, torch.randn(992, generator=torch.Generator().manual_seed(0))]).repeat(2)
    args = (torch.tensor(0.3), x, c, norm)
    (expected, _) = reference("distance_backward", *args)
    for isa in ISAS:
        assert same_bits(call(cpp._import(isa), "distance_backward", *args)[0], expected)
