"""The native call: a kernel of the loaded module with its arguments prepared, without the torch op around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qupedkern.backends import cpp


def available(op: str) -> bool:
    """Whether this op has a native kernel here; tables show a dash for the native call of one that has none."""
    return op in cpp.ops()


def native_call(op: str, args: tuple[Any, ...], outputs: tuple[Any, ...]) -> Callable[[], None]:
    """A call of the kernel on these arguments and outputs with torch's present number of threads.

    RuntimeError where the kernel does not run here or refuses the arguments.
    """
    why = cpp.unavailable() or (None if available(op) else f"{op} has no native kernel") or cpp.refusal(op, args)
    if why is not None:
        raise RuntimeError(f"the native call of {op} cannot be timed: {why}")
    function, threads = cpp._kernels()[op][0], torch.get_num_threads()
    prepared = [cpp._pass(value) for value in (*args, *outputs)]

    def run() -> None:
        function(threads, *prepared)

    run.tensors = (args, outputs)  # type: ignore[attr-defined]  # kept alive with the addresses
    return run
