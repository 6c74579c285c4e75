"""The measurements measure what they say."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bench import cases, digits, ops
from bench.timing import interleaved


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(digits, "WARM_STEPS", 5)
    monkeypatch.setattr(digits, "EVALUATIONS", 60)
    digits._warm.cache_clear()
    yield
    digits._warm.cache_clear()


@pytest.mark.parametrize("method", [*digits.METHODS, "float"])
@pytest.mark.usefixtures("short")
def test_every_method_takes_the_same_number_of_evaluations(method: str) -> None:
    row = digits.run("mlp", method, "2 bit", seed=0, part="val")
    assert abs(row.evaluations - digits.EVALUATIONS) <= 2  # a step before the freeze takes up to three at once
    assert 0 <= row.accuracy <= 100


@pytest.mark.usefixtures("short")
def test_a_network_of_the_table_is_the_same_every_time() -> None:
    first = digits.run("cnn", "straight_through", "1 bit", seed=1, part="val")
    digits._warm.cache_clear()
    assert digits.run("cnn", "straight_through", "1 bit", seed=1, part="val").accuracy == first.accuracy


def test_the_table_counts_missed_bands() -> None:
    rows = [
        digits.Row("digits", arch, method, width, seed, 90.0 + seed - 2 * (method == "hard"), 0, 0.0)
        for arch, method, width, seed in digits.jobs(3)
    ]
    text = digits.table(rows)
    assert "| MLP, 1 bit | 91.00 | 91.00 (0.00) |" in text
    lines = [line for line in text.splitlines() if line.endswith(("kept", "MISSED"))]
    assert [line for line in lines if line.endswith("MISSED")] == [line for line in lines if "4 bit hard" in line]
    assert len(lines) == 2 * len(digits.BANDS)


@pytest.mark.parametrize("op", cases.OP_NAMES)
def test_a_timed_case_is_checked_and_has_its_ratios(op: str) -> None:
    row = ops.measure(op, "resnet20-layer3", 4, compiled=False, rounds=2)
    assert row["bytes"] == cases.build(op, "resnet20-layer3", 4).bytes > 0
    assert min(row["eager_over_kernel"], row["kernel_over_copy"]) > 0
    assert row["name"] in ops.line(row)


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.build("assign", "resnet20-layer3", 4)
    right = case.run()
    monkeypatch.setattr(ops, "_eager", lambda _: lambda: right + torch.ones_like(right))
    with pytest.raises(RuntimeError, match="assign on resnet20-layer3, m = 4: the kernel disagrees with eager"):
        ops.check(case)


def test_candidates_take_turns() -> None:
    order: list[str] = []
    timings = interleaved({name: lambda name=name: order.append(name) for name in "ab"}, rounds=3, least_seconds=0.0)
    assert set(timings) == {"a", "b"}
    assert order[-6:] == ["a", "b"] * 3
