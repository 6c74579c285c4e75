"""dequantize_packed in Triton, and its gradient: codes out of whole groups of the stream, then as dequantize.

Reads `bits` bits and writes a value a weight: bound by memory. Where a row of centers does not start with a group, each code is
read out of its two bytes instead, those of neighbours coming from cache.
"""

from __future__ import annotations

from torch import Tensor

from ._packed import dequantize, sum_by_code


def dequantize_packed(packed: Tensor, centers: Tensor, bits: int, shape: list[int], out: Tensor) -> None:
    dequantize(packed, centers, bits, out)


def dequantize_packed_backward(
    grad: Tensor, packed: Tensor, centers: Tensor, bits: int, shape: list[int], out: Tensor
) -> None:
    sum_by_code(grad, packed, bits, out)
