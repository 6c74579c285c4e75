"""What the Triton kernels take of a GPU, read from binaries compiled ahead of time; no GPU is needed.

`python -m bench.resources` compiles every case for every target with the Triton that is installed and writes its rows of
results/triton-resources.jsonl and .md, those of other versions staying. A case is a call of a launcher on tensors without data:
what it would launch is caught and compiled, with the hints that call would give.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from qupedkern.ops import OPS

from .resource_cases import Case, arguments, cases

RESULTS = Path(__file__).resolve().parent / "results"
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}  # bytes a block, from the makers' tables
REGISTER_FILE = 65_536  # 32-bit registers of a multiprocessor: a block must fit


@dataclass(frozen=True)
class Launch:
    """What a launcher handed to Triton."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__.removeprefix("_")

    def constant(self, name: str) -> Any:
        return dict(zip(self.kernel.arg_names, self.arguments, strict=True)).get(name)


@contextmanager
def caught() -> Iterator[list[Launch]]:
    """Launches inside are noted and not made."""
    from triton.runtime import JITFunction

    launches: list[Launch] = []

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(self, args, options))

    with mock.patch.object(JITFunction, "run", note):
        yield launches


def launches_of(case: Case) -> list[Launch]:
    args = arguments(case)
    outputs = OPS[case.op].allocate(*args)
    stem = case.op.removesuffix("_backward")
    launcher = getattr(importlib.import_module(f"qupedkern.kernels.{stem}"), case.op)
    with caught() as launches:
        launcher(*args, *(outputs if isinstance(outputs, tuple) else () if outputs is None else (outputs,)))
    return launches


_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8", torch.int64: "i64"}
_TYPES |= {torch.int32: "i32"}


def _compiled(launch: Launch, target: str) -> Any:
    """As Triton would on the launch itself: pointers are multiples of 16, integers where they are, 1 is a constant."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, hints = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(launch.kernel.params, launch.arguments, strict=True)):
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name], hints[(i,)] = "*" + _TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                hints[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=hints)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=dict(launch.options))


@dataclass(frozen=True)
class Resources:
    """One kernel of one case on one target. wide_loads, wide_stores: instructions in it that move 16 bytes a thread from and to
    global memory; needed: those of one full tile, 0 where the kernel is not the one that does it."""

    case: str
    kernel: str
    target: str
    triton: str
    num_warps: int
    registers: int
    spills: int  # bytes of stack and local memory a thread
    shared: int  # bytes a block
    wide_loads: int
    wide_loads_needed: int
    wide_stores: int | None = None  # None: not read when the row was made
    wide_stores_needed: int = 0


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _nvidia(cubin: bytes) -> tuple[int, int, int, int, int]:
    """Registers, bytes of stack and local memory a thread, shared memory, wide loads and stores."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_tool("cuobjdump"), "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return *nvidia_usage(text, text), _wide("STG", text)


def nvidia_usage(numbers: str, code: str) -> tuple[int, int, int, int]:
    """Registers, bytes of stack and local memory, of shared memory, and 16-byte loads, from cuobjdump's words on a kernel."""
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", numbers)
    assert usage is not None, numbers[:400]
    registers, stack, shared, local = map(int, usage.groups())
    # LDGSTS copies to shared memory on its way: the loads of a pipelined loop.
    return registers, stack + local, shared, _wide("LDG(?:STS)?", code)


def _wide(instruction: str, code: str) -> int:
    return len(re.findall(rf"\b{instruction}\.\S*128", code))


def _amd(assembly: str) -> tuple[int, int, int, int, int]:
    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", assembly)
        assert found is not None, key
        return int(found.group(1))

    spills = 4 * number("vgpr_spill_count") + number("private_segment_fixed_size")
    loads, stores = (len(re.findall(rf"\b(?:global|buffer)_{way}_dwordx4", assembly)) for way in ("load", "store"))
    return number("vgpr_count"), spills, number("group_segment_fixed_size"), loads, stores


