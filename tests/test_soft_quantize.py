"""Laws of the soft quantizer S_c(x), on every backend; each allowance is the op's derived bound, or none."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import qupedkern as qk
from qupedkern.ops import OPS
from qupedkern.ops._rows import midpoints
from qupedkern.testing.harness import check, compute_type, run, running_backends, same_bits, upcast
from qupedkern.testing.strategies import FLOATS, Limits, soft_quantize_inputs
from qupedkern.testing.tolerances import BOUNDS, ROUNDOFF, SECOND_ORDER, SMALLEST, assert_close, with_output_rounding

ON_EVERY_BACKEND = pytest.mark.parametrize("backend", running_backends())
NATIVE = Limits((torch.float32, torch.bfloat16, torch.float16), numel=600)  # types that every backend takes
SINGLE = Limits((torch.float32,), finite=True, numel=600)
ROUND = Limits((torch.float32,), hostile=False, numel=600)


def bound_of(x: Tensor, centers: Tensor, sharpness: Any, value: Tensor) -> Tensor:
    """How far S may be from its true value, in float64, shaped like x."""
    args = OPS["soft_quantize"].prepare(x, centers, sharpness)
    dtype = compute_type(args)
    (bound,) = BOUNDS["soft_quantize"](*upcast(args), u=ROUNDOFF[dtype], eta=SMALLEST[dtype])
    return with_output_rounding(bound, value.double(), value.dtype, ROUNDOFF[dtype])


def slopes(x: Tensor, centers: Tensor, sharpness: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """dS/dx [n] and dS/dc [n, m] of one row, each element in a row of its own, and their bounds."""
    rows = (x.reshape(-1), centers.reshape(-1, centers.shape[-1])[:1].expand(x.numel(), -1), sharpness)
    args = (torch.ones(x.numel(), dtype=x.dtype), *OPS["soft_quantize"].prepare(*rows))
    values = torch.ops.qupedkern.soft_quantize_backward(*args)
    bounds = BOUNDS["soft_quantize_backward"](*upcast(args), u=ROUNDOFF[x.dtype], eta=SMALLEST[x.dtype])
    return tuple(v.double() for v in values), tuple(bounds)


def single_row(args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """x [n] in order, the first row of centers and its sharpness."""
    x, centers, sharpness = OPS["soft_quantize"].prepare(*args)
    return x.reshape(-1).sort().values, centers.reshape(-1, centers.shape[-1])[0], sharpness[:1]


def points(x: Tensor) -> Tensor:
    """Some of x, at least one: each becomes a row."""
    return x[:64] if x.numel() else torch.zeros(1)


@ON_EVERY_BACKEND
@given(args=soft_quantize_inputs(NATIVE))
def test_stays_between_the_outer_centers(backend: str, args: tuple[Any, ...]) -> None:
    x, centers, _ = args
    with qk.use_backend(backend):
        value = qk.soft_quantize(*args)
    rows = centers.reshape(-1, centers.shape[-1]).to(x.dtype)
    per_row = value.reshape(rows.shape[0], value.numel() // rows.shape[0])
    assert bool(((per_row >= rows[:, :1]) & (per_row <= rows[:, -1:]) | per_row.isnan()).all())
    assert torch.equal(value.isnan(), x.isnan())


@ON_EVERY_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_out_the_sum_of_rounded_steps_does_not_pass_the_last_center(backend: str, dtype: torch.dtype) -> None:
    """Without the clamp some of these 500 rows end an ulp past it."""
    centers = torch.randn(500, 33, generator=torch.Generator().manual_seed(0)).sort(dim=1).values
    x = torch.full((500, 3), 50.0, dtype=dtype)
    with qk.use_backend(backend):
        value = qk.soft_quantize(x, centers, 20.0)
    assert bool((value <= centers[:, -1:].to(dtype)).all())


@ON_EVERY_BACKEND
def test_a_gradient_of_the_centers_overflows_where_it_is_too_large_itself_and_not_on_the_way(backend: str) -> None:
    """d sum g s (1 - s) is past float32's largest number, P times it is not."""
    c, sharpness = torch.tensor([-2.8e36, 1.9e36]), torch.tensor([1e-3])
    args = torch.full((5,), 100.0), midpoints(c[None])[0].expand(5).contiguous(), c, sharpness
    check("soft_quantize_backward", args, backend)
    grad_centers = (run("soft_quantize_backward", args, backend) or ())[1]
    assert bool(grad_centers.isfinite().all())


