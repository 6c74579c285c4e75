"""Laws of the proximal map of the centers: exact against brute force in rational numbers, and what it does to R."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_modules import ISAS, NEEDS_A_BUILD, call, cpp, reference
from torch import Tensor

import qupedkern as qk
from qupedkern.ops import OPS
from qupedkern.testing.harness import run, same_bits
from qupedkern.testing.strategies import HOSTILE, Limits, norms, prox_centers_inputs
from qupedkern.testing.tolerances import BOUNDS, ROUNDOFF, SECOND_ORDER, SMALLEST

DOUBLE = Limits((torch.float64,), hostile=False, numel=60)
U = ROUNDOFF[torch.float64]

sixteenths = st.integers(-64, 64).map(lambda k: Fraction(k, 16))


@st.composite
def rational_problems(draw: st.DrawFn) -> tuple[list[Fraction], list[Fraction], list[Fraction], Fraction]:
    """mu and the old centers (ascending, the same number), weights and a strength, all multiples of 1/16: ties are common."""
    m = draw(st.integers(2, 5))
    rows = [sorted(draw(st.lists(sixteenths, min_size=m, max_size=m))) for _ in range(2)]
    x = draw(st.lists(sixteenths, max_size=12))
    return rows[0], rows[1], x, Fraction(draw(st.integers(0, 40)), 16)


def tensor_of(values: list[Fraction]) -> Tensor:
    return torch.tensor([float(v) for v in values], dtype=torch.float64)


def members(x: list[Fraction], old: list[Fraction]) -> list[list[Fraction]]:
    """The weights of each cell: nearest center, a tie to the lower, equal centers to the first."""
    cells: list[list[Fraction]] = [[] for _ in old]
    for value in x:
        cells[min(range(len(old)), key=lambda j: (abs(value - old[j]), j))].append(value)
    return cells


def best(mu: Fraction, cell: list[Fraction], t: Fraction, norm: str) -> Fraction:
    """argmin_c 1/2 (c - mu)^2 + t sum |x - c|^p by trying every kink and every stationary point."""
    power = 1 if norm == "l1" else 2
    if norm == "l1":
        candidates = [*cell, *(mu + t * k for k in range(-len(cell), len(cell) + 1))]
    else:
        candidates = [(mu + 2 * t * sum(cell)) / (1 + 2 * t * len(cell))]
    return min(candidates, key=lambda c: (c - mu) ** 2 / 2 + t * sum(abs(x - c) ** power for x in cell))


@given(problem=rational_problems(), norm=norms)
def test_exact_is_the_minimum_over_the_members_of_the_old_cells(problem: Any, norm: str) -> None:
    mu, old, x, t = problem
    expected = sorted(best(m, cell, t, norm) for m, cell in zip(mu, members(x, old), strict=True))
    args = (tensor_of(mu), tensor_of(x), float(t), norm, "exact", tensor_of(old))
    got = qk.prox_centers(*args)
    (bound,) = BOUNDS["prox_centers"](*OPS["prox_centers"].prepare(*args), u=U, eta=SMALLEST[torch.float64])
    assert bool(((got - tensor_of(expected)).abs() <= SECOND_ORDER * bound).all())


@given(problem=rational_problems(), norm=norms)
def test_the_l2_step_lies_where_its_slope_vanishes(problem: Any, norm: str) -> None:
    """c - mu + 2 t sum (c - x) = 0, checked in rational numbers on the candidate of the brute force itself."""
    mu, old, x, t = problem
    for m, cell in zip(mu, members(x, old), strict=True):
        c = best(m, cell, t, "l2")
        assert c - m + 2 * t * sum(c - value for value in cell) == 0


@given(problem=rational_problems())
def test_counted_moves_by_the_surplus_on_either_side_and_authors_the_other_way(problem: Any) -> None:
    """Multiples of 1/16 below 2^10 in steps of 1/256 are exact in float64."""
    mu, old, x, t = problem
    for method, sign in (("counted", 1), ("authors", -1)):
        surplus = [sum((v > c) - (v < c) for v in cell) for c, cell in zip(old, members(x, old), strict=True)]
        expected = sorted(m + sign * t * n for m, n in zip(mu, surplus, strict=True))
        got = qk.prox_centers(tensor_of(mu), tensor_of(x), float(t), "l1", method, tensor_of(old))
        assert torch.equal(got, tensor_of(expected))


@given(args=prox_centers_inputs(Limits(finite=True, numel=600)))
def test_rows_come_back_sorted_and_in_the_compute_type(args: tuple[Any, ...]) -> None:
    moved = qk.prox_centers(*args)
    assert not bool((moved[..., 1:] < moved[..., :-1]).any())  # strengths that overflow may leave NaN
    assert moved.dtype == (torch.float64 if args[1].dtype == torch.float64 else torch.float32)
    assert moved.shape == args[0].shape


@given(args=prox_centers_inputs(Limits((torch.float32, torch.float64), finite=True, numel=600)))
def test_strength_zero_gives_mu_to_the_bit(args: tuple[Any, ...]) -> None:
    mu, x, _, norm, method, at = args
    if norm == "l2" and not bool((x.abs().double().sum() < torch.finfo(x.dtype).max / 4).item()):
        return  # the sum of the members overflows
    assert torch.equal(qk.prox_centers(mu, x, 0.0, norm, method, at), mu)


@given(args=prox_centers_inputs(DOUBLE))
def test_a_cell_without_members_keeps_its_center_to_the_bit(args: tuple[Any, ...]) -> None:
    mu, x, strength, norm, method, at = args
    old = mu if at is None else at
    moved = qk.prox_centers(mu, x, strength, norm, method, at)
    rows = old.reshape(-1, old.shape[-1]).shape[0]
    codes = qk.assign(x, old).reshape(rows, x.numel() // rows)
    for row, seen, result in zip(mu.reshape(rows, -1), codes, moved.reshape(rows, -1), strict=True):
        for k in set(range(row.numel())) - set(seen.tolist()):
            assert bool((result == row[k]).any())


@given(args=prox_centers_inputs(DOUBLE))
def test_at_defaults_to_the_centers_themselves(args: tuple[Any, ...]) -> None:
    mu, x, strength, norm, method, _ = args
    got = qk.prox_centers(mu, x, strength, norm, method)
    assert same_bits(got, qk.prox_centers(mu, x, strength, norm, method, mu))


def rounding_of(*terms: Tensor) -> float:
    """n u sum|terms| for every sum these laws take in float64, twice for its two sides."""
    return float(sum(2 * (t.numel() + 8) * U * t.abs().sum() for t in terms))


@given(args=prox_centers_inputs(DOUBLE))
def test_r_never_rises_from_the_old_centers(args: tuple[Any, ...]) -> None:
    """R(x, prox(c)) <= R(x, c) for exact l1 and for l2, whatever the strength; "counted" promises no such thing."""
    c, x, strength, norm, _, _ = args
    moved = qk.prox_centers(c, x, strength, norm, "exact")
    before, after = qk.distance(x, c, norm), qk.distance(x, moved, norm)
    (bound,) = BOUNDS["prox_centers"](*OPS["prox_centers"].prepare(c, x, strength, norm, "exact"), u=U, eta=0.0)
    gap = (x.abs().max() if x.numel() else x.sum()) + c.abs().max() + moved.abs().max()
    slope = x.numel() * (1.0 if norm == "l1" else 2 * float(gap))  # of R in the centers
    allowed = slope * float(bound.max()) + rounding_of(before, after) + x.numel() ** 2 * U * float(gap + gap**2)
    assert float(after) <= float(before) + allowed


@given(args=prox_centers_inputs(DOUBLE), steps=st.integers(0, 2**32 - 1))
def test_the_proximal_objective_is_no_larger_than_at_the_old_centers(args: tuple[Any, ...], steps: int) -> None:
    """1/2 |c' - mu|^2 + t R(x, c') <= 1/2 |c - mu|^2 + t R(x, c) for the cells of the old c and any ascending mu.

    This is what makes the step of Algorithm 1 descend. Strengths here are at most 1.
    """
    c, x, _, norm, _, _ = args
    step = torch.rand(c.shape, generator=torch.Generator().manual_seed(steps), dtype=c.dtype)
    mu = (c + step - 0.5).sort(dim=-1).values
    t = 0.3
    moved = qk.prox_centers(mu, x, t, norm, "exact", c)

    def objective(centers: Tensor) -> tuple[float, float]:
        move, r = 0.5 * (centers - mu).square(), qk.distance(x, centers, norm)
        return float(move.sum() + t * r), rounding_of(move, r) + x.numel() * U * float(r)

    (after, error), (before, other) = objective(moved), objective(c)
    (bound,) = BOUNDS["prox_centers"](*OPS["prox_centers"].prepare(mu, x, t, norm, "exact", c), u=U, eta=0.0)
    b = float(bound.max())
    reach = float((x.abs().max() if x.numel() else x.sum()) + moved.abs().max() + mu.abs().max())
    slope = moved.numel() * reach + t * x.numel() * (1 + 2 * reach)
    assert after <= before + error + other + slope * b + (x.numel() + 1) * b * b


def test_counted_can_make_r_rise_where_exact_does_not() -> None:
    """One weight just above its center and a large strength: counting steps over it."""
    x, c = torch.tensor([0.1]), torch.tensor([0.0, 5.0])
    before = qk.distance(x, c)
    assert qk.distance(x, qk.prox_centers(c, x, 1.0, method="counted")) > before
    assert qk.distance(x, qk.prox_centers(c, x, 1.0, method="exact")) < before
    assert qk.distance(x, qk.prox_centers(c, x, 0.05, method="authors")) > before


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_members_belong_to_the_cells_of_at_and_not_of_mu(norm: str) -> None:
    x, old, mu = torch.tensor([0.4, 0.6]), torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.1])
    with_old = qk.prox_centers(mu, x, 100.0, norm, "exact", old)
    torch.testing.assert_close(with_old, torch.tensor([0.4, 0.6]), atol=0.01, rtol=0)
    with_own = qk.prox_centers(mu, x, 100.0, norm, "exact")  # both weights are members of the upper center
    assert float(with_own[0]) == 0.0


def _beside_each_other(a: Tensor, b: Tensor) -> bool:
    """Equal numbers, or both NaN: a kink at zero may carry either sign."""
    return a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


@NEEDS_A_BUILD
@settings(max_examples=150)
@given(args=prox_centers_inputs(HOSTILE), trouble=st.sampled_from((None, math.nan, math.inf, -math.inf)))
def test_native_l1_is_eagers_number_for_number(args: tuple[Any, ...], trouble: float | None) -> None:
    """Selection decides an integer, and both compute mu + t (n - 2k) from it by the same three roundings."""
    mu, x, strength, _, method, at = args
    if trouble is not None:  # sorted last, or members like any other
        x = torch.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(x.numel())) < 0.1, trouble, x)
    prepared = OPS["prox_centers"].prepare(mu, x, strength, "l1", method, at)
    native = run("prox_centers", prepared, "cpp")
    if native is None:
        assert x.dtype == torch.float64
        return
    eager = run("prox_centers", prepared, "eager")
    assert eager is not None
    assert _beside_each_other(native[0], eager[0])


def _members(kind: str, count: int, c: Tensor, generator: torch.Generator) -> Tensor:
    """Weights on which a search by counting could go wrong: all alike, on the centers, of all magnitudes, in few values."""
    x = 0.1 * torch.randn(count, generator=generator)
    if kind == "one value":
        return torch.full_like(x, 0.05)
    if kind == "on their centers":
        return torch.where(torch.rand(count, generator=generator) < 0.95, qk.hard_quantize(x, c), x)
    if kind == "all magnitudes":
        return x * 10.0 ** torch.randint(-44, 30, (count,), generator=generator)
    return (x * 50).round() / 50 if kind == "a few values" else x


@NEEDS_A_BUILD
@pytest.mark.parametrize("kind", ["normal", "one value", "on their centers", "all magnitudes", "a few values"])
@pytest.mark.parametrize("levels", [2, 4, 16, 256])
def test_selection_over_long_rows_finds_what_sorting_finds(kind: str, levels: int) -> None:
    """From strengths that move nothing to such that pull every center to the median of its members and beyond."""
    generator = torch.Generator().manual_seed(levels)
    c = (0.2 * torch.randn(2, levels, generator=generator)).sort(-1).values
    x = torch.stack([_members(kind, 70_001, row, generator) for row in c])
    mu = (c + 0.01 * torch.randn(c.shape, generator=generator)).sort(-1).values
    for strength in (0.0, 1e-9, 1e-7, 1e-5, 1e-3, 1.0):
        args = (mu, x, torch.tensor([strength]), "l1", "exact", c)
        (expected,) = reference("prox_centers", *args)
        for isa in ISAS:
            for threads in (1, 3):
                (got,) = call(cpp._import(isa), "prox_centers", *args, threads=threads)
                assert _beside_each_other(got, expected), (isa, threads, strength)
