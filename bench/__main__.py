"""`python -m bench train digits`: accuracy of Algorithm 1. `python -m bench ops`: kernels against eager and the copy limit."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from . import machine

RESULTS = Path(__file__).resolve().parent / "results"


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"\nrecords: {path}")


def train_digits(options: argparse.Namespace) -> None:
    """Every network of the table, in worker processes of one torch thread each; same seeds, same numbers."""
    from rich.progress import track

    from . import digits

    todo = digits.jobs(options.seeds)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        done = pool.map(digits.run_job, todo, chunksize=digits.NETWORKS_PER_START)
        rows = list(track(done, total=len(todo), description="digits"))
    print(digits.table(rows))
    _write(
        options.out or RESULTS / "digits.jsonl",
        [{**digits.record(row), **machine.description(), "threads": 1} for row in rows],
    )


def time_ops(options: argparse.Namespace) -> None:
    from . import cases, ops

    torch.set_num_threads(options.threads)
    names = [options.op] if options.op else list(cases.OP_NAMES)
    rows = []
    print(ops.HEADER)
    for name in names:
        for shape in options.shapes.split(","):
            for m in (2, 4, 16):
                rows.append(ops.measure(name, shape, m, compiled=options.compile, rounds=options.rounds))
                print(ops.line(rows[-1]), flush=True)
    _write(options.out or RESULTS / f"ops-{options.threads}t.jsonl", rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="accuracy of Algorithm 1 at equal gradient evaluations")
    train.add_argument("task", choices=["digits"])
    train.add_argument("--seeds", type=int, default=5)
    train.add_argument("--jobs", type=int, default=2, help="worker processes")
    train.add_argument("--out", type=Path)
    train.set_defaults(run=train_digits)
    timing = commands.add_parser("ops", help="kernels against eager, torch.compile and the copy limit")
    timing.add_argument("--op", help="one op (default: all)")
    timing.add_argument("--shapes", default="1M", help="comma-separated: 1M, 16M, resnet20-layer3")
    timing.add_argument("--threads", type=int, default=1)
    timing.add_argument("--rounds", type=int, default=15)
    timing.add_argument("--compile", action="store_true", help="also torch.compile of the reference (slow to start)")
    timing.add_argument("--out", type=Path)
    timing.set_defaults(run=time_ops)
    options = parser.parse_args()
    try:
        options.run(options)
    except (RuntimeError, KeyError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
