"""The GPU run of bench/gpu.sh: build and prove the kernels, then measure them, and write down what was found whatever happens.

This process never touches the GPU. What measures is another (gpu_worker.py): one that dies, or says nothing for too long, is
named with the case it was at, and another goes on behind it. Every row is on disk when it is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from . import gpu_build, gpu_report, gpu_tests
from .gpu_journal import Journal
from .gpu_plan import PLANS, Plan

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ("ceilings", "ops", "lut_linear", "models", "clients", "compiled")
GRACE = 5.0  # seconds past a part's end before its process is stopped
_CRASHES = 4  # of one part; then the next begins
_POLL = 0.1


@dataclass
class Where:
    """How far the workers have come, by the journal."""

    part: str
    job: int = -1  # the last that was begun
    name: str = ""
    moved: float = 0.0  # when the last line came


class Supervisor:
    """Runs workers until every part has had its time."""

    def __init__(self, command: Sequence[str], journal: Journal, plan: Plan, started: float) -> None:
        self._command, self._journal, self._plan, self._started = command, journal, plan, started

    def run(self, parts: Sequence[str]) -> None:
        left, skip, crashes = list(parts), 0, 0
        while left:
            where = Where(left[0], skip - 1)
            why = self._work(left, skip, where)
            if why is None:
                return
            done = left.index(where.part)
            crashes = crashes + 1 if done == 0 else 1
            left, skip = left[done:], where.job + 1
            if why:
                self._journal.write("failed", what=f"{where.part}: {where.name or 'its start'}", sentence=why)
            if not why or not where.name or crashes >= _CRASHES:  # out of time, or no case to leave out
                left, skip, crashes = left[1:], 0, 0

    def _work(self, parts: Sequence[str], skip: int, where: Where) -> str | None:
        """One worker. None: it came to its end; else why it did not, "" where its part was out of time."""
        said = self._journal.path.with_suffix(".said")
        with said.open("ab") as file:
            begin = file.tell()
            process = subprocess.Popen(
                [*self._command, "--skip", str(skip), *parts],
                cwd=ROOT,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
            seen = len(self._journal.events())
            where.moved = time.time()
            try:
                while process.poll() is None:
                    seen = self._follow(where, seen)
                    now, end = time.time(), self._started + self._plan.ends[where.part]
                    if now > end + GRACE:
                        return ""
                    if now - where.moved > self._plan.stall:
                        return f"said nothing for {self._plan.stall:.0f} s and was stopped"
                    time.sleep(_POLL)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # its own session: what it started, nothing else
                    process.wait()
                self._follow(where, seen)
        if process.returncode == 0:
            return None
        last = said.read_bytes()[begin:].decode(errors="replace").strip().splitlines()
        ended = f"signal {-process.returncode}" if process.returncode < 0 else f"status {process.returncode}"
        return f"its process ended with {ended}: {(last or ['nothing was said'])[-1][:300]}"

    def _follow(self, where: Where, seen: int) -> int:
        events = self._journal.events()
        for event in events[seen:]:
            where.moved = time.time()
            if event["event"] == "begin":
                if event["part"] != where.part or event["job"] == 0:
                    print(f"{time.time() - self._started:6.1f} s  {event['part']}", flush=True)
                where.part, where.job, where.name = event["part"], event["job"], event["name"]
            elif event["event"] == "failed":
                print(f"FAILED {event['what']}: {event['sentence']}", flush=True)
        return len(events)


def worker_command(device: str, plan: str, journal: Journal, started: float) -> list[str]:
    options = ["--device", device, "--plan", plan, "--journal", str(journal.path), "--started", str(started)]
    return [sys.executable, "-m", "bench.gpu_worker", *options]


def _prepare(device: str, name: str, journal: Journal, started: float, log: Path) -> None:
    """Build the native module and compile Triton's kernels beside each other; then prove all of them."""
    plan = PLANS[name]
    attempt = gpu_build.attempt
    seconds = plan.ends["build"] - (time.time() - started)
    together: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (attempt, (journal, "build of _C_cuda", gpu_build.cuda_module, seconds, log.with_suffix(".build.log"))),
        (attempt, (journal, "first calls", gpu_tests.warm, journal, plan, name, device, started)),
    ]
    _together(together)
    _together(
        [
            (attempt, (journal, "tests", gpu_tests.correctness, journal, plan, started, log)),
            (
                attempt,
                (journal, "sanitizer", gpu_tests.sanitizer, journal, plan, started, log.with_suffix(".sanitizer.log")),
            ),
        ]
    )


def _together(calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]) -> None:
    threads = [threading.Thread(target=function, args=arguments) for function, arguments in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def execute(device: str, name: str, out: Path, parts: Sequence[str] = ("prepare", *MEASURED)) -> dict[str, Any]:
    """All parts (or those named), then the files gpu-<name>-<date>.json, .md and logs. Returns the record."""
    out.mkdir(parents=True, exist_ok=True)
    started = time.time()
    journal = Journal(out / "gpu-rows.jsonl")
    journal.path.unlink(missing_ok=True)
    said = journal.path.with_suffix(".said")
    said.unlink(missing_ok=True)
    log = out / "gpu-tests.log"
    log.unlink(missing_ok=True)
    try:
        if "prepare" in parts:
            _prepare(device, name, journal, started, log)
        measured = [part for part in MEASURED if part in parts]
        if measured:
            Supervisor(worker_command(device, name, journal, started), journal, PLANS[name], started).run(measured)
    finally:
        found = finish(journal, out)
    print(f"{time.time() - started:6.1f} s  done", flush=True)
    return found


def finish(journal: Journal, out: Path) -> dict[str, Any]:
    """The record and the table of what the journal holds."""
    found = gpu_report.record(journal.events())
    device, date = found["machine"].get("device", "unknown"), datetime.now(timezone.utc).date().isoformat()
    stem = re.sub(r"[^a-z0-9]+", "-", f"gpu-{device}-{date}".lower()).strip("-")
    (out / f"{stem}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    table = gpu_report.markdown(found)
    (out / f"{stem}.md").write_text(table, encoding="utf-8")
    journal.path.rename(out / f"{stem}.jsonl")
    print(table, flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("mode", choices=list(PLANS), nargs="?", default="full")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--device", default="cuda", help="cpu: the processor in place of a GPU, to try this program")
    parser.add_argument("--parts", nargs="*", choices=["prepare", *MEASURED], default=["prepare", *MEASURED])
    options = parser.parse_args()
    found = execute(options.device, options.mode, options.out, options.parts)
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
