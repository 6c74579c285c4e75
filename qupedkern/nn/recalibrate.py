"""recalibrate_: batch-norm statistics of the weights that will ship."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ._quantized import check_model


@dataclass(frozen=True)
class Recalibration:
    """What recalibrate_ did. accuracy_before and _after: share of the batches' labels met, None where they had none.

    shift: the largest change of a running mean, in units of the old standard deviation.
    """

    layers: int
    batches: int
    shift: float
    accuracy_before: float | None
    accuracy_after: float | None

    def __str__(self) -> str:
        line = f"recalibrated {self.layers} batch norms over {self.batches} batches, largest shift {self.shift:.3f} sd"
        if self.accuracy_before is not None and self.accuracy_after is not None:
            line += f", accuracy on these batches {self.accuracy_before:.4f} -> {self.accuracy_after:.4f}"
        return line


def _parts(batch: Any) -> tuple[Any, Tensor | None]:
    if isinstance(batch, (tuple, list)):
        labels = batch[1] if len(batch) > 1 and isinstance(batch[1], Tensor) else None
        return batch[0], labels
    return batch, None


def _accuracy(model: nn.Module, batches: list[Any]) -> float | None:
    """Share of class labels met by the largest of the model's outputs; None where there is no label per row of outputs."""
    right = total = 0
    for batch in batches:
        inputs, labels = _parts(batch)
        if labels is None or labels.is_floating_point():
            return None
        outputs = model(inputs)
        if not isinstance(outputs, Tensor) or outputs.shape[:-1] != labels.shape:
            return None
        right += int((outputs.argmax(-1) == labels).sum())
        total += labels.numel()
    return right / total if total else None


def _restore(norm: nn.Module, state: dict[str, Tensor]) -> None:
    for name, buffer in norm.named_buffers():
        buffer.copy_(state[name])


@torch.no_grad()
def recalibrate_(model: nn.Module, batches: Iterable[Any]) -> Recalibration:
    """Replace every batch norm's running statistics by their plain average over the batches, in place; report the effect.

    Statistics belong to the weights they were gathered under. Call it on a packed model, or under qk.mode(model, "hard").
    At 2 bits and below it can rescue a post-training model; it can also cost points, so it never runs by itself: compare
    accuracy_before and accuracy_after. A batch norm that no batch reaches keeps what it had.

    batches: inputs, or (inputs, class labels) pairs; kept in a list, since they are run up to three times.
    Raises ValueError where there is nothing to recalibrate or no batch; statistics are then, and after any error of the
    model, what they were.
    """
    check_model("recalibrate_", model)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    kept = list(batches)
    if not norms or not kept:
        lack = "has no batch norm with running statistics" if not norms else "needs at least one batch, got none"
        raise ValueError(f"recalibrate_: the model {lack}")
    training = {module: module.training for module in model.modules()}
    old = [{k: v.clone() for k, v in norm.named_buffers()} for norm in norms]
    momenta = [norm.momentum for norm in norms]
    try:
        model.eval()
        before = _accuracy(model, kept)
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average
            norm.train()
        for batch in kept:
            model(_parts(batch)[0])
        for norm, state in zip(norms, old, strict=True):
            norm.eval()
            if not norm.num_batches_tracked:
                _restore(norm, state)
        after = _accuracy(model, kept)
    except BaseException:
        for norm, state in zip(norms, old, strict=True):
            _restore(norm, state)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, flag in training.items():
            module.training = flag
    shifts = [
        float(((n.running_mean - s["running_mean"]).abs() / (s["running_var"] + n.eps).sqrt()).max())
        for n, s in zip(norms, old, strict=True)
        if n.running_mean is not None
    ]
    return Recalibration(len(norms), len(kept), max(shifts), before, after)
