"""The CUDA kernels: csrc/cuda built by nvcc into one module, for NVIDIA GPUs from compute capability 8.0 on.

QUPEDKERN_CUDA_EMULATED=FILE, read on import, names a build of the same sources for the CPU (tests/cuda_emulator), which runs them
on CPU tensors, slowly: that is for tests, on machines without a GPU. The backend must then be forced; it is never chosen.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import platform
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _native

NAME = "cuda"
_EMULATED = os.environ.get("QUPEDKERN_CUDA_EMULATED") or None
DEVICES = ("cpu",) if _EMULATED else ("cuda",)
_MODULE = "qupedkern._C_cuda"
_LEAST = (8, 0)  # compute capability of the oldest machine code in the module


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why these kernels cannot run on this machine, None where they can. One sentence. ImportError where the module is broken."""
    if _EMULATED:
        return None
    info = _native.info()
    if not info:
        return _native.NOT_INSTALLED
    if not info["cuda"]:
        return f"not built: {info['cuda_note']}"
    if importlib.util.find_spec(_MODULE) is None:
        python = platform.python_version()
        return f"not built for Python {python}: the install was made with {info['python']}; install again"
    if torch.version.hip is not None:
        return f"the kernels are for NVIDIA GPUs, torch {torch.__version__} was built for AMD's"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built for the CPU alone; install one for your GPU"
    problem = _loaded().driver_problem()
    if problem:
        return f"the CUDA runtime finds no GPU to use: {problem}"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU"
    capability = torch.cuda.get_device_capability()
    if capability < _LEAST:
        name = torch.cuda.get_device_name()
        return (
            f"the kernels need compute capability {_LEAST[0]}.{_LEAST[1]}, {name} has {capability[0]}.{capability[1]}"
        )
    return None


@lru_cache(maxsize=1)
def _loaded() -> ModuleType:
    try:
        if _EMULATED:
            loader = importlib.machinery.ExtensionFileLoader("_C_cuda_emulated", _EMULATED)
            spec = importlib.util.spec_from_loader(loader.name, loader)
            assert spec is not None
            module = importlib.util.module_from_spec(spec)
            loader.exec_module(module)
            return module
        return importlib.import_module(_MODULE)
    except ImportError as error:
        raise ImportError(
            f"qupedkern: the CUDA module was built but does not load: {error}; install qupedkern again"
        ) from error


@lru_cache(maxsize=1)
def _kernels() -> Mapping[str, tuple[Callable[..., None], _native.Specification]]:
    return _native.kernels_of(_loaded())


def ops() -> Collection[str]:
    """Ops that have a kernel here."""
    return _kernels().keys() if unavailable() is None else ()


def refusal(op: str, args: tuple[Any, ...]) -> str | None:
    """Why the kernel of this op cannot take these arguments, from type and device alone; None where it can."""
    return _native.refusal(_kernels()[op][1], args, DEVICES[0])


def _first(args: tuple[Any, ...]) -> Tensor | None:
    for value in args:
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, Tensor):
            return value
    return None


@lru_cache(maxsize=64)
def _workspace_bytes(op: str) -> Callable[..., int] | None:
    return getattr(_loaded(), f"{op}_workspace", None)


def launch(op: str, args: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
    """Start the kernels on torch's current stream, on contiguous tensors they do not refuse; they write all of the outputs.

    Codes that are too large are clamped: looking at them would make the device wait. Scratch memory is torch's, so a call can be
    captured in a graph.
    """
    first = _first(args)
    if first is None:
        return  # lists without a tensor
    stream = (0, 0)
    if first.is_cuda:
        index = first.device.index
        stream = (index, torch.cuda.current_stream(index).cuda_stream)
    given = [_native.passed(value) for value in args]
    written = [_native.passed(value) for value in outputs]
    bytes_of = _workspace_bytes(op)
    if bytes_of is not None:
        scratch = torch.empty(bytes_of(*given), dtype=torch.uint8, device=first.device)
        written.append(_native.passed(scratch))
    _kernels()[op][0](stream, *given, *written)


def describe() -> str:
    """The GPU and what was built, or why there is none. Never raises."""
    try:
        reason = unavailable()
    except ImportError as error:
        return str(error)
    if reason is not None:
        return reason
    if _EMULATED:
        return "emulated on the CPU (QUPEDKERN_CUDA_EMULATED)"
    return f"nvcc {', '.join(_native.info()['cuda'])} on {torch.cuda.get_device_name()}"
