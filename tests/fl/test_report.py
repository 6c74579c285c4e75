"""What people look at: the numbers in tables and pictures are those of the clients, records and files."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fl import Client, Federation, RunResult, algorithms, data, make_clients, pictures, report
from fl.__main__ import app
from fl.data import Plan, class_counts

Build = Callable[..., Federation]
PLANS = [
    Plan(classes_per_client=[3, 4]),
    *(Plan(partition=kind) for kind in ("dirichlet", "shards", "quantity", "features", "iid")),
    Plan(partition="writers", writers_per_client=2),
]


def cut(digits: data.Dataset, plan: Plan) -> list[Client]:
    """Digits cut so among eight clients; the sixteen writers are made up."""
    dataset = data.Dataset("digits", digits.x, digits.y, 10, writer=np.arange(len(digits.y)) % 16)
    return make_clients(dataset, [("mlp", 2), ("cnn", "ternary")] * 4, seed=1, plan=plan)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.partition)
def test_every_cut_is_printed_as_the_images_that_each_client_has(
    digits: data.Dataset, plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    clients = cut(digits, plan)
    report.print_classes(clients, 10)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if re.match(r" *\d+ +(mlp|cnn) ", line)]
    assert len(rows) == len(clients)
    for client, row in zip(clients, rows, strict=True):
        held = np.bincount(client.data.train.y, minlength=10)
        assert row[:3] == [str(client.id), *("mlp 2-bit" if client.id % 2 == 0 else "cnn ternary").split()]
        assert [0 if cell == "·" else int(cell) for cell in row[3:13]] == held.tolist()
        assert [int(cell) for cell in row[13:]] == [len(client.data.train), len(client.data.val), len(client.data.test)]


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The panels of the pictures that a test draws."""
    drawn: list[Any] = []

    def figure(*size: Any) -> tuple[Any, Any]:
        both = original(*size)
        drawn.append(both[1])
        return both

    original = pictures._figure
    monkeypatch.setattr(pictures, "_figure", figure)
    return drawn


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.partition)
def test_every_cut_is_drawn_with_discs_in_proportion_to_the_images(
    digits: data.Dataset, plan: Plan, panels: list[Any], tmp_path: Path
) -> None:
    clients = cut(digits, plan)
    counts = class_counts([client.data for client in clients], 10)
    pictures.plot_classes(clients, 10, tmp_path / "classes.png")
    (discs,) = panels[0].collections
    seen = np.zeros_like(counts, dtype=float)
    for (client, label), size in zip(discs.get_offsets(), discs.get_sizes(), strict=True):
        seen[int(client), int(label)] = size
    np.testing.assert_allclose(seen, 90 * counts / counts.max())
    assert (tmp_path / "classes.png").stat().st_size > 5000


@pytest.fixture
def results(federation: Build, tmp_path: Path) -> list[RunResult]:
    """QuPeD with dropouts, and local training, in which nothing travels."""
    kinds = [algorithms.QuPeD(local_steps=1), algorithms.Local(local_steps=1)]
    return [federation(kind, rounds=5, dropout=0.3, score_every=2).run(tmp_path / kind.name) for kind in kinds]


def test_accuracy_over_bytes_is_drawn_at_what_has_travelled_by_then(
    results: list[RunResult], panels: list[Any], tmp_path: Path
) -> None:
    pictures.plot_bytes(results, tmp_path / "bytes.png")
    quped, local = panels[0].get_lines()
    total, points = 0.0, []
    for record in results[0].records:
        total += record["bytes_down"] + record["bytes_up"]
        if record.get("scored", True):
            points.append((total / 2**20, 100 * record["accuracy_mean"]))
    np.testing.assert_allclose(quped.get_xydata(), points, rtol=1e-12)
    assert len(points) == 4  # rounds 0, 2, 4 and the last
    assert set(local.get_ydata()) == {100 * results[1].mean_accuracy}
    assert [text.get_text() for text in panels[0].get_legend().get_texts()] == ["QuPeD", "local"]


def test_accuracy_over_rounds_is_drawn_where_clients_were_scored(
    results: list[RunResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    original = report._plot_accuracy
    monkeypatch.setattr(report, "_plot_accuracy", lambda axes, given: (kept.append(axes), original(axes, given)))
    report.plot(results, tmp_path / "accuracy.png")
    lines = kept[0].get_lines()
    assert len(lines) == 6
    for result, (mean, worst, end) in zip(results, (lines[:3], lines[3:]), strict=True):
        assert list(mean.get_xdata()) == list(worst.get_xdata()) == [0, 2, 4, 5]
        shown = [result.records[at] for at in (0, 2, 4, 5)]
        assert list(mean.get_ydata()) == [100 * record["accuracy_mean"] for record in shown]
        assert list(worst.get_ydata()) == [100 * min(record["accuracy"]) for record in shown]
        assert [*end.get_xdata(), *end.get_ydata()] == [5, 100 * result.mean_accuracy]


def test_each_clients_accuracy_is_drawn_under_each_algorithm(
    results: list[RunResult], panels: list[Any], tmp_path: Path
) -> None:
    pictures.plot_clients(results, tmp_path / "clients.png")
    dots = [line for line in panels[0].get_lines() if line.get_marker() == "o"]
    assert len(dots) == 2
    for result, line in zip(results, dots, strict=True):
        assert np.round(line.get_xdata()).tolist() == [row.client for row in result.clients]
        assert list(line.get_ydata()) == [100 * row.accuracy for row in result.clients]
        assert f"mean {100 * result.mean_accuracy:.1f}, worst {100 * result.worst_accuracy:.1f} %" in line.get_label()


def test_the_bar_shows_rounds_and_accuracy(config_file: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["run", str(config_file), "--out", str(tmp_path / "out")])
    assert re.search(r"^quped +━+ 2/2 +mean +\d+\.\d % ", result.output, re.MULTILINE), result.output


def test_clients_of_every_architecture_and_width_make_one_federation(digits: data.Dataset, tmp_path: Path) -> None:
    devices = [
        ("mlp", 1),
        ("cnn", 2),
        ("cnn1", 3),
        ("cnn2", 4),
        ("resnet8", "ternary"),
        ("resnet20", "float"),
        ("resnet32", 2),
    ]
    clients = make_clients(digits, devices, 6, seed=0)
    run = Federation(algorithm=algorithms.QuPeD(local_steps=1, batch_size=8), clients=clients, rounds=1, sample=1.0)
    result = run.run(tmp_path)
    assert [(row.architecture, row.bits) for row in result.clients] == devices
    assert sorted(result.records[1]["evaluations"]) == sorted(map(str, range(len(devices))))
    size = {row.architecture: row.model_bytes for row in result.clients}
    assert size["resnet32"] < size["resnet20"] / 4  # more weights, at 2 bits against 32
    report.print_clients([result])
