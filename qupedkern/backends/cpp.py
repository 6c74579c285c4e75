"""The native CPU kernels: csrc/cpu built once per instruction set; the widest that runs here is loaded at first use.

QUPEDKERN_ISA=baseline|avx2|avx512, read at first use, forces one. What the install built, or why it did not, stands in
qupedkern/_build_info.json.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch

from . import _native
from ._invariance import batch_invariant

NAME = "cpp"
DEVICES = ("cpu",)

_ISAS = ("baseline", "avx2", "avx512")  # widest last
_ENVIRONMENT = "QUPEDKERN_ISA"
_info, _pass = _native.info, _native.passed


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
        reason = _native.NOT_INSTALLED
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
def _kernels() -> Mapping[str, tuple[Callable[..., None], _native.Specification]]:
    """Each op: its native function, (threads, *arguments, *outputs), and what its tensor arguments may be."""
    return _native.kernels_of(_loaded()[1])


def ops() -> Collection[str]:
    """Ops that have a kernel here."""
    return _kernels().keys() if unavailable() is None else ()


def refusal(op: str, args: tuple[Any, ...]) -> str | None:
    """Why the kernel of this op cannot take these arguments, from type and device alone; None where it can."""
    return _native.refusal(_kernels()[op][1], args, "cpu")


def launch(op: str, args: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
    """Run the kernel on contiguous CPU tensors it does not refuse; writes every element of the outputs.

    Uses torch.get_num_threads() threads; the bits of the result do not depend on it. ValueError for codes out of range.
    """
    _kernels()[op][0](torch.get_num_threads(), *args, *outputs)


def direct(op: str) -> Callable[..., None]:
    """launch as f(*args, *outputs), on arguments nobody has checked: ValueError, before it writes, for what it cannot take."""
    function, threads = _kernels()[op][0], torch.get_num_threads
    return lambda *values: function(threads(), *values)


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
