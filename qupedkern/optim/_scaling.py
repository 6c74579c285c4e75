"""Steps under a torch.amp.GradScaler, which knows the inner optimizer's parameters but not the centers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ._codebook import Codebook


def _center_gradients(codebooks: Iterable[Codebook]) -> list[Tensor]:
    return [book.centers.grad for book in codebooks if book.centers.grad is not None]


def _finite(gradients: list[Tensor]) -> bool:
    return all(bool(gradient.isfinite().all()) for gradient in gradients)


def scaled_step(scaler: Any, optimizer: torch.optim.Optimizer, codebooks: Iterable[Codebook]) -> bool:
    """Unscale every gradient and step; an overflow in any, the centers' too, voids the step and lowers the scale.

    codebooks: those whose centers' gradients belong to this step. Returns whether the step was made.
    """
    scale = scaler.get_scale()
    scaler.unscale_(optimizer)
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    centers = _center_gradients(codebooks)
    for gradient in centers:
        gradient.div_(scale)
    finite = _finite(gradients)
    if finite and not _finite(centers):
        scaler.update(scale * scaler.get_backoff_factor())  # the scaler has not seen the centers' overflow
        return False
    if not gradients:  # only centers learn, and the scaler refuses to step on nothing
        scaler.update(scale)
        return True
    if finite:
        scaler.step(optimizer)
    scaler.update()
    return finite


def unscale_centers(scaler: Any, codebooks: Iterable[Codebook]) -> bool:
    """Unscale the centers' gradients of an evaluation of their own; False, and a lower scale, where one overflowed."""
    if scaler is None:
        return True
    scale = scaler.get_scale()
    gradients = _center_gradients(codebooks)
    for gradient in gradients:
        gradient.div_(scale)
    if not _finite(gradients):
        scaler.update(scale * scaler.get_backoff_factor())
        return False
    return True
