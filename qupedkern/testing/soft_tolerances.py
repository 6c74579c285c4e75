"""Bounds of the soft quantizer and its gradient: the conditioning of P (x - t_j), then sums. Conventions as in tolerances.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from qupedkern.ops._rows import column, midpoints, split_rows

from .bounds import ROUNDOFF, largest_number


@dataclass(frozen=True)
class Sigmoids:
    """How sigmoids are computed: the argument P (x - t) is off by `argument` u P |x - t|; s and s (1 - s) by so many u of it."""

    argument: float
    sigmoid: float
    density: float


# The difference and the product round once each. sigmoid(z) = 1 / (1 + e), e = exp(-|z|) within 1 ulp = 2u relative:
# e/(1 + e) 2u <= u, the sum u, the quotient u; times e again (another 2u and a product) where z < 0. s (1 - s) is a product
# of two such.
ROUNDED = Sigmoids(argument=2, sigmoid=6, density=12)
# A GPU's special functions, by PTX's tables: ex2.approx within 2^-22 = 4u, rsqrt.approx within 2^-22.4 < 3.1u. The argument is
# (P log2 e) (x - t): log2 e in float32 u / 4, two products and the difference, 4u. s = rsqrt(1 + e)^2: 4u of e, u of the sum,
# 6.2u of the root twice, u of the square; times e again (4u and a product) where z < 0, 18u. s (1 - s): 13 + 18 of those.
APPROXIMATE = Sigmoids(argument=4, sigmoid=18, density=32)
_in_force = [ROUNDED]


@contextmanager
def arithmetic_of(backend: str) -> Iterator[None]:
    """Inside, bounds are those of this backend's sigmoids."""
    _in_force.append(APPROXIMATE if backend in ("cuda", "triton") else ROUNDED)
    try:
        yield
    finally:
        _in_force.pop()


# One exponential an element serves many midpoints and covers half of float32's exponents for each: s and h may stop
# changing within 2^-64 of their limits, |z| > 44.
SIGMOID_FLOOR = {ROUNDOFF[torch.float32]: 2.0**-64, ROUNDOFF[torch.float64]: 2.0**-1020}


def _argument_error(values: Tensor, t: Tensor, steepness: Tensor, u: float, eta: float) -> tuple[Tensor, Tensor]:
    """z = P (x - t_j) [G, n, m - 1] and how far a kernel's z may be from it.

    t_j is rounded once, u |t|, and its halves underflow by eta; a u |x - t| for the difference and what it is multiplied with,
    a = Sigmoids.argument: |dz| <= P (u (a |x - t| + |t|) + 2 eta) + eta. An infinite x has no error: its sigmoids are 0 and 1.
    """
    p, x, mid = steepness[:, :, None], values[:, :, None], t[:, None, :]
    z = p * (x - mid)
    rounded = _in_force[-1].argument * (x - mid).abs()
    error = p * (u * (rounded + mid.abs()) + 2 * eta) + eta
    return z, torch.where(torch.isfinite(x), error, 0.0)


def _sigmoids(values: Tensor, c: Tensor, steepness: Tensor, u: float, eta: float) -> tuple[Tensor, ...]:
    """s and h = s (1 - s) [G, n, m - 1], and the bounds of their errors.

    Mean value theorem over |z'| >= |z| - |dz|: |s'| = h <= min(1/4, exp(-|z'|)), |h'| <= min(1/(6 sqrt 3), exp(-|z'|)).
    Neither is off by more than its range, 1 and 1/4.
    """
    z, error = _argument_error(values, midpoints(c), steepness, u, eta)
    decay = torch.where(error > 0, torch.exp((error - z.abs()).clamp(max=0.0)), 0.0)
    s = torch.sigmoid(z)
    h = s * torch.sigmoid(-z)
    s_error = (error * decay.clamp(max=0.25)).clamp(max=1.0) + _in_force[-1].sigmoid * u * s + SIGMOID_FLOOR[u]
    h_error = (
        (error * decay.clamp(max=1 / (6 * math.sqrt(3)))).clamp(max=0.25)
        + _in_force[-1].density * u * h
        + SIGMOID_FLOOR[u]
    )
    return s, h, s_error, h_error


def _sides(between: Tensor, ends: tuple[float, float]) -> Tensor:
    """[G, n, m - 1] of midpoints -> [G, n, m] of centers: what lies below plus what lies above each center."""
    low, high = (torch.full_like(between[..., :1], end) for end in ends)
    return torch.cat([low, between], -1) + torch.cat([between, high], -1)


