"""The linear measurement compares what it has checked, on cold weights, and says why a rival is missing."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qupedkern as qk
from bench import linear, linear_contenders, linear_picture, linear_rivals, linear_tables, records, streams
from bench.__main__ import _chosen, main
from bench.linear_contenders import Contender, Packed, checked_rows, copies, error, float_linear


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape of a few rows, and so little memory that copies are few."""
    monkeypatch.setitem(linear.SHAPES, "small", (96, 128))
    monkeypatch.setattr(linear_contenders, "COLD_BYTES", 8192)
    monkeypatch.setattr(linear, "COLD_BYTES", 8192)
    linear._read_bytes.cache_clear()
    yield
    linear._read_bytes.cache_clear()


def test_copies_take_so_much_memory_that_the_first_is_cold_again() -> None:
    for shape in (linear.SHAPES[name] for name in linear.NAMES):
        for bits in (1, 2, 3, 4, 16, 32):
            nbytes = shape[0] * shape[1] * bits // 8
            assert copies(nbytes) * nbytes >= 160e6
            assert (copies(nbytes) - 1) * nbytes < linear_contenders.COLD_BYTES


def test_those_that_share_copies_share_their_turns() -> None:
    packed, visited = Packed(1, (8, 8), torch.zeros(3, 8, dtype=torch.uint8), iter([0, 1, 2, 0, 1])), []
    one, other = (Contender(lambda x: [], torch.zeros(1), 0.0, packed.turns) for _ in range(2))
    calls = [lambda i=i: visited.append(i) for i in range(3)]
    first, second = one.in_turns(calls), other.in_turns(calls)
    for call in (first, first, second, first, second):
        call()
    assert visited == [0, 1, 2, 0, 1]


@given(st.integers(1, 300))
def test_the_checked_rows_are_rows_of_the_weight_each_once_first_and_last_among_them(n: int) -> None:
    rows = checked_rows(n).tolist()
    assert rows == sorted(set(rows))
    assert rows[0] == 0
    assert rows[-1] == n - 1
    assert len(rows) == min(n, linear_contenders.CHECKED_ROWS)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("bits", [1, 3, 4])
@pytest.mark.parametrize("per_channel", [False, True])
def test_ours_are_checked_against_the_weights_they_hold(bits: int, per_channel: bool) -> None:
    packed = Packed.drawn(bits, (96, 128))
    assert len(packed.packed) > 1
    assert len(packed.packed.unique(dim=0)) == len(packed.packed)
    centers = packed.centers(per_channel)
    weight = qk.dequantize(qk.unpack_codes(packed.packed[0], bits, (96, 128)), centers)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(bits))
    contender = packed.native(torch.float32, per_channel) if per_channel else packed.layer(torch.float32)
    if contender is not None:  # there may be no kernel
        assert torch.equal(contender.rows, weight.double()[checked_rows(96)])
        assert error(contender.calls(x)[0](), x, contender.rows, 96) < 1e-6


