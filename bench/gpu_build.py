"""What bench/gpu.sh builds in its scratch folder: the native CUDA module, and what measures a multiprocessor's rates."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .gpu_journal import Journal

ROOT = Path(__file__).resolve().parent.parent
RATES = ROOT / "bench" / "sm_rates.cu"


class Failed(Exception):
    """One sentence about a build."""


def nvcc() -> str | None:
    """The CUDA compiler, from the path or from where CUDA installs it; None where there is none."""
    usual = [os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((path for path in usual if path and Path(path).is_file()), None)


def _run(command: list[str], seconds: float, log: Path) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        try:
            done = subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=max(seconds, 1), check=False
            )
        except subprocess.TimeoutExpired:
            raise Failed(f"{Path(command[0]).name} had not finished after {seconds:.0f} s") from None
    if done.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        wrong = [line for line in lines if "error" in line.lower()] or lines
        raise Failed(f"{Path(command[0]).name} ended with status {done.returncode}: {wrong[-1][:300]}")


def cuda_module(seconds: float, log: Path) -> None:
    """Build _C_cuda beside the package. Failed where this version has none, a tool is missing, or it does not build."""
    if not list((ROOT / "csrc" / "cuda").glob("*.cu")) or "_C_cuda" not in (ROOT / "CMakeLists.txt").read_text("utf-8"):
        raise Failed("no CUDA kernels in this version")
    compiler = nvcc()
    if compiler is None:
        raise Failed("nvcc was not found, in the path or in /usr/local/cuda/bin")
    build = ROOT / "build-cuda"
    configure = [
        "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release", "-DQUPEDKERN_CUDA=ON",
        f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_CUDA_COMPILER={compiler}", f"-Dpybind11_DIR={_pybind11()}",
        f"-DQUPEDKERN_OUTPUT={ROOT / 'qupedkern'}",
    ]  # fmt: skip
    if shutil.which("ninja"):
        configure += ["-G", "Ninja"]
    cmake = shutil.which("cmake")
    command = [cmake] if cmake else [sys.executable, "-m", "cmake"]
    _run([*command, *configure], seconds, log)
    jobs = str(max(2, (os.cpu_count() or 2) - 2))
    _run([*command, "--build", str(build), "--target", "_C_cuda", "--parallel", jobs], seconds, log)
    if not list((ROOT / "qupedkern").glob("_C_cuda*.so")):
        raise Failed("the build left no _C_cuda module")
    record(compiler)


def _pybind11() -> str:
    command = [sys.executable, "-m", "pybind11", "--cmakedir"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed("pybind11 is not installed for this Python")
    return done.stdout.strip()


def record(compiler: str) -> None:
    """What was built, where the package looks for it."""
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"V(\d[\d.]*)", said)
    about: dict[str, Any] = {"version": "scratch", "python": platform.python_version(), "cpu": [], "compiler": None}
    about |= {"cpu_note": "bench/gpu.sh builds the CUDA kernels alone", "cuda_note": None}
    about |= {"cuda": [f"nvcc {version.group(1)}" if version else "nvcc"]}
    (ROOT / "qupedkern" / "_build_info.json").write_text(json.dumps(about) + "\n", encoding="utf-8")


def sm_rates(capability: str, target: Path, seconds: float, log: Path) -> Path:
    """The program that measures a multiprocessor; capability: sm_90, sm_80."""
    compiler = nvcc()
    if compiler is None:
        raise Failed("nvcc was not found, so the rates of a multiprocessor are not measured")
    _run([compiler, "-O3", "-std=c++17", f"-arch={capability}", str(RATES), "-o", str(target)], seconds, log)
    return target


def attempt(journal: Journal, what: str, function: Callable[..., object], *arguments: object) -> bool:
    """Whether function(*arguments) went through; its failure stands in the journal."""
    try:
        function(*arguments)
    except Exception as error:  # whatever it is, the other parts go on
        journal.write("failed", what=what, sentence=str(error)[:500] or type(error).__name__)
        return False
    return True
