"""Checks of arguments, from shape, type and device alone. Each raises one sentence: op, what was needed, what came."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MAX_LEVELS = 256  # codes are uint8


def check_tensor(op: str, name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    return value


def check_float(op: str, name: str, value: Any) -> Tensor:
    tensor = check_tensor(op, name, value)
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got layout {tensor.layout}")
    return tensor


def check_codes(op: str, name: str, value: Any) -> Tensor:
    tensor = check_tensor(op, name, value)
    if tensor.dtype != torch.uint8:
        raise TypeError(f"{op}: {name} must be uint8, got {tensor.dtype}")
    return tensor


def check_same_device(op: str, **tensors: Tensor) -> None:
    (first, reference), *rest = tensors.items()
    for name, tensor in rest:
        if tensor.device != reference.device:
            raise ValueError(
                f"{op}: {name} must be on the device of {first}, {reference.device}, got {tensor.device}; move one of them"
            )


def check_centers(op: str, centers: Any, numel: int, what: str = "x", name: str = "centers") -> Tensor:
    """Shape of centers: [m] or [G, m], m = 2..256, G dividing the number of elements."""
    c = check_float(op, name, centers)
    if c.dim() not in (1, 2) or not 2 <= c.shape[-1] <= MAX_LEVELS or c.numel() == 0:
        raise ValueError(
            f"{op}: {name} must be [m] or [G, m] with m from 2 to {MAX_LEVELS}, got shape {tuple(c.shape)}"
        )
    groups = 1 if c.dim() == 1 else c.shape[0]
    if numel % groups:
        raise ValueError(f"{op}: {name} has {groups} rows, which must divide the {numel} elements of {what} evenly")
    return c


def check_x_centers(op: str, x: Any, centers: Any) -> tuple[Tensor, Tensor]:
    """Contiguous x and centers, the latter in the compute type; every rule about the pair."""
    x = check_float(op, "x", x)
    c = check_centers(op, centers, x.numel())
    check_same_device(op, x=x, centers=c)
    return x.contiguous(), check_center_type(op, x, c)


def check_center_type(op: str, x: Tensor, c: Tensor) -> Tensor:
    """Contiguous centers in the compute type: those of a half x may be float32, all others must have its type."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    if c.dtype != x.dtype and not (half and c.dtype == torch.float32):
        allowed = f"{x.dtype} or torch.float32" if half else f"{x.dtype}, the type of x"
        raise TypeError(f"{op}: centers must be {allowed}, got {c.dtype}")
    return (c.float() if half else c).contiguous()


def check_per_row(op: str, name: str, value: Any, x: Tensor, centers: Tensor) -> Tensor:
    """A number, or a tensor with one entry or one per row of centers -> [1] or [G] in the type of centers."""
    groups = 1 if centers.dim() == 1 else centers.shape[0]
    if isinstance(value, Tensor):
        tensor = check_float(op, name, value)
        if tensor.numel() not in (1, groups) or tensor.dim() > 1:
            raise ValueError(
                f"{op}: {name} must be a number or have shape [1] or [{groups}], got {tuple(tensor.shape)}"
            )
        check_same_device(op, x=x, **{name: tensor})
        if tensor.requires_grad:
            raise ValueError(f"{op}: there is no gradient with respect to {name}; pass {name}.detach()")
        return tensor.reshape(-1).to(centers.dtype).contiguous()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number or a tensor, got {type(value).__name__}")
    return torch.full((1,), float(value), dtype=centers.dtype, device=x.device)


def check_lists(op: str, **lists: Any) -> None:
    """Lists (or tuples) of one length, one entry for each tensor."""
    for name, value in lists.items():
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{op}: {name} must be a list, one entry a tensor, got {type(value).__name__}")
    (first, reference), *rest = lists.items()
    for name, value in rest:
        if len(value) != len(reference):
            raise ValueError(
                f"{op}: {name} must have one entry for each of the {len(reference)} {first}, got {len(value)}"
            )


def check_choice(op: str, name: str, value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{op}: {name} must be {' or '.join(repr(c) for c in choices)}, got {value!r}")
    return str(value)


def check_int(op: str, name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} must be an integer, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} must be between {low} and {high}, got {value}")
    return value


NORMS = ("l1", "l2")


def check_norm(op: str, norm: Any) -> str:
    return check_choice(op, "norm", norm, NORMS)