@ON_EVERY_BACKEND
@given(args=soft_quantize_inputs(SINGLE))
def test_never_falls_as_x_grows(backend: str, args: tuple[Any, ...]) -> None:
    x, centers, sharpness = single_row(args)
    with qk.use_backend(backend):
        value = qk.soft_quantize(x, centers, sharpness)
    allowed = bound_of(x, centers, sharpness, value)
    assert bool((value.double().diff() >= -(allowed[1:] + allowed[:-1])).all())


@ON_EVERY_BACKEND
@given(args=soft_quantize_inputs(ROUND), shift=st.integers(-4096, 4096))
def test_moves_with_its_arguments(backend: str, args: tuple[Any, ...], shift: int) -> None:
    """S_{c + b}(x + b) = S_c(x) + b; multiples of 1/512 below 16 and b below 8 add without rounding."""
    x, centers, sharpness = args
    x, centers = ((v.clamp(-15, 15) * 512).round() / 512 for v in (x, centers))
    b = shift / 512
    with qk.use_backend(backend):
        here, there = qk.soft_quantize(x, centers, sharpness), qk.soft_quantize(x + b, centers + b, sharpness)
    allowed = bound_of(x, centers, sharpness, here) + bound_of(x + b, centers + b, sharpness, there)
    assert bool(((there.double() - here.double() - b).abs() <= allowed).all())


@ON_EVERY_BACKEND
@given(args=soft_quantize_inputs(ROUND), exponent=st.integers(-20, 20))
def test_scales_with_its_arguments_to_the_bit(backend: str, args: tuple[Any, ...], exponent: int) -> None:
    """S_{a c}(a x; P / a) = a S_c(x; P); a power of two scales every float without rounding."""
    x, centers, sharpness = OPS["soft_quantize"].prepare(*args)
    a = 2.0**exponent
    with qk.use_backend(backend):
        scaled = qk.soft_quantize(a * x, a * centers, sharpness / a)
        assert same_bits(scaled, a * qk.soft_quantize(x, centers, sharpness))


@ON_EVERY_BACKEND
@given(args=soft_quantize_inputs(ROUND))
def test_is_odd_under_reflection(backend: str, args: tuple[Any, ...]) -> None:
    """S_{-c}(-x) = -S_c(x), the centers in reverse order; one row per half of x, so a single row is taken."""
    x, centers, sharpness = single_row(args)
    with qk.use_backend(backend):
        here, there = qk.soft_quantize(x, centers, sharpness), qk.soft_quantize(-x, -centers.flip(0), sharpness)
    # The bound itself is not even in x: it grows with the sum of the steps, which runs from the lowest center up.
    allowed = bound_of(x, centers, sharpness, here) + bound_of(-x, -centers.flip(0), sharpness, there)
    assert bool(((here + there).double().abs() <= allowed).all())


@ON_EVERY_BACKEND
@given(args=soft_quantize_inputs(SINGLE), k=st.integers(0, 254))
def test_repeating_a_center_changes_nothing(backend: str, args: tuple[Any, ...], k: int) -> None:
    x, centers, sharpness = single_row(args)
    k = k % centers.numel()
    repeated = torch.cat([centers[: k + 1], centers[k:]])[:256]
    with qk.use_backend(backend):
        if len(repeated) > len(centers):
            assert torch.equal(qk.soft_quantize(x, repeated, sharpness), qk.soft_quantize(x, centers, sharpness))


