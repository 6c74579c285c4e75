"""The GPU run of bench/gpu.sh: correctness of the kernels on the device, then what they reach of its ceilings.

Rows are appended to a file as they are measured, so a kill loses one; a part that fails is noted and the next begins.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import qupedkern as qk
from qupedkern.backends import module

from . import gpu_cases, gpu_models
from .gpu_cases import GpuCase
from .gpu_clock import Clock

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Plan:
    """How much is measured, and until which second each part may go on."""

    numel: int
    matmul: int
    rounds: int
    lut_shapes: tuple[tuple[int, int], ...]
    lut_batches: tuple[int, ...]
    rotated: int
    examples: int  # hypothesis's, an op and property
    ends: dict[str, float]  # part: seconds after the start


PLANS = {
    "quick": Plan(
        1 << 26, 8192, 11, gpu_cases.LUT_SHAPES[:1], (1, 16, 256), gpu_cases.ROTATED_BYTES, 8,
        {"correctness": 90, "ops": 145, "lut_linear": 185, "models": 205, "compiled": 230},
    ),
    "full": Plan(
        1 << 26, 8192, 21, gpu_cases.LUT_SHAPES, gpu_cases.LUT_BATCHES, gpu_cases.ROTATED_BYTES, 25,
        {"correctness": 180, "ops": 270, "lut_linear": 390, "models": 430, "compiled": 520},
    ),
}  # fmt: skip


@dataclass
class Run:
    """Rows and failures so far."""

    clock: Clock
    plan: Plan
    rows_file: Path
    started: float = field(default_factory=time.monotonic)
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    ceilings: dict[str, float] = field(default_factory=dict)  # bytes or operations a second

    def left(self, part: str) -> float:
        return self.started + self.plan.ends[part] - time.monotonic()

    def keep(self, **row: Any) -> None:
        self.rows.append(row)
        with self.rows_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def fail(self, what: str, error: BaseException | str) -> None:
        sentence = error if isinstance(error, str) else "".join(traceback.format_exception_only(error)).strip()
        self.failures.append(f"{what}: {sentence[:600]}")
        print(f"FAILED {self.failures[-1]}", flush=True)


def machine(clock: Clock) -> dict[str, Any]:
    """What it runs on."""
    found: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "triton": module("triton").describe(),
        "qupedkern": qk.__version__,
        "commit": os.environ.get("QUPEDKERN_COMMIT", "unknown"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if clock.is_gpu:
        properties = torch.cuda.get_device_properties(clock.device)
        found |= {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "driver": _smi("driver_version"),
        }
    return found


def _smi(fields: str) -> str | None:
    """What nvidia-smi answers; None where there is none."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None


def measure_ceilings(run: Run) -> None:
    """Copy and read bandwidth and the rate of a bfloat16 matmul: what every share below is a share of."""
    run.clock.wake()
    for name, (candidate, amount) in gpu_cases.ceilings(
        str(run.clock.device), run.plan.numel * 4, run.plan.matmul
    ).items():
        measured = run.clock.time(candidate, run.plan.rounds)
        run.ceilings[name] = amount / (measured.timing.p50 * 1e-6)
        run.keep(part="ceilings", name=name, per_second=run.ceilings[name], time_us=measured.timing.rounded())


def _tests_of(op: str, examples: int, seconds: float) -> tuple[str, int, str]:
    """op, status and the end of what pytest said, of tests/test_every_op.py for one op's Triton kernel."""
    command = [sys.executable, "-m", "pytest", "tests/test_every_op.py", "-q", "-k", f"{op}-triton]"]
    command += ["-p", "no:cacheprovider", "--maxfail=3"]
    environment = {**os.environ, "HYPOTHESIS_PROFILE": "gpu", "QUPEDKERN_EXAMPLES": str(examples)}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=max(seconds, 1), check=False
        )
    except subprocess.TimeoutExpired as late:
        said = late.stdout or b""
        text = said.decode(errors="replace") if isinstance(said, bytes) else said
        return op, 124, text
    return op, done.returncode, done.stdout + done.stderr


