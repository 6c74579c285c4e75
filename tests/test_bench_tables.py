"""What tables say is what records hold: medians of runs, ratios, targets met and missed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench import records, runs
from bench.__main__ import main
from bench.machine import description
from bench.records import Row, cases, from_json, to_json
from bench.tables import Column, Table, duration, number
from bench.targets import at_least, at_most


def row(run: int = 0, m: int = 2, **medians_us: float) -> Row:
    """A row whose candidates have these medians; `limit_a` and the like stand for the ways to the limit."""
    times = {name.replace("limit_", "limit: "): [0.9 * us, us, 1.1 * us] for name, us in medians_us.items()}
    return Row("soft", "1M", "1M, 1 thread", m, "float32", "", 20 << 20, times, {**description(), "threads": 1}, run)


@pytest.mark.parametrize(
    ("bound", "value", "met"),
    [
        (at_most(2.0)[0], 2.0, True),
        (at_most(2.0)[0], 2.2, True),
        (at_most(2.0)[0], 2.2001, False),
        (at_most(2.0)[0], 0.1, True),
        (at_least(10.0)[0], 10.0, True),
        (at_least(10.0)[0], 9.0, True),
        (at_least(10.0)[0], 8.999, False),
        (at_least(10.0)[0], 99.0, True),
        (at_most(2.0)[0], float("nan"), False),
        (at_least(2.0)[0], float("nan"), False),
    ],
)
def test_a_target_is_met_within_a_tenth_of_it(bound: object, value: float, met: bool) -> None:
    assert bound.met(value) is met  # type: ignore[attr-defined]


def test_the_limit_is_the_fastest_way_to_move_the_bytes() -> None:
    one = row(native=30.0, limit_streams=25.0, limit_copy=20.0, eager=90.0)
    assert one.time_us("limit") == 20.0
    assert one.ratio("native", "limit") == 1.5
    assert one.ratio("eager", "native") == 3.0
    assert one.has("limit")
    assert not row(native=1.0).has("limit")


def test_a_case_is_the_median_of_its_runs_ratios_not_the_ratio_of_medians() -> None:
    natives, limits = (10.0, 20.0, 90.0), (10.0, 5.0, 30.0)  # ratios 1, 4, 3; of medians 2
    rows = [row(run, native=n, limit_a=a) for run, (n, a) in enumerate(zip(natives, limits, strict=True))]
    (case,) = cases([*rows])
    assert case.ratio("native", "limit") == 3.0
    assert case.time_us("native") == 20.0
    assert len(cases([*rows, row(m=4, native=1.0), row(1, m=4, native=1.0)])) == 2


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    rows = [row(0, native=1.5, limit_a=1.0), row(1, m=4, native=2.5)]
    records.write(tmp_path / "of a machine" / "soft.jsonl", rows)
    assert records.read(tmp_path / "of a machine" / "soft.jsonl") == rows
    assert from_json(to_json(rows[0])) == rows[0]


def _table() -> Table:
    key = ("1M, 1 thread", "float32", "")
    return Table(
        "soft",
        "What the columns are.",
        [
            Column("native", "native"),
            Column("native / limit", "native", "limit", {(*key, 2): at_most(1.5)[0], (*key, 4): at_most(3.0)[0]}),
            Column("eager / native", "eager", "native", {(*key, 2): at_least(10.0)[0], (*key, 4): at_least(10.0)[0]}),
            Column("compile / native", "compile", "native"),
        ],
    )


def test_a_line_shows_the_ratios_of_every_m_with_their_targets_and_in_bold_what_misses() -> None:
    rows = [row(native=160.0, limit_a=100.0, eager=800.0), row(m=4, native=250.0, limit_a=50.0, eager=5000.0)]
    text = _table().render(rows)
    assert "| 1M, 1 thread | 160 µs / 250 µs | 1.60 / **5.00** (≤ 1.5 / 3) | **5.00** / 20.0 (≥ 10) | - |" in text
    assert text.endswith("2 of 4 targets met (the median within 10 % of it); those missed are bold.")
    assert "Medians of one process, indicative only; samples interleaved, native spreads 20 %" in text
    assert "What the columns are. m = 2 / 4, in this order in each cell." in text


def test_what_has_no_target_or_was_not_timed_stands_beside_what_has() -> None:
    rows = [row(native=160.0, limit_a=100.0), row(m=16, native=2500.0, limit_a=100.0, eager=5000.0)]
    text = _table().render(rows)
    assert "| 160 µs / 2.50 ms | 1.60 / 25.0 (≤ 1.5 / -) | - / 2.00 (≥ 10 / -) | - |" in text
    assert "1 of 1 targets met" in text  # a candidate that was not timed can neither meet nor miss


def test_a_table_of_five_runs_says_so_and_every_line_has_its_columns() -> None:
    rows = [row(run, native=100.0 + run, limit_a=100.0, eager=1000.0) for run in range(5)]
    text = _table().render(rows)
    assert "Medians of 5 separate processes" in text
    assert "| 1.02 (≤ 1.5) | 9.80 (≥ 10) |" in text
    assert "2 of 2 targets met" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 3
    assert {line.count("|") for line in table} == {table[0].count("|")}


def test_types_and_variants_are_columns_where_they_differ() -> None:
    one = row(native=100.0, limit_a=100.0)
    text = _table().render([one, replace(one, variant="SGD"), replace(one, dtype="bfloat16")])
    assert [line.split(" | ")[:3] for line in text.splitlines() if line.startswith("| 1M")] == [
        ["| 1M, 1 thread", "", "float32"], ["| 1M, 1 thread", "SGD", "float32"], ["| 1M, 1 thread", "", "bfloat16"],
    ]  # fmt: skip
    assert text.endswith("1 of 1 targets met (the median within 10 % of it); those missed are bold.")
    assert "No targets were set" in _table().render([replace(one, variant="SGD")])


def test_a_share_is_shown_in_percent_and_what_took_no_time_as_a_dash() -> None:
    key = ("1M, 1 thread", "float32", "", 2)
    columns = [Column("over", "over", "step", {key: at_most(0.03)[0]}, percent=True), Column("none", "none")]
    for over, cell in ((25.0, "2.5 % (≤ 3 %)"), (35.0, "**3.5 %** (≤ 3 %)"), (0.0, "- (≤ 3 %)")):
        text = Table("steps", "note", columns, tensors="network").render([row(step=1000.0, over=over, none=0.0)])
        assert f"| 1M, 1 thread | {cell} | - |" in text
        assert "| network | over | none |" in text


def test_a_busy_machine_is_named() -> None:
    one = row(native=1.0, limit_a=1.0)
    quiet, busy = (replace(one, machine={**one.machine, "cores": 2, "load": load}) for load in (2.4, 4.7))
    assert "busy" not in _table().render([quiet])
    assert "**On a busy machine, load average up to 4.7.**" in _table().render([quiet, replace(busy, run=1)])


def test_a_time_can_have_a_target_too() -> None:
    key = ("1M, 1 thread", "float32", "", 2)
    table = Table("k-means", "note", [Column("native", "native", targets={key: at_most(3e6)[0]})])
    assert "| 1M, 1 thread | 2.50 s (≤ 3.00 s) |" in table.render([row(native=2.5e6)])
    assert "| 1M, 1 thread | **3.50 s** (≤ 3.00 s) |" in table.render([row(native=3.5e6)])


def test_numbers_have_three_digits() -> None:
    assert [number(v) for v in (0.123456, 1.0, 9.994, 12.34, 123.4, 12345.6)] == [
        "0.12", "1.00", "9.99", "12.3", "123", "12,346",
    ]  # fmt: skip
    assert [duration(v) for v in (0.5, 999.0, 1000.0, 12345.0, 2e6)] == [
        "0.50 µs", "999 µs", "1.00 ms", "12.3 ms", "2.00 s",
    ]  # fmt: skip


def test_stored_records_are_shown_again_without_timing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "in_processes", None)  # calling it would raise
    path = tmp_path / "soft.jsonl"
    records.write(path, [row(run, native=150.0, op=160.0, limit_a=100.0) for run in range(5)])
    assert main(["soft", "--show", "--out", str(path)]) == 0
    assert "| 1M, 1 thread | 150 µs | 160 µs | 100 µs | 1.50 (≤ 1.5) |" in capsys.readouterr().out
    assert main(["soft", "--show", "--out", str(tmp_path / "absent.jsonl")]) == 2
    assert "absent.jsonl" in capsys.readouterr().err


def test_timings_run_in_processes_whose_malloc_is_tuned(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["soft", "--tensors", "64k", "--m", "2", "--quick"]
    found = runs.in_processes(arguments, runs=1)
    assert [(one.run, one.dtype) for one in found] == [(0, "float32"), (0, "bfloat16")]
    assert {one.machine["malloc"] for one in found} == {"tuned"}
    assert all(one.time_us(name) > 0 for one in found for name in ("native", "op", "eager", "eager, by hand", "limit"))
    with pytest.raises(RuntimeError, match="process 1 of 1 failed with status 2"):
        runs.in_processes(["soft", "--tensors", "2M"], runs=1)
    assert "workload must be one of 64k, layer, 1M" in capfd.readouterr().err
