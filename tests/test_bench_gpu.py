"""bench/gpu.sh where there is no GPU, and its measuring code with the CPU standing in for one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from elsewhere import NAME, Machine

from bench import gpu, gpu_build, gpu_cases, gpu_clients, gpu_linear, gpu_models, gpu_parts, gpu_report, gpu_tests
from bench.gpu_clock import Clock
from bench.gpu_journal import Journal
from bench.gpu_plan import PLANS
from bench.gpu_worker import Bench, cases, machine, run_part

ROOT = Path(__file__).resolve().parent.parent
SMOKE = PLANS["smoke"]


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


def test_the_plans_end_in_time_and_their_parts_in_order() -> None:
    for name, most in (("quick", 240), ("full", 540)):
        ends = [PLANS[name].ends[part] for part in ("build", "tests", *gpu.MEASURED)]
        assert ends == sorted(ends)
        assert ends[-1] + gpu.GRACE < most


# The measuring parts, in this process.


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(Clock("cpu", 1 << 16), SMOKE, Journal(tmp_path / "rows.jsonl"), time.time())


def found(bench: Bench) -> dict[str, Any]:
    return gpu_report.record(bench.journal.events())


def test_every_op_and_shape_is_checked_timed_and_shown(bench: Bench) -> None:
    bench.journal.write("machine", **machine(bench.clock))
    for part in ("ceilings", "ops", "lut_linear"):
        run_part(bench, part, gpu_parts.PARTS[part])
    record = found(bench)
    assert record["failures"] == []
    assert set(record["ceilings"]) == {"copy", "read", "bfloat16 matmul"}
    names = {row["name"] for row in record["rows"]}
    assert {case.name for case in gpu_cases.single_tensors("cpu", 4096)} <= names
    assert {"quped_step sgd m=2", "quped_step adam m=16", "quped_step sgd m=4, ResNet-20"} <= names
    table = gpu_report.markdown(record)
    for row in record["rows"]:
        p20, p50, p80 = row["times"]["kernel"]["time_us"]
        assert 0 < p20 <= p50 <= p80
        if row["bytes"]:
            assert row["of_copy"] == pytest.approx(row["bytes"] / (p50 * 1e-6) / bench.ceilings["copy"])
        assert f"| {row['name']} |" in table


def test_rounds_of_clients_are_timed_where_the_clock_is(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_clients, "SERIAL", 2)
    run_part(bench, "clients", gpu_parts.PARTS["clients"])
    (row,) = found(bench)["rows"]
    assert row["name"] == "on the processor: round of 3 clients, stacked"
    kernel, serial = row["times"]["kernel"], row["times"]["serial"]
    assert (kernel["way"], serial["way"]) == ("wall clock", "wall clock, 2 of 3 clients")
    assert row["ratios"]["serial"] == pytest.approx(serial["time_us"][1] / kernel["time_us"][1], rel=1e-3)
    with Machine() as machine:
        clock = Clock(NAME, 64)
        for engine in ("stacked", "serial"):
            assert gpu_clients.seconds_a_round(clock, engine, gpu_clients._clients(2), 2) > 0
    trains = {"nll_loss_backward", "convolution_backward", "bmm"}
    assert trains <= machine.ran.keys()
    assert not trains & machine.here.keys()


def test_rounds_on_a_gpu_come_first_and_have_the_name_that_is_judged(bench: Bench) -> None:
    bench.clock.is_gpu = True
    names = [name for name, _ in gpu_clients.rounds(bench)]
    assert names == ["round of 3 clients, stacked", "on the processor: round of 3 clients, stacked"]
    judged = [gpu_report.judged({"name": name, "ratios": {"serial": 9.0}}) for name in names]
    assert judged == [["MISSED 9.00 x serial of 10.00 x serial"], []]


def test_ops_that_are_timed_are_all_that_have_kernels_on_a_gpu() -> None:
    timed = {case.name.split()[0] for case in gpu_cases.single_tensors("cpu", 4096, (2,), bits=(2,))} | {"quped_step"}
    stems = {path.stem for path in (ROOT / "qupedkern" / "kernels").glob("*.py") if not path.stem.startswith("_")}
    assert stems <= timed | {"lut_linear"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when its compiler is first imported
def test_training_steps_and_compiled_references_are_cases_like_any_other() -> None:
    made = [make() for _, make in gpu_models.steps("cpu", SMOKE.models)]
    for case in made[:2]:
        for candidate in case.candidates.values():
            candidate()
    assert made[-1].name.endswith("torch.compile")
    assert {case.name.split()[0] for case in gpu_models.compiled("cpu", 256, (2,))} <= set(gpu_models._COMPILED)
    assert sum(p.numel() for p in gpu_models._network("resnet20")[0].parameters()) == 272_474
    assert sum(p.numel() for p in gpu_models._network("resnet18")[0].parameters()) == 11_689_512


def test_a_wrong_kernel_gets_no_time_and_the_rest_goes_on(bench: Bench) -> None:
    good = list(gpu_cases.single_tensors("cpu", 512, (2,), bits=()))[:3]

    def wrong() -> None:
        raise AssertionError("relative error 0.5")

    def broken(bench: Bench) -> Iterator[gpu_cases.GpuCase]:
        yield replace(good[0], check=wrong)
        yield good[1]
        yield replace(good[2], candidates={**good[2].candidates, "rival": wrong})
        raise RuntimeError("out of memory")

    run_part(bench, "ops", cases("ops", broken))
    record = found(bench)
    assert [row["name"] for row in record["rows"]] == [good[1].name, good[2].name]
    assert record["failures"] == [
        f"ops: {good[0].name}: AssertionError: relative error 0.5",
        f"ops: {good[2].name}: rival: AssertionError: relative error 0.5",
        "ops: RuntimeError: out of memory",
    ]
    assert gpu_report.markdown(record).count("\n- ops: ") == 3


def test_a_part_without_time_left_says_where_it_stopped(bench: Bench) -> None:
    bench.plan = replace(SMOKE, ends={**SMOKE.ends, "ops": -1.0})
    run_part(bench, "ops", gpu_parts.PARTS["ops"])
    assert found(bench)["rows"] == []
    assert found(bench)["notes"] == ["ops: no time was left for quped_step sgd m=2 and what follows"]


def test_a_check_sees_a_wrong_output() -> None:
    next(iter(gpu_cases.single_tensors("cpu", 512, (2,)))).check()
    with pytest.raises(AssertionError, match="relative error"):
        gpu_cases.check_close(torch.ones(3), torch.tensor([1.0, 1.0, 1.01]), "op", 1e-4)
    with pytest.raises(AssertionError):
        gpu_cases.check_close(torch.tensor([float("nan")]), torch.ones(1), "op", 1.0)


def test_a_rival_that_does_not_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> None:
        raise ImportError("no kernel image")

    monkeypatch.setitem(gpu_linear.RIVALS, "gemlite", broken)
    told: list[str] = []
    made = list(gpu_linear.lut_linear("cpu", SMOKE, lambda what, error: told.append(f"{what}: {error}")))
    assert told == [f"lut_linear: gemlite, {bits} bits: no kernel image" for bits in SMOKE.bits]
    assert all("bfloat16 matmul" in case.candidates for case in made if "," not in case.name)


def test_a_row_says_whether_it_reached_its_target() -> None:
    row = {"name": "soft_quantize float32 m=4", "of_copy": 0.93, "ratios": {"eager": 9.0}}
    assert gpu_report.judged(row) == ["met 93 % of_copy of 90 % of_copy", "MISSED 9.00 x eager of 15.00 x eager"]
    assert gpu_report.judged({"name": "distance float32 m=4", "of_copy": 0.1, "ratios": {}}) == []


def test_a_clock_gives_medians_with_their_spread() -> None:
    measured = Clock("cpu", 1 << 16).time(lambda: torch.ones(8).sum(), rounds=5)
    assert 0 < measured.timing.p20 <= measured.timing.p50 <= measured.timing.p80
    assert measured.way == "events"


# What keeps a run alive.


def test_a_line_that_a_kill_cut_short_loses_that_row_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "rows.jsonl")
    journal.write("row", name="a")
    with journal.path.open("a", encoding="utf-8") as file:
        file.write('{"event": "row", "na')
    assert [event["name"] for event in journal.events()] == ["a"]


FAKE = """
import os, sys, time
from pathlib import Path
from bench.gpu_journal import Journal
journal, skip, parts = Journal(Path(sys.argv[1])), int(sys.argv[3]), sys.argv[4:]
for part in parts:
    for job in range(skip, 4):
        journal.write("begin", part=part, job=job, name=f"case {job}")
        if (part, job) == ("ops", 1): os.abort()
        if (part, job) == ("lut_linear", 2): time.sleep(60)
        if part == "models": sys.exit("no device")
        journal.write("row", part=part, name=f"{part} {job}")
    skip = 0
    journal.write("end", part=part)
