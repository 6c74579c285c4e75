"""The command line: what it prints and leaves, one sentence and exit code 2 for a mistake, and a run that is killed."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fl.__main__ import app
from fl.engines import loop

ROOT = Path(__file__).parents[2]
Outcome = Callable[[Path], dict[str, Any]]


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["run", *map(str, arguments)])


def snapshot(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def compared(config_file: Path, config_text: str) -> Path:
    """A configuration with all three algorithms."""
    config_file.write_text(config_text.replace("rounds = 2", 'rounds = 2\ncompare = ["local", "fedavg"]'))
    return config_file


def test_a_run_shows_its_tables_and_keeps_its_results(compared: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = command(compared, "--out", out)
    assert result.exit_code == 0, result.output
    for text in ("Training images by client and class", "Test accuracy by client", "The same budget", "mlp 2-bit"):
        assert text in result.output
    for name in ("QuPeD", "local", "FedAvg"):
        assert re.search(rf"^ *{name} +\d+\.\d +\d+\.\d ", result.output, re.MULTILINE)
    assert "…" not in result.output  # nothing is cut
    for name in ("quped", "local", "fedavg"):
        assert len(list((out / name / "models").glob("client_*.safetensors"))) == 3
        assert len((out / name / "records.jsonl").read_text().splitlines()) == 3
        assert (out / name / "summary.json").is_file()
    for name in ("accuracy.png", "bytes.png", "classes.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert str(out) in result.output


def test_resuming_a_finished_run_shows_it_again(compared: Path, tmp_path: Path) -> None:
    first = command(compared, "--out", tmp_path / "out")
    again = command(compared, "--out", tmp_path / "out", "--resume")
    assert again.exit_code == 0
    tables = [result.output[result.output.index("Test accuracy by client") :] for result in (first, again)]
    assert tables[0].split("memory")[0] == tables[1].split("memory")[0]


def test_one_algorithm_alone_gives_the_same_bits_as_beside_others(
    outcome: Outcome, compared: Path, tmp_path: Path
) -> None:
    command(compared, "--out", tmp_path / "all")
    alone = command(compared, "--out", tmp_path / "alone", "--algorithm", "fedavg")
    assert alone.exit_code == 0
    assert [path.name for path in (tmp_path / "alone").iterdir() if path.is_dir()] == ["fedavg"]
    assert outcome(tmp_path / "alone" / "fedavg") == outcome(tmp_path / "all" / "fedavg")


def test_rounds_and_seed_can_be_given(config_file: Path, tmp_path: Path) -> None:
    result = command(config_file, "--out", tmp_path / "out", "--rounds", 1, "--seed", 4)
    assert result.exit_code == 0
    assert len((tmp_path / "out" / "quped" / "records.jsonl").read_text().splitlines()) == 2


def mistakes() -> list[tuple[str, Callable[[Path], list[object]], str]]:
    """(name, arguments given the configuration's path, the sentence)."""
    return [
        ("no file", lambda path: [path.with_name("absent.toml")], "config: there is no file"),
        (
            "unknown algorithm",
            lambda path: [path, "--algorithm", "fedsgd"],
            "algorithm must be one of ditto, fedavg,",
        ),
        ("no rounds", lambda path: [path, "--rounds", 0], "rounds must be at least 1, got 0"),
        ("wrong seed", lambda path: [path, "--seed", -1], "seed must be between 0"),
        ("no data", lambda path: [path, "--data", path.with_name("nowhere")], "data directory must exist"),
        ("a full directory", lambda path: [path, "--out", path.parent], "is not empty, continue with --resume"),
        ("nothing to resume", lambda path: [path, "--out", path.parent, "--resume"], "holds no run to resume"),
        ("a file as directory", lambda path: [path, "--out", path], "must be a directory, it is a file"),
    ]


@pytest.mark.parametrize(("arguments", "sentence"), [m[1:] for m in mistakes()], ids=[m[0] for m in mistakes()])
def test_a_mistake_is_one_sentence_and_exit_code_2(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, arguments: Callable[[Path], list[object]], sentence: str
) -> None:
    monkeypatch.chdir(config_file.parent)
    before = snapshot(config_file.parent)
    result = command(*arguments(config_file))
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert snapshot(config_file.parent) == before


def test_a_class_count_that_cannot_be_split_writes_nothing(config_file: Path, config_text: str) -> None:
    config_file.write_text(config_text.replace("[4, 5]", "[2, 3]"))
    result = command(config_file, "--out", config_file.parent / "out")
    assert result.exit_code == 2
    assert "cannot hold all 10 classes" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (config_file.parent / "out").exists()


def test_a_checkpoint_of_another_experiment_is_refused_and_kept(compared: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command(compared, "--out", out)
    before = snapshot(out)
    result = command(compared, "--out", out, "--resume", "--seed", 1)
    assert result.exit_code == 2
    assert "holds another experiment" in result.stderr
    assert result.stderr.count("\n") == 1
    assert snapshot(out) == before


def test_ctrl_c_leaves_a_run_that_resumes_to_the_same_bits(
    outcome: Outcome, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command(config_file, "--out", tmp_path / "whole")
    play = loop.play_round

    def interrupted(*arguments: object) -> object:
        if arguments[-1].round == 1:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return play(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "play_round", interrupted)
    result = command(config_file, "--out", tmp_path / "cut")
    assert result.exit_code == 130
    assert "interrupted, quped has 1 of 2 rounds" in result.stderr
    assert result.stderr.count("\n") == 1
    monkeypatch.undo()
    assert command(config_file, "--out", tmp_path / "cut", "--resume").exit_code == 0
    assert outcome(tmp_path / "cut" / "quped") == outcome(tmp_path / "whole" / "quped")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_killed_process_resumes_to_the_same_bits(
    outcome: Outcome, config_file: Path, config_text: str, tmp_path: Path
) -> None:
    config_file.write_text(config_text.replace("rounds = 2", "rounds = 15"))
    records = tmp_path / "cut" / "quped" / "records.jsonl"
    arguments = [sys.executable, "-m", "fl", "run", str(config_file), "--out", str(tmp_path / "cut")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not (records.exists() and records.read_bytes().count(b"\n") > 3):
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    assert 3 < records.read_bytes().count(b"\n") < 16
    assert command(config_file, "--out", tmp_path / "cut", "--resume").exit_code == 0
    command(config_file, "--out", tmp_path / "whole")
    assert outcome(tmp_path / "cut" / "quped") == outcome(tmp_path / "whole" / "quped")


def test_importing_fl_loads_nothing_heavy() -> None:
    program = (
        "import sys, fl, qupedkern; "
        "loaded = {'triton', 'flwr', 'matplotlib', 'sklearn', 'typer', 'rich'} & set(sys.modules); "
        "sys.exit(f'loaded {loaded}' if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_backend_that_is_not_there_is_refused_before_anything_is_written(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUPEDKERN_BACKEND", "bogus")
    result = command(config_file, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr.startswith("QUPEDKERN_BACKEND: the backend must be one of")
    assert not (tmp_path / "out").exists()


def test_results_go_where_the_configuration_says(
    config_file: Path, config_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for line, directory in (("", "runs/tiny"), ('\nout = "elsewhere"', "elsewhere")):
        config_file.write_text(config_text.replace("rounds = 2", f"rounds = 1{line}"))
        assert command(config_file).exit_code == 0
        assert (tmp_path / directory / "quped" / "summary.json").is_file()


def test_a_run_killed_before_its_first_manifest_is_resumed(config_file: Path, tmp_path: Path) -> None:
    """A directory that it has made, and nothing in it but a file it was writing."""
    out = tmp_path / "out"
    (out / "quped").mkdir(parents=True)
    (out / "quped" / ".run.json.x.tmp").write_text("{")
    assert "is not empty, continue with --resume" in command(config_file, "--out", out).stderr
    assert command(config_file, "--out", out, "--resume").exit_code == 0
    assert not (out / "quped" / ".run.json.x.tmp").exists()
    (tmp_path / "mine" / "notes").mkdir(parents=True)
    assert "holds no run to resume" in command(config_file, "--out", tmp_path / "mine", "--resume").stderr
