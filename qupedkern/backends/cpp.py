"""The native CPU kernels: csrc/cpu built once per instruction set; the widest that runs here is loaded at first use.

QUPEDKERN_ISA=baseline|avx2|avx512, read at first use, forces one. What the install built, or why it did not, stands in
qupedkern/_build_info.json.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
from collections.abc import Callable, Collection
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ._invariance import batch_invariant

NAME = "cpp"
DEVICES = ("cpu",)

_ISAS = ("baseline", "avx2", "avx512")  # widest last
_ENVIRONMENT = "QUPEDKERN_ISA"
_INFO = Path(__file__).resolve().parent.parent / "_build_info.json"
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3, torch.int64: 4}  # csrc/tensor_view.h
_Specification = tuple[tuple[str, frozenset[torch.dtype]], ...]  # name and types of each tensor argument, outputs last


@lru_cache(maxsize=1)
def _info() -> dict[str, Any]:
    """What the install recorded; empty where the package runs from a source tree that was never installed."""
    if not _INFO.is_file():
        return {}
    return json.loads(_INFO.read_text(encoding="utf-8"))


def _module_name(isa: str) -> str:
    return f"qupedkern._C_cpu_{isa}"


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why these kernels cannot run on this machine, None where they can. One sentence.

    Raises, rather than let eager take over unnoticed, where what was asked for or built is broken: ValueError for an
    unknown QUPEDKERN_ISA, RuntimeError for one that was not built or does not run here, ImportError for a module that
    fails to load.
    """
    info = _info()
    if not info:
        reason = "not built: qupedkern was not installed (no _build_info.json); run pip install -e . in its source tree"
    elif not info["cpu"]:
        reason = f"not built: {info['cpu_note']}"
    elif all(importlib.util.find_spec(_module_name(isa)) is None for isa in info["cpu"]):
        python = platform.python_version()
        reason = f"not built for Python {python}: the install was made with {info['python']}; install again"
    else:
        _kernels()
        return None
    if _forced() is not None:
        raise RuntimeError(f"{_ENVIRONMENT}={_forced()}: the native CPU kernels cannot run: {reason}")
    return reason


def _forced() -> str | None:
    name = os.environ.get(_ENVIRONMENT) or None
    if name is not None and name not in _ISAS:
        raise ValueError(f"{_ENVIRONMENT} must be one of {', '.join(_ISAS)}, got {name!r}")
    return name


def _import(isa: str) -> ModuleType:
    try:
        return importlib.import_module(_module_name(isa))
    except ImportError as error:
        raise ImportError(
            f"qupedkern: the native module for {isa} was built but does not load: {error}; install qupedkern again"
        ) from error


@lru_cache(maxsize=1)
def _loaded() -> tuple[str, ModuleType]:
    """The instruction set in use and its module."""
    built = _info()["cpu"]
    supported = _import("baseline").supported_instruction_sets()
    forced = _forced()
    if forced is None:
        isa = next(name for name in reversed(_ISAS) if name in built and name in supported)
    elif forced not in built:
        raise RuntimeError(
            f"{_ENVIRONMENT}={forced}: this install built {', '.join(built)} only; choose one of those or build again"
        )
    elif forced not in supported:
        raise RuntimeError(
            f"{_ENVIRONMENT}={forced}: this processor runs {', '.join(supported)} only; choose one of those"
        )
    else:
        isa = forced
    chosen = _import(isa)
    batch_invariant.tell(chosen.set_batch_invariant)
    return isa, chosen


@lru_cache(maxsize=1)
def _kernels() -> dict[str, tuple[Any, _Specification]]:
    """Each op: its native function and what its tensor arguments may be."""
    _, module = _loaded()
    types = {code: dtype for dtype, code in _CODES.items()}
    return {
        op: (getattr(module, op), tuple((name, frozenset(types[code] for code in codes)) for name, codes in tensors))
        for op, tensors in module.KERNELS.items()
    }


def ops() -> Collection[str]:
    """Ops that have a kernel here."""
    return _kernels().keys() if unavailable() is None else ()


def refusal(op: str, args: tuple[Any, ...]) -> str | None:
    """Why the kernel of this op cannot take these arguments, from type and device alone; None where it can."""
    specifications = iter(_kernels()[op][1])
    for value in args:
        if value is None:  # only a tensor may be left out
            next(specifications)
        elif isinstance(value, Tensor):
            sentence = _objection(value, *next(specifications))
            if sentence is not None:
                return sentence
        elif isinstance(value, list) and not (value and isinstance(value[0], int)):
            name, allowed = next(specifications)
            if not all(tensor.dtype in allowed and tensor.is_cpu for tensor in value):
                return next(filter(None, (_objection(t, f"{name}[{i}]", allowed) for i, t in enumerate(value))))
    return None


def _objection(tensor: Tensor, name: str, allowed: frozenset[torch.dtype]) -> str | None:
    if tensor.dtype not in allowed:
        names = " or ".join(_short(dtype) for dtype in _CODES if dtype in allowed)
        return f"{name} must be {names}, got {_short(tensor.dtype)}"
    if not tensor.is_cpu:
        return f"{name} must be on the CPU, got {tensor.device}"
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _pass(value: Any) -> Any:
    """A tensor as (data_ptr, sizes, dtype code), a list of tensors as a list of these; anything else as it is."""
    if not isinstance(value, Tensor):
        return (
            [_pass(v) for v in value] if isinstance(value, list) and value and isinstance(value[0], Tensor) else value
        )
    if not value.is_contiguous():
        raise ValueError(
            f"native kernels need contiguous tensors, got strides {value.stride()} for shape {tuple(value.shape)}"
        )
    return value.data_ptr(), value.shape, _CODES[value.dtype]


def launch(op: str, args: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
    """Run the kernel on contiguous CPU tensors it does not refuse; writes every element of the outputs.

    Uses torch.get_num_threads() threads; the bits of the result do not depend on it. ValueError for codes out of range.
    """
    _kernels()[op][0](torch.get_num_threads(), *map(_pass, args), *map(_pass, outputs))


def bind(op: str, args: tuple[Any, ...]) -> Callable[[Tensor], None]:
    """launch for arguments that stay where they are and an op with one output; the caller keeps them alive."""
    run, passed = _kernels()[op][0], tuple(map(_pass, args))
    return lambda output: run(torch.get_num_threads(), *passed, _pass(output))


def describe() -> str:
    """The instruction set in use and what was built, or why there is none. Never raises."""
    try:
        reason = unavailable()
        if reason is not None:
            return reason
        info = _info()
        return f"{_loaded()[0]} (built: {', '.join(info['cpu'])}; {info['compiler']})"
    except (ImportError, RuntimeError, ValueError) as error:
        return str(error)