@pytest.mark.usefixtures("small")
def test_torch_int4_stands_for_the_weights_it_is_checked_against() -> None:
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(0))
    contender = linear_rivals.int4(weight)["torch int4"]()
    # a code of 16 lies within half a step of the weight, (high - low) / 15, and bfloat16 rounds step and zero to 8 bits
    step = (weight.amax() - weight.amin()) / 15
    assert (
        float((contender.rows - weight[checked_rows(96)].double()).abs().max())
        < 0.55 * step + 0.01 * weight.abs().max()
    )
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(4, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
        result = contender.calls(x)[0]()
        assert result.dtype == dtype
        assert 1e-5 < error(result, x, contender.rows, 96) < 2e-2  # its sums are bfloat16's


@pytest.mark.usefixtures("small")
def test_a_wrong_result_gets_no_time() -> None:
    contender = float_linear(torch.randn(96, 128), torch.float32)
    x = torch.randn(2, 128)
    _, off = linear.checked("it", contender, x, 96)
    assert off < 1e-6
    wrong = Contender(lambda x: [lambda: 1.001 * contender.calls(x)[0]()], contender.rows, 1e-5, iter([0]))
    with pytest.raises(RuntimeError, match=r"^linear: it is off by 0\.001 of the largest result, allowed are 1e-05"):
        linear.checked("it", wrong, x, 96)


@pytest.mark.usefixtures("small")
def test_a_rival_that_is_wrong_or_missing_leaves_its_reason_and_ours_stop_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # what an import that fails looks like
    weights = linear.Weights.drawn((96, 128), (4,))
    found, absent = weights.contenders(torch.float32), weights.absent
    assert "bitsandbytes" in absent["NF4"]
    assert "NF4" not in found
    off = found["torch bfloat16"]
    found["torch bfloat16"] = Contender(off.calls, 1.1 * off.rows, off.allowed, off.turns)
    (row,) = linear.measure("small", "float32", 2, found, absent, threads=1, rounds=1)
    assert "torch bfloat16 is off by" in row.remarks["torch bfloat16"]
    assert not row.has("torch bfloat16")
    text = linear_tables.TABLES[0].render([row])
    assert "NF4: not timed: " in text
    found["layer @ 4"] = Contender(off.calls, 1.1 * off.rows, 1e-5, off.turns)
    with pytest.raises(RuntimeError, match="layer @ 4 is off by"):
        linear.measure("small", "float32", 2, found, absent, threads=1, rounds=1)


@pytest.mark.usefixtures("small")
def test_a_row_holds_its_bits_and_the_rivals_and_its_limit_is_that_of_its_bytes() -> None:
    weights = linear.Weights.drawn((96, 128), (1, 4))
    found, absent = weights.contenders(torch.float32), weights.absent
    one, four = linear.measure("small", "float32", 3, found, absent, threads=1, rounds=2)
    assert (one.m, one.bytes, four.m, four.bytes) == (1, 96 * 128 // 8, 4, 96 * 128 // 2)
    assert one.time_us("torch float32") == four.time_us("torch float32")
    assert four.time_us("limit: read") == pytest.approx(
        4 * one.time_us("limit: read"), abs=0.026
    )  # 4 + 1 halves of the last digit kept, 0.01
    assert {"layer", "torch float32", "torch bfloat16", "torch int4"} <= set(four.quality)
    assert four.quality["torch bfloat16"] > 100 * four.quality["layer"]
    tables = "\n".join(table.render([one, four]) for table in linear.TABLES)
    assert tables.count("| 96 x 128, 1 thread |") == 3  # of float32 inputs, per channel, and of rivals
    assert "input: batch 3, in all rows." in tables
    with pytest.raises(KeyError, match="'4096' is none of 4096x4096"):
        linear.rows(["4096"], [1], rounds=1, threads=1, compiled=False)


def test_every_target_is_of_a_case_that_is_timed() -> None:
    cases = {
        (f"{n} x {k}, {threads} thread{'s' if threads > 1 else ''}", dtype, f"batch {batch}", bits)
        for n, k in (linear.SHAPES[name] for name in linear.NAMES)
        for threads in (1, 2)
        for dtype in linear.DTYPES
        for batch in linear.BATCHES
        for bits in linear.LEVELS
    }
    bounded = [set(column.targets) for table in linear.TABLES for column in table.columns]
    assert all(keys <= cases for keys in bounded)
    # limit: 4 bits at batch 1; torch: 4 bits at 4 batches, for each type; NF4: 4 batches; per channel: 2 x 4 x 2
    assert sum(map(len, bounded)) == 3 * 2 * (4 + 16 + 16 + 4 + 16)


@pytest.mark.usefixtures("small")
def test_the_bandwidth_of_reading_is_never_taken_from_a_contenders_bytes() -> None:
    read = linear._read_bytes()
    assert read.nbytes == 8192
    assert set(streams.reads(2, read)) == {"limit: read", "limit: read, two streams"}
    assert len({call() for call in streams.reads(2, read).values()}) == 1  # both read all of it


def test_stored_cases_are_shown_by_choice_and_kept_when_others_are_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def row(bits: int, batch: int, us: float) -> records.Row:
        machine = {
            "machine": "m",
            "cores": 2,
            "caches": "",
            "torch": "2",
            "threads": 1,
            "native": "",
            "malloc": "",
            "commit": "",
        }
        times = {"native": [us, us, us], "limit: read": [10.0, 10.0, 10.0]}
        return records.Row(
            "linear", "4096x4096", "4096 x 4096, 1 thread", bits, "float32", f"batch {batch}", 8, times, machine
        )

    old, new = [row(1, 1, 20.0), row(2, 1, 30.0), row(1, 4, 40.0)], [row(2, 1, 31.0), row(4, 1, 50.0)]
    merged = records.merged(old, new)
    assert [(one.m, one.variant, one.time_us("native")) for one in merged] == [
        (1, "batch 1", 20.0), (2, "batch 1", 31.0), (1, "batch 4", 40.0), (4, "batch 1", 50.0)
    ]  # fmt: skip
    path = tmp_path / "linear.jsonl"
    records.write(path, merged)
    assert main(["linear", "--show", "--out", str(path), "--batch", "1", "--bits", "1,4"]) == 0
    shown = capsys.readouterr().out
    assert "in this order in each cell. input: batch 1, in all rows." in shown
    assert "| 4096 x 4096, 1 thread | 20.0 µs / 50.0 µs | - | **2.00** / **5.00** (≤ 1.8 / 1.12) |" in shown
    assert "batch 4" not in shown
    options = argparse.Namespace(tensors=None, m=None, dtypes=("bfloat16",), threads=None, batches=None)
    assert not any(_chosen(one, options) for one in merged)


@pytest.mark.usefixtures("small")
def test_the_picture_has_a_bar_for_each_batch_and_number_of_bits_as_high_as_torch_takes_longer(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    weights = linear.Weights.drawn((96, 128), (1, 4))
    found, absent = weights.contenders(torch.float32), weights.absent
    rows = [
        row for batch in (1, 4) for row in linear.measure("small", "float32", batch, found, absent, threads=1, rounds=1)
    ]
    axes = Figure().subplots()
    linear_picture._plot(axes, records.cases(rows), "torch float32")
    assert [1 + bar.get_height() for bar in axes.patches] == pytest.approx(
        [row.ratio("torch float32", "native") for row in sorted(rows, key=lambda row: row.m)]
    )
    assert [label.get_text() for label in axes.get_xticklabels()] == ["batch 1", "batch 4"]
    linear.picture(rows, tmp_path / "linear.png")
    assert (tmp_path / "linear.png").read_bytes().startswith(b"\x89PNG")
