"""Which backend runs an op: the first in ORDER that is there and does not object; eager, the reference itself, is always last.

A backend is one module with NAME, DEVICES, unavailable(), ops(), refusal(op, args), launch(op, args, outputs) and describe().
Adding one is that file and a line in ORDER.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import TracebackType
from typing import Any, Protocol, cast

import torch

from qupedkern.kernels._crossovers import WRITTEN_OUT

from ._invariance import batch_invariant as batch_invariant

# Device type -> backends tried before eager. torch calls AMD's GPUs "cuda" too.
ORDER: dict[str, tuple[str, ...]] = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}
# (device type, op) -> the order for this op, where it is another, and the figures it rests on. Where several backends have a
# kernel the faster one comes first; what is not here is not measured yet.
MEASURED: dict[tuple[str, str], tuple[tuple[str, ...], str]] = {}
EAGER = "eager"
_ENVIRONMENT = "QUPEDKERN_BACKEND"


class Backend(Protocol):
    """What a module in this folder provides. Nothing is loaded before the first call that needs it."""

    NAME: str
    DEVICES: tuple[str, ...]

    def unavailable(self) -> str | None: ...
    def ops(self) -> Collection[str]: ...
    def refusal(self, op: str, args: tuple[Any, ...]) -> str | None: ...
    def launch(self, op: str, args: tuple[Any, ...], outputs: tuple[Any, ...]) -> None: ...
    def describe(self) -> str: ...


@dataclass(frozen=True)
class Choice:
    """What would run for one call, and why the other backends would not."""

    op: str
    backend: str
    forced: bool = False
    reasons: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        how = "forced" if self.forced else "chosen"
        others = "; ".join(f"{name}: {reason}" for name, reason in self.reasons.items())
        return f"{self.op} runs on '{self.backend}' ({how})" + (f"; {others}" if others else "")


def _is_written_out(op: str, args: tuple[Any, ...]) -> bool:
    """Whether this is a lut_linear of so many rows, with the batch not pinned."""
    if op != "lut_linear" or batch_invariant.pinned:
        return False
    x = args[0]
    return x.dtype in WRITTEN_OUT and math.prod(x.shape[:-1]) >= WRITTEN_OUT[x.dtype]


def order_of(device: str, op: str, args: tuple[Any, ...] = ()) -> tuple[str, ...]:
    """Backends in the order in which they are tried before eager."""
    order = MEASURED[device, op][0] if (device, op) in MEASURED else ORDER.get(device, ())
    if device == "cuda" and args and _is_written_out(op, args):  # Triton's kernel does that
        return tuple(sorted(order, key=lambda name: name != "triton"))
    return order


def names() -> tuple[str, ...]:
    """Every backend this version knows, eager last."""
    known = dict.fromkeys(name for order in ORDER.values() for name in order)
    return (*known, EAGER)


@cache
def module(name: str) -> Backend:
    return cast(Backend, importlib.import_module(f"qupedkern.backends.{name}"))


def _checked(name: str | None, source: str) -> str | None:
    if name is not None and name not in names():
        raise ValueError(f"{source}: the backend must be one of {', '.join(names())}, got {name!r}")
    return name


class _Forced:
    """The one piece of state: the backend asked for by use_backend, seen by every thread (autograd has its own)."""

    name: str | None = None


class use_backend:
    """Force a backend for every op: `use_backend("eager")` from here on, `with use_backend("cpp"):` for a block.

    name: "eager", "cpp", "cuda", "triton" (further backends as they are added), or None, which leaves the choice to the
    environment. A forced backend raises RuntimeError where its kernel refuses the arguments; an op without a kernel there
    runs eager. The environment variable QUPEDKERN_BACKEND does the same for a whole process; a name given here overrules it.
    """

    def __init__(self, name: str | None) -> None:
        self._name, self._before = _checked(name, "use_backend"), _Forced.name
        _Forced.name = self._name

    def __enter__(self) -> use_backend:
        if _Forced.name != self._name:  # made earlier, entered now
            self._before, _Forced.name = _Forced.name, self._name
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _Forced.name = self._before


def forced() -> str | None:
    """The backend asked for by use_backend or QUPEDKERN_BACKEND, or None."""
    if _Forced.name is not None:
        return _Forced.name
    return _checked(os.environ.get(_ENVIRONMENT) or None, _ENVIRONMENT)


def _remedy() -> str:
    return f"unset {_ENVIRONMENT} to let one be picked" if _Forced.name is None else "use_backend(None) picks one"


def _device(args: tuple[Any, ...]) -> str:
    for value in args:
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, torch.Tensor):
            return first.device.type
    return "cpu"


def _objection(name: str, op: str, args: tuple[Any, ...], device: str) -> str | None:
    backend = module(name)
    if device not in backend.DEVICES:
        return f"runs on {' and '.join(backend.DEVICES)} tensors, got {device}"
    return backend.unavailable() or backend.refusal(op, args)


def has_kernel(name: str, op: str) -> bool:
    """Whether the backend has a kernel of its own for this op, on a machine where it runs."""
    return name == EAGER or (module(name).unavailable() is None and op in module(name).ops())


def select(op: str, args: tuple[Any, ...]) -> str:
    """The backend for this call. Raises RuntimeError with the reason where a forced one cannot take it."""
    device = _device(args)
    wanted = forced()
    if wanted is not None:
        if wanted == EAGER:
            return EAGER
        missing = module(wanted).unavailable()
        if missing is None and op not in module(wanted).ops():
            return EAGER
        reason = missing or _objection(wanted, op, args, device)
        if reason is None:
            return wanted
        raise RuntimeError(f"{op}: backend {wanted!r} was requested but cannot run: {reason}; {_remedy()}")
    for name in order_of(device, op, args):
        backend = module(name)  # has_kernel and _objection in one: small calls are counted in microseconds
        runs = backend.unavailable() is None and op in backend.ops() and device in backend.DEVICES
        if runs and backend.refusal(op, args) is None:
            return name
    return EAGER


_DIRECT: dict[tuple[str, str | None], Callable[..., None] | None] = {}


def direct(op: str) -> Callable[..., None] | None:
    """The kernel CPU tensors get, for f(*args, *outputs) without select; None where that backend has no such calls.

    It checks its arguments, and raises ValueError before it writes where select would look further. For calls so small that
    finding the kernel would cost more than running it: the environment is read at an op's first one.
    """
    key = op, _Forced.name
    if key not in _DIRECT:
        wanted = forced()
        name = next((n for n in ORDER["cpu"] if has_kernel(n, op)), EAGER) if wanted is None else wanted
        backend = module(name) if name != EAGER and has_kernel(name, op) else None
        _DIRECT[key] = backend.direct(op) if backend is not None and hasattr(backend, "direct") else None
    return _DIRECT[key]


def why_not(name: str, op: str, args: tuple[Any, ...]) -> str | None:
    """Why this backend would not run this call; None where it could."""
    if name == EAGER:
        return None
    missing = module(name).unavailable()
    if missing is None and op not in module(name).ops():
        return getattr(module(name), "COMPOSED", {}).get(op, "has no kernel for this op")
    return missing or _objection(name, op, args, _device(args))
