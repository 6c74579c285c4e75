"""Laws of the hard quantizer, of dequantize and of their gradients, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

import qupedkern as qk
from qupedkern.testing.harness import running_backends, same_bits
from qupedkern.testing.strategies import Limits, assign_inputs, dequantize_inputs

ON_EVERY_BACKEND = pytest.mark.parametrize("backend", running_backends())
NATIVE = Limits((torch.float32, torch.bfloat16, torch.float16), numel=600)
SINGLE = Limits((torch.float32,), numel=600)


@ON_EVERY_BACKEND
@given(args=assign_inputs(SINGLE))
def test_every_value_is_a_center_of_its_row_or_nan(backend: str, args: tuple[Tensor, Tensor]) -> None:
    x, centers = args
    rows = centers.reshape(-1, centers.shape[-1])
    with qk.use_backend(backend):
        values = qk.hard_quantize(x, centers).reshape(rows.shape[0], x.numel() // rows.shape[0])
    known = (values[:, :, None] == rows[:, None, :]).any(-1)
    assert bool((known | values.isnan()).all())


@ON_EVERY_BACKEND
@given(args=assign_inputs(SINGLE))
def test_rounding_twice_is_rounding_once_where_a_center_is_in_its_own_cell(backend: str, args: Any) -> None:
    x, centers = args
    rows = centers.reshape(-1, centers.shape[-1])
    if not torch.equal(qk.hard_quantize(rows.contiguous(), rows), rows):
        return  # centers one ulp apart: a midpoint rounds onto one of them
    with qk.use_backend(backend):
        once = qk.hard_quantize(x, centers)
        assert same_bits(qk.hard_quantize(once, centers), once)


@ON_EVERY_BACKEND
@given(args=assign_inputs(NATIVE))
def test_groups_of_one_row_quantize_like_that_row_alone(backend: str, args: tuple[Tensor, Tensor]) -> None:
    x, centers = args
    row = centers.reshape(-1, centers.shape[-1])[0]
    with qk.use_backend(backend):
        assert same_bits(qk.hard_quantize(x, row), qk.hard_quantize(x, row[None]))


@ON_EVERY_BACKEND
@pytest.mark.parametrize("straight_through", [False, True])
def test_each_center_gets_the_gradient_of_its_members_and_of_equal_ones_the_first(
    backend: str, straight_through: bool
) -> None:
    x = torch.tensor([-1.0, 0.4, 0.6, 3.0], requires_grad=True)
    centers = torch.tensor([-1.0, 0.5, 0.5, 2.0], requires_grad=True)
    with qk.use_backend(backend):
        value = qk.hard_quantize(x, centers, straight_through)
        value.backward(torch.tensor([1.0, 10.0, 100.0, 1000.0]))
    assert centers.grad is not None
    assert x.grad is not None
    assert centers.grad.tolist() == [1.0, 110.0, 0.0, 1000.0]
    assert x.grad.tolist() == ([1.0, 10.0, 100.0, 1000.0] if straight_through else [0.0] * 4)


@ON_EVERY_BACKEND
@given(args=dequantize_inputs(Limits((torch.float32,), numel=600)))
def test_dequantize_looks_up_the_center_of_each_code(backend: str, args: tuple[Tensor, Tensor]) -> None:
    codes, centers = args
    rows = centers.reshape(-1, centers.shape[-1]).tolist()
    with qk.use_backend(backend):
        values = qk.dequantize(codes, centers)
    index = codes.reshape(len(rows), -1).tolist() if codes.numel() else []
    expected = [row[k] for row, line in zip(rows, index, strict=False) for k in line]
    assert values.reshape(-1).tolist() == expected


@ON_EVERY_BACKEND
@pytest.mark.parametrize("levels", [2, 3, 16, 17, 255])
@pytest.mark.parametrize("length", [1, 15, 64, 65, 4097])
def test_a_code_past_the_last_center_is_refused_wherever_it_stands(backend: str, levels: int, length: int) -> None:
    for position in {0, length // 2, length - 1}:
        codes = torch.zeros(length, dtype=torch.uint8)
        codes[position] = levels
        centers = torch.linspace(-1, 1, levels)
        sentence = f"^dequantize: codes must be below m = {levels}, got {levels}$"
        with qk.use_backend(backend), pytest.raises(ValueError, match=sentence):
            qk.dequantize(codes, centers)
