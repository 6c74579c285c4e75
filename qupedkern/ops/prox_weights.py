"""prox_weights: the proximal map that pulls each weight toward its nearest center."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._call import call
from ._checks import check_norm, check_per_row, check_x_centers
from ._define import define_op, not_differentiable, vmap_over_rows
from ._rows import column, split_rows
from .hard_quantize import nearest


def _prepare(x: Any, centers: Any, strength: Any, norm: str = "l1") -> tuple[Tensor, Tensor, Tensor, str]:
    norm = check_norm("prox_weights", norm)
    x, centers = check_x_centers("prox_weights", x, centers)
    return x, centers, check_per_row("prox_weights", "strength", strength, x, centers), norm


@define_op(
    "prox_weights(Tensor x, Tensor centers, Tensor strength, str norm) -> Tensor",
    allocate=lambda x, centers, strength, norm: x.new_empty(x.shape),
    prepare=_prepare,
)
def reference(x: Tensor, centers: Tensor, strength: Tensor, norm: str) -> Tensor:
    # These forms leave a weight that sits on its center there to the bit and are the identity at strength 0; the
    # textbook ones, q + sign(y - q) max(|y - q| - t, 0) and (y + 2 t q) / (1 + 2 t), are neither.
    y, c = split_rows(x, centers)
    t = column(strength, like=c)
    q = nearest(y, c)
    gap = y - q
    if norm == "l1":
        moved = torch.where(gap.abs() <= t, q, y - t * gap.sign())
    else:
        moved = y - gap * (t / (0.5 + t))  # 2t / (1 + 2t), to the bit, without its overflow
        past = torch.where(gap > 0, moved < q, moved > q)  # the rounding of a large gap can carry it out of the cell
        moved = torch.where(past, q, moved)
    return moved.to(x.dtype).reshape(x.shape)


not_differentiable("prox_weights", "it is a step of an optimizer and has no gradient; call it under torch.no_grad()")
vmap_over_rows("prox_weights", elementwise=("x",), per_row=("strength",), outputs=("x",))


def prox_weights(x: Tensor, centers: Tensor, strength: float | Tensor, norm: str = "l1") -> Tensor:
    """Proximal map of t R(., c): pulls each weight toward its nearest center, the exact global minimiser.

    argmin_u 1/2 (u - y)^2 + t min_j |u - c_j| ("l1") or + t min_j (u - c_j)^2 ("l2"); with q the center nearest to y:
    l1: q where |y - q| <= t, else y - t sign(y - q);  l2: y - (y - q) 2t / (1 + 2t)

    x: [...], the point y, float32, float64, bfloat16 or float16.  centers: [m] or [G, m], ascending rows, m = 2..256.
    strength: t >= 0 finite, a number, [1] or [G]; unit of x for l1, none for l2 (a learning rate times lambda).
    Returns the moved weights, shaped and typed like x; each stays in its cell, and on its center if it was there.
    Raises TypeError or ValueError. QuPeD, Ozkara et al. 2021 (arXiv:2107.13892), Algorithm 1.
    """
    return call("prox_weights", *_prepare(x, centers, strength, norm))
