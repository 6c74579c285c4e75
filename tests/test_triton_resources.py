"""What the kernels take of a GPU, from binaries compiled here: no spills, nothing over a limit, loads of 16 bytes."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import resources
from qupedkern.backends import module
from qupedkern.ops import OPS

BACKEND: Any = module("triton")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or BACKEND.interpreted(), reason="needs Triton, and not its interpreter"
)
EVERYTHING = os.environ.get("HYPOTHESIS_PROFILE") == "slow"
NEWEST = "3.7.1"  # the version that the table is made with; rows of others may stand beside its own


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


def test_the_table_of_results_has_every_op_on_every_target_and_no_objection() -> None:
    rows = resources.read()
    op_of = {case.name: case.op for case in resources.cases()}
    assert {row.case for row in rows} <= set(op_of), "rows of cases that are no more: run python -m bench.resources"
    found = {(op_of[row.case], row.target) for row in rows if row.triton == NEWEST}
    assert found == {(op, target) for op in op_of.values() for target in resources.TARGETS}
    for row in rows:
        assert not resources.objections(row), (row, resources.objections(row))


def test_every_op_has_a_case_or_no_kernel_by_design() -> None:
    assert {case.op for case in resources.cases()} | set(BACKEND.COMPOSED) == set(OPS)
    assert not any((BACKEND._KERNELS / f"{op}.py").exists() for op in BACKEND.COMPOSED)


def test_objections_see_what_they_are_for() -> None:
    fine = resources.Resources("case", "kernel", "sm_90", "3.7.1", 4, 64, 0, 1024, 4, 4)
    assert not resources.objections(fine)
    wrongs = ({"spills": 16}, {"shared": 300_000}, {"registers": 255, "num_warps": 16}, {"wide_loads": 2})
    for wrong in (*wrongs, {"wide_stores": 1, "wide_stores_needed": 2}):
        assert len(resources.objections(replace(fine, **wrong))) == 1  # type: ignore[arg-type]
