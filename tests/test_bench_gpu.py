"""bench/gpu.sh where there is no GPU, and its measuring code with the CPU standing in for one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_cases, gpu_models
from bench.gpu_clock import Clock

ROOT = Path(__file__).resolve().parent.parent
SMALL = gpu.Plan(4096, 32, 3, ((32, 64),), (1, 4), 8192, 2, dict.fromkeys(gpu.PLANS["full"].ends, 600.0))
CPU = Clock("cpu", 1 << 16)


def shell(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), *arguments]
    environment = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_in_one_sentence_and_stops(tmp_path: Path) -> None:
    done = shell("quick", "--out", str(tmp_path / "results"))
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith("gpu.sh: nothing can be measured here: ")
    assert done.stderr.endswith("; run it on a machine with a GPU\n")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "results").exists()


def test_wrong_arguments_and_a_missing_python_are_told() -> None:
    assert (shell("fast").returncode, shell("fast").stderr) == (2, "usage: bench/gpu.sh [quick|full] [--out DIR]\n")
    assert shell("--out").returncode == 2
    done = shell(PYTHON="no-such-python")
    assert (done.returncode, done.stderr.split(";")[0]) == (3, "gpu.sh: no-such-python was not found")


def test_the_measuring_code_runs_with_the_cpu_in_place_of_a_gpu(tmp_path: Path) -> None:
    run = gpu.execute("cpu", SMALL, tmp_path, only=("ceilings", "ops", "lut_linear"), flush_bytes=1 << 16)
    assert run.failures == []
    (record,) = tmp_path.glob("gpu-*.json")
    (table,) = tmp_path.glob("gpu-*.md")
    assert not list(tmp_path.glob("*.jsonl"))
    found = json.loads(record.read_text(encoding="utf-8"))
    assert set(found["ceilings"]) == {"copy", "read", "bfloat16 matmul"}
    assert found["machine"]["torch"] == torch.__version__
    timed = [row for row in found["rows"] if "times" in row]
    names = {row["name"] for row in timed}
    assert {case.name for case in gpu_cases.single_tensors("cpu", SMALL.numel)} <= names
    assert {"quped_step sgd m=2", "quped_step adam m=16"} <= names
    for row in timed:
        p20, p50, p80 = row["times"]["kernel"]["time_us"]
        assert 0 < p20 <= p50 <= p80
        assert row["of_copy"] == pytest.approx(row["bytes"] / (p50 * 1e-6) / found["ceilings"]["copy"])
        assert f"| {row['name']} |" in table.read_text(encoding="utf-8")


def test_a_wrong_kernel_gets_no_time_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = list(gpu_cases.single_tensors("cpu", 512, (2,)))[:2]

    def wrong() -> None:
        raise AssertionError("relative error 0.5")

    def broken(device: str, numel: int) -> Iterator[gpu_cases.GpuCase]:
        yield replace(good[0], check=wrong)
        yield good[1]
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu_cases, "single_tensors", broken)
    monkeypatch.setattr(gpu_cases, "weight_steps", lambda device, numel: iter(()))
    run = gpu.execute("cpu", SMALL, tmp_path, only=("ceilings", "ops"), flush_bytes=1 << 16)
    assert [row["name"] for row in run.rows if "times" in row] == [good[1].name]
    assert run.failures == [
        f"ops: {good[0].name}: AssertionError: relative error 0.5",
        "ops: RuntimeError: out of memory",
    ]
    (table,) = tmp_path.glob("gpu-*.md")
    assert table.read_text(encoding="utf-8").count("\n- ops") == 2


def test_a_part_without_time_left_says_where_it_stopped(tmp_path: Path) -> None:
    plan = replace(SMALL, ends={**SMALL.ends, "ops": -1.0})
    run = gpu.execute("cpu", plan, tmp_path, only=("ceilings", "ops"), flush_bytes=1 << 16)
    assert [row["part"] for row in run.rows if "skipped" in row] == ["ops"]
    assert run.failures == []


def test_a_check_sees_a_wrong_output() -> None:
    case = next(iter(gpu_cases.single_tensors("cpu", 512, (2,))))
    case.check()
    with pytest.raises(AssertionError, match="relative error"):
        gpu_cases._close(torch.ones(3), torch.tensor([1.0, 1.0, 1.01]), "op", 1e-4)
    with pytest.raises(AssertionError):
        gpu_cases._close(torch.tensor([float("nan")]), torch.ones(1), "op", 1.0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when its compiler is first imported
def test_training_steps_and_compiled_references_are_cases_like_any_other() -> None:
    for case in gpu_models.steps("cpu", "mlp", 4):
        for candidate in case.candidates.values():
            candidate()
    names = {case.name.split()[0] for case in gpu_models.compiled("cpu", 256)}
    assert names == set(gpu_models._COMPILED)


def test_tests_that_take_too_long_are_stopped_and_named() -> None:
    op, status, _ = gpu._tests_of("assign", 1, 0.0)
    assert (op, status) == ("assign", 124)


def test_a_clock_gives_medians_with_their_spread() -> None:
    measured = CPU.time(lambda: torch.ones(8).sum(), rounds=5)
    assert 0 < measured.timing.p20 <= measured.timing.p50 <= measured.timing.p80
    assert measured.way == "events"
