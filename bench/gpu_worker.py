"""The process of a GPU run that measures: parts, one after the other, each a series of jobs, all of it noted in the journal.

A fault on a GPU leaves a process that can do nothing more there. It then ends, and bench/gpu.py starts another behind the job
that did it.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

import qupedkern as qk
from qupedkern.backends import EAGER, module, names

from .gpu_cases import GpuCase
from .gpu_clock import Clock
from .gpu_journal import Journal
from .gpu_plan import PLANS, Plan

LOST = 86  # status of a process whose device answers no more


@dataclass
class Bench:
    """Where and how a part measures."""

    clock: Clock
    plan: Plan
    journal: Journal
    started: float  # time.time()
    ceilings: dict[str, float] = field(default_factory=dict)  # bytes or operations a second

    @property
    def device(self) -> str:
        return str(self.clock.device)

    def left(self, part: str) -> float:
        return self.started + self.plan.ends[part] - time.time()

    def fail(self, what: str, error: BaseException | str) -> None:
        self.journal.write("failed", what=what, sentence=sentence_of(error))


Job = tuple[str, Callable[[Bench], None]]
Part = Callable[[Bench], Iterator[Job]]


def sentence_of(error: BaseException | str) -> str:
    text = error if isinstance(error, str) else "".join(traceback.format_exception_only(error))
    return re.sub(r"\s+", " ", text).strip()[:500]


def machine(clock: Clock) -> dict[str, Any]:
    """What it runs on."""
    found: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "backends": {name: module(name).describe() for name in names() if name != EAGER},
        "qupedkern": qk.__version__,
        "commit": os.environ.get("QUPEDKERN_COMMIT", "unknown"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if clock.is_gpu:
        properties = torch.cuda.get_device_properties(clock.device)
        found |= {
            "device": properties.name,
            "capability": list(torch.cuda.get_device_capability(clock.device)),
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "driver": smi("driver_version"),
            "clocks_mhz": smi("clocks.sm,clocks.mem,clocks.max.sm"),
        }
    return found


def smi(fields: str) -> str | None:
    """What nvidia-smi answers; None where there is none."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None


def measure(bench: Bench, part: str, case: GpuCase) -> None:
    """Check what is timed first, then time every candidate; one that fails is noted and the others go on."""
    case.check()
    times: dict[str, dict[str, Any]] = {}
    for name, candidate in case.candidates.items():
        rounds = bench.plan.rounds if name == "kernel" else max(3, bench.plan.rounds // 3)
        try:
            measured = bench.clock.time(candidate, rounds)
        except Exception as error:
            if name == "kernel":
                raise
            bench.fail(f"{part}: {case.name}: {name}", error)
            stop_if_lost(bench)
            continue
        times[name] = {"time_us": measured.timing.rounded(), "way": measured.way}
    kernel = times["kernel"]["time_us"][1]
    shares = {}
    if case.bytes and {"copy", "read"} <= set(bench.ceilings):
        shares = {f"of_{name}": case.bytes / (kernel * 1e-6) / bench.ceilings[name] for name in ("copy", "read")}
    if case.operations and "bfloat16 matmul" in bench.ceilings:
        shares["of_matmul"] = case.operations / (kernel * 1e-6) / bench.ceilings["bfloat16 matmul"]
    ratios = {name: times[name]["time_us"][1] / kernel for name in times if name != "kernel"}
    bench.journal.write(
        "row", part=part, name=case.name, backend=case.backend, bytes=case.bytes, times=times, ratios=ratios,
        **case.notes, **shares,
    )  # fmt: skip


def cases(part: str, found: Callable[[Bench], Iterator[GpuCase]]) -> Part:
    """A part of cases that are all measured alike."""

    def jobs(bench: Bench) -> Iterator[Job]:
        for case in found(bench):
            yield case.name, partial(measure, part=part, case=case)

    return jobs


def stop_if_lost(bench: Bench) -> None:
    """End the process where the device answers no more."""
    try:
        bench.clock.synchronize()
    except Exception as error:
        print(f"the device is lost: {sentence_of(error)}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(LOST)  # no clean-up: it would wait for the device


def run_part(bench: Bench, name: str, part: Part, skip: int = 0) -> None:
    """Its jobs from number `skip` on, until its time is up."""
    bench.clock.wake()
    iterator, number = part(bench), -1
    while True:
        number += 1
        try:
            job = next(iterator, None)
        except Exception as error:
            bench.fail(name, error)
            stop_if_lost(bench)
            break
        if job is None:
            break
        if number < skip:
            continue
        if bench.left(name) <= 0:
            bench.journal.write("skipped", part=name, name=job[0])
            break
        bench.journal.write("begin", part=name, job=number, name=job[0])
        try:
            job[1](bench)
        except Exception as error:
            bench.fail(f"{name}: {job[0]}", error)
            del error
            stop_if_lost(bench)
        job = None
        if bench.clock.is_gpu:
            gc.collect()
            torch.cuda.empty_cache()
    bench.journal.write("end", part=name, clocks=smi("clocks.sm,clocks.mem") if bench.clock.is_gpu else None)


def main() -> int:
    from .gpu_parts import PARTS

    parser = argparse.ArgumentParser(prog="python -m bench.gpu_worker", description=__doc__)
    parser.add_argument("--device", required=True)
    parser.add_argument("--plan", choices=list(PLANS), required=True)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--started", type=float, required=True, help="time.time() of the run's start")
    parser.add_argument("--skip", type=int, default=0, help="jobs of the first part that are done")
    parser.add_argument("parts", nargs="+", choices=list(PARTS))
    options = parser.parse_args()
    plan, journal = PLANS[options.plan], Journal(options.journal)
    bench = Bench(Clock(options.device, plan.flush), plan, journal, options.started)
    for event in journal.events():
        if event["event"] == "ceiling":
            bench.ceilings[event["name"]] = event["per_second"]
    if not any(event["event"] == "machine" for event in journal.events()):
        journal.write("machine", **machine(bench.clock))
    for i, name in enumerate(options.parts):
        run_part(bench, name, PARTS[name], options.skip if i == 0 else 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
