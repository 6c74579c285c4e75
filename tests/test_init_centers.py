"""First centers: k-means is optimal against exhaustive search, the other rules are what they say."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from native_modules import ISAS, NEEDS_A_BUILD, call, cpp
from torch import Tensor

import qupedkern as qk
from qupedkern.ops import OPS
from qupedkern.testing.harness import check, objective
from qupedkern.testing.strategies import HOSTILE, init_centers_inputs, masses
from qupedkern.testing.tolerances import BOUNDS, ROUNDOFF, SECOND_ORDER, SMALLEST

U = ROUNDOFF[torch.float64]

distinct_weights = st.lists(
    st.integers(-500, 500).map(float), min_size=6, max_size=9, unique=True
)  # no shortcut applies
some_weights = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=9)
spread_weights = st.lists(st.sampled_from([0.0, 1.0, 1e-6, -1e8, 1e8, 2.5]), min_size=1, max_size=9)


def squared_error(x: Tensor, centers: Tensor, weights: Tensor | None = None) -> float:
    return float(objective("init_centers", (x, centers.shape[-1], 1, "kmeans", weights), centers))


def partitions(count: int, levels: int) -> Any:
    """Every cut of range(count) into at most `levels` contiguous runs: an optimal assignment in one dimension is one of them."""
    for parts in range(1, min(levels, count) + 1):
        for cuts in combinations(range(1, count), parts - 1):
            yield list(zip((0, *cuts), (*cuts, count), strict=True))


@settings(max_examples=100)
@given(values=distinct_weights | some_weights | spread_weights, levels=st.integers(2, 5), data=st.data())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kmeans_is_optimal_over_all_contiguous_partitions(
    dtype: torch.dtype, values: list[float], levels: int, data: st.DataObject
) -> None:
    x = torch.tensor(values, dtype=dtype)
    weights = data.draw(st.none() | masses(x, 1))
    x, order = x.double().sort()
    w = torch.ones_like(x) if weights is None else weights[order].double()
    found = squared_error(x, qk.init_centers(x.to(dtype), levels, weights=None if weights is None else w.to(dtype)), w)

    def error(a: int, b: int) -> float:
        mass = w[a:b].sum()
        return float((w[a:b] * (x[a:b] - (w[a:b] * x[a:b]).sum() / mass).square()).sum()) if mass > 0 else 0.0

    best = min(sum(error(a, b) for a, b in cut) for cut in partitions(len(values), levels))
    args = (x, levels, 1, "kmeans", w)
    (bound,) = BOUNDS["init_centers"](*args, u=ROUNDOFF[dtype], eta=SMALLEST[dtype])
    assert found <= best + SECOND_ORDER * float(bound)


@settings(max_examples=30)
@given(
    values=st.lists(st.integers(-40, 40).map(float), min_size=5, max_size=60), levels=st.integers(2, 6), data=st.data()
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_weight_of_k_is_k_equal_values(
    dtype: torch.dtype, values: list[float], levels: int, data: st.DataObject
) -> None:
    counts = data.draw(st.lists(st.integers(0, 4), min_size=len(values), max_size=len(values)).filter(any))
    x, w = torch.tensor(values, dtype=dtype), torch.tensor(counts)
    repeated = x.repeat_interleave(w)
    assert torch.equal(qk.init_centers(x, levels, weights=w.to(dtype)), qk.init_centers(repeated, levels))


@given(values=st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=20), levels=st.integers(2, 12))
def test_kmeans_keeps_every_value_and_repeats_centers_when_there_are_few(values: list[float], levels: int) -> None:
    distinct = sorted(set(values))
    centers = qk.init_centers(torch.tensor(values), levels).tolist()
    assert len(centers) == levels
    if len(distinct) <= levels:
        assert sorted(set(centers)) == distinct
    assert centers == sorted(centers)


@given(values=some_weights, levels=st.integers(2, 6))
def test_kmeans_centers_are_the_means_of_their_cells(values: list[float], levels: int) -> None:
    """Where they are all different, and up to n u max|x| for a mean."""
    x = torch.tensor(values, dtype=torch.float64)
    centers = qk.init_centers(x, levels)
    codes = qk.assign(x, centers)
    for k in set(codes.tolist()):
        mean = x[codes == k].mean()
        assert abs(float(centers[k] - mean)) <= 4 * len(values) * U * float(x.abs().max())


@given(args=init_centers_inputs(HOSTILE), seed=st.integers(0, 1000))
@example(
    args=(torch.tensor([0.765625]), 8, 1, "linspace", None), seed=0
)  # a (1 - w) + a w once fell by an ulp on its way
def test_rows_are_ascending_and_independent_and_order_does_not_matter(args: tuple[Any, ...], seed: int) -> None:
    x, levels, groups, method, weights = args
    centers = qk.init_centers(*args)
    assert centers.shape == ((levels,) if groups == 1 else (groups, levels))
    assert bool((centers.diff(dim=-1) >= 0).all())
    assert bool((centers >= x.min()).all())
    assert bool((centers <= x.max()).all())
    rows = x.reshape(groups, -1)
    masses = [None] * groups if weights is None else list(weights.reshape(groups, -1))
    each = [qk.init_centers(row, levels, 1, method, w) for row, w in zip(rows, masses, strict=True)]
    assert torch.equal(torch.stack(each).reshape(centers.shape), centers)
    if method != "signed_mean":  # whose sums are taken in order
        order = torch.randperm(rows.shape[1], generator=torch.Generator().manual_seed(seed))
        shuffled = None if weights is None else torch.stack([w[order] for w in masses])
        assert torch.equal(qk.init_centers(rows[:, order], levels, groups, method, shuffled), centers)


def test_linspace_spans_the_weights() -> None:
    x = torch.tensor([3.0, -1.0, 0.5])
    assert qk.init_centers(x, 5, method="linspace").tolist() == [-1.0, 0.0, 1.0, 2.0, 3.0]


def test_quantiles_are_the_middles_of_equally_full_parts() -> None:
    x = torch.arange(8.0).flip(0)
    assert qk.init_centers(x, 4, method="quantile").tolist() == [0.5, 2.5, 4.5, 6.5]
    assert qk.init_centers(torch.tensor([7.0]), 3, method="quantile").tolist() == [7.0, 7.0, 7.0]


def test_signed_mean_is_the_mean_of_either_side_and_of_the_other_where_one_is_empty() -> None:
    assert qk.init_centers(torch.tensor([-3.0, -1.0, 0.0, 4.0]), 2, method="signed_mean").tolist() == [-2.0, 2.0]
    assert qk.init_centers(torch.tensor([1.0, 3.0]), 2, method="signed_mean").tolist() == [2.0, 2.0]
    assert qk.init_centers(torch.tensor([-1.0, -3.0]), 2, method="signed_mean").tolist() == [-2.0, -2.0]


@pytest.mark.parametrize("method", ["kmeans", "linspace", "quantile", "signed_mean"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(method: str, bad: float) -> None:
    with pytest.raises(ValueError, match=r"^init_centers: x must be finite, got a NaN or an infinity$"):
        qk.init_centers(torch.tensor([0.0, bad]), 2, method=method)


def _rows(count: int, seed: int) -> dict[str, np.ndarray]:
    """Shapes of data that a bound on boundaries, a sum of squares or a sort could trip over."""
    rng = np.random.default_rng(seed)
    normal = rng.normal(size=count)
    return {
        "normal": normal,
        "uniform": rng.random(count),
        "sorted": np.sort(normal),
        "reversed": -np.sort(normal),
        "cauchy": rng.standard_cauchy(count),
        "lognormal": np.exp(6 * normal),
        "two clumps": np.where(rng.random(count) < 0.5, 5 + normal / 100, normal / 100),
        "one far value": np.where(np.arange(count) == count // 2, 1e6, normal),
        "offset": 1e4 + normal,
        "symmetric": np.concatenate([normal[: count // 2], -normal[: count // 2]]),
        "evenly spaced": np.arange(count) / 8,
        "already quantized": np.round(normal * 4) / 4,
        "lattice": rng.integers(-700, 700, count) / 16,
        "denormal": normal * 1e-41,
        "huge": normal * 1e37,
    }


@NEEDS_A_BUILD
@pytest.mark.parametrize("levels", [2, 3, 16, 100])
@pytest.mark.parametrize("kind", _rows(2, 0))
def test_windows_lose_no_optimum(kind: str, levels: int) -> None:
    """Rows long enough that the kernel narrows its windows in several rounds, against the whole program in float64."""
    x = torch.from_numpy(_rows(3000, 7 * levels)[kind]).float()
    check("init_centers", (x, levels, 1, "kmeans", None), "cpp")
    weights = torch.rand(x.shape, generator=torch.Generator().manual_seed(levels)).square()
    check("init_centers", (x, levels, 1, "kmeans", weights), "cpp")


@NEEDS_A_BUILD
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("levels", [4, 32])
def test_every_instruction_set_and_number_of_threads_gives_the_same_bits(levels: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 20_000, generator=torch.Generator().manual_seed(levels)).to(dtype)
    weights = torch.rand(3, 20_000, generator=torch.Generator().manual_seed(1)).to(dtype)
    for w in (None, weights):
        args = (x, levels, 3, "kmeans", w)
        first, *others = (
            call(cpp._import(isa), "init_centers", *args, threads=threads)[0] for isa in ISAS for threads in (1, 2)
        )
        assert all(torch.equal(first, other) for other in others)


@NEEDS_A_BUILD
@pytest.mark.parametrize("method", ["linspace", "quantile", "signed_mean"])
def test_the_other_rules_run_natively_in_every_type(method: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(2, 5001, generator=torch.Generator().manual_seed(3)).to(dtype)
        args = OPS["init_centers"].prepare(x, 2, 2, method)
        assert qk.explain("init_centers", x, 2, 2, method).backend == "cpp"
        check("init_centers", args, "cpp")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weights_that_say_nothing_are_refused(dtype: torch.dtype) -> None:
    x = torch.arange(4.0, dtype=dtype)
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(
            ValueError, match=r"^init_centers: weights must be finite and not negative, got one that is"
        ):
            qk.init_centers(x, 2, weights=torch.tensor([1.0, 1.0, bad, 1.0], dtype=dtype))
    with pytest.raises(ValueError, match=r"^init_centers: weights must have a positive entry in every row, got a row"):
        qk.init_centers(x, 2, 2, weights=torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=dtype))
    with pytest.raises(ValueError, match=r"^init_centers: x must be finite"):
        qk.init_centers(x / 0, 2, weights=torch.ones(4, dtype=dtype))


def test_weights_move_the_centers_to_where_they_are() -> None:
    x = torch.tensor([0.0, 1.0, 2.0, 10.0])
    assert qk.init_centers(x, 2, weights=torch.tensor([1.0, 1.0, 1.0, 1e-6])).tolist() != [1.0, 10.0]
    assert qk.init_centers(x, 2, weights=torch.tensor([1.0, 0.0, 0.0, 3.0])).tolist() == [0.0, 10.0]
    assert qk.init_centers(x, 2, weights=torch.tensor([0.0, 0.0, 5.0, 0.0])).tolist() == [2.0, 2.0]
