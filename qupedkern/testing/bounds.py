"""What every bound is made of: units of rounding, the largest number, sums by cell; and the comparison with one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float64: 2.0**-1074, torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
FLUSHED_BELOW = 2.0**-126  # processors multiply pairs of bfloat16 with smaller factors and sums taken for zero
SECOND_ORDER = 1.01  # (1 + u)^k - 1 <= 1.01 k u for k u <= 0.01: thousands of operations in float32
# exp may give 0 from where it leaves the normal numbers: exp(-87) < 2^-125.
EXP_FLOOR = {ROUNDOFF[torch.float32]: 2.0**-125, ROUNDOFF[torch.float64]: 2.0**-1020}


def largest_number(u: float) -> float:
    return torch.finfo(torch.float64 if u == ROUNDOFF[torch.float64] else torch.float32).max


def cell_total(values: Tensor, codes: Tensor, m: int) -> Tensor:
    return values.new_zeros((values.shape[0], m)).scatter_add_(1, codes, values)


def smallest_of(op: str, args: tuple[Any, ...], dtype: torch.dtype) -> float:
    """eta of an op that computes in dtype, given its arguments."""
    products = op in ("lut_linear", "lut_linear_backward")
    return FLUSHED_BELOW if products and args[0].dtype == torch.bfloat16 else SMALLEST[dtype]


def with_output_rounding(bound: Tensor | float, expected: Tensor, dtype: torch.dtype, u: float) -> Tensor:
    """Adds the rounding of the result to its own type: half an ulp of it, or half its smallest number."""
    bound = torch.as_tensor(bound, dtype=torch.float64).expand(expected.shape) * SECOND_ORDER
    if dtype not in ROUNDOFF or ROUNDOFF[dtype] == u:
        return bound
    return bound + ROUNDOFF[dtype] * (expected.abs().nan_to_num(posinf=0.0) + bound) + SMALLEST[dtype] / 2


def assert_close(got: Tensor, expected: Tensor, bound: Tensor, what: str) -> None:
    """|got - expected| <= bound; NaN where NaN is expected; past the largest number of got's type an infinity of that sign."""
    value, claimed = got.detach().double(), ~torch.isinf(bound)
    largest = torch.finfo(got.dtype).max if got.dtype.is_floating_point else math.inf
    may_overflow = (expected.abs() + bound > largest) & torch.isinf(value) & (value.sign() == expected.sign())
    same = (value == expected) | (value.isnan() & expected.isnan()) | may_overflow
    wrong = claimed & ~same & ~((value - expected).abs() <= bound)
    if bool(wrong.any()):
        first = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements are off, first at {first}: "
            f"got {float(value[first])!r}, expected {float(expected[first])!r} within {float(bound[first]):.3g}"
        )
