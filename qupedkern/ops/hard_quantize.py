"""hard_quantize: each element at its nearest center, with gradients for the centers and, on request, straight through to x."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._call import call
from ._checks import check_x_centers
from ._define import define_op, differentiable, not_differentiable, vmap_over_rows
from ._rows import cell_sum, split_rows
from .assign import cell_codes


def _prepare(x: Any, centers: Any, straight_through: bool = False) -> tuple[Tensor, Tensor, bool]:
    if not isinstance(straight_through, bool):
        raise TypeError(f"hard_quantize: straight_through must be a bool, got {type(straight_through).__name__}")
    return (*check_x_centers("hard_quantize", x, centers), straight_through)


def nearest(values: Tensor, c: Tensor) -> Tensor:
    """The formula, on rows: q [G, n] for values [G, n] and centers [G, m]; NaN stays NaN."""
    return torch.where(values.isnan(), values, c.gather(1, cell_codes(values, c)))


@define_op(
    "hard_quantize(Tensor x, Tensor centers, bool straight_through) -> Tensor",
    allocate=lambda x, centers, straight_through: x.new_empty(x.shape),
    prepare=_prepare,
)
def reference(x: Tensor, centers: Tensor, straight_through: bool) -> Tensor:
    return nearest(*split_rows(x, centers)).to(x.dtype).reshape(x.shape)


@define_op(
    "hard_quantize_backward(Tensor grad, Tensor x, Tensor centers, bool straight_through) -> (Tensor, Tensor)",
    allocate=lambda grad, x, centers, straight_through: (x.new_empty(x.shape), centers.new_empty(centers.shape)),
)
def reference_backward(grad: Tensor, x: Tensor, centers: Tensor, straight_through: bool) -> tuple[Tensor, Tensor]:
    values, c = split_rows(x, centers)
    g, _ = split_rows(grad, centers)
    grad_centers = cell_sum(g, cell_codes(values, c), c.shape[-1])
    grad_x = grad.to(x.dtype, copy=True) if straight_through else torch.zeros_like(x)
    return grad_x, grad_centers.to(centers.dtype).reshape(centers.shape)


differentiable("hard_quantize", wrt=("x", "centers"))
not_differentiable("hard_quantize_backward", "there is no second derivative")
vmap_over_rows("hard_quantize", elementwise=("x",), per_row=(), outputs=("x",))
vmap_over_rows("hard_quantize_backward", elementwise=("grad", "x"), per_row=(), outputs=("x", "centers"))


def hard_quantize(x: Tensor, centers: Tensor, straight_through: bool = False) -> Tensor:
    """Each element of x replaced by its nearest center, a tie going to the lower one.

    Q_c(x) = c_k, k = assign(x, c).  Gradients: to centers the sum of grad over each cell's members; to x zero, or grad
    itself where straight_through is set (the straight-through estimator).

    x: [...], float32, float64, bfloat16 or float16.  centers: [m] or [G, m], ascending rows, m = 2..256, in x's type, or
    float32 beside a half type; row r owns the r-th of G equal runs of x in row-major order.
    Returns values shaped like x in x's type; NaN stays NaN, +-inf give the outer centers. Raises TypeError or ValueError.
    QuPeD, Ozkara et al. 2021 (arXiv:2107.13892).
    """
    return call("hard_quantize", *_prepare(x, centers, straight_through))
