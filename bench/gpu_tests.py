"""What bench/gpu.sh runs beside each other before it measures: the property tests of every kernel on the GPU, compute-sanitizer on
small cases, and the first calls of what will be timed, so that Triton compiles on all processors at once."""

from __future__ import annotations

import concurrent.futures
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .gpu_journal import Journal
from .gpu_plan import Plan

ROOT = Path(__file__).resolve().parent.parent
LATE = 124  # status of what was stopped
SANITIZERS = ("memcheck", "racecheck")
REGIMES = {"cuda": ("tests/test_cuda_soft.py", "tests/test_cuda_lut.py"), "triton": ("tests/test_triton_regimes.py",)}
_FIRST = (
    "quped_step",
    "lut_linear",
    "lut_linear_backward",
    "prox_centers",
    "packed_embedding_backward",
)  # take longest


def run(command: Sequence[str], seconds: float, **environment: str) -> tuple[int, str]:
    """Status and what was said; LATE where it and all it started were stopped."""
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its own session: everything it started, nothing else
        said, _ = process.communicate()
        return LATE, said.decode(errors="replace")
    return process.returncode, said.decode(errors="replace")


def workers() -> int:
    return max(1, min(16, (os.cpu_count() or 2) - 1))


def backends() -> dict[str, list[str]]:
    """Ops with kernels, by backend that runs here; found in a process of its own, for a GPU's context must not stay in this one."""
    code = (
        "from qupedkern.testing.harness import kernels\n"
        "for op, backend in kernels():\n"
        "    if backend not in ('eager', 'cpp'): print('KERNEL', backend, op)\n"
    )
    status, said = run([sys.executable, "-c", code], 120)
    found: dict[str, list[str]] = {}
    for line in said.splitlines():
        if line.startswith("KERNEL "):
            _, backend, op = line.split()
            found.setdefault(backend, []).append(op)
    if status:
        raise RuntimeError(f"the backends cannot be listed: {said.strip()[-400:]}")
    return found


def tests_of(backend: str, ops: list[str]) -> dict[str, list[str]]:
    """What pytest is told, by the name of a row: the properties of each op, and the ways kernels take by size."""
    found = {op: ["tests/test_every_op.py", "-k", f"{op}-{backend}]"] for op in ops}
    return found | {Path(file).stem.removeprefix("test_"): [file] for file in REGIMES.get(backend, ())}


def _run_tests(arguments: list[str], plan: Plan, end: float) -> tuple[int, str]:
    # Other versions of torch and Python warn of other things, which is no fault of a kernel.
    command = [sys.executable, "-m", "pytest", *arguments, "-q", "-p", "no:cacheprovider", "--maxfail=3"]
    command += ["-W", "default"]
    return run(command, end - time.time(), HYPOTHESIS_PROFILE="gpu", QUPEDKERN_EXAMPLES=str(plan.examples))


def correctness(journal: Journal, plan: Plan, started: float, log: Path) -> None:
    """The property tests of every kernel that runs here, a kernel a process; late ones are stopped and named."""
    end = started + plan.ends["tests"]
    jobs = [
        (name, backend, told) for backend, ops in backends().items() for name, told in tests_of(backend, ops).items()
    ]
    jobs.sort(key=lambda job: job[0] not in _FIRST)
    if not jobs:
        raise RuntimeError("no backend has kernels that run here")
    with log.open("a", encoding="utf-8") as file, concurrent.futures.ThreadPoolExecutor(workers()) as pool:
        found = {pool.submit(_run_tests, told, plan, end): (op, backend) for op, backend, told in jobs}
        for job in concurrent.futures.as_completed(found):
            (op, backend), (status, said) = found[job], job.result()
            passed = re.search(r"(\d+) passed", said)
            verdict = {0: "passed", LATE: "out of time"}.get(status, "failed")
            file.write(f"==== {op} on {backend}: {verdict}\n{said}\n")
            count = int(passed.group(1)) if passed else 0
            journal.write("row", part="tests", name=op, backend=backend, passed=count, verdict=verdict)
            if verdict == "failed":
                reason = (re.findall(r"^E  +(.*)", said, re.M) or [said.strip()[-300:] or f"status {status}"])[0]
                journal.write("failed", what=f"tests of {op} on {backend}", sentence=reason[:400])


def sanitizer(journal: Journal, plan: Plan, started: float, log: Path) -> None:
    """compute-sanitizer over the kernels on a few hostile examples: writes and reads out of bounds, races in shared memory."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).is_file():
        journal.write("note", what="sanitizer", sentence="compute-sanitizer is not on this machine: not run")
        return
    end = started + plan.ends["sanitizer"]
    jobs = [(backend, check) for backend in backends() for check in SANITIZERS]
    with concurrent.futures.ThreadPoolExecutor(2) as pool, log.open("a", encoding="utf-8") as file:
        found = {pool.submit(_sanitized, tool, backend, check, end): (backend, check) for backend, check in jobs}
        for job in concurrent.futures.as_completed(found):
            (backend, check), (status, said) = found[job], job.result()
            file.write(f"==== {check} on {backend}: status {status}\n{said}\n")
            done = len(re.findall(r"^ok ", said, re.M))
            verdict = {0: "passed", LATE: "out of time"}.get(status, "failed")
            journal.write("row", part="sanitizer", name=check, backend=backend, passed=done, verdict=verdict)
            if verdict == "failed":
                wrong = re.findall(r"^=+ (?!COMPUTE)(.*\S)", said, re.M) or [said.strip()[-300:]]
                journal.write("failed", what=f"{check} on {backend}", sentence=wrong[0][:400])


def _sanitized(tool: str, backend: str, check: str, end: float) -> tuple[int, str]:
    command = [tool, "--tool", check, "--error-exitcode", "99", "--target-processes", "all"]
    command += [sys.executable, "-m", "qupedkern.testing", "--backend", backend, "--examples", "2"]
    # Else overruns land in torch's own cached block, unseen.
    return run(command, end - time.time(), PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def warm(journal: Journal, plan: Plan, name: str, device: str, started: float) -> None:
    """Compile what will be timed into Triton's cache, with all processors."""
    count, end = workers(), started + plan.ends["build"]
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        command = [sys.executable, "-m", "bench.gpu_tests", name, device]
        found = [pool.submit(run, [*command, str(i), str(count)], end - time.time()) for i in range(count)]
    for status, said in (job.result() for job in found):
        if status not in (0, LATE):
            journal.write("failed", what="first calls", sentence=said.strip()[-400:])


def _first_calls(plan: Plan, device: str, share: int, of: int) -> int:
    """Every `of`-th case once, small; one that fails says so when it is measured."""
    from . import gpu_cases, gpu_linear

    numel = min(plan.numel, 1 << 16)
    small = replace(plan, shapes=((1024, 2048),), rotated=1)
    every = (*gpu_cases.weight_steps(device, numel), *gpu_cases.single_tensors(device, numel))
    linear = gpu_linear.lut_linear(device, small, lambda what, error: None)
    for i, case in enumerate((*every, *linear)):
        if i % of == share:
            for name, candidate in case.candidates.items():
                if name not in ("eager", *gpu_linear.RIVALS):
                    try:
                        candidate()
                    except Exception as error:
                        print(f"{case.name}: {name}: {error}"[:300])
    return 0


def main() -> int:
    from .gpu_plan import PLANS

    name, device, share, of = sys.argv[1:]
    return _first_calls(PLANS[name], device, int(share), int(of))


if __name__ == "__main__":
    sys.exit(main())
