"""Choosing a backend: by use_backend, by the environment, by itself; and what explain() and backends() say about it."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import pytest
import torch

import qupedkern as qk
from qupedkern.backends import EAGER, forced, names
from qupedkern.explain import BackendTable
from qupedkern.ops import OPS
from qupedkern.testing.harness import missing_backends, running_backends

X, C = torch.linspace(-2, 2, 20), torch.tensor([-1.0, 0.0, 1.0])
NATIVE = pytest.mark.skipif(
    "cpp" not in running_backends(), reason=f"cpp does not run here: {missing_backends().get('cpp')}"
)


class Recorder:
    """A backend that can be told to be missing or to refuse, and remembers what it ran."""

    NAME, DEVICES = "recorder", ("cpu",)

    def __init__(
        self, missing: str | None = None, refuses: str | None = None, has: tuple[str, ...] = ("assign",)
    ) -> None:
        self.missing, self.refuses, self.has = missing, refuses, has
        self.launched: list[str] = []

    def unavailable(self) -> str | None:
        return self.missing

    def ops(self) -> tuple[str, ...]:
        return () if self.missing else self.has

    def refusal(self, op: str, args: tuple[Any, ...]) -> str | None:
        return self.refuses

    def launch(self, op: str, args: tuple[Any, ...], outputs: tuple[torch.Tensor, ...]) -> None:
        self.launched.append(op)
        for out in outputs:
            out.zero_()

    def describe(self) -> str:
        return "for tests"


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a Recorder where the real backends are: adding a backend is a module and a line in ORDER, so this is all it takes."""

    def put(recorder: Recorder) -> Recorder:
        monkeypatch.delenv("QUPEDKERN_BACKEND", raising=False)
        # qk.backends and qk.explain are functions, so the modules of these names are reached by name
        monkeypatch.setattr(sys.modules["qupedkern.backends"], "ORDER", {"cpu": ("recorder",)})
        for owner in ("qupedkern.backends", "qupedkern.explain", "qupedkern.ops._define"):
            monkeypatch.setattr(sys.modules[owner], "module", lambda name: recorder)
        return recorder

    return put


def test_the_first_backend_that_has_the_op_and_does_not_object_runs_it(install: Any) -> None:
    recorder = install(Recorder())
    assert not qk.assign(X, C).any()
    assert recorder.launched == ["assign"]
    assert bool(qk.hard_quantize(X, C).any())  # no kernel there: eager
    assert recorder.launched == ["assign"]


def test_outputs_reach_a_kernel_poisoned_in_these_tests(install: Any) -> None:
    recorder = install(Recorder(has=("assign", "hard_quantize")))
    recorder.launch = lambda op, args, outputs: None
    assert qk.assign(X, C).unique().tolist() == [0xA5]
    assert bool(qk.hard_quantize(X, C).isnan().all())


@pytest.mark.parametrize("reason", ["missing", "refuses"])
def test_left_to_itself_the_choice_moves_on_and_explain_says_why(install: Any, reason: str) -> None:
    install(Recorder(**{reason: "because it is Tuesday"}))
    assert bool(qk.assign(X, C).any())
    choice = qk.explain("assign", X, C)
    assert choice.backend == EAGER
    assert not choice.forced
    assert choice.reasons == {"recorder": "because it is Tuesday"}
    assert str(choice) == "assign runs on 'eager' (chosen); recorder: because it is Tuesday"


@pytest.mark.parametrize("reason", ["missing", "refuses"])
def test_a_forced_backend_that_cannot_run_raises_with_the_reason(install: Any, reason: str) -> None:
    install(Recorder(**{reason: "because it is Tuesday"}))
    sentence = (
        "assign: backend 'recorder' was requested but cannot run: because it is Tuesday; use_backend(None) picks one"
    )
    with qk.use_backend("recorder"), pytest.raises(RuntimeError) as caught:
        qk.assign(X, C)
    assert str(caught.value) == sentence


def test_a_forced_backend_without_a_kernel_for_the_op_runs_eager_and_explain_says_so(install: Any) -> None:
    recorder = install(Recorder())
    with qk.use_backend("recorder"):
        assert bool(qk.hard_quantize(X, C).any())
        choice = qk.explain("hard_quantize", X, C)
    assert recorder.launched == []
    assert (choice.backend, choice.forced) == (EAGER, True)
    assert choice.reasons == {"recorder": "has no kernel for this op"}


def test_another_device_is_an_objection(install: Any) -> None:
    recorder = install(Recorder())
    recorder.DEVICES = ("cuda",)  # type: ignore[misc]
    assert bool(qk.assign(X, C).any())
    assert qk.explain("assign", X, C).reasons == {"recorder": "runs on cuda tensors, got cpu"}


def test_use_backend_holds_for_its_block_nests_and_ends_with_an_error() -> None:
    assert forced() is None
    with qk.use_backend("eager"):
        assert forced() == "eager"
        with qk.use_backend("cpp"):
            assert forced() == "cpp"
        assert forced() == "eager"
        with pytest.raises(KeyError), qk.use_backend("cpp"):
            raise KeyError
        assert forced() == "eager"
    assert forced() is None


