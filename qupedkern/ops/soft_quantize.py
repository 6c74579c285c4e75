"""soft_quantize: a differentiable stand-in for rounding to the nearest center (QuPeD's relaxed quantizer)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._call import call
from ._checks import check_per_row, check_x_centers
from ._define import define_op, differentiable, not_differentiable, vmap_over_rows
from ._rows import column, midpoints, row_sum, sigmoid, split_rows


def _prepare(x: Any, centers: Any, sharpness: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, centers = check_x_centers("soft_quantize", x, centers)
    return x, centers, check_per_row("soft_quantize", "sharpness", sharpness, x, centers)


@define_op(
    "soft_quantize(Tensor x, Tensor centers, Tensor sharpness) -> Tensor",
    allocate=lambda x, centers, sharpness: x.new_empty(x.shape),
    prepare=_prepare,
)
def reference(x: Tensor, centers: Tensor, sharpness: Tensor) -> Tensor:
    values, c = split_rows(x, centers)
    steepness = column(sharpness, like=c)
    t, d = midpoints(c), c.diff(dim=1)
    soft = c[:, :1].expand_as(values)
    for j in range(t.shape[1]):
        soft = soft + d[:, j : j + 1] * sigmoid(steepness * (values - t[:, j : j + 1]))
    soft = soft.clamp(min=c[:, :1], max=c[:, -1:])  # exact in real numbers; in floats the sum can pass the ends
    return soft.to(x.dtype).reshape(x.shape)


@define_op(
    "soft_quantize_backward(Tensor grad, Tensor x, Tensor centers, Tensor sharpness) -> (Tensor, Tensor)",
    allocate=lambda grad, x, centers, sharpness: (x.new_empty(x.shape), centers.new_empty(centers.shape)),
)
def reference_backward(grad: Tensor, x: Tensor, centers: Tensor, sharpness: Tensor) -> tuple[Tensor, Tensor]:
    values, c = split_rows(x, centers)
    g, _ = split_rows(grad, centers)
    steepness = column(sharpness, like=c)
    t, d = midpoints(c), c.diff(dim=1)
    slope = torch.zeros_like(values)  # sum_j d_j s_j (1 - s_j)
    rising = [row_sum(g)]  # A_j = sum g s_j, with s_1 = 1 and s_{m+1} = 0
    bump = [torch.zeros_like(rising[0])]  # P d_j B_j / 2, B_j = sum g s_j (1 - s_j), with d_1 = d_{m+1} = 0
    steep = (steepness / 2 * d).clamp(max=torch.finfo(d.dtype).max)  # first: d_j B_j can be past the largest number
    for j in range(t.shape[1]):
        z = steepness * (values - t[:, j : j + 1])
        s = sigmoid(z)
        density = s * sigmoid(-z)  # s (1 - s) without cancellation where s is close to 1
        slope = slope + d[:, j : j + 1] * density
        rising.append(row_sum(g * s))
        bump.append(steep[:, j] * row_sum(g * density))
    rising.append(torch.zeros_like(rising[0]))
    bump.append(torch.zeros_like(rising[0]))
    a, b = torch.stack(rising, dim=1), torch.stack(bump, dim=1)  # [G, m + 1]
    grad_centers = a[:, :-1] - a[:, 1:] - b[:, :-1] - b[:, 1:]
    grad_x = g * steepness * slope
    return grad_x.to(x.dtype).reshape(x.shape), grad_centers.to(centers.dtype).reshape(centers.shape)


differentiable("soft_quantize", wrt=("x", "centers"))
not_differentiable("soft_quantize_backward", "there is no second derivative")
vmap_over_rows("soft_quantize", elementwise=("x",), outputs=("x",), per_row=("sharpness",))
vmap_over_rows("soft_quantize_backward", elementwise=("grad", "x"), outputs=("x", "centers"), per_row=("sharpness",))


def soft_quantize(x: Tensor, centers: Tensor, sharpness: float | Tensor) -> Tensor:
    """Differentiable stand-in for rounding each element of x to its nearest center.

    S = c_1 + sum_{j=2..m} d_j s_j,  d_j = c_j - c_{j-1},  s_j = sigmoid(P (x - t_j)),  t_j = (c_{j-1} + c_j) / 2
    dS/dx = P sum_j d_j s_j (1 - s_j)
    dS/dc_k = s_k - s_{k+1} - (P/2) (d_k s_k (1 - s_k) + d_{k+1} s_{k+1} (1 - s_{k+1})),  s_1 = 1, s_{m+1} = 0, d_1 = d_{m+1} = 0

    x: [...], float32, float64, bfloat16 or float16 (the last two computed in float32).
    centers: [m] or [G, m], ascending rows, m = 2..256, in x's type, or float32 beside a half type; row r owns the r-th of G
    equal runs of x in row-major order.  sharpness: P > 0, a number, [1] or [G], unit 1/x; S tends to rounding as it grows.
    Returns S shaped like x in x's type, c_1 <= S <= c_m; NaN stays NaN. Raises TypeError or ValueError.
    Domain: |c| <= max/8 and P |x| finite; outside it values are unspecified.
    QuPeD, Ozkara et al. 2021 (arXiv:2107.13892), soft quantization function.
    """
    return call("soft_quantize", *_prepare(x, centers, sharpness))