def _before(end: float, op: str, examples: int) -> tuple[str, int, str]:
    """_tests_of in what time is left once a worker takes the job."""
    return _tests_of(op, examples, end - time.monotonic())


def correctness(run: Run, log: Path) -> None:
    """The property tests of every op that has a Triton kernel, on the GPU, an op a process; late ones are stopped and named."""
    ops = module("triton").ops()
    workers = max(1, min(16, (os.cpu_count() or 2) - 1))
    end = run.started + run.plan.ends["correctness"]
    with log.open("w", encoding="utf-8") as file, concurrent.futures.ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(_before, end, op, run.plan.examples) for op in ops]
        for job in concurrent.futures.as_completed(jobs):
            op, status, text = job.result()
            passed = re.search(r"(\d+) passed", text)
            dots = len(re.findall(r"\.", re.sub(r"\[.*?\]", "", text.splitlines()[0]))) if text and status == 124 else 0
            count = int(passed.group(1)) if passed else dots
            verdict = {0: "passed", 124: "stopped: out of time"}.get(status, "failed")
            file.write(f"==== {op}: {verdict}\n{text}\n")
            run.keep(part="correctness", name=op, passed=count, verdict=verdict)
            if status == 124:
                print(f"{op}: {count} properties held, the rest had no time", flush=True)
            elif status:
                run.fail(f"tests of {op} on the GPU", (re.findall(r"^E  .*", text, re.M) or [text[-300:]])[0])


