"""What the kernels take of a GPU, from binaries compiled here: no spills, nothing over a limit, loads of 16 bytes."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import resources
from qupedkern.backends import module

BACKEND: Any = module("triton")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or BACKEND.interpreted(), reason="needs Triton, and not its interpreter"
)
EVERYTHING = os.environ.get("HYPOTHESIS_PROFILE") == "slow"
TABLE = Path(resources.RESULTS) / "triton-resources.jsonl"


def chosen() -> list[Any]:
    """(case, target): all of them in the slow suite, else each op on one target, the numbers of centers going round."""
    every = resources.cases()
    if EVERYTHING:
        return [(case, target) for case in every for target in resources.TARGETS]
    by_op: dict[str, list[Any]] = {}
    for case in every:
        by_op.setdefault(case.op, []).append(case)
    targets = list(resources.TARGETS)
    return [(found[(3 * i) % len(found)], targets[i % 3]) for i, found in enumerate(by_op.values())]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize(("case", "target"), chosen(), ids=lambda value: getattr(value, "name", value))
def test_a_kernel_compiles_without_spills_within_the_limits_and_with_wide_loads(case: Any, target: str) -> None:
    for row in resources.resources(case, target):
        assert not resources.objections(row), (row, resources.objections(row))


def test_the_table_of_results_has_every_case_and_no_objection() -> None:
    rows = [resources.Resources(**json.loads(line)) for line in TABLE.read_text(encoding="utf-8").splitlines()]
    wanted = {(case.name, target) for case in resources.cases() for target in resources.TARGETS}
    assert {(row.case, row.target) for row in rows} == wanted, "run python -m bench.resources"
    for row in rows:
        assert not resources.objections(row), (row, resources.objections(row))


def test_the_ops_with_kernels_are_the_ops_with_cases() -> None:
    stems = {path.stem for path in BACKEND._KERNELS.glob("*.py") if not path.stem.startswith("_")}
    assert {case.op.removesuffix("_backward") for case in resources.cases()} == stems


def test_objections_see_what_they_are_for() -> None:
    fine = resources.Resources("case", "kernel", "sm_90", "3.7.1", 4, 64, 0, 1024, 4, 4)
    assert not resources.objections(fine)
    for wrong in ({"spills": 16}, {"shared": 300_000}, {"registers": 255, "num_warps": 16}, {"wide_loads": 2}):
        assert len(resources.objections(replace(fine, **wrong))) == 1  # type: ignore[arg-type]
