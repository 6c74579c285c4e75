"""What the CUDA kernels take of a GPU, from machine code: no spills where memory binds, loads of 16 bytes."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from bench import cuda_resources as resources

MISSING = resources.missing()
EVERYTHING = os.environ.get("HYPOTHESIS_PROFILE") == "slow"
TABLE = Path(resources.RESULTS) / "cuda-resources.jsonl"
HOT = resources.hot_kernels()


@pytest.mark.skipif(MISSING is not None, reason=f"CUDA RESOURCES NOT READ: {MISSING}")
@pytest.mark.parametrize("target", resources.TARGETS if EVERYTHING else resources.TARGETS[-1:])
@pytest.mark.parametrize("file", ["soft_quantize.cu", "soft_quantize_backward.cu", "quped_step.cu", "lut_mma_4.cu"])
def test_a_kernel_compiles_without_spills_and_with_wide_loads(file: str, target: str) -> None:
    rows = resources.compiled(resources.SOURCES / file, target)
    assert any(row.wide_loads_needed for row in rows), "no kernel here is bound by memory: the names changed"
    for row in rows:
        assert not resources.objections(row), (row, resources.objections(row))


def test_the_table_has_the_hot_kernels_for_every_target_and_no_objection() -> None:
    rows = [resources.Usage(**json.loads(line)) for line in TABLE.read_text(encoding="utf-8").splitlines()]
    assert {(row.kernel, row.target) for row in rows} >= {
        (name, target) for name in HOT for target in resources.TARGETS
    }
    for row in rows:
        assert not resources.objections(row), (row, resources.objections(row))
        assert row.wide_loads_needed == HOT.get(row.kernel, 0)


def test_the_kernels_are_compiled_as_the_build_compiles_them() -> None:
    text = (resources.SOURCES.parent.parent / "CMakeLists.txt").read_text(encoding="utf-8")
    options = re.search(r"COMPILE_LANGUAGE:CUDA>:([^>]*)>", text)
    assert options is not None
    assert set(resources.OPTIONS) - {"-std=c++17"} == set(options.group(1).split()) - {"-Xcompiler=-Wall"}


def test_objections_see_what_they_are_for() -> None:
    fine = resources.Usage("kernel", "file.cu", "sm_90", "13.0", 64, 0, 1024, 4, 4)
    assert not resources.objections(fine)
    for wrong in ({"spills": 16}, {"shared": 300_000}, {"registers": 200}, {"wide_loads": 2}):
        assert len(resources.objections(replace(fine, **wrong))) == 1  # type: ignore[arg-type]
