"""Time by phase: every microsecond of a step belongs to one phase, and the table and picture show them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qupedkern as qk
from bench import phases, train_resnet20
from bench.phases import EVALUATIONS, FLOAT, PHASES, QUANTIZED, REST, Clock, Watched


class Ticks:
    """A clock that moves only when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Ticks:
    found = Ticks()
    monkeypatch.setattr(phases.time, "perf_counter", found)
    return found


def test_time_belongs_to_the_innermost_phase(ticks: Ticks) -> None:
    clock = Clock()
    ticks.pass_(1)
    with clock.phase("weight step"):
        ticks.pass_(2)
        with clock.phase("center step"):
            ticks.pass_(4)
        ticks.pass_(8)
    ticks.pass_(16)
    found = clock.stop()
    assert {name: us for name, us in found.items() if us} == {REST: 17e6, "weight step": 10e6, "center step": 4e6}
    clock.reset()
    assert sum(clock.stop().values()) == 0


def test_a_phase_that_raises_is_closed(ticks: Ticks) -> None:
    clock = Clock()

    def fail() -> None:
        ticks.pass_(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        clock.wrap(fail, "weight step")()
    ticks.pass_(2)
    assert (clock.stop()[REST], clock.stop()["weight step"]) == (2e6, 1e6)


class Timed(torch.autograd.Function):
    """The identity; its forward takes a second and its backward three."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor, ticks: Ticks) -> torch.Tensor:
        ticks.pass_(1)
        ctx.ticks = ticks  # type: ignore[attr-defined]
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.ticks.pass_(3)  # type: ignore[attr-defined]
        return grad, None


EXPECTED = {  # seconds in float and quantized evaluations of a step
    train_resnet20.PLAIN: (4e6, 0),
    "straight_through": (0, 4e6),
    "simultaneous": (4e6, 4e6),
    "alternating": (4e6, 8e6),
    "hard": (4e6, 4e6),
}


@pytest.mark.parametrize("method", train_resnet20.METHODS)
def test_forward_and_backward_passes_are_evaluations_and_nothing_else_is(method: str, ticks: Ticks) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    if method != train_resnet20.PLAIN:
        qk.quantize_(model, bits=1, rule=lambda *_: True)
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    watched = Watched(
        train_resnet20._optimizer(method, model), lambda: F.cross_entropy(Timed.apply(model(x), ticks), y)
    )
    backward = torch.Tensor.backward
    for _ in range(2):
        found = watched.step()
        assert (found[FLOAT], found[QUANTIZED]) == EXPECTED[method]
        assert sum(found.values()) == sum(EXPECTED[method])  # nothing else took time by this clock
    assert torch.Tensor.backward is backward


@pytest.mark.parametrize("method", train_resnet20.METHODS)
def test_a_watched_optimizer_takes_the_steps_it_takes_alone(method: str) -> None:
    models = []
    for watch in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
        if method != train_resnet20.PLAIN:
            qk.quantize_(model, bits=1, rule=lambda *_: True)
        x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
        optimizer = train_resnet20._optimizer(method, model)

        def closure(model: nn.Module = model, x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            return F.cross_entropy(model(x), y)

        watched = Watched(optimizer, closure)
        for _ in range(3):
            if watch:
                assert all(us > 0 for name, us in watched.step().items() if name == REST)
            elif method == train_resnet20.PLAIN:
                optimizer.zero_grad()
                closure().backward()
                optimizer.step()
            else:
                optimizer.step(closure)  # type: ignore[arg-type]
        models.append(model)
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


def test_the_rows_of_a_network_hold_each_method_and_make_a_table_and_a_picture(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        rows = train_resnet20.rows(["ResNet-8"], [4], rounds=2, threads=1, compiled=False)
    finally:
        torch.set_num_threads(before)
    assert [row.variant.replace(" ", "_") for row in rows[1:]] == list(train_resnet20.METHODS[1:])
    for row in rows:
        parts, beside = (sum(row.time_us(name) for name in names) for names in (PHASES, set(PHASES) - set(EVALUATIONS)))
        assert parts == pytest.approx(
            row.time_us("step"), abs=0.1
        )  # of two samples the median is the mean, which adds up
        assert beside == pytest.approx(row.time_us(train_resnet20.BESIDE), abs=0.1)
    assert rows[0].ratio("step", train_resnet20.PLAIN) == 1
    text = train_resnet20.TABLES[0].render(rows)
    assert text.count("| ResNet-8, batch 8, 1 thread |") == len(train_resnet20.METHODS)
    train_resnet20.picture(rows, tmp_path / "steps.png")
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
