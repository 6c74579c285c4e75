"""Algorithm 1 descends: with the steps its constants allow, F(x, c) = f(x) + f(S_c(x)) + lambda R(x, c) never rises."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import qupedkern as qk
from qupedkern.testing.tolerances import ROUNDOFF

U = ROUNDOFF[torch.float64]


@dataclass(frozen=True)
class LeastSquares:
    """f(x) = 1/2 |A x - b|^2 with the curvature L = |A|^2 of A [k, n]."""

    a: Tensor
    b: Tensor

    def value(self, x: Tensor) -> Tensor:
        return 0.5 * (self.a @ x - self.b).square().sum()

    def gradient(self, x: Tensor) -> Tensor:
        return self.a.T @ (self.a @ x - self.b)

    @property
    def curvature(self) -> float:
        return float(torch.linalg.matrix_norm(self.a, 2)) ** 2


@dataclass(frozen=True)
class Problem:
    f: LeastSquares
    lam: float
    sharpness: float
    norm: str

    def value(self, x: Tensor, c: Tensor) -> float:
        soft = qk.soft_quantize(x, c, self.sharpness)
        return float(self.f.value(x) + self.f.value(soft) + self.lam * qk.distance(x, c, self.norm))

    def x_rate(self, x: Tensor, c: Tensor) -> float:
        """1 / (2 L_x): f and f(S) curve by L and L (P range/4)^2 + |grad f|_inf P^2 range / (6 sqrt 3)."""
        p, width, curve = self.sharpness, float(c[-1] - c[0]), self.f.curvature
        slope = float(self.f.gradient(qk.soft_quantize(x, c, p)).abs().max())
        return 0.5 / (curve + curve * (p * width / 4) ** 2 + slope * p**2 * width / (6 * math.sqrt(3)))

    def c_rate(self, x: Tensor, c: Tensor) -> float:
        """1 / (2 L_c), L_c = L n (1 + P range/4)^2 + |grad f|_1 ((m - 1) P + P^2 range / (6 sqrt 3)).

        sum_k |dS/dc_k| <= 1 + P range/4 for each of n weights. Along v, t_j moves by at most |v|_inf and d_j by twice that, so
        |d2S| <= sum_j (2 (2 |v|) (P |v|) / 4 + d_j P^2 |v|^2 / (6 sqrt 3)).
        """
        p, width, m = self.sharpness, float(c[-1] - c[0]), c.numel()
        slope = float(self.f.gradient(qk.soft_quantize(x, c, p)).abs().sum())
        bend = slope * ((m - 1) * p + p**2 * width / (6 * math.sqrt(3)))
        return 0.5 / (self.f.curvature * x.numel() * (1 + p * width / 4) ** 2 + bend)

    def step(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor, bool]:
        """One step of Algorithm 1, and whether the centers keep their order; members are those of the old centers."""
        leaf = x.clone().requires_grad_()
        (through,) = torch.autograd.grad(self.f.value(qk.soft_quantize(leaf, c, self.sharpness)), leaf)
        rate = self.x_rate(x, c)
        x = qk.prox_weights(x - rate * (self.f.gradient(x) + through), c, rate * self.lam, self.norm)
        leaf = c.clone().requires_grad_()
        (h,) = torch.autograd.grad(self.f.value(qk.soft_quantize(x, leaf, self.sharpness)), leaf)
        rate = self.c_rate(x, c)
        mu = c - rate * h
        middles = (c[1:] + c[:-1]) / 2
        ordered = bool((mu[:-1] <= middles).all()) and bool((mu[1:] >= middles).all())
        return x, qk.prox_centers(mu, x, rate * self.lam, self.norm, "exact", c), ordered


@st.composite
def problems(draw: st.DrawFn, norm: str) -> tuple[Problem, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    n, m = draw(st.integers(2, 20)), draw(st.integers(2, 6))
    a, b, x = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((n + 3, n), (n + 3,), (n,)))
    c = qk.init_centers(x, m, method=draw(st.sampled_from(("kmeans", "linspace"))))
    lam, sharpness = draw(st.sampled_from([0.1, 1e-3, 1.0, 10.0])), draw(st.sampled_from([3.0, 0.5, 10.0, 40.0]))
    return Problem(LeastSquares(a, b), lam, sharpness, norm), x, c


@pytest.mark.parametrize("norm", ["l1", "l2"])
@settings(max_examples=15)
@given(data=st.data())
def test_f_never_rises_while_no_centers_cross(norm: str, data: st.DataObject) -> None:
    """Rounding: F is a sum of fewer than 100 terms a value, of the size of F itself."""
    problem, x, c = data.draw(problems(norm))
    value = problem.value(x, c)
    for _ in range(25):
        x, c, ordered = problem.step(x, c)
        after = problem.value(x, c)
        if ordered:
            assert after <= value * (1 + 1000 * U)
        value = after


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_steps_make_progress_and_centers_hardly_ever_cross(norm: str) -> None:
    """The property above would be empty without it."""
    generator = torch.Generator().manual_seed(7)
    a, b, x = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((23, 20), (23,), (20,)))
    c = qk.init_centers(x, 4)
    problem = Problem(LeastSquares(a, b), 0.1, 3.0, norm)
    start, crossings = problem.value(x, c), 0
    for _ in range(300):
        x, c, ordered = problem.step(x, c)
        crossings += not ordered
    assert problem.value(x, c) < 0.8 * start
    assert crossings == 0
