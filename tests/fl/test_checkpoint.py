"""Damaged, truncated, foreign and newer checkpoints: refused in one sentence, and left alone. Two runs never share a directory."""

import dataclasses
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fl import Federation, algorithms, storage
from fl.engines import loop
from fl.errors import CheckpointError
from fl.lock import alone

Build = Callable[..., Federation]
Outcome = Callable[[Path], dict[str, Any]]
ALGORITHM = algorithms.QuPeD(local_steps=1)


@pytest.fixture
def cut(federation: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Federation, Path]:
    """A run of three rounds that was stopped after two, and its directory."""
    run, play = federation(ALGORITHM), loop.play_round

    def stopping(*arguments: Any) -> Any:
        if arguments[-1].round == 2:
            raise InterruptedError
        return play(*arguments)

    monkeypatch.setattr(loop, "play_round", stopping)
    with pytest.raises(InterruptedError):
        run.run(tmp_path / "run")
    monkeypatch.undo()
    return run, tmp_path / "run"


def content(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def refused(run: Federation, directory: Path, match: str) -> None:
    before = content(directory)
    with pytest.raises(CheckpointError, match=match) as caught:
        run.run(directory, resume=True)
    assert "\n" not in str(caught.value)
    assert content(directory) == before


def client_files(directory: Path) -> list[Path]:
    return sorted((directory / "state").glob("client_*"))


DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("no records", lambda run: (run / "records.jsonl").unlink(), "records.jsonl is damaged"),
    ("records cut short", lambda run: cut_short(run / "records.jsonl"), r"it must hold \d+ bytes, got \d+"),
    ("other records", lambda run: (run / "records.jsonl").write_bytes(b"[]\n" * 5000), "records.jsonl is damaged"),
    ("no round", lambda run: replace(run / "records.jsonl", b'"round": 1', b'"round": 2'), "each of the rounds 0 to 2"),
    ("records in bytes", lambda run: scribble(run / "records.jsonl"), "records.jsonl is damaged"),
    (
        "no server",
        lambda run: (run / "state" / "server.2.safetensors").unlink(),
        "server.2.safetensors must be a state",
    ),
    ("half a server", lambda run: cut_short(run / "state" / "server.2.safetensors"), "must be a state file"),
    ("no client", lambda run: client_files(run)[0].unlink(), r"client_\d+.\d.safetensors must be a state file"),
    ("half a client", lambda run: cut_short(client_files(run)[-1]), r"client_\d+.\d.safetensors must be a state file"),
    ("foreign client", lambda run: scribble(client_files(run)[0]), r"client_\d+.\d.safetensors must be a state file"),
    ("half a manifest", lambda run: cut_short(run / "run.json"), r"run\.json cannot be read"),
    ("manifest in bytes", lambda run: scribble(run / "run.json"), r"run\.json cannot be read"),
    ("another format", lambda run: change(run, ["description", "format"], 3), "its format is 3, this version reads 2"),
]
ENTRIES: list[tuple[list[str], Any]] = [
    (["description"], None),
    (["description"], {}),
    (["round"], "2"),
    (["round"], -1),
    (["round"], 1),  # whose server file is another
    (["server"], "../../server.2.safetensors"),
    (["record_bytes"], -5),
    (["record_bytes"], None),
    (["threads"], "one"),
    (["built_with"], None),
    (["clients"], []),
    (["clients", "0"], "1"),
    (["clients", "0"], 3),  # a round that has not been
    (["clients", "9"], 1),  # a client that is not there
]


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def replace(path: Path, old: bytes, new: bytes) -> None:
    path.write_bytes(path.read_bytes().replace(old, new))


def scribble(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def change(directory: Path, keys: list[str], value: Any) -> None:
    manifest = json.loads((directory / "run.json").read_text())
    table = manifest
    for key in keys[:-1]:
        table = table[key]
    table[keys[-1]] = value
    (directory / "run.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(("damage", "sentence"), [d[1:] for d in DAMAGES], ids=[d[0] for d in DAMAGES])
def test_a_damaged_checkpoint_is_one_sentence_and_left_alone(
    cut: tuple[Federation, Path], damage: Callable[[Path], object], sentence: str
) -> None:
    damage(cut[1])
    refused(*cut, sentence)


@pytest.mark.parametrize(("keys", "value"), ENTRIES, ids=[f"{'.'.join(keys)} {value}" for keys, value in ENTRIES])
def test_a_manifest_that_no_run_writes_is_one_sentence(
    cut: tuple[Federation, Path], keys: list[str], value: Any
) -> None:
    change(cut[1], keys, value)
    refused(*cut, r"holds no run to resume, run\.json cannot be read: ")


def test_a_finished_run_whose_results_are_damaged_is_one_sentence(cut: tuple[Federation, Path]) -> None:
    run, directory = cut
    run.run(directory, resume=True)
    cut_short(directory / "summary.json")
    refused(run, directory, "has finished, and its results cannot be read")


def test_what_is_left_over_is_dropped_and_the_run_continues_to_the_same_bits(
    outcome: Outcome, cut: tuple[Federation, Path], tmp_path: Path
) -> None:
    run, directory = cut
    run.run(tmp_path / "whole")
    with open(directory / "records.jsonl", "ab") as file:
        file.write(b'{"round": 3, "half of a')
    for name in (".run.json.x.tmp", "state/.client_001.3.safetensors.7.tmp", "state/client_001.3.safetensors"):
        (directory / name).write_bytes(b"half")
    run.run(directory, resume=True)
    assert outcome(directory) == outcome(tmp_path / "whole")
    assert not list(directory.rglob(".*"))


def test_a_directory_in_which_a_run_is_under_way_is_refused(cut: tuple[Federation, Path], tmp_path: Path) -> None:
    run, directory = cut
    pytest.importorskip("fcntl", reason="this system has no flock")
    with alone(directory):
        refused(run, directory, f"another process is running in {re.escape(str(directory))}, wait for its end")
    said = []

    def second(rounds: int, record: dict[str, Any]) -> None:
        with pytest.raises(CheckpointError, match="another process is running") as caught:
            run.run(directory, resume=True)
        said.append(caught.value)

    run.run(directory, resume=True, on_round=second)
    assert len(said) == 2
    assert dataclasses.replace(run).run(directory, resume=True).directory == directory  # nobody holds it any more


def test_a_state_file_is_checked_by_its_header_and_length(tmp_path: Path) -> None:
    import torch

    path = tmp_path / "state"
    storage.save_state(path, {"a": torch.ones(20)}, 1)
    storage.check_state(path)
    cut_short(path)
    with pytest.raises(CheckpointError, match="must be a state file"):
        storage.check_state(path)
