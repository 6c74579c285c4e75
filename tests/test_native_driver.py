"""What `make sanitize` and `make test-instructions` rest on: no kernel is left out, and a slower one is told."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "tests" / "native"


@pytest.fixture
def counter() -> ModuleType:
    spec = importlib.util.spec_from_file_location("count_instructions", NATIVE / "count_instructions.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_driver_runs_every_kernel() -> None:
    kernels = re.findall(r"^void (\w+)\(", (ROOT / "csrc" / "kernels.h").read_text(encoding="utf-8"), re.MULTILINE)
    text = (NATIVE / "exercises.cpp").read_text(encoding="utf-8")
    run = re.findall(r"^ +EXERCISE(?:_OF_LISTS|_OF_PACKED)?\((\w+)\)", text, re.MULTILINE)
    assert sorted(run) == sorted(kernels), "one function for each kernel in tests/native/exercises.cpp, no other"


def test_the_recorded_cases_are_those_of_the_driver(counter: ModuleType) -> None:
    recorded = json.loads(counter.RECORD.read_text(encoding="utf-8"))
    assert set(recorded) == {"compiler", "isa", "instructions_per_element"}
    named = re.findall(r'\{"([\w+-]+)", \w+\}', (NATIVE / "counted.cpp").read_text(encoding="utf-8"))
    assert list(recorded["instructions_per_element"]) == named


def test_more_instructions_than_allowed_and_missing_cases_are_told(
    counter: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert counter.compare({"a": 10.0, "b": 9.0}, {"a": 10.0, "b": 10.0}) == []
    assert "b: fewer than recorded; run with --update" in capsys.readouterr().out
    assert counter.compare({"a": 10.4}, {"a": 10.0}) == []
    assert counter.compare({"a": 10.6}, {"a": 10.0}) == ["a: 10.6 instructions an element, 6.0% more than recorded"]
    assert counter.compare({"new": 1.0}, {"old": 1.0}) == [
        "old: recorded, but the driver has no such case",
        "new: not recorded; run with --update",
    ]
