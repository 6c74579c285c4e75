"""The parts of a GPU run that measure, in their order: what compiles for long comes late."""

from __future__ import annotations

import itertools
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from . import gpu_build, gpu_cases, gpu_linear, gpu_models
from .gpu_worker import Bench, Job, Part, cases, measure


def ceilings(bench: Bench) -> Iterator[Job]:
    """What every share is a share of: copy and read bandwidth, a bfloat16 matmul, and the rates of a multiprocessor."""
    found = gpu_cases.ceilings(bench.device, bench.plan.numel * 4, bench.plan.matmul)
    for name, (candidate, amount) in found.items():
        yield (
            name,
            partial(_ceiling, name=name, candidate=candidate, amount=amount),
        )
    if bench.clock.is_gpu and torch.version.cuda:
        yield "rates of a multiprocessor", _rates


def _ceiling(bench: Bench, name: str, candidate: gpu_cases.Candidate, amount: float) -> None:
    measured = bench.clock.time(candidate, bench.plan.rounds)
    bench.ceilings[name] = amount / (measured.timing.p50 * 1e-6)
    bench.journal.write("ceiling", name=name, per_second=bench.ceilings[name], time_us=measured.timing.rounded())


def _rates(bench: Bench) -> None:
    major, minor = torch.cuda.get_device_capability(bench.clock.device)
    with tempfile.TemporaryDirectory(prefix="sm-rates-") as folder:
        program = gpu_build.sm_rates(f"sm_{major}{minor}", Path(folder) / "sm_rates", 60, Path(folder) / "log")
        done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-300:] or f"sm_rates ended with status {done.returncode}")
    for line in done.stdout.splitlines():
        bench.journal.write("ceiling", **json.loads(line))


def _ops(bench: Bench) -> Iterator[gpu_cases.GpuCase]:
    device, numel = bench.device, bench.plan.numel
    return itertools.chain(gpu_cases.weight_steps(device, numel), gpu_cases.single_tensors(device, numel))


def _made(make: Callable[[], gpu_cases.GpuCase], bench: Bench) -> None:
    measure(bench, "models", make())


def _models(bench: Bench) -> Iterator[Job]:
    for name, make in gpu_models.steps(bench.device, bench.plan.models):
        yield name, partial(_made, make)


def _clients(bench: Bench) -> Iterator[Job]:
    from . import gpu_clients

    yield from gpu_clients.rounds(bench)


PARTS: dict[str, Part] = {
    "ceilings": ceilings,
    "ops": cases("ops", _ops),
    "lut_linear": cases("lut_linear", lambda bench: gpu_linear.lut_linear(bench.device, bench.plan, bench.fail)),
    "models": _models,
    "clients": _clients,
    "compiled": cases("compiled", lambda bench: gpu_models.compiled(bench.device, bench.plan.numel)),
}