def soft_quantize(x: Tensor, centers: Tensor, sharpness: Tensor, *, u: float, eta: float) -> tuple[Tensor]:
    """c_1 + sum_j d_j s_j: each s_j off by its error, d_j and the product by u each, the m - 1 additions by u max|c| each.

    u (m max|c| + 2 sum d s) + sum_j d_j |ds_j|; without the conditioning of z inside |ds_j| the formula itself would fail.
    """
    values, c = split_rows(x, centers)
    s, _, s_error, _ = _sigmoids(values, c, column(sharpness, like=c), u, eta)
    d = c.diff(dim=1)[:, None, :]
    m = c.shape[1]
    bound = u * m * c.abs().amax(1, keepdim=True) + (d * (s_error + 2 * u * s)).sum(-1) + m * eta
    return (bound.reshape(x.shape),)


def soft_quantize_backward(
    grad: Tensor, x: Tensor, centers: Tensor, sharpness: Tensor, *, u: float, eta: float
) -> tuple[Tensor, Tensor]:
    """grad_x = g P sum_j d_j h_j;  grad_c_k = sum_i g (s_k - s_{k+1} - (P/2) (d_k h_k + d_{k+1} h_{k+1})).

    grad_x: |g| P (sum_j d_j |dh_j| + u (m + 4) sum_j d_j h_j), for m - 1 additions, d_j and three products.
    grad_c: the terms' own errors, 6u for their products and differences, and n u sum|terms| for any order of adding n of
    them; the parts s_k and s_{k+1} count apart, as they may be summed apart.
    A product that underflows is off by eta, times whatever it is multiplied by later: of g, P and the slope (at most the
    range of the centers), or P d_j by eta each before g h_j, and each of the m - 1 terms g P d_j h_j by eta; of g, P/2,
    d_j and h_j, in any order.
    Nothing is claimed where |g| P (c_m - c_1) overflows.
    """
    values, c = split_rows(x, centers)
    p = column(sharpness, like=c)
    g = grad.reshape(values.shape).abs()
    s, h, s_error, h_error = _sigmoids(values, c, p, u, eta)
    d = c.diff(dim=1)[:, None, :]
    n, m = values.shape[1], c.shape[1]
    slope_error = (d * h_error).sum(-1) + u * (m + 4) * (d * h).sum(-1) + m * eta
    width = c[:, -1:] - c[:, :1]
    steep = p * width
    overflow = (g * steep > largest_number(u)) | (steep > largest_number(u)) | (g * p > largest_number(u))
    bound_x = torch.where(overflow, math.inf, g * p * slope_error + eta * (m * (1 + g) + p + width))

    terms = _sides(s, ends=(1.0, 0.0)) + 0.5 * p[..., None] * _sides(d * h, ends=(0.0, 0.0))
    errors = _sides(s_error, ends=(0.0, 0.0)) + 0.5 * p[..., None] * _sides(d * h_error + 2 * eta, ends=(0.0, 0.0))
    weighted = g[..., None] * (errors + (6 + n) * u * terms) + eta * (
        2 + g[..., None] + p[..., None] * (1 + d.amax(-1, keepdim=True))
    )
    bound_c = torch.where(overflow.any(1, keepdim=True), math.inf, weighted.sum(1))
    return bound_x.reshape(x.shape), bound_c.reshape(centers.shape)


def foreach_soft_quantize(
    x: list[Tensor], centers: list[Tensor], sharpness: list[Tensor], *, u: float, eta: float
) -> tuple[Tensor, ...]:
    """That of soft_quantize for each."""
    return tuple(soft_quantize(*args, u=u, eta=eta)[0] for args in zip(x, centers, sharpness, strict=True))


def foreach_soft_quantize_backward(
    grad: list[Tensor], x: list[Tensor], centers: list[Tensor], sharpness: list[Tensor], *, u: float, eta: float
) -> tuple[Tensor, ...]:
    """That of soft_quantize_backward for each: grad_x of all, then grad_centers of all."""
    pairs = [soft_quantize_backward(*args, u=u, eta=eta) for args in zip(grad, x, centers, sharpness, strict=True)]
    return (*(bound for bound, _ in pairs), *(bound for _, bound in pairs))
