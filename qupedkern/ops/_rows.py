"""Groups: x is flattened in row-major order and cut into G equal runs; row r of `centers` [G, m] belongs to run r."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 4096  # terms added before their sum joins the next level: the order of addition never depends on threads


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type formulas are evaluated in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def split_rows(x: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """x [...], centers [m] or [G, m] -> values [G, n] and centers [G, m], both in the compute type."""
    c = centers.reshape(-1, centers.shape[-1])
    values = x.reshape(c.shape[0], x.numel() // c.shape[0])
    dtype = compute_dtype(x)
    return values.to(dtype), c.to(dtype)


def column(per_row: Tensor, like: Tensor) -> Tensor:
    """A strength or sharpness, [1] or [G], as [1, 1] or [G, 1] in the type of `like`."""
    return per_row.reshape(-1, 1).to(like.dtype)


def midpoints(c: Tensor) -> Tensor:
    """t_j = 0.5 c_{j-1} + 0.5 c_j, [G, m] -> [G, m - 1]; halves are added so that nothing overflows."""
    return 0.5 * c[:, :-1] + 0.5 * c[:, 1:]


def sigmoid(z: Tensor) -> Tensor:
    """1 / (1 + exp(-z)), the same bits wherever in a tensor an element stands.

    torch.sigmoid computes the ends of each thread's share by another formula, so its bits follow the number of threads.
    """
    return 1 / (1 + torch.exp(-z))


def row_sum(values: Tensor) -> Tensor:
    """Sum over the last dimension, [G, n] -> [G], in an order fixed by the shape alone.

    A plain sum over one long row is split among threads, and its last bits follow their number. Blocks of 4,096 are not.
    """
    while values.shape[-1] > _BLOCK:
        values = torch.nn.functional.pad(values, (0, -values.shape[-1] % _BLOCK))
        values = values.reshape(values.shape[0], -1, _BLOCK).sum(-1)
    return values.sum(-1)


def cell_sum(values: Tensor, codes: Tensor, levels: int) -> Tensor:
    """Sum of values over the members of each cell: values [G, n], codes [G, n] -> [G, levels]. Fixed order."""
    zero = values.new_zeros(())
    return torch.stack([row_sum(torch.where(codes == k, values, zero)) for k in range(levels)], dim=-1)
