"""What the CUDA kernels take of a GPU, read from their machine code; no GPU is needed.

`python -m bench.cuda_resources` compiles csrc/cuda/*.cu for every target and writes results/cuda-resources.jsonl and .md; with
`--only FILE` it compiles and prints that file alone. It needs nvcc and cuobjdump, which Triton brings along.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from .resources import REGISTER_FILE, RESULTS, SHARED_LIMIT, markdown, nvidia_usage

SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
TARGETS = ("sm_80", "sm_90")
OPTIONS = ("-std=c++17", "-O3", "--fmad=false", "--extended-lambda", "--expt-relaxed-constexpr")  # as CMakeLists.txt
_FLOATS = (("float", 1), ("qk::bfloat16", 2), ("qk::float16", 2))  # with elements to 4 bytes


def hot_kernels() -> dict[str, int]:
    """Kernels that are bound by memory: 16-byte loads a full tile needs, two of x for 8 float32 elements a thread."""
    hot = {}
    for name, narrower in _FLOATS:
        for method in range(3):
            hot[f"soft_quantize_spans<{name}, (Method){method}>"] = 2 // narrower
        for narrow in ("true", "false"):
            for window in ("true", "false"):
                hot[f"soft_backward_spans<{name}, {narrow}, {window}>"] = 4 // narrower
    for soft in ("true", "false"):
        hot[f"quped_spans<{soft}, false, true>"] = 4  # x, both gradients, the momentum
        hot[f"quped_spans<{soft}, true, true>"] = 5
    for bits in (1, 2, 3, 4):  # a lane's pieces of four rows of W
        for tiles in (1, 2):  # batches to 8 and to 16
            for name, _ in _FLOATS[1:]:
                hot[f"lut_mma_kernel<{name}, {bits}, {tiles}>"] = 12 if bits == 3 else 4
    for bits in (2, 3, 4):
        hot[f"lut_fma_kernel<{bits}, 1>"] = 12 if bits == 3 else 4
    for bits in range(1, 9):
        for value in ("unsigned int", "unsigned short"):
            hot[f"dequantize_packed_kernel<{bits}, {value}>"] = 1
    return hot


@dataclass(frozen=True)
class Usage:
    """One kernel on one target. wide_loads: instructions in it that load 16 bytes a thread from global memory."""

    kernel: str
    file: str
    target: str
    nvcc: str
    registers: int
    spills: int  # bytes of stack and local memory a thread
    shared: int  # bytes a block, beside what a launch asks for
    wide_loads: int
    wide_loads_needed: int  # 0 where the kernel is not bound by memory


def tool(name: str) -> str | None:
    """nvcc or cuobjdump: where CUDA is installed, or Triton's own."""
    homes = [home for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    triton = importlib.util.find_spec("triton")
    folders = [f"{home}/bin" for home in homes]
    if triton is not None and triton.origin is not None:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which(name) or next((found for f in folders if (found := shutil.which(name, path=f))), None)


def missing() -> str | None:
    """Which tool is not here; None where all are."""
    absent = [name for name in ("nvcc", "cuobjdump", "c++filt") if tool(name) is None]
    return f"{' and '.join(absent)} not found" if absent else None


def _run(name: str, *arguments: str) -> str:
    found = tool(name)
    assert found is not None, name
    return subprocess.run([found, *arguments], capture_output=True, text=True, check=True).stdout


def _version() -> str:
    found = re.search(r"release ([\d.]+)", _run("nvcc", "--version"))
    return found.group(1) if found else "unknown"


def _readable(mangled: str) -> str:
    """A kernel's name and template arguments, without namespaces of its file."""
    plain = _run("c++filt", mangled).strip()
    plain = re.sub(r"qk::cuda::(\(anonymous namespace\)|_GLOBAL__N__\w+)::", "", plain).removeprefix("void ")
    name, bracket, arguments = plain.partition("<")
    return name + bracket + arguments.rpartition(">")[0] + ">" if bracket else plain.partition("(")[0]


def usages(cubin: Path, file: str, target: str, nvcc: str) -> list[Usage]:
    """Of every kernel in a cubin."""
    text = _run("cuobjdump", "-res-usage", str(cubin))
    code = dict(
        re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*\.\.\.\.|\Z)", _run("cuobjdump", "-sass", str(cubin)), re.S)
    )
    hot = hot_kernels()
    found = []
    for mangled, numbers in re.findall(r"Function (\S+):\n(.*?)\n", text):
        registers, spills, shared, wide = nvidia_usage(numbers, code[mangled])
        name = _readable(mangled)
        found.append(Usage(name, file, target, nvcc, registers, spills, shared, wide, hot.get(name, 0)))
    return sorted(found, key=lambda usage: usage.kernel)


def compiled(source: Path, target: str) -> list[Usage]:
    """Compile one source and read it."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        _run("nvcc", *OPTIONS, f"-arch={target}", "-cubin", "-o", str(cubin), str(source))
        return usages(cubin, source.name, target, _version())


def objections(row: Usage) -> list[str]:
    """What is wrong with it: sentences."""
    found = []
    if row.spills and row.wide_loads_needed:
        found.append(f"{row.spills} bytes a thread go to memory")
    if row.shared > SHARED_LIMIT[row.target]:
        found.append(f"{row.shared} bytes of shared memory, {SHARED_LIMIT[row.target]} are there")
    if row.wide_loads_needed and row.registers * 512 > REGISTER_FILE:
        found.append(f"{row.registers} registers: fewer than 512 threads fit on a multiprocessor")
    if row.wide_loads < row.wide_loads_needed:
        found.append(f"{row.wide_loads} loads of 16 bytes, a tile needs {row.wide_loads_needed}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_resources", description=__doc__)
    parser.add_argument("--only", default="", help="sources whose name holds this; printed, not written")
    options = parser.parse_args()
    reason = missing()
    if reason is not None:
        print(f"nothing can be read here: {reason}")
        return 2
    rows = []
    for source in sorted(SOURCES.glob("*.cu")):
        if options.only in source.name:
            for target in TARGETS:
                for row in compiled(source, target):
                    rows.append(row)
                    print(markdown([row])[-1], *objections(row), flush=True)
    if not options.only:
        write(rows)
    return 0 if not any(objections(row) for row in rows) else 1


def write(rows: list[Usage]) -> None:
    """The table, as JSON lines and as Markdown."""
    text = "".join(json.dumps(asdict(row)) + "\n" for row in rows)
    (RESULTS / "cuda-resources.jsonl").write_text(text, encoding="utf-8")
    (RESULTS / "cuda-resources.md").write_text("\n".join(markdown(rows)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
