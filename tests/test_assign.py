"""Codes are decisions: every element is checked against the rule itself, and ties, NaN and infinities by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import qupedkern as qk
from qupedkern.ops._rows import midpoints, split_rows
from qupedkern.testing.harness import running_backends, same_bits
from qupedkern.testing.strategies import FLOATS, Limits, assign_inputs
from qupedkern.testing.tolerances import ROUNDOFF

ON_EVERY_BACKEND = pytest.mark.parametrize("backend", running_backends())
NATIVE = Limits((torch.float32, torch.bfloat16, torch.float16), numel=600)
SINGLE = Limits((torch.float32,), finite=True, numel=600)


def counted_codes(x: Tensor, centers: Tensor) -> Tensor:
    """#{j : x > t_j} with t_j rounded in the compute type, then the first of equal centers; one comparison at a time."""
    values, c = split_rows(x.contiguous(), centers.contiguous())
    above = (values[:, :, None] > midpoints(c)[:, None, :]).sum(-1)
    first = torch.tensor([[row.index(v) for v in row] for row in c.tolist()])
    return first.gather(1, above).to(torch.uint8).reshape(x.shape)


@ON_EVERY_BACKEND
@given(args=assign_inputs(NATIVE))
def test_a_code_counts_the_midpoints_below_and_takes_the_first_of_equal_centers(backend: str, args: Any) -> None:
    with qk.use_backend(backend):
        assert torch.equal(qk.assign(*args), counted_codes(*args))


@ON_EVERY_BACKEND
@given(args=assign_inputs(SINGLE))
def test_no_center_is_nearer_than_the_assigned_one(backend: str, args: tuple[Tensor, Tensor]) -> None:
    """Up to the rounding of a midpoint, which can cost 2 |x - t| <= 2 u |t|, in float64."""
    values, c = (v.double() for v in split_rows(args[0].contiguous(), args[1].contiguous()))
    with qk.use_backend(backend):
        codes = qk.assign(*args).reshape(values.shape).long()
    chosen = (values - c.gather(1, codes)).abs()
    gaps = (values[:, :, None] - c[:, None, :]).abs().amin(-1)
    rounding = 2 * ROUNDOFF[torch.float32] * c.abs().amax(1, keepdim=True) + 2.0**-148
    assert bool((chosen <= gaps + rounding).all())


@ON_EVERY_BACKEND
@pytest.mark.parametrize("dtype", FLOATS)
def test_ties_go_down_nan_to_zero_and_infinities_to_the_outer_centers(backend: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64:
        backend = "eager"
    x = torch.tensor([-0.5, 0.5, 0.25, math.nan, math.inf, -math.inf, 0.5001], dtype=dtype)
    centers = torch.tensor([-1.0, 0.0, 1.0, 1.0], dtype=dtype)
    expected = [0, 1, 1, 0, 2, 0, 2 if x[-1] > 0.5 else 1]  # of the equal centers 2 and 3 the first
    with qk.use_backend(backend):
        assert qk.assign(x, centers).tolist() == expected


@ON_EVERY_BACKEND
@given(args=assign_inputs(SINGLE))
def test_codes_never_fall_as_x_grows(backend: str, args: tuple[Tensor, Tensor]) -> None:
    x, c = args[0].reshape(-1).sort().values, args[1].reshape(-1, args[1].shape[-1])[0]
    with qk.use_backend(backend):
        assert bool((qk.assign(x, c).int().diff() >= 0).all())


@ON_EVERY_BACKEND
@given(args=assign_inputs(NATIVE))
def test_dequantized_codes_are_the_hard_values_to_the_bit(backend: str, args: tuple[Tensor, Tensor]) -> None:
    x, centers = args
    with qk.use_backend(backend):
        values = qk.dequantize(qk.assign(x, centers), centers.float()).to(x.dtype)
        hard = qk.hard_quantize(x, centers)
    assert same_bits(values[~x.isnan()], hard[~x.isnan()])
    assert bool(hard[x.isnan()].isnan().all())


@ON_EVERY_BACKEND
@given(args=assign_inputs(NATIVE), seed=st.integers(0, 1000))
def test_rows_are_independent_and_order_within_a_row_does_not_matter(backend: str, args: Any, seed: int) -> None:
    x, centers = args
    values, _ = split_rows(x.contiguous(), centers.contiguous())
    order = torch.randperm(values.shape[1], generator=torch.Generator().manual_seed(seed))
    rows = x.reshape(values.shape)
    with qk.use_backend(backend):
        codes = qk.assign(rows, centers)
        assert torch.equal(qk.assign(rows[:, order], centers), codes[:, order])
        for k, row in enumerate(centers.reshape(values.shape[0], -1)):
            assert torch.equal(qk.assign(rows[k], row), codes[k])
