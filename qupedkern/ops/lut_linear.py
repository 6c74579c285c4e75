"""lut_linear: a linear layer on packed codes; the weight, a table lookup, is never written out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qupedkern.backends import batch_invariant

from ._call import call
from ._checks import check_center_type, check_float, check_same_device
from ._define import define_op, differentiable, not_differentiable
from ._packed import check_packed
from ._rows import compute_dtype, row_sum
from .dequantize_packed import reference as dequantize_packed

_OP = "lut_linear"


def _prepare(
    x: Any, packed: Any, centers: Any, bias: Any, bits: Any, shape: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int, list[int]]:
    packed, centers, bits, sizes = check_packed(_OP, packed, centers, bits, shape)
    if len(sizes) != 2:
        raise ValueError(f"{_OP}: shape must be the weight's two sizes (out, in), got {tuple(sizes)}")
    x = check_float(_OP, "x", x)
    if x.dim() == 0 or x.shape[-1] != sizes[1]:
        raise ValueError(f"{_OP}: the last size of x must be in = {sizes[1]}, got x of shape {tuple(x.shape)}")
    check_same_device(_OP, x=x, packed=packed)
    centers = check_center_type(_OP, x, centers)
    if bias is not None:
        bias = check_float(_OP, "bias", bias)
        if bias.shape != (sizes[0],) or bias.dtype not in (x.dtype, centers.dtype):
            raise ValueError(
                f"{_OP}: bias must be {x.dtype} of shape ({sizes[0]},), got {bias.dtype} {tuple(bias.shape)}"
            )
        check_same_device(_OP, x=x, bias=bias)
        bias = bias.to(centers.dtype).contiguous()
    return x.contiguous(), packed, centers, bias, bits, sizes


@define_op(
    "lut_linear(Tensor x, Tensor packed, Tensor centers, Tensor? bias, int bits, int[] shape) -> Tensor",
    allocate=lambda x, packed, centers, bias, bits, shape: x.new_empty((*x.shape[:-1], shape[0])),
    prepare=_prepare,
)
def reference(
    x: Tensor, packed: Tensor, centers: Tensor, bias: Tensor | None, bits: int, shape: Sequence[int]
) -> Tensor:
    rows = x.reshape(math.prod(x.shape[:-1]), shape[1]).to(compute_dtype(x))
    weight = dequantize_packed(packed, centers, bits, shape).to(rows.dtype)
    if batch_invariant.pinned and rows.shape[0] > 1:  # a matrix product may sum in another order for each batch
        out = torch.cat([torch.nn.functional.linear(row, weight, bias) for row in rows.split(1)])
    else:
        out = torch.nn.functional.linear(rows, weight, bias)
    return out.to(x.dtype).reshape(*x.shape[:-1], shape[0])


@define_op(
    "lut_linear_backward(Tensor grad, Tensor x, Tensor packed, Tensor centers, Tensor? bias, int bits, int[] shape)"
    " -> (Tensor, Tensor, Tensor)",
    allocate=lambda grad, x, packed, centers, bias, bits, shape: (
        torch.empty_like(x),
        torch.empty_like(centers),
        centers.new_empty(0 if bias is None else shape[0]),
    ),
)
def reference_backward(
    grad: Tensor, x: Tensor, packed: Tensor, centers: Tensor, bias: Tensor | None, bits: int, shape: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    batch = math.prod(x.shape[:-1])
    rows = x.reshape(batch, shape[1]).to(compute_dtype(x))
    slopes = grad.reshape(batch, shape[0]).to(rows.dtype)
    kernels = torch.ops.qupedkern  # their own kernels where there are some
    weight = kernels.dequantize_packed(packed, centers, bits, shape)
    grad_x = (slopes @ weight).to(x.dtype).reshape(x.shape)
    grad_centers = kernels.dequantize_packed_backward(slopes.t() @ rows, packed, centers, bits, shape)
    grad_bias = centers.new_empty(0) if bias is None else row_sum(slopes.t())
    return grad_x, grad_centers, grad_bias


differentiable("lut_linear", wrt=("x", "centers", "bias"))
not_differentiable("lut_linear_backward", "there is no second derivative")


def lut_linear(
    x: Tensor, packed: Tensor, centers: Tensor, bias: Tensor | None, bits: int, shape: Sequence[int]
) -> Tensor:
    """y = x W^T + b with W = dequantize(unpack_codes(packed, bits, shape), centers), which is never written out.

    x: [..., in], any float type.  packed: uint8 [ceil(out * in * bits / 8)], as pack_codes makes it.  centers: [m] or [G, m],
    m <= 2**bits, typed like x or float32; rows split the flattened weight.  bias: [out] or None.  bits: 1..8.  shape: (out, in).
    Returns [..., out] in the type of x: products and sums in float32 (float64 for float64), within the error of a dot product
    of that type. A row of x gives the same bits in every batch of one kernel regime; batch_invariant(True) makes it one.
    Differentiable in x, centers and bias. Raises ValueError for a code >= m on the CPU (accelerators clamp it), TypeError or
    ValueError for wrong types and shapes.
    """
    return call("lut_linear", *_prepare(x, packed, centers, bias, bits, shape))