def measure(run: Run, part: str, case: GpuCase) -> None:
    """Check the kernel's output, then time every candidate."""
    case.check()
    times: dict[str, dict[str, Any]] = {}
    for name, candidate in case.candidates.items():
        measured = run.clock.time(candidate, run.plan.rounds if name == "kernel" else max(3, run.plan.rounds // 3))
        times[name] = {"time_us": measured.timing.rounded(), "way": measured.way}
    seconds = times["kernel"]["time_us"][1] * 1e-6
    shares = {
        "of_copy": case.bytes / seconds / run.ceilings["copy"],
        "of_read": case.bytes / seconds / run.ceilings["read"],
    }
    if case.operations:
        shares["of_matmul"] = case.operations / seconds / run.ceilings["bfloat16 matmul"]
    ratios = {name: times[name]["time_us"][1] / times["kernel"]["time_us"][1] for name in times if name != "kernel"}
    run.keep(part=part, name=case.name, backend=case.backend, bytes=case.bytes, times=times, ratios=ratios, **shares)


def measure_all(run: Run, part: str, cases: Iterable[GpuCase]) -> None:
    """Until the part's time is up; what could not be measured is noted."""
    run.clock.wake()
    iterator = iter(cases)
    while True:
        try:
            case = next(iterator, None)
        except Exception as error:
            run.fail(part, error)
            return
        if case is None:
            return
        if run.left(part) <= 0:
            run.keep(part=part, name=case.name, skipped="no time was left for this and what follows")
            return
        try:
            measure(run, part, case)
        except Exception as error:
            run.fail(f"{part}: {case.name}", error)


def parts(run: Run, log: Path) -> dict[str, Callable[[], None]]:
    """In the order in which they run: right first, then fast; what compiles for long comes late."""
    device, plan = str(run.clock.device), run.plan
    return {
        "ceilings": lambda: measure_ceilings(run),
        "correctness": lambda: correctness(run, log),
        "ops": lambda: measure_all(
            run,
            "ops",
            itertools.chain(gpu_cases.weight_steps(device, plan.numel), gpu_cases.single_tensors(device, plan.numel)),
        ),
        "lut_linear": lambda: measure_all(
            run,
            "lut_linear",
            gpu_cases.lut_linear(device, batches=plan.lut_batches, shapes=plan.lut_shapes, rotated=plan.rotated),
        ),
        "models": lambda: measure_all(run, "models", gpu_models.steps(device)),
        "compiled": lambda: measure_all(run, "compiled", gpu_models.compiled(device, plan.numel)),
    }


def markdown(about: dict[str, Any], run: Run) -> str:
    """A short table: medians in microseconds, shares of the ceilings of the same run."""
    ceilings = ", ".join(
        f"{name} {value / 1e12:.3g} T{'FLOP' if 'matmul' in name else 'B'}/s" for name, value in run.ceilings.items()
    )
    lines = [
        f"# {about['device']}",
        "",
        f"{about['triton']}; torch {about['torch']}; driver {about.get('driver')}; commit {about['commit']}; {about['date']}",
    ]
    lines += ["", f"Ceilings: {ceilings}.", ""]
    tested = [row for row in run.rows if row["part"] == "correctness"]
    held = sum(row["verdict"] == "passed" for row in tested)
    lines += [f"Correctness on the device: {held} of {len(tested)} ops passed all properties.", ""]
    lines += [
        "| case | backend | us (p20, median, p80) | of copy | of read | others / kernel |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in run.rows:
        if "times" in row:
            us = ", ".join(f"{value:.1f}" for value in row["times"]["kernel"]["time_us"])
            others = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratios"].items())
            shares = " | ".join(f"{100 * row[key]:.0f} %" if row["bytes"] else "-" for key in ("of_copy", "of_read"))
            lines.append(f"| {row['name']} | {row['backend']} | {us} | {shares} | {others} |")
        elif "skipped" in row:
            lines.append(f"| {row['part']}, from {row['name']} on | | {row['skipped']} | | | |")
    lines += ["", "Failed:" if run.failures else "Nothing failed.", *(f"- {sentence}" for sentence in run.failures), ""]
    return "\n".join(lines)


def execute(device: str, plan: Plan, out: Path, *, only: tuple[str, ...] = (), flush_bytes: int | None = None) -> Run:
    """All parts (or those named), then the files: gpu-<name>-<date>.json and .md. Returns what was found."""
    clock = Clock(device) if flush_bytes is None else Clock(device, flush_bytes)
    about = machine(clock)
    stem = re.sub(r"[^a-z0-9]+", "-", f"gpu-{about['device']}-{about['date'][:10]}".lower()).strip("-")
    out.mkdir(parents=True, exist_ok=True)
    rows_file = out / f"{stem}.jsonl"
    rows_file.unlink(missing_ok=True)
    run = Run(clock, plan, rows_file)
    print(json.dumps(about, indent=2), flush=True)
    if clock.is_gpu:
        run.keep(part="machine", name="clocks before, MHz", clocks=_smi("clocks.sm,clocks.mem"))
    for name, part in parts(run, out / f"{stem}-tests.log").items():
        if only and name not in only:
            continue
        print(f"{time.monotonic() - run.started:6.1f} s  {name}", flush=True)
        try:
            part()
        except Exception as error:
            run.fail(name, error)
    if clock.is_gpu:
        run.keep(part="machine", name="clocks after, MHz", clocks=_smi("clocks.sm,clocks.mem"))
    record = {"machine": about, "ceilings": run.ceilings, "rows": run.rows, "failures": run.failures}
    (out / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    table = markdown(about, run)
    (out / f"{stem}.md").write_text(table, encoding="utf-8")
    rows_file.unlink()
    print(table, flush=True)
    return run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("mode", choices=list(PLANS), nargs="?", default="full")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args()
    reason = module("triton").unavailable()
    if reason is not None or not torch.cuda.is_available():
        print(f"bench.gpu: nothing can be measured here: {reason or 'torch finds no GPU'}", file=sys.stderr)
        return 3
    run = execute("cuda", PLANS[options.mode], options.out)
    return 1 if run.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
