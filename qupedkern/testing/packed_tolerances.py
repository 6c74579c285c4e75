"""Bounds of the ops on codes as a bit stream. Conventions as in tolerances.py."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qupedkern.ops import OPS
from qupedkern.ops.dequantize import reference as dequantize
from qupedkern.ops.unpack_codes import reference as unpack_codes

from .bounds import FLUSHED_BELOW, cell_total, largest_number
from .row_tolerances import dequantize_backward


def dequantize_packed_backward(
    grad: Tensor, packed: Tensor, centers: Tensor, bits: int, shape: list[int], *, u: float, eta: float
) -> tuple[Tensor]:
    """Sums over each code, as in dequantize_backward."""
    codes = OPS["unpack_codes"].reference(packed, bits, shape)
    return dequantize_backward(grad, codes, centers, u=u, eta=eta)


def packed_embedding_backward(
    grad: Tensor, indices: Tensor, packed: Tensor, centers: Tensor, bits: int, shape: list[int], *, u: float, eta: float
) -> tuple[Tensor]:
    """(n_k + 1) u sum|terms| over the values looked up of each code: n_k counts a row as often as it is named."""
    reference = OPS["packed_embedding_backward"].reference
    total, count = (reference(g, indices, packed, centers, bits, shape) for g in (grad.abs(), torch.ones_like(grad)))
    return (torch.where(total > largest_number(u), math.inf, (count + 1) * u * total),)


def lut_linear(
    x: Tensor,
    packed: Tensor,
    centers: Tensor,
    bias: Tensor | None,
    bits: int,
    shape: list[int],
    *,
    u: float,
    eta: float,
) -> tuple[Tensor]:
    """A dot product of K terms and the bias in any order of addition: (K + 1) u (sum |w| |x| + |b|), eta for each underflow.

    Where numbers below eta = 2^-126 count as zero (smallest_of), a term loses eta |x| or eta |w| by its factors besides.
    Where an x is infinite or NaN so is the result; nothing is claimed where a partial sum may overflow.
    """
    weight = _lut_weight(packed, centers, bits, shape).abs()
    rows = x.reshape(math.prod(x.shape[:-1]), shape[1]).abs()
    size = _finite_product(rows, weight.t()) + (0.0 if bias is None else bias.abs())
    bound = (shape[1] + 1) * (u * size + eta)
    if eta == FLUSHED_BELOW:
        bound = bound + eta * (rows.nan_to_num(posinf=0.0).sum(1, keepdim=True) + weight.sum(1))
    return (torch.where(size > largest_number(u), math.inf, bound).reshape(*x.shape[:-1], shape[0]),)


def lut_linear_backward(
    grad: Tensor,
    x: Tensor,
    packed: Tensor,
    centers: Tensor,
    bias: Tensor | None,
    bits: int,
    shape: list[int],
    *,
    u: float,
    eta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_x: dot products over the outputs.  grad_bias: sums over the batch.  grad_centers: each weight's gradient is a dot
    product over the batch, (B + 1) u of its terms, and adding n_k of them gives n_k u more. Any order of addition.

    Where numbers below eta = 2^-126 count as zero, the terms of both products lose eta times their other factor besides.
    """
    batch = math.prod(x.shape[:-1])
    codes = unpack_codes(packed, bits, shape)
    weight, rows = dequantize(codes, centers).abs(), x.reshape(batch, shape[1]).abs()
    slopes = grad.reshape(batch, shape[0]).abs()
    to_x = _finite_product(slopes, weight)
    to_weight = _finite_product(slopes.t(), rows)
    groups, levels = centers.reshape(-1, centers.shape[-1]).shape
    by_group = (groups, codes.numel() // groups)
    index, terms = codes.reshape(by_group).long(), to_weight.reshape(by_group)
    total, count = cell_total(terms, index, levels), cell_total(torch.ones_like(terms), index, levels)
    to_centers = (batch + 1 + count) * (u * total + eta * count)
    bound_x = (shape[0] + 1) * (u * to_x + eta)
    to_bias = slopes.sum(0) if bias is not None else slopes.new_zeros(0)
    if eta == FLUSHED_BELOW:
        finite, given = slopes.nan_to_num(posinf=0.0), rows.nan_to_num(posinf=0.0)
        bound_x = bound_x + eta * (finite.sum(1, keepdim=True) + weight.sum(0))
        lost = eta * (finite.sum(0)[:, None] + given.sum(0))  # of the gradient of a weight
        to_centers = to_centers + cell_total(lost.reshape(by_group), index, levels)
    sizes = (to_x, total, to_bias)
    bounds = (bound_x, to_centers, (batch + 1) * (u * to_bias + eta))
    shapes = (x.shape, centers.shape, to_bias.shape)
    return tuple(  # type: ignore[return-value]
        torch.where(size > largest_number(u), math.inf, bound).reshape(like)
        for size, bound, like in zip(sizes, bounds, shapes, strict=True)
    )


def _lut_weight(packed: Tensor, centers: Tensor, bits: int, shape: list[int]) -> Tensor:
    return dequantize(unpack_codes(packed, bits, shape), centers)


def _finite_product(a: Tensor, b: Tensor) -> Tensor:
    """|a| |b| summed, infinities and NaN left out: they are exact."""
    return a.nan_to_num(nan=0.0, posinf=0.0) @ b.nan_to_num(nan=0.0, posinf=0.0)
