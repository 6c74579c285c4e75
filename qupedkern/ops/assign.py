"""assign: the code of each element, that is the index of its nearest center."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._call import call
from ._checks import check_x_centers
from ._define import define_op, vmap_over_rows
from ._rows import midpoints, split_rows


def cell_codes(values: Tensor, c: Tensor) -> Tensor:
    """The formula, on rows: values [G, n], c [G, m] -> int64 codes [G, n]. Shared by every reference that needs a cell."""
    above = torch.searchsorted(midpoints(c), values)  # [G, n], #{j : t_j < x}
    above = torch.where(values.isnan(), torch.zeros_like(above), above)  # searchsorted puts NaN last
    first = torch.searchsorted(c, c)  # [G, m]; of equal centers the first owns the cell
    return first.gather(1, above)


def _prepare(x: Any, centers: Any) -> tuple[Tensor, Tensor]:
    x, centers = check_x_centers("assign", x, centers)
    return x.detach(), centers.detach()


@define_op(
    "assign(Tensor x, Tensor centers) -> Tensor",
    allocate=lambda x, centers: x.new_empty(x.shape, dtype=torch.uint8),
    prepare=_prepare,
)
def reference(x: Tensor, centers: Tensor) -> Tensor:
    values, c = split_rows(x, centers)
    return cell_codes(values, c).to(torch.uint8).reshape(x.shape)


vmap_over_rows("assign", elementwise=("x",), per_row=(), outputs=("x",))


def assign(x: Tensor, centers: Tensor) -> Tensor:
    """Code of each element of x: the index of its nearest center, a tie going to the lower one.

    code = #{j : x > t_j}, t_j = (c_{j-1} + c_j) / 2 rounded in the compute type, then the first of equal centers.

    x: [...], float32, float64, bfloat16 or float16 (the last two are compared in float32).
    centers: [m] or [G, m], ascending rows, m = 2..256; row r owns the r-th of G equal runs of x in row-major order.
    Returns uint8 codes shaped like x. NaN gives 0, +-inf the outer centers. Carries no gradient.
    Raises TypeError or ValueError for a wrong type, shape or device. Unsorted centers give unspecified codes.
    """
    return call("assign", *_prepare(x, centers))
