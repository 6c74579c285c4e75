"""A device that is not there: tensors that say they are on it, compute on the CPU, and refuse what a GPU refuses.

So a run "on" it must give the CPU's bits, and a tensor that was left on the CPU is an error where it meets one that was not.
"""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "lazy:0"  # of a type that every torch knows, with a guard for autograd and no device behind it
DEVICE = torch.device(NAME)
_aten = torch.ops.aten
_DEVICE_OF = torch.ops.prim.device.default
_MOVES = {_aten._to_copy.default, _aten.copy_.default}  # what may be given tensors of two devices


class Elsewhere(Tensor):
    """`values` on the CPU, behind a tensor of their form that has no storage."""

    values: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor) -> Elsewhere:
        with torch.inference_mode(False):  # a view of an ordinary tensor is one, and shares its version counter
            form = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device="meta")
            new = Tensor._make_subclass(cls, form, False, dispatch_device=True, device_for_backend_keys=DEVICE)  # type: ignore[attr-defined]
        new.values = values
        return new

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.values})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class Machine(TorchDispatchMode):
    """While it is entered, the device is there. ran: the ops computed on it, by name; here: those on CPU tensors alone."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: Counter[str] = Counter()
        self.here: Counter[str] = Counter()
        self._patches: list[Any] = []

    def __enter__(self) -> Machine:
        self._patches.append(
            mock.patch.object(torch, "is_autocast_enabled", return_value=False)
        )  # it raises for "lazy"
        self._patches[-1].start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.pop().stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE_OF:
            return _compute(func, args, {})
        if torch.is_inference_mode_enabled():  # in which ops that are made of others arrive whole
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        there = any(isinstance(value, Elsewhere) for value in _pytree.tree_leaves((args, kwargs)))
        (self.ran if there else self.here)[func.overloadpacket.__name__] += 1
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func is _DEVICE_OF:
        return DEVICE
    given = [value for value in _pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    there = any(isinstance(value, Elsewhere) for value in given)
    left = [value for value in given if not isinstance(value, Elsewhere) and value.dim() > 0]  # a scalar is taken along
    if there and left and func not in _MOVES:
        raise RuntimeError(f"{func}: needs all tensors on {DEVICE}, got {tuple(left[0].shape)} on {left[0].device}")
    wanted = kwargs.get("device")
    if wanted is not None:
        there = torch.device(wanted).type == DEVICE.type
        kwargs = {**kwargs, "device": "cpu"}
    plain, named = _pytree.tree_map_only(Elsewhere, lambda tensor: tensor.values, (args, kwargs))
    known = {id(tensor.values if isinstance(tensor, Elsewhere) else tensor): tensor for tensor in given}

    def placed(tensor: Tensor) -> Tensor:  # what was written is given back as itself
        return known[id(tensor)] if id(tensor) in known else Elsewhere(tensor) if there else tensor

    return _pytree.tree_map_only(Tensor, placed, func(*plain, **named))