"""


def supervised(tmp_path: Path, plan: Any, *parts: str) -> tuple[list[str], list[str]]:
    """Rows and failures of a run whose worker dies, hangs and gives up."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE, encoding="utf-8")
    journal = Journal(tmp_path / "rows.jsonl")
    command = [sys.executable, str(script), str(journal.path)]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    gpu.Supervisor(command, journal, plan, time.time()).run(parts)
    record = gpu_report.record(journal.events())
    return [row["name"] for row in record["rows"]], record["failures"]


def test_a_worker_that_dies_or_hangs_costs_one_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    plan = replace(SMOKE, stall=4.0)
    rows, failures = supervised(tmp_path, plan, "ops", "lut_linear", "models", "clients")
    survivors = [f"ops {i}" for i in (0, 2, 3)] + [f"lut_linear {i}" for i in (0, 1, 3)]
    assert rows == [*survivors, *(f"clients {i}" for i in range(4))]
    assert failures[:2] == [
        "ops: case 1: its process ended with signal 6: nothing was said",
        "lut_linear: case 2: said nothing for 4 s and was stopped",
    ]
    assert failures[2:] == [f"models: case {i}: its process ended with status 1: no device" for i in range(4)]


def test_a_part_that_does_not_end_is_stopped_when_its_time_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.setattr(gpu, "GRACE", 0.0)
    plan = replace(SMOKE, ends={**SMOKE.ends, "lut_linear": 6.0})
    rows, failures = supervised(tmp_path, plan, "lut_linear", "clients")
    assert rows == ["lut_linear 0", "lut_linear 1", *(f"clients {i}" for i in range(4))]
    assert failures == []


