"""dequantize_packed: the bit stream of a weight straight to its values; its codes are never written out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._call import call
from ._define import define_op, differentiable, not_differentiable
from ._packed import centers_at, check_packed
from ._rows import cell_sum, split_rows


def _prepare(packed: Any, centers: Any, bits: Any, shape: Any) -> tuple[Tensor, Tensor, int, list[int]]:
    return check_packed("dequantize_packed", packed, centers, bits, shape)


def _rows(op: str, packed: Tensor, centers: Tensor, bits: int, shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """centers [G, m], and the row of centers and the code of each weight, int64 [G, n]."""
    c = centers.reshape(-1, centers.shape[-1])
    numel = math.prod(shape)
    places = torch.arange(numel, device=packed.device).reshape(c.shape[0], numel // c.shape[0])
    return (c, *centers_at(op, packed, c, bits, places.shape[1], places))


@define_op(
    "dequantize_packed(Tensor packed, Tensor centers, int bits, int[] shape) -> Tensor",
    allocate=lambda packed, centers, bits, shape: centers.new_empty(shape),
    prepare=_prepare,
)
def reference(packed: Tensor, centers: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    c, row, code = _rows("dequantize_packed", packed, centers, bits, shape)
    return c[row, code].reshape(list(shape))


@define_op(
    "dequantize_packed_backward(Tensor grad, Tensor packed, Tensor centers, int bits, int[] shape) -> Tensor",
    allocate=lambda grad, packed, centers, bits, shape: centers.new_empty(centers.shape),
)
def reference_backward(grad: Tensor, packed: Tensor, centers: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    _, _, code = _rows("dequantize_packed_backward", packed, centers, bits, shape)
    values, _ = split_rows(grad, centers)
    return cell_sum(values, code, centers.shape[-1]).to(centers.dtype).reshape(centers.shape)


differentiable("dequantize_packed", wrt=("centers",))
not_differentiable("dequantize_packed_backward", "there is no second derivative")


def dequantize_packed(packed: Tensor, centers: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """dequantize(unpack_codes(packed, bits, shape), centers) in one pass, to the bit: out_i = c[code_i].

    packed: uint8 [ceil(prod(shape) * bits / 8)], as pack_codes gives it.  centers: [m] or [G, m] float, m <= 2**bits, same
    device; its rows own equal runs of the weight in row-major order.  bits: 1..8.
    Returns values of the shape, in the type of centers. Differentiable in centers: grad_c_k = sum of grad over code k.
    Raises ValueError for a code >= m on the CPU (accelerators clamp it), TypeError or ValueError for wrong types and shapes.
    """
    return call("dequantize_packed", *_prepare(packed, centers, bits, shape))
