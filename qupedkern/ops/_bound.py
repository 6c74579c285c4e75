"""Bound: an op that a layer calls with the same tensors every time; what follows from them alone is found once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qupedkern.backends import EAGER, _Forced, module, select

from ._define import OPS, call, output_hook, watched


class Bound:
    """call(name, *args) for an op with one output. The choice of backend and the arguments' native form are kept while the
    tensors stay where and what they are and use_backend asks for no other backend (the environment is for a whole process and
    read when they are first seen): a third of the cost of a small call. Values are read anew.

    A copy starts afresh, so that it never knows the tensors of another.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._kept: tuple[list[Any], Callable[[Tensor], None]] | None = None

    def __deepcopy__(self, memo: Any) -> Bound:
        return Bound(self.name)

    def __reduce__(self) -> tuple[Any, ...]:
        return Bound, (self.name,)

    def __call__(self, *args: Any) -> Tensor:
        if torch.compiler.is_compiling() or watched(args):
            return call(self.name, *args)
        key: list[Any] = [_Forced.name]
        for value in args:
            if isinstance(value, Tensor):
                key += (value.data_ptr(), value.shape, value.dtype, value.is_contiguous())
            else:
                key.append(value)
        kept = self._kept
        if kept is None or kept[0] != key:
            launch = self._bind(args)
            if launch is None:
                return call(self.name, *args)
            kept = self._kept = (key, launch)
        output: Tensor = OPS[self.name].allocate(*args)
        if output_hook.fill is not None:
            output_hook.fill(output)
        kept[1](output)
        return output

    def _bind(self, args: tuple[Any, ...]) -> Callable[[Tensor], None] | None:
        """None where the backend cannot keep these arguments."""
        name = select(self.name, args)
        bind = None if name == EAGER else getattr(module(name), "bind", None)
        contiguous = all(a.is_contiguous() for a in args if isinstance(a, Tensor))
        return bind(self.name, args) if bind is not None and contiguous else None
