"""center_step: the centers' step of many tensors, from the gradients and statistics that quped_step returned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._call import call
from ._checks import check_choice, check_float, check_lists, check_norm, check_per_row, check_same_device
from ._define import define_op
from ._rows import compute_dtype

METHODS = ("none", "counted", "authors")
_OP = "center_step"
_Tensors = list[Tensor]


def _check_like(i: int, name: str, value: Any, centers: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{_OP}: tensor {i}: {name} must be a torch.Tensor, got {type(value).__name__}")
    narrower = dtype != torch.int64 and value.dtype == centers.dtype
    if value.shape != shape or not (value.dtype == dtype or narrower):
        came = f"{value.dtype} of shape {tuple(value.shape)}"
        raise ValueError(f"{_OP}: tensor {i}: {name} must be {dtype} of shape {shape}, got {came}")
    check_same_device(f"{_OP}: tensor {i}", centers=centers, **{name: value})
    return value.to(dtype)


def _prepare(
    centers: Any,
    center_grad: Any,
    counts: Any,
    sums: Any,
    strength: Any,
    rate: Any,
    norm: str = "l1",
    method: str = "counted",
    clip: float = 10.0,
) -> tuple[Any, ...]:
    norm = check_norm(_OP, norm)
    method = check_choice(_OP, "method", method, METHODS)
    if isinstance(clip, bool) or not isinstance(clip, (int, float)) or not clip > 0:
        raise ValueError(f"{_OP}: clip must be a positive number, got {clip!r}")
    if not isinstance(rate, (list, tuple)):
        rate = [rate] * (len(centers) if isinstance(centers, (list, tuple)) else 1)
    check_lists(_OP, centers=centers, rate=rate)
    prox = method != "none"
    wanted = {"center_grad": (center_grad, bool(center_grad)), "counts": (counts, prox), "strength": (strength, prox)}
    wanted["sums"] = (sums, prox and norm == "l2")
    kept: dict[str, list[Any]] = {}
    for name, (value, needed) in wanted.items():
        if needed:
            check_lists(_OP, centers=centers, **{name: value})
        kept[name] = list(value) if needed else []
    strengths: _Tensors = []
    for i, c in enumerate(centers):
        check_float(f"{_OP}: tensor {i}", "centers", c)
        if c.dim() not in (1, 2) or c.shape[-1] < 2:
            raise ValueError(
                f"{_OP}: tensor {i}: centers must be [m] or [G, m] with m >= 2, got shape {tuple(c.shape)}"
            )
        check_same_device(f"{_OP}: tensor {i}", **{"tensor 0": centers[0], f"tensor {i}": c})
        if c.dtype != centers[0].dtype:
            raise TypeError(f"{_OP}: tensor {i}: all centers must have one type, {centers[0].dtype}, got {c.dtype}")
        for name in ("center_grad", "sums"):
            if kept[name]:
                kept[name][i] = _check_like(i, name, kept[name][i], c, tuple(c.shape), compute_dtype(c))
        if prox:
            _check_like(i, "counts", kept["counts"][i], c, (*c.shape[:-1], 3, c.shape[-1]), torch.int64)
            strengths.append(check_per_row(f"{_OP}: tensor {i}", "strength", kept["strength"][i], c, c))
    if len({id(c) for c in centers}) != len(centers):
        raise ValueError(f"{_OP}: centers must be different tensors, got one of them twice; pass it once")
    like = centers[0] if centers else torch.empty(0)
    rates = torch.tensor([float(value) for value in rate], dtype=compute_dtype(like), device=like.device)
    lists = (list(centers), kept["center_grad"], kept["counts"], kept["sums"], strengths)
    return (*lists, rates, norm, method, float(clip))


@define_op(
    "center_step(Tensor(a!)[] centers, Tensor[] center_grad, Tensor[] counts, Tensor[] sums, Tensor[] strength,"
    " Tensor rate, str norm, str method, float clip) -> ()",
    allocate=lambda *args: None,
    prepare=_prepare,
)
def reference(
    centers: _Tensors,
    center_grad: _Tensors,
    counts: _Tensors,
    sums: _Tensors,
    strength: _Tensors,
    rate: Tensor,
    norm: str,
    method: str,
    clip: float,
) -> None:
    for i, out in enumerate(centers):
        c = out.to(compute_dtype(out))
        gradient = center_grad[i].clamp(-clip, clip) if center_grad else torch.zeros_like(c)
        moved = c - rate[i] * gradient
        if method != "none":
            t = strength[i].reshape(*[-1] * (c.dim() - 1), 1).to(c.dtype)
            members, above, below = counts[i].unbind(-2)
            if norm == "l2":
                # sum (x - mu) 2t / (1 + 2tn), as in prox_centers; sum (x - mu) = sum (x - c) + n (c - mu)
                moved = moved + (sums[i] + members * (c - moved)) / (0.5 / t + members.clamp(min=1))
            elif method == "counted":
                moved = moved + t * (above - below)
            else:
                moved = moved - t * (above - below)
        out.copy_(moved.sort(dim=-1).values)


@torch.no_grad()
def center_step(
    centers: list[Tensor],
    center_grad: list[Tensor],
    counts: list[Tensor],
    sums: list[Tensor],
    strength: list[float | Tensor],
    *,
    rate: float | list[float],
    norm: str = "l1",
    method: str = "counted",
    clip: float = 10.0,
) -> None:
    """c <- sort(prox_{t R(x, .)}(c - eta_2 clip(h))) for every tensor of centers, in place, in one call.

    mu = c - rate clip(center_grad, -clip, clip), then by method and norm, with the members of the old centers' cells:
      "none"           mu
      l2               mu_j + (sums_j + n_j (c_j - mu_j)) 2t / (1 + 2 t n_j), the exact prox, for both methods
      l1, "counted"    mu_j + t (above_j - below_j)
      l1, "authors"    the opposite sign, as in the published code; it increases R and is here for comparison
    Then each row is sorted. The exact l1 prox needs the weights: `prox_centers`.

    centers: [m] or [G, m] each, ascending rows, written.  center_grad, counts, sums: what quped_step returned, x being the
    weights and c the centers it was given; center_grad may be an empty list (h = 0), sums is read for l2 alone, counts and
    strength are not read for "none".  strength: t = eta_2 lambda >= 0, a number, [1] or [G] each.
    rate: eta_2, one number or one each.  clip: bound of |h|.
    Raises TypeError or ValueError, which name the tensor by its place in the list.
    QuPeD, Ozkara et al. 2021 (arXiv:2107.13892), Algorithm 1.
    """
    args = _prepare(centers, center_grad, counts, sums, strength, rate, norm, method, clip)
    call("center_step", *args)
