"""`python -m qupedkern first-calls` runs every public op with its gradient, and says which backend did."""

from __future__ import annotations

import pytest

import qupedkern as qk
from qupedkern.__main__ import main
from qupedkern.first_calls import first_calls
from qupedkern.ops import OPS


def test_every_public_op_has_a_row_with_the_backend_that_explain_names() -> None:
    rows = {row.op: row for row in first_calls("cpu")}
    assert set(rows) == {op for op in OPS if hasattr(qk, op)} - {"quped_step", "center_step"} | {"a step of QuPeD"}
    assert all(row.first > 0 and row.second > 0 for row in rows.values())
    with qk.use_backend("eager"):
        assert {row.backend for row in first_calls("cpu")} == {"eager", "as above"}


def test_the_command_prints_them_and_refuses_a_device_that_is_not_there_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["qupedkern", "first-calls", "--device", "cpu"])
    assert main() == 0
    assert "soft_quantize " in capsys.readouterr().out
    for device in ("nowhere", "cuda:99"):
        monkeypatch.setattr("sys.argv", ["qupedkern", "first-calls", "--device", device])
        assert main() == 2
        output = capsys.readouterr()
        assert (output.out, output.err.count("\n")) == ("", 1)
        assert output.err.startswith(f"first-calls: torch has no device '{device}' here: ")