def resources(case: Case, target: str) -> list[Resources]:
    """Of every kernel of the case, in the order of their launches."""
    import triton

    found = []
    for i, launch in enumerate(launches_of(case)):
        compiled = _compiled(launch, target)
        lanes = TARGETS[target][2]
        warps = launch.options["num_warps"]
        registers, spills, shared, loads, stores = (
            _amd(compiled.asm["amdgcn"]) if target.startswith("gfx") else _nvidia(compiled.asm["cubin"])
        )
        needed = [0, 0]
        if i == 0 and (case.loaded or case.stored):
            tile = launch.constant("BLOCK")
            # A thread that moves less than 16 bytes of a tile in this direction has nothing to make wide.
            read, written = (int(tile * each) // (lanes * warps) for each in (case.loaded, case.stored))
            needed = [read // case.chunk * (case.chunk // 16), written // 16]
        if i == 0 and case.packed and lanes == 32:
            needed[0] = _of_x(launch) + 1
        shared = max(shared, compiled.metadata.shared)
        row = Resources(
            case.name, launch.name, target, triton.__version__, warps, registers, spills, shared, loads, needed[0],
            stores, needed[1],
        )  # fmt: skip
        found.append(row)
    return found


def _of_x(launch: Launch) -> int:
    """Wide loads of a tile of x in lut_linear: one more must be there, of packed words."""
    x, tile = launch.arguments[0], launch.constant("BLOCK_B") * launch.constant("BLOCK_K")
    return tile * x.element_size() // (32 * launch.options["num_warps"] * 16)


def objections(row: Resources) -> list[str]:
    """What is wrong with it: sentences."""
    lanes = TARGETS[row.target][2]
    found = []
    if row.spills:
        found.append(f"{row.spills} bytes a thread go to memory")
    if row.shared > SHARED_LIMIT[row.target]:
        found.append(f"{row.shared} bytes of shared memory, {SHARED_LIMIT[row.target]} are there")
    if row.registers * row.num_warps * lanes > REGISTER_FILE * (1 if lanes == 32 else 4):
        found.append(f"{row.registers} registers in {row.num_warps} warps do not fit")
    if row.wide_loads < row.wide_loads_needed:
        found.append(f"{row.wide_loads} loads of 16 bytes, a tile needs {row.wide_loads_needed}")
    if row.wide_stores is not None and row.wide_stores < row.wide_stores_needed:
        found.append(f"{row.wide_stores} stores of 16 bytes, a tile needs {row.wide_stores_needed}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.resources", description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS))
    options = parser.parse_args()
    wrong = False
    for case in cases():
        if options.only in case.name:
            rows = [row for target in options.targets for row in resources(case, target)]
            for row in rows:
                print(markdown([row])[-1], *objections(row), flush=True)
            wrong |= any(objections(row) for row in rows)
            write(rows)
    return 1 if wrong else 0


def read() -> list[Resources]:
    """The rows of the table, of every version of Triton it was made with."""
    lines = (RESULTS / "triton-resources.jsonl").read_text(encoding="utf-8").splitlines()
    return [Resources(**json.loads(line)) for line in lines]


def write(rows: list[Resources]) -> None:
    """Put rows in the place of those of the same case, target and version; rows of cases that are no more go."""
    order = {case.name: number for number, case in enumerate(cases())}
    new = {(row.triton, row.case, row.target) for row in rows}
    kept = [row for row in read() if row.case in order and (row.triton, row.case, row.target) not in new]
    table = sorted([*kept, *rows], key=lambda row: (row.triton, order[row.case], list(TARGETS).index(row.target)))
    written = "".join(json.dumps(asdict(row)) + "\n" for row in table)
    (RESULTS / "triton-resources.jsonl").write_text(written, encoding="utf-8")
    (RESULTS / "triton-resources.md").write_text("\n".join(markdown(table)) + "\n", encoding="utf-8")


def markdown(rows: Sequence[Any]) -> list[str]:
    """The table of dataclasses of one kind, a line a row under two of heading."""
    columns = [field.name for field in fields(rows[0])]
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    return lines + ["| " + " | ".join(str(getattr(row, name)) for name in columns) + " |" for row in rows]


if __name__ == "__main__":
    raise SystemExit(main())
