"""Separate processes for timings: each with glibc's malloc tuned, so that page faults of temporaries do not flatter us.

glibc maps and unmaps every block of 32 MB or more anew; faulting those pages in takes most of the time of eager and
compiled PyTorch at 16M elements (4 to 7 times), of a kernel that writes into given outputs none. malloc reads its settings
when a process starts, so the process that prints never times.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from . import records

TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(32 * 2**30)}  # never mmap; keep up to 32 GiB
WORKER = "--records-to"  # the option that makes a process time and write its rows there


def is_tuned() -> bool:
    return all(os.environ.get(name) == value for name, value in TUNED.items())


def in_processes(arguments: Sequence[str], runs: int) -> list[records.Row]:
    """`python -m bench ARGUMENTS` in `runs` fresh processes, one after the other; their rows. RuntimeError where one fails."""
    rows: list[records.Row] = []
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as folder:
        for run in range(runs):
            path = Path(folder) / f"{run}.jsonl"
            command = [sys.executable, "-m", "bench", *arguments, WORKER, str(path)]
            print(f"bench: process {run + 1} of {runs}", file=sys.stderr, flush=True)
            done = subprocess.run(command, cwd=root, env={**os.environ, **TUNED}, check=False)
            if done.returncode != 0 or not path.is_file():
                raise RuntimeError(
                    f"process {run + 1} of {runs} failed with status {done.returncode}; it says why above"
                )
            rows += [replace(row, run=run) for row in records.read(path)]
    return rows
