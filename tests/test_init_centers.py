"""First centers: k-means is optimal against exhaustive search, the other rules are what they say."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import qupedkern as qk
from qupedkern.testing.strategies import HOSTILE, init_centers_inputs
from qupedkern.testing.tolerances import ROUNDOFF

U = ROUNDOFF[torch.float64]

distinct_weights = st.lists(
    st.integers(-500, 500).map(float), min_size=6, max_size=9, unique=True
)  # no shortcut applies
some_weights = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=9)
spread_weights = st.lists(st.sampled_from([0.0, 1.0, 1e-6, -1e8, 1e8, 2.5]), min_size=1, max_size=9)


def squared_error(x: Tensor, centers: Tensor) -> float:
    return float((x[:, None] - centers[None, :]).abs().amin(1).square().sum())


def partitions(count: int, levels: int) -> Any:
    """Every cut of range(count) into at most `levels` contiguous runs: an optimal assignment in one dimension is one of them."""
    for parts in range(1, min(levels, count) + 1):
        for cuts in combinations(range(1, count), parts - 1):
            yield list(zip((0, *cuts), (*cuts, count), strict=True))


@settings(max_examples=100)
@given(values=distinct_weights | some_weights | spread_weights, levels=st.integers(2, 5))
@example(values=[0.0, 0.0, 0.0, 1.0], levels=2)
def test_kmeans_is_optimal_over_all_contiguous_partitions(values: list[float], levels: int) -> None:
    """Costs are differences of prefix sums of squares about the mean: off by 4n u sum (x - mean)^2 a segment, levels of them."""
    x = torch.tensor(values, dtype=torch.float64).sort().values
    found = squared_error(x, qk.init_centers(x, levels))
    best = min(
        sum(float((x[a:b] - x[a:b].mean()).square().sum()) for a, b in cut) for cut in partitions(len(values), levels)
    )
    total = float((x - x.mean()).square().sum())
    assert found <= best + 2 * levels * 4 * len(values) * U * (total + float(x.abs().max()) ** 2 * U)


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
@example(args=(torch.tensor([0.765625]), 8, 1, "linspace"), seed=0)  # a (1 - w) + a w once fell by an ulp on its way
def test_rows_are_ascending_and_independent_and_order_does_not_matter(args: tuple[Any, ...], seed: int) -> None:
    x, levels, groups, method = args
    centers = qk.init_centers(x, levels, groups, method)
    assert centers.shape == ((levels,) if groups == 1 else (groups, levels))
    assert bool((centers.diff(dim=-1) >= 0).all())
    assert bool((centers >= x.min()).all())
    assert bool((centers <= x.max()).all())
    rows = x.reshape(groups, -1)
    each = torch.stack([qk.init_centers(row, levels, 1, method) for row in rows])
    assert torch.equal(each.reshape(centers.shape), centers)
    if method != "signed_mean":  # whose sums are taken in order
        order = torch.randperm(rows.shape[1], generator=torch.Generator().manual_seed(seed))
        assert torch.equal(qk.init_centers(rows[:, order], levels, groups, method), centers)


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
