"""`python -m qupedkern.testing [--backend NAME] [--examples N] [OP ...]`: every kernel against its float64 reference.

For a kernel under work, an instruction set (QUPEDKERN_ISA) or an install. Exit code 1 where one is wrong, 2 for a wrong argument.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from hypothesis import HealthCheck, given, settings

from qupedkern.ops import OPS

from .harness import check, kernels, missing_backends, running_backends
from .strategies import HOSTILE, INPUTS


def failure_of(op: str, backend: str, examples: int) -> BaseException | None:
    """Hypothesis' smallest counterexample, None where the kernel is right on every example."""

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(INPUTS[op](HOSTILE))
    def holds(args: tuple[Any, ...]) -> None:
        check(op, OPS[op].prepare(*args), backend)

    try:
        holds()
    except Exception as error:
        return error
    return None


def wanted_kernels(backend: str | None, ops: list[str]) -> list[tuple[str, str]]:
    """(op, backend) to check; ValueError with one sentence for a name that is unknown or cannot run here."""
    reasons = missing_backends()
    if backend in reasons:
        raise ValueError(f"backend {backend!r} cannot run here: {reasons[backend]}")
    if backend is not None and backend not in running_backends():
        raise ValueError(f"--backend must be one of {', '.join(running_backends())}, got {backend!r}")
    unknown = [op for op in ops if op not in OPS]
    if unknown:
        raise ValueError(f"OP must be one of {', '.join(OPS)}, got {unknown[0]!r}")
    return [(op, name) for op, name in kernels() if backend in (None, name) and (not ops or op in ops)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qupedkern.testing", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("ops", nargs="*", metavar="OP", help="the ops to check; all without any")
    parser.add_argument("--backend", help="one backend; every one that runs here without it")
    parser.add_argument("--examples", type=int, default=50, help="hypothesis examples a kernel (50)")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.examples < 1:
            raise ValueError(f"--examples must be at least 1, got {chosen.examples}")
        wanted = wanted_kernels(chosen.backend, chosen.ops)
    except ValueError as error:
        print(f"qupedkern.testing: {error}", file=sys.stderr)
        return 2
    wrong = 0
    for op, backend in wanted:
        failure = failure_of(op, backend, chosen.examples)
        wrong += failure is not None
        note = "" if failure is None else "\n".join([f" {failure}", *getattr(failure, "__notes__", ())])
        print(f"{'ok' if failure is None else 'WRONG':<6}{backend:<8}{op}{note}", flush=True)
    print(f"{len(wanted) - wrong} of {len(wanted)} kernels within their bounds on {chosen.examples} examples each")
    return 1 if wrong or not wanted else 0


if __name__ == "__main__":
    sys.exit(main())
