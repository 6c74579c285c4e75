"""Laws of the proximal map of the weights, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from torch import Tensor

import qupedkern as qk
from qupedkern.ops import OPS
from qupedkern.ops._rows import column, split_rows
from qupedkern.testing.harness import running_backends, same_bits, upcast
from qupedkern.testing.strategies import HOSTILE, Limits, assign_inputs, norms, prox_weights_inputs
from qupedkern.testing.tolerances import BOUNDS, ROUNDOFF, SECOND_ORDER, SMALLEST

ON_EVERY_BACKEND = pytest.mark.parametrize("backend", running_backends())
SINGLE = Limits((torch.float32,), finite=True, numel=300)
FINITE = Limits((torch.float32, torch.bfloat16, torch.float16), finite=True, numel=600)

# The l2 step y - (y - q) share, with a share of one, once stepped over q by the rounding of y - q, here by 1, into the next cell.
OVERSHOOT = (torch.tensor([1e8, 3e7, -7e8]), torch.tensor([0.99, 1.0, 1.01]), 1e30, "l2")


def on_grid(args: tuple[Any, ...]) -> bool:
    """Centers that are values of x's type: then rounding the result to that type cannot carry it past its center."""
    x, centers = args[:2]
    return torch.equal(centers.to(x.dtype).to(centers.dtype), centers)


def reach(args: tuple[Any, ...]) -> Tensor:
    """Elements whose distance to their center is a finite number of the compute type."""
    x, centers = args[:2]
    return (x.float() - qk.hard_quantize(x.float(), centers.float())).isfinite()


@ON_EVERY_BACKEND
@given(args=prox_weights_inputs(SINGLE))
def test_is_the_global_minimum_over_all_centers(backend: str, args: tuple[Any, ...]) -> None:
    """G(u) = 1/2 (u - y)^2 + t min_j |u - c_j|^p is nowhere smaller: on a grid, at the centers, and around the result.

    A result off by b has G too large by (|u - y| + t) b + b^2 for l1, (|u - y| + 2 t gap) b + (1 + t) b^2 for l2.
    """
    prepared = OPS["prox_weights"].prepare(*args)
    u, eta = ROUNDOFF[torch.float32], SMALLEST[torch.float32]
    with qk.use_backend(backend):
        result, _ = split_rows(torch.ops.qupedkern.prox_weights(*prepared).double(), args[1])
    (bound,) = BOUNDS["prox_weights"](*upcast(prepared), u=u, eta=eta)
    y, c = split_rows(prepared[0].double(), prepared[1])
    b = SECOND_ORDER * bound.reshape(y.shape)
    t, norm = column(prepared[2].double(), like=c), prepared[3]

    def objective(points: Tensor) -> tuple[Tensor, Tensor]:  # points [G, n, k]
        gap = (points[..., None] - c[:, None, None, :]).abs().amin(-1)
        return 0.5 * (points - y[..., None]) ** 2 + t[..., None] * (gap if norm == "l1" else gap**2), gap

    some = max(1, 100_000 // c.shape[1] ** 2 // 13)
    y, result, b = y[:, :some], result[:, :some], b[:, :some]
    value, gap = (v[..., 0] for v in objective(result[..., None]))
    slope = (result - y).abs() + (t if norm == "l1" else 2 * t * gap)
    slack = slope * b + (1 + t) * b**2 + 2.0**-50 * value  # the last for this test's own float64
    share = torch.linspace(-0.1, 1.1, 13, dtype=torch.float64)
    toward = y[..., None, None] + (c[:, None, :, None] - y[..., None, None]) * share  # [G, n, m, 13]
    grid = torch.cat([toward.flatten(2), y[..., None], result[..., None]], dim=-1)
    lowest = objective(grid)[0].amin(-1)
    wrong = (value > lowest + slack) & torch.isfinite(b)
    assert not bool(wrong.any()), (y[wrong][0], result[wrong][0], value[wrong][0], lowest[wrong][0])


@ON_EVERY_BACKEND
@given(args=prox_weights_inputs(FINITE))
@example(args=OVERSHOOT)
def test_a_weight_stays_in_its_cell(backend: str, args: tuple[Any, ...]) -> None:
    """A center one ulp from its neighbour may lie outside its own cell, as the midpoint rounds onto it: those are left out."""
    x, centers, _, _ = args
    if not on_grid(args):
        return
    with qk.use_backend(backend):
        codes = qk.assign(x, centers)
        same = qk.assign(qk.prox_weights(*args), centers) == codes
        at_home = qk.assign(qk.hard_quantize(x, centers), centers) == codes
    assert bool((same | ~at_home | ~reach(args)).all())


@ON_EVERY_BACKEND
@given(args=prox_weights_inputs(FINITE))
@example(args=OVERSHOOT)
def test_a_weight_ends_between_itself_and_its_center(backend: str, args: tuple[Any, ...]) -> None:
    x, centers, _, _ = args
    if not on_grid(args):
        return
    with qk.use_backend(backend):
        moved, center = qk.prox_weights(*args), qk.hard_quantize(x, centers)
    inside = (moved >= torch.minimum(x, center)) & (moved <= torch.maximum(x, center))
    assert bool((inside | ~reach(args)).all())


@ON_EVERY_BACKEND
@given(args=prox_weights_inputs(HOSTILE))
def test_a_weight_on_its_center_stays_there_to_the_bit(backend: str, args: tuple[Any, ...]) -> None:
    x, centers, strength, norm = args
    if x.dtype == torch.float64:
        backend = "eager"
    on_center = qk.hard_quantize(x.nan_to_num(0.0), centers)
    settled = on_center == qk.hard_quantize(on_center, centers)  # false where a half type cannot hold the center
    if not on_grid(args):
        settled &= on_center.float() == qk.hard_quantize(on_center.float(), centers.float())
    with qk.use_backend(backend):
        moved = qk.prox_weights(on_center, centers, strength, norm)
    assert bool(((moved == on_center) | ~settled).all())


@ON_EVERY_BACKEND
@given(args=assign_inputs(FINITE), norm=norms)
def test_strength_zero_is_the_identity_to_the_bit(backend: str, args: tuple[Any, ...], norm: str) -> None:
    x, centers = args
    with qk.use_backend(backend):
        moved = qk.prox_weights(x, centers, 0.0, norm)
    away = (moved != x) & reach((x, centers))
    assert not bool(away.any())


@ON_EVERY_BACKEND
@given(args=assign_inputs(FINITE))
def test_a_large_l1_strength_puts_every_weight_on_its_center(backend: str, args: tuple[Any, ...]) -> None:
    x, centers = args
    with qk.use_backend(backend):
        moved, center = qk.prox_weights(x, centers, torch.finfo(torch.float32).max), qk.hard_quantize(x, centers)
    assert same_bits(torch.where(reach(args), moved, center), center)


@ON_EVERY_BACKEND
@given(args=prox_weights_inputs(Limits((torch.float32,), hostile=False)))
def test_taking_the_steps_in_two_goes_no_further_than_taking_them_in_one(backend: str, args: tuple[Any, ...]) -> None:
    """l1: prox_t after prox_s is prox_{s + t}, up to a rounding of each: three of at most |y| + |q| + t."""
    x, centers, strength, _ = args
    with qk.use_backend(backend):
        twice = qk.prox_weights(qk.prox_weights(x, centers, strength), centers, strength)
        once = qk.prox_weights(x, centers, 2 * strength)
    largest = x.abs() + qk.hard_quantize(x, centers).abs()
    assert bool(((twice - once).abs() <= 4 * ROUNDOFF[x.dtype] * largest).all())
