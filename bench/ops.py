"""Single ops against the machine's limit, eager PyTorch and torch.compile of the same reference."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import cases
from .against_streams import each, timed
from .records import Row
from .streams import scratch
from .tables import Column, Table
from .workloads import Workload

NAMES, QUICK, LEVELS = ("1M",), ("layer",), (2, 4, 16)
# Ops whose kernels sum or exponentiate in another order than the reference; all others must agree to the bit.
INEXACT = ("soft", "backward", "distance", "prox_centers")


def _compiled(case: cases.Case) -> Callable[[], Any]:
    # a reference that reads a value breaks its graph; so be it
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    torch.compiler.reset()  # the references of all cases share their code, and its compiled versions are counted
    return torch.compile(case.reference)


def check(name: str, got: Any, expected: Any, case: cases.Case) -> None:
    """RuntimeError unless a result is the reference's: to the bit, or where sums are in it to 1e-4 of the largest value."""
    for a, b in zip(cases.flat(got), cases.flat(expected), strict=True):
        if any(word in case.op for word in INEXACT):
            right = float((a.double() - b.double()).abs().max()) <= 1e-4 * float(b.abs().max())
        else:
            right = torch.equal(a, b)
        if not right:
            raise RuntimeError(f"{name}: {case.op} disagrees with the reference")


def measure(op: str, work: Workload, m: int, *, rounds: int, compiled: bool) -> Row:
    """One row, every candidate checked before it is timed."""
    torch.set_num_threads(work.threads)
    case = cases.build(op, work, m)
    candidates: dict[str, Callable[[], Any]] = {"op": case.run, "eager": case.reference}
    native = case.native()
    if native is not None:
        candidates["native"] = native
    if compiled:
        candidates["compile"] = _compiled(case)
    expected = case.reference()
    for name, candidate in candidates.items():
        check(name, candidate(), expected, case)
    copy = [([source], [target]) for source, target in [scratch(2, case.bytes // 8)]]
    return timed("ops", work, m, candidates, copy, rounds=rounds, variant=op, moved=case.bytes)


def rows(
    names: Sequence[str],
    levels: Sequence[int],
    *,
    rounds: int,
    threads: int | None,
    compiled: bool,
    op: str | None = None,
) -> list[Row]:
    """All rows of one process; op: of that op alone."""
    ops = (op,) if op else cases.OP_NAMES
    return [
        measure(one, work, m, rounds=rounds, compiled=compiled) for work, one, m in each(names, ops, levels, threads)
    ]


TABLES = [
    Table(
        "Single ops",
        "float32. limit: a copy of as many bytes as the op must read and write, by the best of our memory streams, ordinary or "
        "non-temporal, and torch's copy. native: the kernel call, outputs given; a dash where there is none. op: through "
        "torch.ops. eager, compile: the op's reference in PyTorch.",
        [
            Column("native", "native"),
            Column("op", "op"),
            Column("limit", "limit"),
            Column("native / limit", "native", "limit"),
            Column("eager / op", "eager", "op"),
            Column("compile / op", "compile", "op"),
        ],
        variant="name",
    )
]