def test_use_backend_as_a_call_holds_from_there_on_and_none_lifts_it() -> None:
    qk.use_backend("eager")
    assert forced() == "eager"
    qk.use_backend(None)
    assert forced() is None


def test_use_backend_is_seen_by_other_threads_as_autograd_has_its_own() -> None:
    seen = []
    with qk.use_backend("eager"):
        thread = threading.Thread(target=lambda: seen.append(forced()))
        thread.start()
        thread.join()
    assert seen == ["eager"]


@pytest.mark.parametrize("name", ["cublas", "EAGER", "", "native"])
def test_an_unknown_backend_is_refused_by_name_and_changes_nothing(name: str) -> None:
    known = ", ".join(names())
    with qk.use_backend("eager"):
        with pytest.raises(ValueError, match="use_backend") as caught:
            qk.use_backend(name)
        assert str(caught.value) == f"use_backend: the backend must be one of {known}, got {name!r}"
        assert forced() == "eager"


def test_the_environment_forces_and_use_backend_overrules_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUPEDKERN_BACKEND", "eager")
    assert qk.explain("assign", X, C).backend == "eager"
    assert qk.explain("assign", X, C).forced
    with qk.use_backend("cpp"):
        assert forced() == "cpp"
    monkeypatch.setenv("QUPEDKERN_BACKEND", "")
    assert forced() is None


def test_an_unknown_backend_in_the_environment_is_refused_at_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUPEDKERN_BACKEND", "gpu")
    sentence = f"QUPEDKERN_BACKEND: the backend must be one of {', '.join(names())}, got 'gpu'"
    with pytest.raises(ValueError, match="QUPEDKERN_BACKEND") as caught:
        qk.assign(X, C)
    assert str(caught.value) == sentence


@NATIVE
def test_native_kernels_come_first_and_refuse_float64_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUPEDKERN_BACKEND", raising=False)
    assert qk.explain("assign", X, C).backend == "cpp"
    assert qk.explain("assign", X, C).reasons["eager"] == "'cpp' comes first"
    assert set(qk.explain("assign", X, C).reasons) == set(names()) - {"cpp"}
    choice = qk.explain("assign", X.double(), C.double())
    assert choice.backend == "eager"
    assert choice.reasons["cpp"] == "x must be float32 or bfloat16 or float16, got float64"


def test_explain_computes_nothing_and_knows_wrong_arguments(install: Any) -> None:
    recorder = install(Recorder())
    assert qk.explain("assign", X, C).backend == "recorder"
    assert recorder.launched == []
    with pytest.raises(ValueError, match="assign: centers must be") as caught:
        qk.explain("assign", X, C[:1])
    assert str(caught.value).startswith("assign: centers must be [m] or [G, m]")
    with pytest.raises(ValueError, match="explain: ") as caught:
        qk.explain("round", X, C)
    assert str(caught.value) == f"explain: op must be one of {', '.join(sorted(OPS))}, got 'round'"


def test_backends_lists_every_op_and_every_backend_with_its_reason(install: Any) -> None:
    table = qk.backends()
    assert isinstance(table, BackendTable)
    assert table.ops == tuple(OPS)
    assert table.kernels[EAGER] == tuple(OPS)
    install(Recorder(missing="because it is Tuesday"))
    table = qk.backends()
    assert table.unavailable == {"recorder": "because it is Tuesday"}
    assert table.kernels == {"recorder": (), "eager": tuple(OPS)}
    lines = str(table).splitlines()
    assert lines[0] == "recorder not available: because it is Tuesday"
    assert all(any(line.startswith(op + " ") and "-> eager" in line for line in lines) for op in OPS)


def test_the_machines_table_is_printed_by_the_package() -> None:
    done = subprocess.run([sys.executable, "-m", "qupedkern"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in names():
        assert any(line.split()[:1] == [name] for line in done.stdout.splitlines()), name
    assert all(op in done.stdout for op in OPS)


def test_every_op_keeps_what_its_file_says() -> None:
    for name, op in OPS.items():
        assert op.name == name
        assert op.schema.startswith(f"{name}(")
        schema = str(getattr(torch.ops.qupedkern, name).default._schema)
        assert schema.removeprefix("qupedkern::") == op.schema


def test_use_backend_made_earlier_forces_when_it_is_entered() -> None:
    later = qk.use_backend("eager")
    qk.use_backend(None)
    with later:
        assert forced() == "eager"
        assert "'eager' is forced" in str(qk.backends())
    assert forced() is None


def test_a_backend_forced_by_the_environment_is_named_in_the_remedy(
    install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(Recorder(refuses="because it is Tuesday"))
    monkeypatch.setenv("QUPEDKERN_BACKEND", "recorder")
    with pytest.raises(RuntimeError, match=r"unset QUPEDKERN_BACKEND to let one be picked$"):
        qk.assign(X, C)
