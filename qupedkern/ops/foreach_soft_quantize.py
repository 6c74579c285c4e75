"""foreach_soft_quantize: soft_quantize of many tensors in one call, so that small layers share the cost of a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._call import attempt, call
from ._checks import check_lists, check_per_row, check_same_device, check_x_centers
from ._define import OPS, define_op, differentiable, not_differentiable

_Lists = tuple[list[Tensor], list[Tensor], list[Tensor]]


def _prepare(xs: Any, centers: Any, sharpness: Any) -> _Lists:
    op = "foreach_soft_quantize"
    if not isinstance(sharpness, (list, tuple)):
        sharpness = [sharpness] * (len(xs) if isinstance(xs, (list, tuple)) else 1)
    check_lists(op, xs=xs, centers=centers, sharpness=sharpness)
    prepared: _Lists = ([], [], [])
    for i, (x, c, p) in enumerate(zip(xs, centers, sharpness, strict=True)):
        x, c = check_x_centers(f"{op}: tensor {i}", x, c)
        check_same_device(op, **{"tensor 0": prepared[0][0] if i else x, f"tensor {i}": x})
        for kept, value in zip(prepared, (x, c, check_per_row(f"{op}: tensor {i}", "sharpness", p, x, c)), strict=True):
            kept.append(value)
    return prepared


def _allocate(x: list[Tensor], centers: list[Tensor], sharpness: list[Tensor]) -> list[Tensor]:
    return [_like(v) for v in x]


def _like(x: Tensor) -> Tensor:
    """Empty and contiguous; without an option where it can be, for torch takes a quarter of a microsecond to read one."""
    return torch.empty_like(x) if x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)


@define_op(
    "foreach_soft_quantize(Tensor[] x, Tensor[] centers, Tensor[] sharpness) -> Tensor[]",
    allocate=_allocate,
    prepare=_prepare,
)
def reference(x: list[Tensor], centers: list[Tensor], sharpness: list[Tensor]) -> list[Tensor]:
    one = OPS["soft_quantize"].reference
    return [one(*args) for args in zip(x, centers, sharpness, strict=True)]


@define_op(
    "foreach_soft_quantize_backward(Tensor[] grad, Tensor[] x, Tensor[] centers, Tensor[] sharpness) -> (Tensor[], Tensor[])",
    allocate=lambda grad, x, centers, sharpness: (
        [_like(v) for v in x],
        [torch.empty_like(c) for c in centers],
    ),
)
def reference_backward(
    grad: list[Tensor], x: list[Tensor], centers: list[Tensor], sharpness: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    one = OPS["soft_quantize_backward"].reference
    pairs = [one(*args) for args in zip(grad, x, centers, sharpness, strict=True)]
    return [grad_x for grad_x, _ in pairs], [grad_centers for _, grad_centers in pairs]


differentiable("foreach_soft_quantize", wrt=("x", "centers"))
not_differentiable("foreach_soft_quantize_backward", "there is no second derivative")


def _checked(*args: Any) -> list[Tensor]:
    return call("foreach_soft_quantize", *_prepare(*args))


def foreach_soft_quantize(
    xs: list[Tensor], centers: list[Tensor], sharpness: float | list[float | Tensor]
) -> list[Tensor]:
    """[soft_quantize(x, c, P) for each tensor x, its centers c and its sharpness P], in one call; the same bits.

    xs: tensors of any shapes and float types on one device.  centers: one [m] or [G, m] for each; m and G may differ.
    sharpness: one number for all, or a list with a number, [1] or [G] for each.
    Returns a list of tensors, each shaped and typed like its x; differentiable in xs and centers. An empty list gives one.
    Raises TypeError or ValueError, which name the tensor by its place in the list. Formula, domain, source: soft_quantize.
    """
    given = (xs, centers, sharpness)
    return attempt("foreach_soft_quantize", given, _checked) if isinstance(sharpness, list) else _checked(*given)
