"""Kernels against eager PyTorch, against torch.compile of the same reference, and against the machine's copy speed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

import qupedkern as qk

from . import cases, machine
from .timing import interleaved

HEADER = (
    f"{'op':<24} {'shape':<16} {'m':>3} {'threads':>7} {'kernel us':>10} {'eager /':>8} {'compile /':>9} {'/ copy':>7}"
)


def _eager(case: cases.Case) -> Callable[[], Any]:
    def run() -> Any:
        with qk.use_backend("eager"):
            return case.run()

    return run


def _compiled(case: cases.Case) -> Callable[[], Any]:
    logging.getLogger("torch._dynamo").setLevel(
        logging.ERROR
    )  # a reference that checks codes breaks its graph; so be it
    torch.compiler.reset()  # the references of all cases share their code, and its compiled versions are counted
    functions = [torch.compile(function) for function in case.references()]
    return lambda: [function() for function in functions][-1]


def _copy(moved: int) -> Callable[[], Any]:
    """A copy that moves `moved` bytes: half of them read, half written."""
    source = torch.ones(moved // 8, dtype=torch.float32)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def check(case: cases.Case) -> None:
    """Refuse to time a kernel that disagrees with eager: exactly for codes and hard values, else to 1e-4 of the scale."""
    got, expected = case.run(), _eager(case)()
    pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
    for a, b in pairs:
        if "soft" in case.op or "backward" in case.op:
            scale = float(b.abs().max())
            if not float((a - b).abs().max()) <= 1e-4 * scale:
                raise RuntimeError(f"bench: {case.op} on {case.shape}, m = {case.m}: the kernel disagrees with eager")
        elif not torch.equal(a, b):
            raise RuntimeError(f"bench: {case.op} on {case.shape}, m = {case.m}: the kernel disagrees with eager")


def measure(op: str, shape: str, m: int, *, compiled: bool, rounds: int) -> dict[str, Any]:
    """One record: microseconds (20th, 50th, 80th percentile) of the kernel and its rivals, and the ratios of medians."""
    case = cases.build(op, shape, m)
    check(case)
    candidates: dict[str, Callable[[], Any]] = {"kernel": case.run, "eager": _eager(case), "copy": _copy(case.bytes)}
    if compiled:
        candidates["compile"] = _compiled(case)
    timings = interleaved(candidates, rounds=rounds)
    kernel = timings["kernel"].p50
    return {
        "op": op,
        "backend": qk.explain(case.names[0], *case.args[0]).backend,
        "shape": list(cases.SHAPES[shape]),
        "name": shape,
        "m": m,
        "dtype": "float32",
        "bytes": case.bytes,
        "time_us_p20_p50_p80": {name: [round(v, 2) for v in (t.p20, t.p50, t.p80)] for name, t in timings.items()},
        "eager_over_kernel": round(timings["eager"].p50 / kernel, 2),
        "compile_over_kernel": round(timings["compile"].p50 / kernel, 2) if compiled else None,
        "kernel_over_copy": round(kernel / timings["copy"].p50, 2),
        **machine.description(),
    }


def line(row: dict[str, Any]) -> str:
    compiled = "-" if row["compile_over_kernel"] is None else f"{row['compile_over_kernel']:.1f}"
    return (
        f"{row['op']:<24} {row['name']:<16} {row['m']:>3} {row['threads']:>7} "
        f"{row['time_us_p20_p50_p80']['kernel'][1]:>10.1f} {row['eager_over_kernel']:>8.1f} {compiled:>9} "
        f"{row['kernel_over_copy']:>7.2f}"
    )
