"""packed_embedding: rows of a packed table by index."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._call import call
from ._checks import check_same_device, check_tensor
from ._define import define_op, differentiable, not_differentiable
from ._packed import centers_at, check_packed


def _prepare(
    indices: Any, packed: Any, centers: Any, bits: Any, shape: Any
) -> tuple[Tensor, Tensor, Tensor, int, list[int]]:
    index = check_tensor("packed_embedding", "indices", indices)
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"packed_embedding: indices must be int64 or int32, got {index.dtype}")
    packed, centers, bits, sizes = check_packed("packed_embedding", packed, centers, bits, shape)
    if len(sizes) != 2:
        raise ValueError(f"packed_embedding: shape must be [V, D], the table's, got {sizes}")
    check_same_device("packed_embedding", indices=index, packed=packed)
    return index.long().contiguous(), packed, centers, bits, sizes


def _rows(
    op: str, indices: Tensor, packed: Tensor, centers: Tensor, bits: int, shape: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """centers [G, m], and the row of centers and the code of each value looked up, int64 [..., D]."""
    (count, width), c = shape, centers.reshape(-1, centers.shape[-1])
    if indices.device.type == "cpu":
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < count:
            wrong = indices[(indices < 0) | (indices >= count)]
            raise ValueError(f"{op}: indices must be from 0 to {count - 1}, got {int(wrong[0])}")
    else:
        indices = indices.clamp(0, count - 1)  # looking at the values would make an accelerator wait
    places = indices[..., None] * width + torch.arange(width, device=indices.device)
    return (c, *centers_at(op, packed, c, bits, math.prod(shape) // c.shape[0], places))


@define_op(
    "packed_embedding(Tensor indices, Tensor packed, Tensor centers, int bits, int[] shape) -> Tensor",
    allocate=lambda indices, packed, centers, bits, shape: centers.new_empty((*indices.shape, shape[1])),
    prepare=_prepare,
)
def reference(indices: Tensor, packed: Tensor, centers: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    c, row, code = _rows("packed_embedding", indices, packed, centers, bits, shape)
    return c[row, code]


@define_op(
    "packed_embedding_backward(Tensor grad, Tensor indices, Tensor packed, Tensor centers, int bits, int[] shape) "
    "-> Tensor",
    allocate=lambda grad, indices, packed, centers, bits, shape: centers.new_empty(centers.shape),
)
def reference_backward(
    grad: Tensor, indices: Tensor, packed: Tensor, centers: Tensor, bits: int, shape: Sequence[int]
) -> Tensor:
    c, row, code = _rows("packed_embedding_backward", indices, packed, centers, bits, shape)
    sums = torch.zeros(c.numel(), dtype=torch.float64, device=grad.device)
    sums.index_add_(0, (row * c.shape[1] + code).flatten(), grad.double().flatten())  # one thread: a fixed order
    return sums.to(centers.dtype).reshape(centers.shape)


differentiable("packed_embedding", wrt=("centers",))
not_differentiable("packed_embedding_backward", "there is no second derivative")


def packed_embedding(indices: Tensor, packed: Tensor, centers: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """Rows of a packed table: dequantize_packed(packed, centers, bits, shape)[indices], to the bit, from those rows alone.

    indices: [...], int64 or int32, from 0 to V - 1.  packed, centers, bits: as in dequantize_packed, of a weight of
    shape [V, D].
    Returns [..., D] in the type of centers. Differentiable in centers: grad_c_k = sum of grad over the values of code k.
    Raises ValueError on the CPU for an index outside the table and for a code >= m in the rows it names (accelerators
    clamp both), TypeError or ValueError for wrong types and shapes.
    """
    return call("packed_embedding", *_prepare(indices, packed, centers, bits, shape))
