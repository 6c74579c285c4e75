"""What a run of the command line keeps beside its records: its configuration, and how weights come to lie on centers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fl import Client, Federation, algorithms, make_clients, pictures
from fl.__main__ import app
from fl.config import as_given, loads
from fl.core import ClientState, state_file
from fl.data import Dataset
from fl.trace import LOOKS, NEAR, Trace, first_rows, read_trace, share_on_centers

Build = Callable[..., Federation]
PNG = b"\x89PNG"


@given(st.integers(1, 5), st.integers(2, 9), st.integers(0, 40), st.integers(0, 2**32))
def test_the_share_counts_the_weights_near_their_center(rows: int, m: int, off: int, seed: int) -> None:
    """Weights on centers that are one apart, `off` of them moved by more than NEAR gaps and the others by less."""
    random = torch.Generator().manual_seed(seed)
    centers = torch.arange(m, dtype=torch.float32) + torch.randint(-9, 9, (rows, 1), generator=random)
    codes = torch.randint(0, m, (rows, 60), generator=random)
    moved = torch.randperm(60 * rows, generator=random)[: min(off, 60 * rows)]
    by = (0.9 * NEAR * (2 * torch.rand(rows * 60, generator=random) - 1)).index_fill_(0, moved, 5 * NEAR)
    weight = (centers.gather(1, codes) + by.view(rows, 60)).view(rows, 5, 12)
    tensors = {"model.a.weight": weight, "model.a.bias": torch.zeros(rows), "model.norm.weight": torch.ones(7)}
    tensors["model.a.centers"] = centers[0] if rows == 1 else centers
    assert share_on_centers(tensors) == (60 * rows - len(moved)) / (60 * rows)
    assert first_rows(tensors) == {"a": centers[0].tolist()}


def test_a_state_without_centers_has_no_share() -> None:
    assert share_on_centers({"model.a.weight": torch.ones(3, 3)}) is None


@pytest.fixture
def kinds(digits: Dataset) -> list[Client]:
    """Two clients of each of two quantized devices, and one in float."""
    return make_clients(
        digits, [("mlp", 2), ("cnn", 1, "channel"), ("mlp", 2), ("cnn", 1, "channel"), ("mlp", "float")], 5
    )


def test_a_line_tells_of_each_quantized_client_that_took_part(kinds: list[Client], tmp_path: Path) -> None:
    run = Federation(
        algorithm=algorithms.QuPeD(local_steps=2, freeze_at=0.5), clients=kinds, rounds=4, sample=0.8, dropout=0.2
    )
    seen: dict[tuple[int, int], ClientState] = {}
    trace = Trace(tmp_path, kinds)

    def on_round(rounds: int, record: dict[str, Any]) -> None:
        trace(rounds, record)
        for number in set(record["drawn"]) - set(record["failed"]) - {4}:
            seen[rounds, number] = ClientState.load(tmp_path / "state" / state_file(number, rounds))

    run.run(tmp_path, on_round=on_round)
    lines = {(line["round"], line["client"]): line for line in read_trace(tmp_path)}
    assert list(lines) == sorted(lines)
    assert set(lines) == set(seen)
    assert any(rounds == 4 for rounds, _ in lines)
    for (rounds, number), line in lines.items():
        tensors = seen[rounds, number].tensors
        assert line["device"] == ("cnn 1-bit" if number % 2 else "mlp 2-bit")
        assert line["share"] == share_on_centers(tensors)
        assert (line["share"] == 1) == (rounds > 2)  # after the freeze they lie on their centers
        assert ("centers" in line) == (number < 2)
        if number < 2:
            assert line["centers"] == first_rows(tensors)
            assert line["largest"] == "linear1"


def test_looks_are_few_however_many_clients_take_part(digits: Dataset, tmp_path: Path) -> None:
    clients = make_clients(digits, [("mlp", 2)] * (LOOKS + 3) + [("mlp", 1)], 5)
    run = Federation(algorithm=algorithms.Local(local_steps=1), clients=clients, rounds=1, sample=1.0)
    run.run(tmp_path, on_round=Trace(tmp_path, clients))
    lines = read_trace(tmp_path)
    assert len(lines) == LOOKS
    assert {line["client"] for line in lines if "centers" in line} == {0, LOOKS + 3}


def test_a_run_that_is_cut_and_continued_leaves_the_file_of_one_that_was_not(federation: Build, tmp_path: Path) -> None:
    run = federation(algorithms.QuPeD(local_steps=1), rounds=4)
    run.run(tmp_path / "whole", on_round=Trace(tmp_path / "whole", run.clients))
    trace = Trace(tmp_path / "cut", run.clients)

    def stopping(rounds: int, record: dict[str, Any]) -> None:
        if rounds == 3:
            raise InterruptedError  # the round is done, its lines are not written
        trace(rounds, record)

    with pytest.raises(InterruptedError):
        run.run(tmp_path / "cut", on_round=stopping)
    path = tmp_path / "cut" / "centers.jsonl"
    path.write_text(path.read_text() + '{"round": 3, "client": 1, "share": 0.5}\n{"round": 3, "cli')
    run.run(tmp_path / "cut", resume=True, on_round=Trace(tmp_path / "cut", run.clients))
    assert path.read_bytes() == (tmp_path / "whole" / "centers.jsonl").read_bytes()
    assert {line["round"] for line in read_trace(tmp_path / "cut")} >= {3, 4}


def test_the_command_keeps_the_configuration_and_draws_the_pictures(
    config_file: Path, config_text: str, tmp_path: Path
) -> None:
    config_file.write_text(config_text.replace("rounds = 2", 'rounds = 3\ncompare = ["local", "fedavg"]'))
    result = CliRunner().invoke(app, ["run", str(config_file), "--out", str(tmp_path / "out"), "--seed", "4"])
    assert result.exit_code == 0, result.output
    assert "accuracy.png, bytes.png, clients.png, classes.png, centers.png\n" in result.output
    for name in ("quped", "local", "fedavg"):
        kept = (tmp_path / "out" / name / "config.toml").read_text()
        assert kept == "# given on the command line: seed = 4\n" + config_file.read_text()
        assert loads(kept) == loads(config_file.read_text())
        assert bool(read_trace(tmp_path / "out" / name)) == (name != "fedavg")
    for name in ("clients.png", "centers.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(PNG)
    assert as_given(config_file, {"seed": None}) == config_file.read_text()


def test_runs_without_quantized_clients_have_no_picture_of_centers(
    config_file: Path, config_text: str, tmp_path: Path
) -> None:
    config_file.write_text(config_text.replace("bits = 2", 'bits = "float"'))
    result = CliRunner().invoke(app, ["run", str(config_file), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "clients.png, classes.png\n" in result.output
    assert not (tmp_path / "out" / "centers.png").exists()


def test_the_picture_of_centers_shows_what_the_file_says(
    federation: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = federation(algorithms.QuPeD(local_steps=1), sample=1.0)
    result = run.run(tmp_path / "quped", on_round=Trace(tmp_path / "quped", run.clients))
    kept: list[Any] = []
    monkeypatch.setattr(pictures, "_plot_shares", _keeping(kept, pictures._plot_shares))
    monkeypatch.setattr(pictures, "_plot_one_layer", _keeping(kept, pictures._plot_one_layer))
    assert pictures.plot_centers([result], tmp_path / "centers.png")
    lines = read_trace(tmp_path / "quped")
    shares, *layers = kept
    for drawn in shares.get_lines():
        own = [line for line in lines if line["device"] == drawn.get_label()]
        assert drawn.get_xdata().tolist() == [line["round"] for line in own]
        assert drawn.get_ydata().tolist() == [100 * line["share"] for line in own]
    assert len(shares.get_lines()) == 3  # of four clients one is in float
    for axes in layers:
        (own,) = [seen for device, seen in pictures._watched(lines).items() if f"({device})" in axes.get_title("left")]
        found = [drawn.get_ydata().tolist() for drawn in axes.get_lines()]
        assert found == [
            list(column) for column in zip(*(line["centers"][line["largest"]] for line in own), strict=True)
        ]
    assert json.loads(json.dumps(lines)) == lines


def _keeping(kept: list[Any], draw: Callable[..., None]) -> Callable[..., None]:
    def drawing(axes: Any, *arguments: Any) -> None:
        kept.append(axes)
        draw(axes, *arguments)

    return drawing
