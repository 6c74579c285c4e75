"""The native CPU modules called directly, so that every instruction set is tested where only the widest would be loaded."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from qupedkern.ops._define import OPS, mutated, tensors_of
from qupedkern.testing.harness import each, unshared

cpp = importlib.import_module("qupedkern.backends.cpp")
BUILT: list[str] = cpp._info().get("cpu", [])
RUNS_HERE = cpp._import("baseline").supported_instruction_sets() if BUILT else []
ISAS = [isa for isa in BUILT if isa in RUNS_HERE]
NEEDS_A_BUILD = pytest.mark.skipif(not ISAS, reason=f"the native CPU kernels are not here: {cpp.describe()}")

HALVES = [torch.bfloat16, torch.float16]
FLOATS = [torch.float32, *HALVES]


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, 0xA5 if dtype == torch.uint8 else 12345.0, dtype=dtype)


def call(module: ModuleType, op: str, *args: Any, threads: int = 1) -> tuple[Tensor, ...]:
    """Run one kernel on poisoned outputs shaped by the op's own allocator; what it writes in place, in copies, comes last."""
    args = unshared(op, args)
    made = OPS[op].allocate(*args)
    outputs = made if isinstance(made, tuple) else (made,) if made is not None else ()
    outputs = tuple(each(lambda out: poisoned(*out.shape, dtype=out.dtype), out) for out in outputs)
    getattr(module, op)(threads, *map(cpp._pass, args), *map(cpp._pass, outputs))
    return (*tensors_of(outputs), *tensors_of([args[i] for i in mutated(op)]))


def values(n: int, centers: Tensor, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Weights around the centers, with some exactly on a center, on a midpoint, infinite and NaN (all but one size)."""
    generator = torch.Generator().manual_seed(seed)
    groups = centers.reshape(-1, centers.shape[-1])
    x = torch.randn(groups.shape[0], n, generator=generator) * groups.abs().amax()
    for row, c in zip(x, groups, strict=True):
        special = torch.cat([c, 0.5 * c[:-1] + 0.5 * c[1:], torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0])])
        row[1 : 1 + len(special)] = special[: max(n - 1, 0)]
    return x.reshape(-1).to(dtype)


def sorted_centers(m: int, groups: int | None = None, seed: int = 0) -> Tensor:
    shape = (m,) if groups is None else (groups, m)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).sort(-1).values


def reference(op: str, *args: Any) -> tuple[Tensor, ...]:
    out = OPS[op].reference(*args)
    return out if isinstance(out, tuple) else (out,)


def upcast(*args: Any) -> tuple[Any, ...]:
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, any NaN equal to any other."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    nan = a.isnan() & b.isnan() if a.is_floating_point() else torch.zeros(a.shape, dtype=torch.bool)
    return a.dtype == b.dtype and bool(((a.view(integer) == b.view(integer)) | nan).all())
