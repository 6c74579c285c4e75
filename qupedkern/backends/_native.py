"""What the backends of compiled modules share: the install's record, how arguments are passed, and refusals from the modules."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

INFO = Path(__file__).resolve().parent.parent / "_build_info.json"
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3, torch.int64: 4}  # csrc/tensor_view.h
Specification = tuple[tuple[str, frozenset[torch.dtype]], ...]  # name and types of each tensor argument, outputs last
NOT_INSTALLED = "not built: qupedkern was not installed (no _build_info.json); run pip install -e . in its source tree"


@lru_cache(maxsize=1)
def info() -> dict[str, Any]:
    """What the install recorded; empty where the package runs from a source tree that was never installed."""
    if not INFO.is_file():
        return {}
    return json.loads(INFO.read_text(encoding="utf-8"))


def kernels_of(module: ModuleType) -> Mapping[str, tuple[Callable[..., None], Specification]]:
    """Each op of a module: its native function, (context, *arguments, *outputs), and what its tensor arguments may be."""
    types = {code: dtype for dtype, code in CODES.items()}
    reads_tensors = hasattr(module, "read_tensors") and module.read_tensors(torch.Tensor)

    def function(op: str) -> Callable[..., None]:
        native = getattr(module, op)
        return native if reads_tensors else lambda context, *values: native(context, *map(passed, values))

    return {
        op: (function(op), tuple((name, frozenset(types[code] for code in codes)) for name, codes in tensors))
        for op, tensors in module.KERNELS.items()
    }


def refusal(specification: Specification, args: tuple[Any, ...], device: str) -> str | None:
    """Why a kernel cannot take these arguments, from type and device alone; None where it can."""
    specifications = iter(specification)
    for value in args:
        if value is None:  # only a tensor may be left out
            next(specifications)
        elif isinstance(value, Tensor):
            sentence = _objection(value, *next(specifications), device)
            if sentence is not None:
                return sentence
        elif isinstance(value, list) and not (value and isinstance(value[0], int)):
            name, allowed = next(specifications)
            devices = {each.type for each in set(map(_device_of, value))}
            if not (allowed.issuperset(map(_dtype_of, value)) and devices <= {device}):
                return next(filter(None, (_objection(t, f"{name}[{i}]", allowed, device) for i, t in enumerate(value))))
    return None


_dtype_of, _device_of = attrgetter("dtype"), attrgetter("device")


def _objection(tensor: Tensor, name: str, allowed: frozenset[torch.dtype], device: str) -> str | None:
    if tensor.dtype not in allowed:
        names = " or ".join(_short(dtype) for dtype in CODES if dtype in allowed)
        return f"{name} must be {names}, got {_short(tensor.dtype)}"
    if tensor.device.type != device:
        return f"{name} must be on the {device.upper()}, got {tensor.device}"
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def passed(value: Any) -> Any:
    """A tensor as (data_ptr, sizes, dtype code), a list of tensors as a list of these; anything else as it is."""
    if not isinstance(value, Tensor):
        return (
            [passed(v) for v in value] if isinstance(value, list) and value and isinstance(value[0], Tensor) else value
        )
    if not value.is_contiguous():
        raise ValueError(
            f"native kernels need contiguous tensors, got strides {value.stride()} for shape {tuple(value.shape)}"
        )
    if value.dtype not in CODES:
        raise ValueError(f"native kernels need {', '.join(map(_short, CODES))} tensors, got {_short(value.dtype)}")
    return value.data_ptr(), value.shape, CODES[value.dtype]
