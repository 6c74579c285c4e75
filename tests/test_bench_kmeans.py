"""The k-means measurement compares errors it has checked, and shows where a rival's is larger."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qupedkern as qk
from bench import kmeans


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kmeans.SIZES, "few", 600)


@pytest.mark.usefixtures("few")
def test_a_row_has_times_and_no_rival_below_the_optimum() -> None:
    (row,) = kmeans.rows(["few"], [5], rounds=1, threads=1, compiled=False)
    assert {"op", "eager", "sklearn", "sklearn, 10 starts", "sklearn, sample", "torch.sort"} <= set(
        row.time_us_p20_p50_p80
    )
    assert min(row.quality.values()) >= 1 - 1e-6
    assert row.quality["sklearn"] >= row.quality["sklearn, 10 starts"] - 1e-6
    table = kmeans.TABLES[0].render([row])
    assert "| few, 1 thread |" in table
    assert f"{max(100 * (row.quality['sklearn'] - 1), 0):.2g} %" in table


@pytest.mark.usefixtures("few")
def test_centers_that_are_not_optimal_get_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = qk.init_centers

    def off(x: torch.Tensor, levels: int, **options: Any) -> torch.Tensor:
        return right(x, levels, **options) + 0.01

    monkeypatch.setattr(kmeans.qk, "init_centers", off)
    with pytest.raises(RuntimeError, match="smaller error than the optimum on few, m = 4"):
        kmeans.measure("few", 4, threads=1, rounds=1)


def test_the_error_is_that_of_the_nearest_centers() -> None:
    x = torch.tensor([-1.0, 0.25, 2.0])
    assert kmeans.squared_error(x, torch.tensor([0.0, 1.0])) == 1 + 0.0625 + 1