def test_a_run_leaves_its_record_its_table_and_every_row(tmp_path: Path) -> None:
    record = gpu.execute("cpu", "smoke", tmp_path, ("ceilings",))
    assert record["failures"] == []
    assert set(record["ceilings"]) == {"copy", "read", "bfloat16 matmul"}
    assert record["machine"]["torch"] == torch.__version__
    kinds = sorted(path.suffix for path in tmp_path.iterdir())
    assert kinds == [".json", ".jsonl", ".md", ".said"]
    assert json.loads(next(tmp_path.glob("*.json")).read_text(encoding="utf-8")) == record


# What runs before anything is measured.


def test_a_command_that_takes_too_long_is_stopped_with_all_it_started() -> None:
    status, said = gpu_tests.run(["bash", "-c", "echo begun; sleep 60 & wait"], 1.0)
    assert (status, said) == (gpu_tests.LATE, "begun\n")


def test_properties_are_run_a_kernel_a_process_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tests, "backends", lambda: {"eager": ["pack_codes"], "none": ["assign"]})
    journal = Journal(tmp_path / "rows.jsonl")
    gpu_tests.correctness(journal, SMOKE, time.time(), tmp_path / "log")
    verdicts = {row["name"]: row["verdict"] for row in gpu_report.record(journal.events())["rows"]}
    assert verdicts == {"pack_codes": "passed", "assign": "failed"}  # no test is no success


def test_the_ways_of_kernels_have_rows_of_their_own() -> None:
    told = gpu_tests.tests_of("cuda", ["soft_quantize"])
    assert told["soft_quantize"] == ["tests/test_every_op.py", "-k", "soft_quantize-cuda]"]
    assert told["cuda_soft"] == ["tests/test_cuda_soft.py"]
    for files in gpu_tests.REGIMES.values():
        assert all((ROOT / file).is_file() for file in files)


def test_a_build_that_cannot_be_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_build, "ROOT", tmp_path)
    (tmp_path / "CMakeLists.txt").write_text("", encoding="utf-8")
    journal = Journal(tmp_path / "rows.jsonl")
    assert not gpu_build.attempt(journal, "build", gpu_build.cuda_module, 1.0, tmp_path / "log")
    assert gpu_report.record(journal.events())["failures"] == ["build: no CUDA kernels in this version"]
    with pytest.raises(gpu_build.Failed, match="ended with status 3: error: no"):
        gpu_build._run(["bash", "-c", "echo error: no; exit 3"], 60, tmp_path / "log")


@pytest.mark.skipif(gpu_build.nvcc() is None, reason="nvcc is not on this machine")
def test_the_program_that_measures_a_multiprocessor_compiles(tmp_path: Path) -> None:
    program = gpu_build.sm_rates("sm_90", tmp_path / "sm_rates", 600, tmp_path / "log")
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    if torch.cuda.is_available():
        assert len(done.stdout.splitlines()) == 5
    else:
        assert (done.returncode, done.stderr.split(":")[0]) == (1, "sm_rates")
