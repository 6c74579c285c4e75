"""What the Triton kernels take of a GPU, read from binaries compiled ahead of time; no GPU is needed.

`python -m bench.resources` compiles every case for every target and writes results/triton-resources.jsonl and .md. A case is a
call of a launcher on tensors without data: what it would launch is caught and compiled, with the hints that call would give.
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

RESULTS = Path(__file__).resolve().parent / "results"
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}  # bytes a block, from the makers' tables
REGISTER_FILE = 65_536  # 32-bit registers of a multiprocessor: a block must fit
_SIDE = 4096  # of a linear layer
_N, _RAGGED = 1 << 24, (1 << 24) + 5  # rows of 2^24 / G weights; a single one has no length that helps


@dataclass(frozen=True)
class Case:
    """A call. loaded: bytes of tensors (not of tables of centers) read an element of a tile, by the first kernel launched."""

    op: str
    dtype: torch.dtype
    m: int
    loaded: float
    groups: int = 1
    bits: int = 0
    variant: str = ""  # of quped_step: its optimizer

    @property
    def name(self) -> str:
        rows = "" if self.groups == 1 else f", {self.groups} rows"
        dtype = str(self.dtype).removeprefix("torch.")
        what = f"{dtype} {self.bits} bits{rows}" if self.bits else f"{dtype} m={self.m}{rows}"
        return f"{self.op} {what} {self.variant}".rstrip()


def _arguments(case: Case) -> tuple[Any, ...]:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows, n = ((case.groups,), _N) if case.groups > 1 else ((), _RAGGED)
    x, c, one = empty(n, dtype=case.dtype), empty(*rows, case.m), empty(1)
    codes, scalar = empty(n, dtype=torch.uint8), torch.empty((), device="meta")
    if case.bits:
        stream, table, size = empty(-(-n * case.bits // 8), dtype=torch.uint8), empty(*rows, case.m), (_SIDE, _SIDE)
        square = empty(_SIDE * _SIDE * case.bits // 8, dtype=torch.uint8)
        return {
            "dequantize_packed": (stream, table.to(case.dtype), case.bits, [n]),
            "dequantize_packed_backward": (x, stream, table.to(case.dtype), case.bits, [n]),
            "lut_linear": (empty(16, _SIDE, dtype=case.dtype), square, table, empty(_SIDE), case.bits, list(size)),
            "pack_codes": (codes, case.bits),
            "packed_embedding": (empty(4096, dtype=torch.int64), square, table.to(case.dtype), case.bits, list(size)),
            "unpack_codes": (stream, case.bits, [n]),
        }[case.op]
    listed = {
        "foreach_soft_quantize": ([x] * 3, [c] * 3, [one] * 3),
        "foreach_soft_quantize_backward": ([x] * 3, [x] * 3, [c] * 3, [one] * 3),
    }
    if case.op == "quped_step":  # SGD with momentum beside the soft quantizer's gradient, Adam without
        chain, options = ("soft", (0.9, 0.0)) if case.variant == "sgd" else ("none", (0.9, 0.999))
        soft = chain == "soft"
        tensors = ([x], [x], [x] if soft else [], [x], [] if soft else [x], [c], [one] if soft else [], [one])
        return (*tensors, chain, case.variant, "l1", 0.1, 1e-4, *options, 1e-8, False, 2, False, True, 0)
    if case.op == "center_step":
        counts = empty(3, case.m, dtype=torch.int64)
        return [c], [c], [counts], [], [one], one, "l1", "counted", 10.0
    if case.op.startswith("distillation"):
        logits = empty(128, case.m, dtype=case.dtype)
        given = (logits, logits, 2.0)
        return (scalar, *given, empty(128, 5)) if case.op.endswith("backward") else given
    if case.op in listed:
        return listed[case.op]
    single: dict[str, tuple[Any, ...]] = {
        "assign": (x, c),
        "dequantize": (codes, c.to(case.dtype)),
        "dequantize_backward": (x, codes, c.to(case.dtype)),
        "distance": (x, c, "l1"),
        "distance_backward": (scalar, x, c, "l1"),
        "hard_quantize": (x, c, True),
        "hard_quantize_backward": (x, x, c, True),
        "prox_weights": (x, c, one, "l1"),
        "soft_quantize": (x, c, one),
        "soft_quantize_backward": (x, x, c, one),
    }
    return single[case.op]


_MANY = ("assign", "hard_quantize_backward", "soft_quantize", "soft_quantize_backward")  # also for 256 centers


def cases() -> list[Case]:
    """Every op with kernels: float32 by number of centers and with rows, bfloat16, codes by bits, steps by optimizer."""
    found = []
    for dtype, levels in ((torch.float32, (2, 4, 16)), (torch.bfloat16, (4,))):
        size = dtype.itemsize
        loaded = {"assign": size, "dequantize": 1, "dequantize_backward": size + 1, "distance": size}
        loaded |= {"distance_backward": size, "hard_quantize": size, "hard_quantize_backward": 2 * size}
        loaded |= {"prox_weights": size, "soft_quantize": size, "soft_quantize_backward": 2 * size}
        loaded |= {"foreach_soft_quantize": size, "foreach_soft_quantize_backward": 2 * size}
        found += [Case(op, dtype, m, wide) for op, wide in loaded.items() for m in levels]
    for op in _MANY:
        found.append(Case(op, torch.float32, 256, 8 if op.endswith("backward") else 4))
    for op in _MANY[2:]:
        found.append(Case(op, torch.float32, 4, 8 if op.endswith("backward") else 4, groups=64))
    for bits, dtype in ((2, torch.float32), (3, torch.bfloat16), (4, torch.bfloat16)):
        for op in ("dequantize_packed", "dequantize_packed_backward", "packed_embedding", "lut_linear"):
            found.append(Case(op, dtype, 1 << bits, 0, bits=bits))
    found.append(Case("lut_linear", torch.bfloat16, 16, 0, groups=_SIDE, bits=4))
    for bits in range(1, 9):
        found += [Case("pack_codes", torch.uint8, 2, 1, bits=bits)]
        found += [Case("unpack_codes", torch.uint8, 2, bits / 8 if 8 % bits == 0 else 0, bits=bits)]
    for m in (2, 4, 16):
        found += [
            Case("quped_step", torch.float32, m, 16, variant="sgd"),
            Case("quped_step", torch.float32, m, 16, variant="adam"),
        ]
    found.append(Case("center_step", torch.float32, 16, 0))
    found += [Case(op, torch.bfloat16, 1000, 0) for op in ("distillation_loss", "distillation_loss_backward")]
    return found


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
    args = _arguments(case)
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
    """One kernel of one case on one target. wide_loads: instructions in it that load 16 bytes a thread from global memory."""

    case: str
    kernel: str
    target: str
    triton: str
    num_warps: int
    registers: int
    spills: int  # bytes of stack and local memory a thread
    shared: int  # bytes a block
    wide_loads: int
    wide_loads_needed: int  # for one full tile; 0 where the kernel is not the one that reads it


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _nvidia(cubin: bytes) -> tuple[int, int, int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_tool("cuobjdump"), "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return nvidia_usage(text, text)


def nvidia_usage(numbers: str, code: str) -> tuple[int, int, int, int]:
    """Registers, bytes of stack and local memory, of shared memory, and 16-byte loads, from cuobjdump's words on a kernel."""
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", numbers)
    assert usage is not None, numbers[:400]
    registers, stack, shared, local = map(int, usage.groups())
    return registers, stack + local, shared, len(re.findall(r"\bLDG\.\S*128", code))


