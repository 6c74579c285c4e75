"""center_step is prox_centers of a gradient step, from counts and sums in place of the weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import qupedkern as qk
from qupedkern.testing.harness import running_backends, same_bits

BACKENDS = running_backends()
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
SHAPES = ((4,), (3, 2), (5, 17))
RATES = [0.3, 0.01, 0.1]
STRENGTHS = [0.002, torch.tensor([0.0, 1e-3, 0.02]), 0.01]


def problem(seed: int, scale: float) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Weights, ascending centers and their gradients."""
    generator = torch.Generator().manual_seed(seed)
    centers = [torch.randn(shape, generator=generator).sort(-1).values for shape in SHAPES]
    x = [torch.randn(c.numel() * 40, generator=generator) for c in centers]
    return x, centers, [scale * torch.randn(shape, generator=generator) for shape in SHAPES]


def statistics(x: list[Tensor], centers: list[Tensor], norm: str) -> tuple[list[Tensor], list[Tensor]]:
    still = [torch.zeros_like(v) for v in x]
    result = qk.quped_step(x, still, [], [], [], centers, [], [0.0] * len(x), norm=norm, lr=0.0)
    return result.counts, result.sums


@EVERY_BACKEND
@settings(max_examples=20)
@given(st.integers(0, 1000), st.sampled_from((1.0, 30.0)), st.sampled_from(("counted", "authors", "none")))
def test_l1_equals_prox_centers_of_the_gradient_step_to_the_bit(
    backend: str, seed: int, scale: float, method: str
) -> None:
    x, centers, grad = problem(seed, scale)
    with qk.use_backend(backend):
        counts, _ = statistics(x, centers, "l1")
        wanted = []
        for v, c, g, t, rate in zip(x, centers, grad, STRENGTHS, RATES, strict=True):
            mu = c - rate * g.clamp(-10, 10)
            wanted.append(mu.sort(-1).values if method == "none" else qk.prox_centers(mu, v, t, "l1", method, at=c))
        qk.center_step(centers, grad, counts, [], STRENGTHS, rate=RATES, method=method)
    assert all(same_bits(c, w.sort(-1).values) for c, w in zip(centers, wanted, strict=True))


@EVERY_BACKEND
@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_l2_equals_prox_centers_within_the_rounding_of_its_sums(backend: str, seed: int) -> None:
    """Both sum n terms below 10 in float32, n u 10 n each, times 2t / (1 + 2tn) <= 1/n: 2 * 10 n u, and 20u for the rest."""
    x, centers, grad = problem(seed, 1.0)
    old = [c.clone() for c in centers]
    with qk.use_backend(backend):
        counts, sums = statistics(x, centers, "l2")
        qk.center_step(centers, grad, counts, sums, STRENGTHS, rate=RATES, norm="l2")
        for v, c, before, g, t, rate in zip(x, centers, old, grad, STRENGTHS, RATES, strict=True):
            wanted = qk.prox_centers(before - rate * g.clamp(-10, 10), v, t, "l2", at=before)
            assert float((c - wanted).abs().max()) <= 2.0**-24 * (20 * v.numel() + 20 * 10)


@EVERY_BACKEND
def test_without_gradients_only_the_prox_moves_and_without_either_nothing(backend: str) -> None:
    x, centers, _ = problem(1, 1.0)
    old = [c.clone() for c in centers]
    with qk.use_backend(backend):
        counts, _ = statistics(x, centers, "l1")
        qk.center_step(centers, [], [], [], [], rate=0.1, method="none")
        assert all(same_bits(c, before) for c, before in zip(centers, old, strict=True))
        qk.center_step(centers, [], counts, [], [0.0] * 3, rate=0.1)
        assert all(same_bits(c, before) for c, before in zip(centers, old, strict=True))
        qk.center_step(centers, [], counts, [], [0.1] * 3, rate=0.1)
        assert not any(same_bits(c, before) for c, before in zip(centers, old, strict=True))


@EVERY_BACKEND
def test_centers_that_cross_come_back_sorted_and_nan_goes_last(backend: str) -> None:
    c = [torch.tensor([-1.0, 0.0, 1.0, 2.0])]
    with qk.use_backend(backend):
        qk.center_step(c, [torch.tensor([-9.0, 0.0, float("nan"), 5.0])], [], [], [], rate=1.0, method="none")
    assert same_bits(c[0], torch.tensor([-3.0, 0.0, 8.0, float("nan")]))


def test_wrong_arguments_are_named() -> None:
    c, counts = torch.tensor([-1.0, 1.0]), torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="center_step: centers must be different tensors, got one of them twice"):
        qk.center_step([c, c], [], [counts, counts], [], [0.1, 0.1], rate=0.1)
    with pytest.raises(ValueError, match=r"center_step: tensor 0: counts must be torch.int64 of shape \(3, 2\)"):
        qk.center_step([c], [], [counts.float()], [], [0.1], rate=0.1)
    with pytest.raises(ValueError, match="center_step: clip must be a positive number, got 0"):
        qk.center_step([c], [], [counts], [], [0.1], rate=0.1, clip=0)
    with pytest.raises(ValueError, match="center_step: method must be 'none' or 'counted' or 'authors', got 'exact'"):
        qk.center_step([c], [], [counts], [], [0.1], rate=0.1, method="exact")
    assert torch.equal(c, torch.tensor([-1.0, 1.0]))
