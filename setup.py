"""Builds the native kernels with CMake; without a compiler the package installs as pure Python and says so in one line.

QUPEDKERN_CPU=AUTO|ON|OFF   CPU kernels: AUTO (default) builds them if it can, ON fails the install where it cannot.
QUPEDKERN_CUDA=AUTO|ON|OFF  CUDA kernels: AUTO looks for nvcc and notes what it found; there are none to build yet.
QUPEDKERN_SANITIZE=LIST     a test build of the CPU kernels under sanitizers, for example address,undefined.
CXX, CXXFLAGS, LDFLAGS      as everywhere.

What was built is written to qupedkern/_build_info.json and printed as the last line.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "qupedkern"
MODULES = "_C_*"  # native modules in the package folder


class BuildError(Exception):
    """Why the native kernels could not be built: one line."""


def version() -> str:
    text = (ROOT / PACKAGE / "_version.py").read_text(encoding="utf-8")
    found = re.search(r'__version__\s*=\s*"([^"]+)"', text)
    if found is None:
        raise SystemExit(f"{PACKAGE}: _version.py must set __version__")
    return found.group(1)


def choice(name: str) -> str:
    value = os.environ.get(name, "").strip().upper() or "AUTO"
    if value not in ("AUTO", "ON", "OFF"):
        raise SystemExit(f"{PACKAGE}: {name} must be AUTO, ON or OFF, got {os.environ[name]!r}")
    return value


def tool(name: str, folder_attribute: str) -> str | None:
    """cmake or ninja: the one of the build environment's Python package if there is one, else the system's."""
    try:
        folder = getattr(__import__(name), folder_attribute)
    except (ImportError, AttributeError):
        return shutil.which(name)
    return shutil.which(name, path=folder) or shutil.which(name)


def reason_of(log: str) -> str:
    """What went wrong in a failed CMake run, in one line."""
    lines = log.splitlines()
    for i, line in enumerate(lines):
        if line.startswith("CMake Error"):
            paragraph = " ".join(text.strip() for text in lines[i + 1 : i + 8] if text.strip())
            sentence = re.split(r"\.\s", paragraph)[0].rstrip(".") or line
            return sentence.replace("No CMAKE_CXX_COMPILER could be found", "no C++ compiler was found")
        if re.search(r"\berror\b[: ]", line):
            return line.strip()
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def run(command: list[str]) -> None:
    """Run one step of the build, showing its output; BuildError with the reason where it fails."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
    )
    print(done.stdout, flush=True)
    if done.returncode:
        raise BuildError(reason_of(done.stdout))


def configure_arguments(output: Path) -> list[str]:
    import pybind11

    arguments = [
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DQUPEDKERN_OUTPUT={output}",
        f"-DQUPEDKERN_SANITIZE={os.environ.get('QUPEDKERN_SANITIZE', '')}",
    ]
    ninja = tool("ninja", "BIN_DIR")
    if ninja:
        arguments += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    return arguments


def clean_if_changed(build: Path, settings: list[str]) -> None:
    """CMake keeps the compiler and the generator it first saw; other settings start from an empty folder."""
    flags = [os.environ.get(name, "") for name in ("CXX", "CXXFLAGS", "LDFLAGS")]
    compilers = [str(shutil.which(name)) for name in (flags[0], "c++", "g++", "clang++") if name]
    fingerprint = hashlib.sha256("\n".join(settings + flags + compilers).encode()).hexdigest()
    mark = build / "settings"
    if not mark.is_file() or mark.read_text(encoding="utf-8") != fingerprint:
        shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True)
        mark.write_text(fingerprint, encoding="utf-8")


def build_cpu(build: Path) -> tuple[list[str], str, list[Path]]:
    """Instruction sets, compiler and module files of a finished build; BuildError where there is none."""
    cmake = tool("cmake", "CMAKE_BIN_DIR")
    if cmake is None:
        raise BuildError("cmake was not found")
    output = build / "modules"
    arguments = configure_arguments(output)
    clean_if_changed(build, [cmake, *arguments])
    run([cmake, "-S", str(ROOT), "-B", str(build), *arguments])
    run([cmake, "--build", str(build), "--config", "Release", "--parallel", str(os.cpu_count() or 1)])
    sets, compiler = (build / "built.txt").read_text(encoding="utf-8").splitlines()
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    files = [output / f"_C_cpu_{name}{suffix}" for name in sets.split()]
    for file in files:
        if not file.is_file():
            raise BuildError(f"the build ended without {file.name}")
    return sets.split(), compiler, files


def cuda_note() -> str:
    """Whether CUDA kernels could be built here, and why they were not."""
    wanted = choice("QUPEDKERN_CUDA")
    if wanted == "OFF":
        return "switched off by QUPEDKERN_CUDA=OFF"
    if wanted == "ON":
        raise SystemExit(f"{PACKAGE}: QUPEDKERN_CUDA=ON, but there are no CUDA kernels to build yet; use AUTO or OFF")
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc"), *(f"{home}/bin/nvcc" for home in homes if home)]
    for nvcc in candidates:
        if nvcc and shutil.which(nvcc):
            shown = subprocess.run([nvcc, "--version"], capture_output=True, text=True, errors="replace", check=False)
            release = re.search(r"release ([\d.]+)", shown.stdout)
            number = release.group(1) if release else "of unknown version"
            return f"nvcc {number} found, this version has no CUDA kernels"
    return "nvcc not found"


def summary(info: dict) -> str:
    if info["cpu"]:
        cpu = f"built cpu ({', '.join(info['cpu'])}) with {info['compiler']}"
    else:
        cpu = f"pure Python, cpu kernels not built: {info['cpu_note']}"
    return f"{PACKAGE} {info['version']}: {cpu}; cuda not built: {info['cuda_note']}"


class BuildKernels(build_ext):
    """The native modules and _build_info.json, into the build folder or, for an editable install, the source tree."""

    def run(self) -> None:
        info, files = self._built()
        package = (ROOT if self.inplace else Path(self.build_lib).resolve()) / PACKAGE
        package.mkdir(parents=True, exist_ok=True)
        suffix = sysconfig.get_config_var("EXT_SUFFIX") if self.inplace else ""
        for stale in package.glob(f"{MODULES}{suffix}"):
            stale.unlink()
        record = package / "_build_info.json"
        record.write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
        self._written = [record, *(Path(shutil.copy2(file, package / file.name)) for file in files)]
        print(summary(info), flush=True)

    def _built(self) -> tuple[dict, list[Path]]:
        """What goes into _build_info.json, and the finished modules."""
        wanted = choice("QUPEDKERN_CPU")
        info: dict = {"version": version(), "python": platform.python_version(), "cpu": [], "cpu_note": None}
        info |= {"compiler": None, "cuda": [], "cuda_note": cuda_note()}
        if wanted == "OFF":
            return info | {"cpu_note": "switched off by QUPEDKERN_CPU=OFF"}, []
        try:
            sets, compiler, files = build_cpu(Path(self.build_temp).resolve() / "cmake")
        except BuildError as error:
            if wanted == "ON":
                message = f"{PACKAGE}: QUPEDKERN_CPU=ON, but the cpu kernels could not be built: {error}"
                raise SystemExit(message) from None
            return info | {"cpu_note": str(error)}, []
        return info | {"cpu": sets, "compiler": compiler}, files

    def get_outputs(self) -> list[str]:
        return [str(file) for file in getattr(self, "_written", [])]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # an editable install finds the modules where they were written


setup(ext_modules=[Extension(f"{PACKAGE}._C_cpu", sources=[])], cmdclass={"build_ext": BuildKernels})
