"""StraightThrough: train through the hard quantizer with learned centers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._base import Closure, QuantizedOptimizer
from .schedules import Schedule


class StraightThrough(QuantizedOptimizer):
    """Minimises f(Q_c(x)) with the straight-through estimator: grad_x := grad of f at Q_c(x); h = its sum over each cell.

    One evaluation a step. Weights step by the inner optimizer, centers by eta_2 = center_lr * eta_1 * m / n (or eta_2
    absolute) with h clipped to +-center_clip. After freeze_at of total_steps as in QuPeD. step returns f(Q_c(x)).
    Bengio et al. 2013 (arXiv:1308.3432) for the estimator.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        center_lr: Schedule = 3.0,
        freeze_at: float | None = 0.8,
        *,
        total_steps: int,
        eta_2: Schedule | None = None,
        center_clip: Schedule = 10.0,
        finetune_rate: Schedule = 0.1,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            total_steps=total_steps,
            freeze_at=freeze_at,
            center_lr=center_lr,
            eta_2=eta_2,
            center_clip=center_clip,
            finetune_rate=finetune_rate,
        )

    def _train_step(self, closure: Closure, scaler: Any) -> Tensor:
        self._clear()
        loss, relaxed = self._evaluate(closure, scaler, "hard", statistics=True, straight_through=True)
        if self._update_weights(relaxed, scaler, None, "l1", center_gradients=True):
            self._update_centers(None, "l1", None)
        return loss
