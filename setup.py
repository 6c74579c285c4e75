"""Builds the native kernels with CMake; without a compiler the package installs as pure Python and says so in one line.

QUPEDKERN_CPU=AUTO|ON|OFF   CPU kernels: AUTO (default) builds them if it can, ON fails the install where it cannot.
QUPEDKERN_CUDA=AUTO|ON|OFF  CUDA kernels: AUTO builds them where nvcc is found (CUDACXX, PATH, CUDA_HOME, CUDA_PATH,
                            /usr/local/cuda) and otherwise notes why not, ON fails the install where it cannot.
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
from collections.abc import Callable
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


def run(command: list[str], **environment: str) -> None:
    """Run one step of the build, showing its output; BuildError with the reason where it fails."""
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        env={**os.environ, **environment},
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
        f"-DQUPEDKERN_CUDA={choice('QUPEDKERN_CUDA')}",
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


def nvcc() -> str | None:
    """The CUDA compiler, looked for where it usually is; CMake decides whether it works."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc"), *(f"{home}/bin/nvcc" for home in homes if home)]
    return next((path for path in candidates if path and shutil.which(path)), None)


class Build:
    """A configured build folder; BuildError where CMake cannot make one."""

    def __init__(self, folder: Path) -> None:
        cmake = tool("cmake", "CMAKE_BIN_DIR")
        if cmake is None:
            raise BuildError("cmake was not found")
        self._cmake, self._folder, self._output = cmake, folder, folder / "modules"
        arguments = configure_arguments(self._output)
        compiler = nvcc()
        clean_if_changed(folder, [cmake, *arguments, str(compiler)])
        run([cmake, "-S", str(ROOT), "-B", str(folder), *arguments], **({"CUDACXX": compiler} if compiler else {}))
        facts = (folder / "built.txt").read_text(encoding="utf-8").splitlines()
        self.sets, self.compiler, self.cuda, self.cuda_note = facts[0].split(), facts[1], facts[2], facts[3]

    def modules(self, names: list[str], target: str) -> list[Path]:
        """Build a target; the modules it makes."""
        run([self._cmake, "--build", str(self._folder), "--config", "Release", "--target", target,
             "--parallel", str(os.cpu_count() or 1)])  # fmt: skip
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        files = [self._output / f"{name}{suffix}" for name in names]
        for file in files:
            if not file.is_file():
                raise BuildError(f"the build ended without {file.name}")
        return files


def part(kind: str, wanted: str, make: Callable[[], list[Path]]) -> tuple[list[Path], str | None]:
    """The modules of one kind of kernels, or why there are none; what was asked for and cannot be built ends the install."""
    if wanted == "OFF":
        return [], f"switched off by QUPEDKERN_{kind}=OFF"
    try:
        return make(), None
    except BuildError as error:
        if wanted == "ON":
            sentence = f"{PACKAGE}: QUPEDKERN_{kind}=ON, but the {kind.lower()} kernels could not be built: {error}"
            raise SystemExit(sentence) from None
        return [], str(error)


def summary(info: dict) -> str:
    if info["cpu"]:
        cpu = f"built cpu ({', '.join(info['cpu'])}) with {info['compiler']}"
    else:
        cpu = f"pure Python, cpu kernels not built: {info['cpu_note']}"
    cuda = f"built with nvcc {info['cuda'][0]}" if info["cuda"] else f"not built: {info['cuda_note']}"
    return f"{PACKAGE} {info['version']}: {cpu}; cuda {cuda}"


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
        folder = Path(self.build_temp).resolve() / "cmake"
        configured: list[Build] = []

        def build() -> Build:
            if not configured:
                configured.append(Build(folder))
            return configured[0]

        def cpu() -> list[Path]:
            return build().modules([f"_C_cpu_{isa}" for isa in build().sets], "all")

        def cuda() -> list[Path]:
            if build().cuda_note:
                raise BuildError(build().cuda_note)
            return build().modules(["_C_cuda"], "_C_cuda")

        cpu_files, cpu_note = part("CPU", choice("QUPEDKERN_CPU"), cpu)
        cuda_files, cuda_note = part("CUDA", choice("QUPEDKERN_CUDA"), cuda)
        info = {
            "version": version(),
            "python": platform.python_version(),
            "cpu": build().sets if cpu_files else [],
            "cpu_note": cpu_note,
            "compiler": build().compiler if cpu_files else None,
            "cuda": [build().cuda] if cuda_files else [],
            "cuda_note": cuda_note,
        }
        return info, [*cpu_files, *cuda_files]

    def get_outputs(self) -> list[str]:
        return [str(file) for file in getattr(self, "_written", [])]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # an editable install finds the modules where they were written


setup(ext_modules=[Extension(f"{PACKAGE}._C_cpu", sources=[])], cmdclass={"build_ext": BuildKernels})
