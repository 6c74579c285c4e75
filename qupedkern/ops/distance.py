"""distance: R(x, c), how far the weights are from their centers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._call import call
from ._checks import check_norm, check_x_centers
from ._define import define_op, differentiable, not_differentiable
from ._rows import cell_sum, compute_dtype, row_sum, split_rows
from .assign import cell_codes
from .hard_quantize import nearest


def _prepare(x: Any, centers: Any, norm: str = "l1") -> tuple[Tensor, Tensor, str]:
    norm = check_norm("distance", norm)
    return (*check_x_centers("distance", x, centers), norm)


@define_op(
    "distance(Tensor x, Tensor centers, str norm) -> Tensor",
    allocate=lambda x, centers, norm: x.new_empty((), dtype=compute_dtype(x)),
    prepare=_prepare,
)
def reference(x: Tensor, centers: Tensor, norm: str) -> Tensor:
    values, c = split_rows(x, centers)
    gap = values - nearest(values, c)
    return row_sum((gap.abs() if norm == "l1" else gap * gap).reshape(1, -1)).reshape(())


@define_op(
    "distance_backward(Tensor grad, Tensor x, Tensor centers, str norm) -> (Tensor, Tensor)",
    allocate=lambda grad, x, centers, norm: (x.new_empty(x.shape), centers.new_empty(centers.shape)),
)
def reference_backward(grad: Tensor, x: Tensor, centers: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    values, c = split_rows(x, centers)
    codes = cell_codes(values, c)
    gap = values - c.gather(1, codes)
    pull = grad * (gap.sign() if norm == "l1" else 2 * gap)
    grad_centers = -cell_sum(pull, codes, c.shape[-1])
    return pull.to(x.dtype).reshape(x.shape), grad_centers.to(centers.dtype).reshape(centers.shape)


differentiable("distance", wrt=("x", "centers"))
not_differentiable("distance_backward", "there is no second derivative")


def distance(x: Tensor, centers: Tensor, norm: str = "l1") -> Tensor:
    """The regularizer R(x, c) = sum_i min_j |x_i - c_j| ("l1") or sum_i min_j (x_i - c_j)^2 ("l2"); no factor 1/2.

    x: [...], float32, float64, bfloat16 or float16.  centers: [m] or [G, m], ascending rows, m = 2..256.
    Returns a scalar tensor, float64 for float64 x and float32 otherwise, summed in a fixed order. Differentiable in both:
    dR/dx_i = sign(x_i - q_i) or 2 (x_i - q_i); dR/dc_k = minus the sum of those over the members of cell k.
    Raises TypeError or ValueError. QuPeD, Ozkara et al. 2021 (arXiv:2107.13892).
    """
    return call("distance", *_prepare(x, centers, norm))
