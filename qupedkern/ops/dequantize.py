"""dequantize: codes back to values."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._call import call
from ._checks import check_centers, check_codes, check_same_device
from ._define import define_op, differentiable, not_differentiable, vmap_over_rows
from ._rows import cell_sum, split_rows


def _prepare(codes: Any, centers: Any) -> tuple[Tensor, Tensor]:
    codes = check_codes("dequantize", "codes", codes)
    centers = check_centers("dequantize", centers, codes.numel(), what="codes")
    check_same_device("dequantize", codes=codes, centers=centers)
    return codes.contiguous(), centers.contiguous()


def _rows(op: str, codes: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """codes as int64 [G, n] and centers [G, m]; codes past the last center raise on the CPU and are clamped elsewhere."""
    c = centers.reshape(-1, centers.shape[-1])
    index = codes.reshape(c.shape[0], codes.numel() // c.shape[0]).long()
    levels = c.shape[-1]
    if codes.device.type == "cpu":
        if index.numel() and int(index.max()) >= levels:
            raise ValueError(f"{op}: codes must be below m = {levels}, got {int(index.max())}")
        return index, c
    return index.clamp(max=levels - 1), c  # looking at the values would make an accelerator wait


@define_op(
    "dequantize(Tensor codes, Tensor centers) -> Tensor",
    allocate=lambda codes, centers: centers.new_empty(codes.shape),
    prepare=_prepare,
)
def reference(codes: Tensor, centers: Tensor) -> Tensor:
    index, c = _rows("dequantize", codes, centers)
    return c.gather(1, index).reshape(codes.shape)


@define_op(
    "dequantize_backward(Tensor grad, Tensor codes, Tensor centers) -> Tensor",
    allocate=lambda grad, codes, centers: centers.new_empty(centers.shape),
)
def reference_backward(grad: Tensor, codes: Tensor, centers: Tensor) -> Tensor:
    index, _ = _rows("dequantize_backward", codes, centers)
    values, _ = split_rows(grad, centers)
    return cell_sum(values, index, centers.shape[-1]).to(centers.dtype).reshape(centers.shape)


differentiable("dequantize", wrt=("centers",))
not_differentiable("dequantize_backward", "there is no second derivative")
vmap_over_rows("dequantize", elementwise=("codes",), per_row=(), outputs=("x",))
vmap_over_rows("dequantize_backward", elementwise=("grad", "codes"), per_row=(), outputs=("centers",))


def dequantize(codes: Tensor, centers: Tensor) -> Tensor:
    """The center each code stands for: out_i = c[code_i], of the row that i belongs to.

    codes: [...], uint8, all below m.  centers: [m] or [G, m] float, same device.
    Returns values shaped like codes, in the type of centers. Differentiable in centers: grad_c_k = sum of grad over code k.
    Raises ValueError for a code >= m on the CPU (accelerators clamp it), TypeError or ValueError for wrong types and shapes.
    """
    return call("dequantize", *_prepare(codes, centers))
