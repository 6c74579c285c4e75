"""The Triton backend without a GPU: what it says of a machine, its kernels interpreted, and compiled ahead of time."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import qupedkern as qk
from qupedkern.backends import module

ROOT = Path(__file__).resolve().parent.parent
BACKEND: Any = module("triton")
NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed here")
COMPILES = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or BACKEND.interpreted(), reason="needs Triton, and not its interpreter"
)
X, C = torch.linspace(-2, 2, 20), torch.tensor([-1.0, 0.0, 1.0])


def unavailable(monkeypatch: pytest.MonkeyPatch, **machine: Any) -> str | None:
    """What the backend says of a machine that is not this one."""
    found = machine.get("triton", True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if found else None)
    monkeypatch.setattr(BACKEND, "interpreted", lambda: machine.get("interpreted", False))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "capability" in machine)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: machine["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Turing T1")
    monkeypatch.setattr(torch.version, "cuda", machine.get("cuda"))
    monkeypatch.setattr(torch.version, "hip", machine.get("hip"))
    return BACKEND.unavailable.__wrapped__()


def test_a_machine_that_cannot_run_the_kernels_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unavailable(monkeypatch, triton=False) == "Triton is not installed; pip install triton"
    assert "was built for the CPU alone" in str(unavailable(monkeypatch))
    assert "finds no GPU; TRITON_INTERPRET=1 runs" in str(unavailable(monkeypatch, cuda="13.0"))
    old = unavailable(monkeypatch, cuda="13.0", capability=(7, 5))
    assert old == "the kernels need compute capability 8.0, Turing T1 has 7.5"


def test_a_machine_that_can_run_them_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unavailable(monkeypatch, cuda="13.0", capability=(9, 0)) is None
    assert unavailable(monkeypatch, hip="6.4", capability=(0, 0)) is None  # AMD's numbers mean something else
    assert unavailable(monkeypatch, interpreted=True) is None


def test_forcing_it_where_it_cannot_run_raises_its_reason() -> None:
    reason = BACKEND.unavailable()
    if reason is None:
        assert "cuda" in BACKEND.DEVICES
        return
    with qk.use_backend("triton"), pytest.raises(RuntimeError) as caught:
        qk.assign(X, C)
    assert str(caught.value).startswith("assign: backend 'triton' was requested but cannot run: " + reason)


def test_tensors_of_other_types_and_devices_are_refused() -> None:
    elsewhere = [torch.empty(2, device="meta"), torch.empty((1, 2), device="meta")]
    assert "runs on cuda" in BACKEND.refusal("assign", (elsewhere[0], elsewhere[1]))


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@NEEDS_TRITON
def test_every_kernel_agrees_with_the_reference_when_interpreted() -> None:
    """test_every_op.py on the Triton kernels and their regimes, in a process of its own: Triton reads the variable on import."""
    options = (
        "-q",
        "-k",
        "triton",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore::RuntimeWarning",
    )  # numpy's overflow in exp
    profile = os.environ.get("HYPOTHESIS_PROFILE") or "interpreted"
    files = ("tests/test_every_op.py", "tests/test_triton_regimes.py")
    done = python("-m", "pytest", *files, *options, TRITON_INTERPRET="1", HYPOTHESIS_PROFILE=profile)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@NEEDS_TRITON
def test_interpreted_kernels_run_on_the_cpu_when_forced_and_are_never_chosen() -> None:
    code = (
        "import torch, qupedkern as qk; x, c = torch.linspace(-2, 2, 20), torch.tensor([-1.0, 1.0]); "
        "print(qk.explain('assign', x, c).backend != 'triton')\n"
        "with qk.use_backend('triton'): print(qk.assign(x, c).sum().item(), qk.explain('assign', x, c).backend)\n"
        "with qk.use_backend('triton'):\n"
        "    try: qk.assign(x.double(), c.double())\n"
        "    except RuntimeError as error: print(error)\n"
    )
    done = python("-c", code, TRITON_INTERPRET="1", QUPEDKERN_BACKEND="")
    assert done.returncode == 0, done.stderr
    chosen, forced, refused = done.stdout.splitlines()
    assert (chosen, forced) == ("True", "10 triton")
    assert refused.startswith("assign: backend 'triton' was requested but cannot run: float64 is left to eager;")