@ON_EVERY_BACKEND
@given(args=soft_quantize_inputs(SINGLE))
def test_is_within_the_exponential_bound_of_hard_rounding(backend: str, args: tuple[Any, ...]) -> None:
    """|S - Q| <= sum_j d_j exp(-P |x - t_j|)"""
    x, centers, sharpness = single_row(args)
    with qk.use_backend(backend):
        soft, hard = qk.soft_quantize(x, centers, sharpness), qk.hard_quantize(x, centers)
    c = centers.double()[None]
    law = (c.diff() * torch.exp(-sharpness.double() * (x.double()[:, None] - midpoints(c)).abs())).sum(1)
    # Q is taken with midpoints rounded in float32: next to one, the exponent is off by P u |t|.
    slack = (c.diff() * (sharpness.double() * ROUNDOFF[x.dtype] * midpoints(c).abs()).expm1().clamp(max=1.0)).sum(1)
    assert bool(((soft.double() - hard.double()).abs() <= law + slack + bound_of(x, centers, sharpness, soft)).all())


@ON_EVERY_BACKEND
@given(args=soft_quantize_inputs(SINGLE))
def test_slopes_in_x_and_in_all_centers_add_up_to_one(backend: str, args: tuple[Any, ...]) -> None:
    """dS/dx + sum_k dS/dc_k = 1"""
    x, centers, sharpness = single_row(args)
    with qk.use_backend(backend):
        (by_x, by_centers), (bound_x, bound_c) = slopes(points(x), centers, sharpness)
    assert not bool(((by_x + by_centers.sum(1) - 1).abs() > SECOND_ORDER * (bound_x + bound_c.sum(1))).any())


@ON_EVERY_BACKEND
@given(args=soft_quantize_inputs(SINGLE))
def test_its_slope_is_never_negative_nor_above_a_quarter_of_p_times_the_range(
    backend: str, args: tuple[Any, ...]
) -> None:
    """0 <= dS/dx <= P (c_m - c_1) / 4"""
    x, centers, sharpness = single_row(args)
    with qk.use_backend(backend):
        (slope, _), (bound, _) = slopes(points(x), centers, sharpness)
    steepest = float(sharpness) * float(centers[-1].double() - centers[0].double()) / 4
    assert bool((slope >= 0).all() | bound.isinf().any())
    assert bool((slope <= steepest + SECOND_ORDER * bound).all())


@ON_EVERY_BACKEND
@given(args=soft_quantize_inputs(ROUND))
def test_its_curvature_is_bounded(backend: str, args: tuple[Any, ...]) -> None:
    """|d2S/dx2| <= P^2 (c_m - c_1) / (6 sqrt 3), so the slopes at two points differ by at most that times their distance."""
    x, centers, sharpness = single_row(args)
    with qk.use_backend(backend):
        (slope, _), (bound, _) = slopes(points(x), centers, sharpness)
    curvature = float(sharpness) ** 2 * float(centers[-1] - centers[0]) / (6 * math.sqrt(3))
    allowed = curvature * points(x).double().diff() * (1 + 2**-40) + SECOND_ORDER * (bound[1:] + bound[:-1])
    assert bool((slope.diff().abs() <= allowed).all())


@ON_EVERY_BACKEND
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_row_of_one_value_gives_that_value_and_no_slope(backend: str, dtype: torch.dtype) -> None:
    x = torch.tensor([-3.0, 0.1, 0.7, 5.0, math.inf, -math.inf], dtype=dtype)
    centers = torch.full((3,), 0.7, dtype=dtype)
    if dtype == torch.float64:
        backend = "eager"
    with qk.use_backend(backend):
        assert torch.equal(qk.soft_quantize(x, centers, 30.0), torch.full_like(x, 0.7))
        grad_x, _ = torch.ops.qupedkern.soft_quantize_backward(
            torch.ones_like(x), *OPS["soft_quantize"].prepare(x, centers, 30.0)
        )
    assert torch.equal(grad_x, torch.zeros_like(x))


