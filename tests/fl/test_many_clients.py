"""Memory of a federation does not grow with its clients' states: the benchmark's own command, small here, whole when slow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLOW = os.environ.get("HYPOTHESIS_PROFILE") == "slow"
LIMIT_MIB = 2048
CLIENTS, DRAWN = (10_000, 100) if SLOW else (40, 10)  # the states of 10,000 alone would take 2.4 GB


def test_memory_stays_under_the_limit_however_many_clients_there_are(tmp_path: Path) -> None:
    pytest.importorskip("resource", reason="this system does not tell a process's largest memory")
    command = [sys.executable, "-m", "bench.many_clients", "--clients", str(CLIENTS), "--drawn", str(DRAWN)]
    command += ["--rounds", "2", "--out", str(tmp_path / "record.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["models"] == CLIENTS
    assert record["parameters"] > 30_000
    assert record["peak_mib_with_data_alone"] < record["peak_mib"] < LIMIT_MIB
