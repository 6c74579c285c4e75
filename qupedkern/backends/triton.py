"""The Triton kernels, qupedkern/kernels/<op>.py: on NVIDIA GPUs and, through the same sources, on AMD's (torch calls both "cuda").

With TRITON_INTERPRET=1 in the environment Triton runs its kernels on CPU tensors, one program after another, slowly: that is
for tests, on machines without a GPU. It must be set before the first call, and this backend must then be forced on CPU
tensors (use_backend or QUPEDKERN_BACKEND); it is never chosen for them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ._invariance import batch_invariant

NAME = "triton"
_INTERPRET = "TRITON_INTERPRET"
_KERNELS = Path(__file__).resolve().parent.parent / "kernels"
_LEAST = (8, 0)  # compute capability: bfloat16 in hardware
# Ops that have no kernel here by design, and why.
COMPOSED = {
    "init_centers": "has no kernel by design: called once a tensor, it is made of torch calls, its exact k-means on the host"
}


def interpreted() -> bool:
    """Whether Triton was asked to interpret its kernels, by its own reading of the variable."""
    return os.environ.get(_INTERPRET, "").lower() in ("1", "true", "yes", "on", "y")


DEVICES = ("cuda", "cpu") if interpreted() else ("cuda",)


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why these kernels cannot run on this machine, None where they can. One sentence."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        if built is None:
            return f"torch {torch.__version__} was built for the CPU alone; install one for your GPU"
        return f"torch {torch.__version__} finds no GPU; {_INTERPRET}=1 runs the kernels on CPU tensors, for tests"
    if torch.version.hip is None and torch.cuda.get_device_capability() < _LEAST:
        major, minor = torch.cuda.get_device_capability()
        name = torch.cuda.get_device_name()
        return f"the kernels need compute capability {_LEAST[0]}.{_LEAST[1]}, {name} has {major}.{minor}"
    return None


@cache
def _module(op: str) -> ModuleType | None:
    """The file of an op, or of the op it is the gradient of; None where there is none. One that fails to import raises."""
    stem = op.removesuffix("_backward")
    if not (_KERNELS / f"{stem}.py").is_file():
        return None
    found = importlib.import_module(f"qupedkern.kernels.{stem}")
    if hasattr(found, "set_batch_invariant"):
        batch_invariant.tell(found.set_batch_invariant)
    return found


@cache
def _launcher(op: str) -> Callable[..., None]:
    return getattr(_module(op), op)


@cache
def _unsupported(op: str) -> Callable[..., str | None] | None:
    return getattr(_module(op), f"{op}_unsupported", None)


@lru_cache(maxsize=1)
def ops() -> tuple[str, ...]:
    """Ops that have a kernel here: the functions of that name in the files of qupedkern/kernels."""
    if unavailable() is not None:
        return ()
    stems = sorted(path.stem for path in _KERNELS.glob("*.py") if not path.stem.startswith("_"))
    names = (name for stem in stems for name in (stem, f"{stem}_backward"))
    return tuple(name for name in names if hasattr(_module(name), name))


def _tensors(args: tuple[Any, ...]) -> Iterator[Tensor]:
    for value in args:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list):
            yield from _tensors(tuple(value))


def refusal(op: str, args: tuple[Any, ...]) -> str | None:
    """Why the kernel of this op cannot take these arguments, from type, shape and device alone; None where it can."""
    for tensor in _tensors(args):
        if tensor.device.type not in DEVICES:
            return f"runs on {' and '.join(DEVICES)} tensors, got one on {tensor.device}"
        if tensor.dtype == torch.float64:
            return "float64 is left to eager"
    objection = _unsupported(op)
    return None if objection is None else objection(*args)


def _on_device_of(args: tuple[Any, ...]) -> AbstractContextManager[Any]:
    """Triton launches on torch's current device, which need not be the tensors'."""
    first = next(_tensors(args), None)
    return torch.cuda.device(first.device) if first is not None and first.is_cuda else nullcontext()


def launch(op: str, args: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
    """Start the kernels on torch's current stream, on contiguous tensors they do not refuse; they write all of the outputs.

    Codes that are too large are clamped: looking at them would make the device wait.
    """
    with _on_device_of(args):
        _launcher(op)(*args, *outputs)


def describe() -> str:
    """Triton's version and the GPU, or why there is none. Never raises."""
    reason = unavailable()
    if reason is not None:
        return reason
    version = importlib.import_module("triton").__version__
    if interpreted():
        return f"Triton {version}, interpreted on the CPU ({_INTERPRET}=1)"
    return f"Triton {version} on {torch.cuda.get_device_name()}"
