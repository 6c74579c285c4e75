"""Whole runs killed at random moments: no finished round is lost, and the run ends in the bits of one that was left alone.

A few kills in every run of the suite; with HYPOTHESIS_PROFILE=slow at least 50 an engine.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fl.engines import shared

Outcome = Callable[[Path], dict[str, Any]]
ROOT = Path(__file__).parents[2]
KILLS = 50 if os.environ.get("HYPOTHESIS_PROFILE") == "slow" else 3
SHARE_AT_THE_START = 0.15  # of the kills: before the run has said anything, while Python still imports
ROUNDS = 8
MINUTE = 60.0

pytestmark = pytest.mark.skipif(not hasattr(os, "killpg"), reason="this system has no process groups")


@dataclass
class Runs:
    """`python -m fl run` of one configuration, over and over; every process of a launch is in a group of its own."""

    config: Path
    log: Path

    def start(self, out: Path, engine: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "fl", "run", str(self.config), "--out", str(out), "--engine", engine]
        command += ["--workers", "2"] if engine == "pool" else []
        command += ["--resume"] if out.exists() else []
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        with open(self.log, "wb") as log:
            return subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=log, start_new_session=True, cwd=ROOT
            )

    def finish(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        process.stdout.read()
        process.stdout.close()
        assert process.wait(5 * MINUTE) == 0, self.log.read_text()


def wait_for_work(process: subprocess.Popen[bytes]) -> None:
    """Until the run has printed how its data is cut, which it does just before it touches its directory."""
    assert process.stdout is not None
    for line in process.stdout:
        if b"Training images" in line:
            return


def finished_rounds(directory: Path) -> int:
    """Rounds that the run says it has finished; the manifest must be readable at any moment. -1: none, not even round 0."""
    try:
        return int(json.loads((directory / "run.json").read_text()).get("round", -1))
    except FileNotFoundError:
        return -1


def kill(process: subprocess.Popen[bytes], whole_group: bool, after: float, directory: Path) -> int | None:
    """Kill a run so many seconds from now, if it is still there; the rounds it had finished, None where it had ended."""
    assert process.stdout is not None
    reader = threading.Thread(target=process.stdout.read)  # a full pipe would stop the run
    reader.start()
    with suppress(subprocess.TimeoutExpired):
        process.wait(after)
    before = finished_rounds(directory)
    if process.poll() is None:
        if whole_group:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()  # its workers, if any, find out by themselves
    process.wait()
    reader.join(MINUTE)  # which ends with the last process that writes there, so with the workers
    assert not reader.is_alive()
    process.stdout.close()
    return before if process.returncode == -signal.SIGKILL else None


@pytest.fixture
def runs(config_file: Path, config_text: str, tmp_path: Path) -> Runs:
    config_file.write_text(config_text.replace("rounds = 2", f"rounds = {ROUNDS}"))
    return Runs(config_file, tmp_path / "log.txt")


def strip(line: str) -> dict[str, Any]:
    record = json.loads(line)
    del record["seconds"]
    return record


@pytest.mark.parametrize("engine", ["serial", "pool"])
def test_a_run_killed_at_random_moments_loses_no_finished_round(
    outcome: Outcome, runs: Runs, engine: str, tmp_path: Path
) -> None:
    process = runs.start(tmp_path / "whole", engine)
    wait_for_work(process)
    since = time.monotonic()
    while not (tmp_path / "whole" / "quped" / "summary.json").exists():
        assert time.monotonic() - since < 5 * MINUTE
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
            if chance.random() < SHARE_AT_THE_START:
                after = chance.uniform(0, 3)  # seconds; importing takes two or three
            else:
                wait_for_work(process)
                after = chance.uniform(0, length)
            before = kill(process, chance.random() < 0.7, after, directory)
            if before is None:
                assert process.returncode == 0, runs.log.read_text()
                break
            kills += 1
            now = finished_rounds(directory)
            assert now >= max(before, rounds), "a finished round is lost"
            rounds = now
            written = (directory / "records.jsonl").read_text().splitlines() if rounds >= 0 else []
            assert [strip(line) for line in written[: rounds + 1]] == expected["records"][: rounds + 1]
        runs.finish(runs.start(out, engine))
        assert outcome(directory) == expected
        assert not list(out.rglob(".*"))
        cuts += 1


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="this system has no /dev/shm")
def test_memory_that_a_killed_run_shared_is_released_by_a_later_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "YOUNG", 0.0)
    live = shared.shared_directory()
    program = "import time; from fl.engines.shared import shared_directory; print(shared_directory(), flush=True); time.sleep(60)"
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
