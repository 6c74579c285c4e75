"""The CUDA backend without a GPU: what it says of a machine, its kernels run by an emulator on the CPU, and the emulator itself."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import qupedkern as qk
from qupedkern.backends import MEASURED, ORDER, _native, module, order_of
from qupedkern.kernels._crossovers import WRITTEN_OUT
from qupedkern.ops import OPS

ROOT = Path(__file__).resolve().parent.parent
BACKEND: Any = module("cuda")
X, C = torch.linspace(-2, 2, 20), torch.tensor([-1.0, 0.0, 1.0])
SELF_TESTS = (
    "a_barrier_makes_every_order_agree",
    "a_missing_barrier_is_seen",
    "a_divergent_barrier_is_an_error",
    "barriers_of_different_lines_are_an_error",
    "a_shuffle_that_waits_for_ever_is_an_error",
    "a_warp_adds_up",
    "shared_memory_starts_as_nan",
    "too_much_shared_memory_is_refused",
    "an_error_leaves_the_emulator_working",
    "tensor_cores_multiply",
    "special_functions_err_as_documented",
)


def unavailable(monkeypatch: pytest.MonkeyPatch, **machine: Any) -> str | None:
    """What the backend says of a machine that is not this one."""
    monkeypatch.setattr(BACKEND, "_EMULATED", None)
    info = {"cuda": ["13.0"], "cuda_note": None, "python": "3.14"} | machine.get("info", {})
    monkeypatch.setattr(_native, "info", lambda: info if machine.get("installed", True) else {})
    found = object() if machine.get("module", True) else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(BACKEND, "_loaded", lambda: SimpleNamespace(driver_problem=lambda: machine.get("problem", "")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "capability" in machine)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: machine["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Turing T1")
    monkeypatch.setattr(torch.version, "cuda", machine.get("cuda"))
    monkeypatch.setattr(torch.version, "hip", machine.get("hip"))
    return BACKEND.unavailable.__wrapped__()


def test_a_machine_that_cannot_run_the_kernels_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "run pip install -e ." in str(unavailable(monkeypatch, installed=False))
    assert unavailable(monkeypatch, info={"cuda": [], "cuda_note": "nvcc not found"}) == "not built: nvcc not found"
    assert "install was made with 3.14; install again" in str(unavailable(monkeypatch, module=False))
    assert "was built for AMD's" in str(unavailable(monkeypatch, hip="6.4"))
    assert "was built for the CPU alone" in str(unavailable(monkeypatch))
    driver = "CUDA driver version is insufficient for CUDA runtime version"
    told = unavailable(monkeypatch, cuda="13.0", problem=driver)
    assert told == f"the CUDA runtime finds no GPU to use: {driver}"
    assert str(unavailable(monkeypatch, cuda="13.0")).endswith("finds no GPU")
    old = unavailable(monkeypatch, cuda="13.0", capability=(7, 5))
    assert old == "the kernels need compute capability 8.0, Turing T1 has 7.5"


def test_a_machine_that_can_run_them_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unavailable(monkeypatch, cuda="13.0", capability=(9, 0)) is None


def test_forcing_it_where_it_cannot_run_raises_its_reason() -> None:
    reason = BACKEND.unavailable()
    if reason is None:
        return
    with qk.use_backend("cuda"), pytest.raises(RuntimeError) as caught:
        qk.soft_quantize(X, C, 3.0)
    assert str(caught.value).startswith("soft_quantize: backend 'cuda' was requested but cannot run: " + reason)
    assert BACKEND.describe() == reason
    assert BACKEND.ops() == ()


def test_the_order_of_the_gpu_backends_is_one_table_whose_exceptions_name_their_figures() -> None:
    assert order_of("cuda", "soft_quantize") == MEASURED.get(("cuda", "soft_quantize"), (ORDER["cuda"], ""))[0]
    for (device, op), (order, figures) in MEASURED.items():
        assert sorted(order) == sorted(ORDER[device])
        assert op in OPS
        assert any(digit.isdigit() for digit in figures)


@pytest.mark.parametrize(("dtype", "rows"), WRITTEN_OUT.items(), ids=str)
def test_large_batches_go_to_the_backend_that_writes_the_weight_out(dtype: torch.dtype, rows: int) -> None:
    def first(batch: tuple[int, ...]) -> str:
        return order_of("cuda", "lut_linear", (torch.empty(*batch, 7, dtype=dtype),))[0]

    assert first((rows - 1,)) == first((2, rows // 2 - 1)) == ORDER["cuda"][0]
    assert first((rows,)) == first((2, rows // 2)) == "triton"
    with qk.batch_invariant(True):
        assert first((rows,)) == ORDER["cuda"][0]
    assert set(order_of("cuda", "lut_linear", (torch.empty(rows, 7, dtype=dtype),))) == set(ORDER["cuda"])


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build folder of the emulated kernels, made where the tests run; ccache and ninja where they are there."""
    cmake = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    if cmake is None or shutil.which(os.environ.get("CXX") or "c++") is None or sys.platform != "linux":
        pytest.skip("CUDA EMULATOR NOT BUILT: needs Linux, cmake and a C++ compiler")
    import pybind11

    build = Path(os.environ.get("QUPEDKERN_EMULATOR_BUILD") or tmp_path_factory.mktemp("cuda_emulator"))
    arguments = ["-DQUPEDKERN_EMULATOR=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    arguments += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    arguments += ["-DCMAKE_CXX_COMPILER_LAUNCHER=ccache"] if shutil.which("ccache") else []
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    arguments += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    for command in (
        [cmake, "-S", str(ROOT), "-B", str(build), *arguments],
        [
            cmake,
            "--build",
            str(build),
            "--parallel",
            str(os.cpu_count() or 1),
            "--target",
            "_C_cuda_emulated",
            "self_test",
        ],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return build


def emulated(build: Path) -> str:
    return str(build / "modules" / f"_C_cuda_emulated{sysconfig.get_config_var('EXT_SUFFIX')}")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", SELF_TESTS)
def test_the_emulator_sees_what_it_is_for(emulator: Path, name: str) -> None:
    done = subprocess.run(
        [str(emulator / "tests" / "cuda_emulator" / "self_test"), name], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_kernel_agrees_with_the_reference_when_emulated(emulator: Path) -> None:
    """The tests of kernels on them, in a process of its own: the backend reads the variable on import."""
    options = ("-q", "-k", "cuda", "-p", "no:cacheprovider")
    profile = os.environ.get("HYPOTHESIS_PROFILE") or "emulated"
    done = python(
        "-m", "pytest", "tests/test_every_op.py", "tests/test_cuda_lut.py", "tests/test_cuda_soft.py", *options,
        QUPEDKERN_CUDA_EMULATED=emulated(emulator), HYPOTHESIS_PROFILE=profile,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


ORDERS = """
import torch, qupedkern as qk
from qupedkern.backends import cuda
from qupedkern.ops._define import tensors_of
from qupedkern.testing.harness import same_bits
x = torch.linspace(-2, 2, 3000)
grad = torch.sin(torch.arange(3000.0))

def step(c, chain, norm):
    copies = [x.clone() for _ in range(3)]
    sharpness = [30.0] if chain == "soft" else []
    out = qk.quped_step(
        [copies[0]], [grad], [grad.flip(0)], [copies[1]], [copies[2].abs()], [c], sharpness, [0.01], chain=chain,
        optimizer="adamw", norm=norm, lr=0.1, weight_decay=0.01, beta1=0.9, beta2=0.99, step=3, codes=True, pack_bits=6,
    )
    return [*tensors_of(list(out)), *copies]

def everything(c):
    leaves = [x.clone().requires_grad_(), c.clone().requires_grad_()]
    out = qk.soft_quantize(*leaves, 30.0)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves), *step(c, "soft", "l1"), *step(c, "hard", "l2")]

for m in (2, 16, 40):
    for groups in (1, 60):
        c = torch.linspace(-1, 1, m).repeat(groups, 1) + torch.linspace(0, 0.1, groups)[:, None]
        found = []
        for order in (("forward", 0), ("backward", 0), ("shuffled", 1)):
            cuda._loaded().set_order(*order)
            with qk.use_backend("cuda"):
                found.append(everything(c))
        for other in found[1:]:
            assert all(same_bits(a, b) for a, b in zip(found[0], other, strict=True)), (m, groups)
print("the same")
"""


def test_the_order_in_which_threads_run_changes_no_bit(emulator: Path) -> None:
    """A missing barrier would."""
    done = python("-c", ORDERS, QUPEDKERN_CUDA_EMULATED=emulated(emulator))
    assert done.stdout.strip() == "the same", done.stdout + done.stderr


def test_emulated_kernels_run_on_the_cpu_when_forced_and_are_never_chosen(emulator: Path) -> None:
    code = (
        "import torch, qupedkern as qk; x, c = torch.linspace(-2, 2, 20), torch.tensor([-1.0, 1.0]); "
        "print(qk.explain('soft_quantize', x, c, 3.0).backend != 'cuda')\n"
        "with qk.use_backend('cuda'): print(qk.explain('soft_quantize', x, c, 3.0).backend)\n"
        "with qk.use_backend('cuda'):\n"
        "    try: qk.soft_quantize(x.double(), c.double(), 3.0)\n"
        "    except RuntimeError as error: print(error)\n"
    )
    done = python("-c", code, QUPEDKERN_CUDA_EMULATED=emulated(emulator), QUPEDKERN_BACKEND="")
    assert done.returncode == 0, done.stderr
    chosen, forced, refused = done.stdout.splitlines()
    assert (chosen, forced) == ("True", "cuda")
    start = "soft_quantize: backend 'cuda' was requested but cannot run: x must be float32 or bfloat16 or float16, got"
    assert refused.startswith(start)
