"""Whole runs killed at random moments: no finished round is lost, and the run ends in the bits of one that was left alone.

A few kills in every run of the suite; with HYPOTHESIS_PROFILE=slow 50 an engine. The runs are `python -m fl run` in processes
that are forked with the imports done; test_command.py kills one that is started as a user does.
"""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from fl.engines import shared

Outcome = Callable[[Path], dict[str, Any]]
ROOT = Path(__file__).parents[2]
KILLS = 50 if os.environ.get("HYPOTHESIS_PROFILE") == "slow" else 4
ROUNDS = 8
MINUTE = 60.0


def run_command(arguments: list[str], log: Path) -> None:
    """`python -m fl run`, in a process group of its own; what it prints goes to a file."""
    from fl.__main__ import app

    os.setsid()
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    app(["run", *arguments])


@dataclass
class Runs:
    """Runs of one configuration, over and over."""

    config: Path
    log: Path

    def start(self, out: Path, engine: str) -> BaseProcess:
        arguments = [str(self.config), "--out", str(out), "--engine", engine]
        arguments += ["--workers", "2"] if engine == "pool" else []
        arguments += ["--resume"] if out.exists() else []
        self.log.write_text("")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["fl.__main__"])
        process = context.Process(target=run_command, args=(arguments, self.log))
        process.start()
        return process

    def finish(self, process: BaseProcess) -> None:
        process.join(10 * MINUTE)
        assert process.exitcode == 0, self.log.read_text()

    def wait_for_work(self, process: BaseProcess) -> None:
        """Until the run has printed how its data is cut, which it does just before it touches its directory."""
        while "Training images" not in self.log.read_text() and process.exitcode is None:
            time.sleep(0.002)


def finished_rounds(directory: Path) -> int:
    """Rounds that the run says it has finished; the manifest must be readable at any moment. -1: none, not even round 0."""
    try:
        return int(json.loads((directory / "run.json").read_text()).get("round", -1))
    except FileNotFoundError:
        return -1


def kill(process: BaseProcess, whole_group: bool, after: float, directory: Path) -> int | None:
    """Kill a run so many seconds from now, if it is still there; the rounds it had finished, None where it had ended.

    Without its group, workers outlive it for a moment, and may still be writing when the next run starts.
    """
    process.join(after)
    before = finished_rounds(directory)
    if process.exitcode is None and process.pid is not None:
        if whole_group:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.join()
    return before if process.exitcode == -signal.SIGKILL else None


@pytest.fixture
def runs(config_file: Path, config_text: str, tmp_path: Path) -> Runs:
    config_file.write_text(config_text.replace("rounds = 2", f"rounds = {ROUNDS}"))
    return Runs(config_file, tmp_path / "log.txt")


def without_seconds(line: str) -> dict[str, Any]:
    record = json.loads(line)
    del record["seconds"]
    return record


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="this system has no process groups")
@pytest.mark.parametrize("engine", ["serial", "pool"])
def test_a_run_killed_at_random_moments_loses_no_finished_round(
    outcome: Outcome, runs: Runs, engine: str, tmp_path: Path
) -> None:
    process = runs.start(tmp_path / "whole", engine)
    runs.wait_for_work(process)
    since = time.monotonic()
    while not (tmp_path / "whole" / "quped" / "summary.json").exists():
        assert time.monotonic() - since < 5 * MINUTE, runs.log.read_text()
        time.sleep(0.01)
    length = time.monotonic() - since  # of the work alone
    runs.finish(process)
    expected = outcome(tmp_path / "whole" / "quped")

    chance = random.Random(f"{engine} {KILLS}")
    kills = cuts = 0
    while kills < KILLS:
        out = tmp_path / f"cut{cuts}"
        directory, rounds = out / "quped", -1
        for _ in range(1 + chance.randrange(8)):  # then the run is left alone
            process = runs.start(out, engine)
            runs.wait_for_work(process)
            before = kill(process, chance.random() < 0.7, chance.uniform(0, length), directory)
            if before is None:
                assert process.exitcode == 0, runs.log.read_text()
                break
            kills += 1
            now = finished_rounds(directory)
            assert now >= max(before, rounds), "a finished round is lost"
            rounds = now
            written = (directory / "records.jsonl").read_text().splitlines() if rounds >= 0 else []
            assert [without_seconds(line) for line in written[: rounds + 1]] == expected["records"][: rounds + 1]
        runs.finish(runs.start(out, engine))
        assert outcome(directory) == expected
        assert not list(out.rglob(".*"))
        cuts += 1


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="this system has no /dev/shm")
def test_memory_that_a_killed_run_shared_is_released_by_a_later_one(monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = f"qupedkern-test{os.getpid()}-"  # this test's own: other runs of this machine are left alone
    monkeypatch.setattr(shared, "YOUNG", 0.0)
    monkeypatch.setattr(shared, "PREFIX", prefix)
    live = shared.shared_directory()
    program = f"import time; from fl.engines import shared; shared.PREFIX = {prefix!r}; "
    program += "print(shared.shared_directory(), flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        other = Path(process.stdout.readline().strip())
        shared.remove(shared.shared_directory())
        assert other.is_dir(), "the memory of a run that lives is gone"
        process.kill()
    assert other.is_dir()
    shared.remove(shared.shared_directory())
    assert not other.exists()
    assert live.is_dir()
    shared.remove(live)
    assert not live.exists()
