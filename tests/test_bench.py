"""The measurements measure what they say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import cases, digits, distill, native, ops, rivals, soft, step, streams, timing, workloads
from bench.__main__ import main
from bench.records import Case
from bench.timing import interleaved
from qupedkern.ops import OPS


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(digits, "WARM_STEPS", 5)
    monkeypatch.setattr(digits, "EVALUATIONS", 60)
    digits._warm.cache_clear()
    yield
    digits._warm.cache_clear()


@pytest.mark.parametrize("method", [*digits.METHODS, "float"])
@pytest.mark.usefixtures("short")
def test_every_method_takes_the_same_number_of_evaluations(method: str) -> None:
    row = digits.run("mlp", method, "2 bit", seed=0, part="val")
    assert abs(row.evaluations - digits.EVALUATIONS) <= 2  # a step before the freeze takes up to three at once
    assert 0 <= row.accuracy <= 100


@pytest.mark.usefixtures("short")
def test_a_network_of_the_table_is_the_same_every_time() -> None:
    first = digits.run("cnn", "straight_through", "1 bit", seed=1, part="val")
    digits._warm.cache_clear()
    assert digits.run("cnn", "straight_through", "1 bit", seed=1, part="val").accuracy == first.accuracy


def test_the_table_counts_missed_bands() -> None:
    rows = [
        digits.Row("digits", arch, method, width, seed, 90.0 + seed - 2 * (method == "hard"), 0, 0.0)
        for arch, method, width, seed in digits.jobs(3)
    ]
    text = digits.table(rows)
    assert "| MLP, 1 bit | 91.00 | 91.00 (0.00) |" in text
    lines = [line for line in text.splitlines() if line.endswith(("kept", "MISSED"))]
    assert [line for line in lines if line.endswith("MISSED")] == [line for line in lines if "4 bit hard" in line]
    assert len(lines) == 2 * len(digits.BANDS)


LAYER = workloads.Workload("tiny", ((16, 9, 2),), 1)


def test_records_that_cannot_be_written_are_refused_before_anything_is_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["fl", "--quick", "--out", str(tmp_path)])
    assert f"must be a file for the records, got the folder {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize("op", cases.OP_NAMES)
def test_a_timed_op_is_checked_and_has_its_ratios(op: str) -> None:
    row = ops.measure(op, LAYER, 4, rounds=2, compiled=False)
    assert row.bytes == cases.build(op, LAYER, 4).bytes > 0
    assert min(row.ratio("eager", "op"), row.ratio("op", "limit")) > 0
    assert f"| tiny, 1 thread | {ops.TABLES[0].columns[0].cell([Case((row,))])} |" in ops.TABLES[0].render([row])


@pytest.mark.parametrize("op", ["assign", "hard_quantize + backward", "distance"])
def test_a_wrong_op_is_not_timed(op: str) -> None:
    case = cases.build(op, LAYER, 4)
    right = case.reference()
    ops.check("native", right, right, case)
    wrong = [*right[:-1], cases.flat(right[-1])[0] + 1]
    with pytest.raises(RuntimeError, match=f"native: {re.escape(op)} disagrees with the reference"):
        ops.check("native", wrong, [*right[:-1], cases.flat(right[-1])[0]], case)
    with pytest.raises(KeyError, match="op must be one of soft_quantize; "):
        cases.build("assing", LAYER, 4)


def test_candidates_take_turns() -> None:
    order: list[str] = []
    timings = interleaved({name: lambda name=name: order.append(name) for name in "ab"}, rounds=3, least_seconds=0.0)
    assert set(timings) == {"a", "b"}
    assert order[-6:] == ["a", "b"] * 3


def test_a_slow_candidate_is_sampled_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(timing, "VERY_SLOW", 0.5)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))  # every call takes a second
    calls: list[int] = []
    assert interleaved({"slow": lambda: calls.append(0)}, rounds=16)["slow"].p50 == 1e6
    assert len(calls) == 1 + 2  # one to see how long it takes, then two samples


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("nontemporal", [False, True])
@pytest.mark.parametrize(("read", "written"), [(1, 1), (2, 1), (3, 2), (4, 3), (4, 4), (1, 4)])
def test_a_stream_reads_every_source_and_writes_every_target(
    threads: int, nontemporal: bool, read: int, written: int
) -> None:
    sources = [s.view(torch.int32) for s in streams.scratch(read, 5 * 256)]
    targets = [torch.zeros_like(sources[0]) for _ in range(written)]
    expected = torch.stack(sources).sum(0, dtype=torch.int32)
    streams.stream(threads, sources, targets, nontemporal)()
    assert all(torch.equal(target, expected) for target in targets)
    streams.stream(threads, sources, sources[: min(read, written)], nontemporal)()  # in place, as an update has it
    assert all(torch.equal(source, expected) for source in sources[: min(read, written)])


def test_a_stream_refuses_what_it_cannot_move_whole() -> None:
    whole = streams.scratch(2, 1024)
    with pytest.raises(ValueError, match="of equal size"):
        streams.stream(1, whole[:1], [torch.zeros(3)], False)
    for tensors in ([torch.zeros(65)], [torch.zeros(256)[1:65]], whole * 3):
        with pytest.raises(ValueError, match="1 to 4 sources and targets of whole 256 bytes"):
            streams.stream(1, tensors, tensors[:1], False)()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("two_streams", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 8, 37])
def test_a_read_reads_every_byte_once(threads: int, two_streams: bool, steps: int) -> None:
    (source,) = streams.scratch(1, steps * 256)
    source = source[: steps * 256].clone()
    total = int(source.view(torch.int32).sum(dtype=torch.int64)) if steps else 0
    expected = (total + 2**31) % 2**32 - 2**31
    assert streams.read_only(threads, source, two_streams)() == expected
    with pytest.raises(ValueError, match="whole 256 bytes aligned to 64 are needed, got 252 bytes"):
        streams.read_only(threads, torch.zeros(63), two_streams)()


def test_the_limit_of_a_list_moves_the_bytes_of_its_tensors_but_for_a_rest() -> None:
    work = workloads.workload("ResNet-20")
    assert (len(work.shapes), work.numel) == (20, 269_824)
    moves = soft._moves(work, torch.bfloat16)
    assert sum(t.nbytes for move in moves for side in move for t in side) == 5 * 2 * work.numel
    assert set(streams.limits(1, moves)) == {"limit: streams", "limit: non-temporal streams", "limit: copy"}


@given(st.integers(2, 17), st.integers(1, 300), st.floats(0.1, 50.0), st.integers(0, 2**31))
def test_rivals_compute_what_the_formula_says(m: int, n: int, p: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, g, c = (torch.randn(size, dtype=torch.float64, generator=generator) for size in (n, n, m))
    c, P = c.sort().values, torch.tensor([p], dtype=torch.float64)
    expected = (OPS["soft_quantize"].reference(x, c, P), *OPS["soft_quantize_backward"].reference(g, x, c, P))
    for got in (rivals.soft_by_hand(g, x, c, P), rivals.soft_by_autograd([g], [x], [c], [P], rivals.soft_formula)[0]):
        for a, b in zip(got, expected, strict=True):
            # float64: 50 n m roundings of 1e-16 at most 50 (slope p/4 of a sigmoid) leave 9 digits of the largest term
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9 * float(1 + g.abs().sum()))


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_wrong_soft_result_gets_no_time(part: int) -> None:
    case = workloads.tensors(workloads.Workload("tiny", ((3, 4), (5,)), 1), 4)
    right = soft._op(case)()
    true = soft.truth(case)
    soft.check("op", right, true, case)
    wrong = [list(result) for result in right]
    wrong[1][part] = wrong[1][part] * 1.01 + 0.01
    with pytest.raises(RuntimeError, match=f"op: {('S', 'grad_x', 'grad_c')[part]} of tensor 1 is off by"):
        soft.check("op", wrong, true, case)  # type: ignore[arg-type]
    wrong[1][part] = torch.full_like(right[1][part], torch.nan)
    with pytest.raises(RuntimeError, match="off by nan"):
        soft.check("op", wrong, true, case)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_soft_row_has_every_candidate_checked_and_timed(dtype: str) -> None:
    work = workloads.Workload("tiny", ((16, 32),), 1)
    row = soft.measure(work, 4, dtype, rounds=2, compiled=False)
    assert row.bytes == 5 * 512 * (4 if dtype == "float32" else 2)
    assert {"native", "op", "eager", "eager, by hand"} < set(row.time_us_p20_p50_p80)
    assert row.ratio("native", "limit") > 0
    assert soft.TABLES[0].render([row]).count("| tiny, 1 thread |") == 1


def test_a_native_call_that_cannot_run_says_why() -> None:
    x, c = torch.zeros(4, dtype=torch.float64), torch.tensor([0.0, 1.0])
    with pytest.raises(RuntimeError, match="native call of assign cannot be timed: x must be float32"):
        native.native_call("assign", (x, c), (torch.zeros(4, dtype=torch.uint8),))
    with pytest.raises(RuntimeError, match="distillation has no native kernel"):
        native.native_call("distillation", (), ())


@given(st.integers(2, 17), st.integers(1, 300), st.floats(0.0, 1.0), st.integers(0, 2**31))
def test_rivals_of_the_step_move_weights_as_our_ops_do(m: int, n: int, strength: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, c = (torch.randn(size, generator=generator) for size in (n, m))
    c, t = c.sort().values, torch.tensor([strength])
    moved = OPS["prox_weights"].reference(x, c, t, "l1")
    codes, distance = OPS["assign"].reference(moved, c), OPS["distance"].reference(moved, c, "l1")
    members = torch.bincount(codes.long(), minlength=m)
    for rival in (rivals.prox_by_ops, rivals.prox_lean, rivals.prox_published):
        got = rival(x, c, t)
        torch.testing.assert_close(got[0], moved, rtol=0, atol=1e-6)  # 2 ulp of values up to 4
        assert torch.equal(got[1], codes)
        assert torch.equal(got[2][0], members)
        off = [got[0] > c[codes.long()], got[0] < c[codes.long()]]
        for counted, where in zip(got[2][1:], off, strict=True):
            here = torch.bincount(codes[where].long(), minlength=m)
            # the lean rival adds the gap to the center, where a gap of less than an ulp is lost
            assert int((counted - here).abs().sum()) <= (n // 50 + 1 if rival is rivals.prox_lean else 0)
        torch.testing.assert_close(got[3].float(), distance, rtol=1e-5, atol=1e-6 * n)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize("m", [2, 16])
def test_a_row_of_the_step_has_every_candidate_checked_and_timed(optimizer: str, m: int) -> None:
    row = step.measure(workloads.Workload("tiny", ((8, 32), (256,)), 1), m, optimizer, rounds=2)
    assert row.bytes == 512 * 4 * (5 if optimizer == "SGD" else 7)
    assert {"op", "eager", "lean eager", "published"} < set(row.time_us_p20_p50_p80)
    assert step.TABLES[0].render([row]).count("| tiny, 1 thread |") == 1


def test_the_published_procedure_is_left_out_where_it_repeats_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "REPEATED_GIB", 4 * 512 * 4 / 2**30)
    work = workloads.Workload("tiny", ((16, 32),), 1)
    assert "published" in step._candidates(workloads.tensors(work, 3), "SGD", 3)
    assert "published" not in step._candidates(workloads.tensors(work, 4), "SGD", 4)


@pytest.mark.parametrize(
    ("part", "sentence"), [("x", "x dis"), ("codes", "codes dis"), ("counts", "members"), ("R", "R dis")]
)
def test_a_wrong_step_gets_no_time(part: str, sentence: str) -> None:
    case = workloads.tensors(workloads.Workload("tiny", ((16, 32), (32, 16)), 1), 4)
    right, other = step.State.of(case), step.State.of(case)
    expected, got = step._op(right, "SGD")(), step._op(other, "SGD")()
    step.check("op", got, other.kept("SGD"), expected, right.kept("SGD"))
    x, codes, counts, distance = got[1]
    if part == "x":
        x[3, 4] += 1e-3
    elif part == "codes":
        codes = codes.flip(0)
    elif part == "counts":
        counts = counts.flip(0)
    else:
        distance = 1.001 * distance
    got[1] = (x, codes, counts, distance)
    with pytest.raises(RuntimeError, match=f"op: {sentence}"):
        step.check("op", got, other.kept("SGD"), expected, right.kept("SGD"))


def test_a_wrong_distillation_loss_gets_no_time_and_a_right_one_its_rivals() -> None:
    row = distill.measure(4, 10, "float32", threads=1, rounds=2, compiled=False)
    assert {"op", "eager", "composition"} <= set(row.time_us_p20_p50_p80)
    student, teacher = torch.randn(4, 10), torch.randn(4, 10)
    loss, *gradients = distill._by_autograd(distill.composition, student, teacher)()
    with pytest.raises(RuntimeError, match=r"^it: the teacher's gradient is off by "):
        distill.check("it", (loss, gradients[0], 1.01 * gradients[1]), student, teacher)