def _amd(assembly: str) -> tuple[int, int, int, int]:
    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", assembly)
        assert found is not None, key
        return int(found.group(1))

    spills = 4 * number("vgpr_spill_count") + number("private_segment_fixed_size")
    wide = len(re.findall(r"\b(?:global|buffer)_load_dwordx4", assembly))
    return number("vgpr_count"), spills, number("group_segment_fixed_size"), wide


def resources(case: Case, target: str) -> list[Resources]:
    """Of every kernel of the case, in the order of their launches."""
    import triton

    found = []
    for i, launch in enumerate(launches_of(case)):
        compiled = _compiled(launch, target)
        lanes = TARGETS[target][2]
        warps = launch.options["num_warps"]
        registers, spills, shared, wide = (
            _amd(compiled.asm["amdgcn"]) if target.startswith("gfx") else _nvidia(compiled.asm["cubin"])
        )
        needed = 0
        if i == 0 and case.loaded:
            tile = launch.constant("BLOCK") or launch.constant("GROUPS") * launch.constant("PER")
            needed = int(tile * case.loaded) // (lanes * warps * 16)
        shared = max(shared, compiled.metadata.shared)
        row = Resources(
            case.name, launch.name, target, triton.__version__, warps, registers, spills, shared, wide, needed
        )
        found.append(row)
    return found


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
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.resources", description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name holds this; printed, not written")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS))
    options = parser.parse_args()
    rows = []
    for case in cases():
        if options.only in case.name:
            for target in options.targets:
                for row in resources(case, target):
                    rows.append(row)
                    print(markdown([row])[-1], *objections(row), flush=True)
    if not options.only:
        written = "".join(json.dumps(asdict(row)) + "\n" for row in rows)
        (RESULTS / "triton-resources.jsonl").write_text(written, encoding="utf-8")
        (RESULTS / "triton-resources.md").write_text("\n".join(markdown(rows)) + "\n", encoding="utf-8")
    return 0 if not any(objections(row) for row in rows) else 1


def markdown(rows: Sequence[Any]) -> list[str]:
    """The table of dataclasses of one kind, a line a row under two of heading."""
    columns = [field.name for field in fields(rows[0])]
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    return lines + ["| " + " | ".join(str(getattr(row, name)) for name in columns) + " |" for row in rows]


if __name__ == "__main__":
    raise SystemExit(main())