@ON_EVERY_BACKEND
def test_an_output_larger_than_the_caches_has_the_bits_of_its_pieces(backend: str) -> None:
    """Such outputs are written past the caches, and a row that is odd in length ends in a partial vector."""
    n, piece = 2**24 + 17, 2**20
    x = torch.randn(n, generator=torch.Generator().manual_seed(0))
    centers, sharpness = torch.tensor([-1.0, 1.0]), torch.tensor([5.0])
    if backend == "eager":
        x = x[-piece - 17 :]
    with qk.use_backend(backend):
        whole = qk.soft_quantize(x, centers, sharpness)
        slope, _ = torch.ops.qupedkern.soft_quantize_backward(x, x, centers, sharpness)
        for start in range(0, x.numel(), piece):
            part = x[start : start + piece]
            assert same_bits(whole[start : start + piece], qk.soft_quantize(part, centers, sharpness))
            grad_x, _ = torch.ops.qupedkern.soft_quantize_backward(part, part, centers, sharpness)
            assert same_bits(slope[start : start + piece], grad_x)


@ON_EVERY_BACKEND
def test_the_largest_sharpness_is_within_the_bound(backend: str) -> None:
    """P log2(e) is past the largest float; P x is not."""
    centers = torch.tensor([0.0, 1e-39, 3e-39])
    x = torch.cat([torch.linspace(-2e-39, 6e-39, 41), torch.tensor([1.0, -1.0, math.inf, -math.inf, math.nan])])
    args = OPS["soft_quantize"].prepare(x, centers, torch.finfo(torch.float32).max)
    check("soft_quantize", args, backend)
    check("soft_quantize_backward", (torch.ones_like(x[:-1]), args[0][:-1], *args[1:]), backend)


@ON_EVERY_BACKEND
@settings(max_examples=40)
@given(data=st.data())
def test_a_long_row_agrees_with_its_short_pieces(backend: str, data: st.DataObject) -> None:
    """A kernel may look at the midpoints near x alone in a long row with many, and at all of them in a short one."""
    m = data.draw(st.sampled_from([5, 6, 7, 8, 12, 16, 17, 32, 33, 64]))
    steps_per_gap = data.draw(st.sampled_from([1.0, 5.0, 10.0, 17.0, 40.0, 200.0, 1e4]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    even = torch.linspace(-1, 1, m) + data.draw(st.sampled_from([0.0, 1.0, 300.0]))
    spread = torch.randn(m, generator=generator)
    centers = data.draw(st.sampled_from([even, spread, spread * 1e-30, spread * 1e30])).sort().values
    middle, width = (centers[0] + centers[-1]) / 2, centers[-1] - centers[0]
    x = middle + 0.5 * width * torch.randn(4096 + 37, generator=generator)
    x[::97] = centers[torch.arange(x[::97].numel()) % m]
    x[5], x[6], x[7] = math.inf, -math.inf, math.nan
    sharpness = steps_per_gap * (m - 1) / float(width)
    with qk.use_backend(backend):
        whole = qk.soft_quantize(x, centers, sharpness)
        pieces = torch.cat([qk.soft_quantize(piece, centers, sharpness) for piece in x.split(1000)])
    bound = bound_of(x, centers, sharpness, whole)
    expected = OPS["soft_quantize"].reference(*upcast(OPS["soft_quantize"].prepare(x, centers, sharpness)))
    assert_close(whole, expected, bound, "a long row")
    assert_close(pieces, expected, bound, "its pieces")
    assert bool(whole[7].isnan())
    if backend != "eager":  # whose sum of rounded steps can stop short of the last center
        assert torch.equal(whole[5:7], centers[[-1, 0]])


@pytest.mark.parametrize("backend", [name for name in running_backends() if name != "eager"])
def test_the_exponential_is_within_2_ulp(backend: str) -> None:
    """Far below its only midpoint S - c_1 is d exp(z) to within exp(2z), z = P (x - t); d is a power of two.

    2 ulp are 4u; P in powers of two is rounded to float32, u |z|; the reciprocal, its denominator and the product with d
    are off by 2u, u and u.
    """
    x = -torch.linspace(17.5, 43.5, 2_000_003, dtype=torch.float64).float()
    d, u = 2.0**-60, ROUNDOFF[torch.float32]
    with qk.use_backend(backend):
        value = qk.soft_quantize(x, torch.tensor([0.0, d]), 1.0).double()
    z = x.double() - d / 2
    assert bool(((value / d - z.exp()).abs() <= z.exp() * (8 * u + z.abs() * u + z.exp())).all())
