"""What surrounds one evaluation of the loss: statistics kept still, and the quantized weights of all layers made in one call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qupedkern.nn import all_row_gaps, sharpness_of
from qupedkern.ops import foreach_soft_quantize, hard_quantize
from qupedkern.ops._call import attempt

from ._codebook import Codebook


def _running_statistics(model: nn.Module) -> list[nn.Module]:
    """Modules that would update running statistics; in eval mode none does, and the flag means something else to some."""
    return [m for m in model.modules() if m.training and getattr(m, "track_running_stats", False)]


@contextmanager
def without_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norm normalises by the batch but leaves its running statistics alone: they belong to the weights that ship."""
    layers = _running_statistics(model)
    for layer in layers:
        layer.track_running_stats = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True  # type: ignore[assignment]


@dataclass
class Relaxed:
    """The quantized weights one evaluation multiplied with, one for each codebook: leaves, whose .grad is dL/dS or dL/dQ."""

    mode: str  # "soft" or "hard"
    straight_through: bool
    weights: list[Tensor]
    sharpness: list[Tensor]  # soft: P of each row, [1] or [G]

    @property
    def chain(self) -> str:
        """How a gradient reaches x: through S_c ("soft"), as it is ("straight_through"), or not at all ("hard")."""
        return "straight_through" if self.straight_through else self.mode


@torch.no_grad()
def quantize_weights(codebooks: list[Codebook], mode: str, options: dict[str, Any]) -> Relaxed:
    """S_c(x) or Q_c(x) of every weight; the soft ones in one call, so that small layers share its cost."""
    xs, centers = [book.x for book in codebooks], [book.centers for book in codebooks]
    sharpness: list[Tensor] = []
    if mode == "soft":
        P = options.get("P")
        if P is None:
            gaps = all_row_gaps(centers)
            sharpness = [
                sharpness_of(gap, options["sharpness"]).to(c.dtype) for gap, c in zip(gaps, centers, strict=True)
            ]
        else:
            sharpness = [c.new_full((1,), P) for c in centers]
        weights = foreach_soft_quantize(xs, centers, sharpness)  # type: ignore[arg-type]
    else:
        weights = [hard_quantize(x, c) for x, c in zip(xs, centers, strict=True)]
    for weight, book in zip(weights, codebooks, strict=True):
        weight.requires_grad_(book.weight.requires_grad or book.centers.requires_grad)
    return Relaxed(mode, bool(options.get("straight_through")), weights, sharpness)


def stand_in(codebooks: list[Codebook], relaxed: Relaxed) -> None:
    """Let every layer multiply with its prepared weight until its mode is left."""
    for book, weight in zip(codebooks, relaxed.weights, strict=True):
        for layer in book.layers:
            layer._multiply_with(layer.weight_mode, weight)


@torch.no_grad()
def chain_gradients(
    codebooks: list[Codebook], relaxed: Relaxed, wanted: list[Codebook], *, to_weights: bool = True
) -> None:
    """What autograd would have done for the wanted codebooks: dL/dS or dL/dQ to x (added to x.grad) and to c (its .grad)."""
    chosen = {id(book) for book in wanted}
    used = [(i, book) for i, book in enumerate(codebooks) if id(book) in chosen and relaxed.weights[i].grad is not None]
    if not used:
        return
    gradients = [relaxed.weights[i].grad for i, _ in used]
    xs, centers = [book.x for _, book in used], [book.centers for _, book in used]
    if relaxed.mode == "soft":
        sharpness = [relaxed.sharpness[i] for i, _ in used]
        to_x, to_c = attempt("foreach_soft_quantize_backward", (gradients, xs, centers, sharpness))
    else:
        through = relaxed.straight_through
        pairs = [
            attempt("hard_quantize_backward", (g, x, c, through))
            for g, x, c in zip(gradients, xs, centers, strict=True)
        ]
        to_x, to_c = [g for g, _ in pairs], [h for _, h in pairs]
    for (_, book), g, h in zip(used, to_x, to_c, strict=True):
        x, c = book.weight, book.centers
        if c.requires_grad:
            c.grad = h
        if x.requires_grad and to_weights and relaxed.chain != "hard":
            g = book.layer.like_weight(g)
            x.grad = g if x.grad is None else x.grad + g


def gradients_may_stay_outside(codebooks: list[Codebook]) -> bool:
    """Whether nothing but the optimizer waits for gradients to reach weights and centers.

    Hooks of theirs, and data-parallel training, which averages gradients as they arrive, need the ordinary way; half types
    take it so that sums are rounded where autograd rounds them.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    parameters = [p for book in codebooks for p in (book.weight, book.centers)]
    plain = all(p.dtype in (torch.float32, torch.float64) and p.dtype == parameters[0].dtype for p in parameters)
    return plain and not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters)
