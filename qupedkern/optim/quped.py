"""QuPeD: alternating proximal updates of weights and centers over any torch optimizer (Algorithm 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qupedkern.nn import all_row_gaps

from ._base import Closure, QuantizedOptimizer
from ._codebook import Codebook
from ._evaluation import Relaxed, chain_gradients
from ._scaling import unscale_centers
from .schedules import Schedule, check_schedule, linear_share, value_at

EVALUATIONS = {"simultaneous": 2, "alternating": 3, "hard": 2}  # of a step before the freeze; 1 after it
CENTER_PROXES = ("counted", "exact", "authors")
_DOSE = {"simultaneous": 0.3, "alternating": 0.3, "hard": 3.0}


class QuPeD(QuantizedOptimizer):
    """Minimises F(x, c) = f(x) + f(S_c(x)) + lambda R(x, c) over weights x and centers c; what ships is Q_c(x).

        x <- prox_{eta_1 lambda R(., c)}(x - eta_1 g)      with any torch optimizer's step inside the prox
        c <- prox_{eta_2 lambda R(x, .)}(c - eta_2 h)      members from the old centers; h clipped to +-center_clip

    variant: "alternating"   g = grad_x f(x) + grad_x f(S_c(x)), then h = grad_c f(S_c(x)) at the new x: 3 evaluations (the paper)
             "simultaneous"  g as above, h from the same evaluation of f(S_c(x)): 2 evaluations
             "hard"          g = grad_x f(x), h = grad_c f(Q_c(x)): 2 evaluations (the authors' published code)
    Other parameters (biases, norms) take the gradients that the weights take. After `freeze_at` of total_steps the weights
    stay at Q_c(x) with fixed codes, and centers and other parameters are fine-tuned on f(Q_c(x)) at finetune_rate times the
    rate: 1 evaluation. Batch-norm statistics are gathered in the quantized evaluations only.

    Scale-free settings: sharpness p, the soft quantizer's P = p / gap with gap = (c_m - c_1) / (m - 1) of each row; dose,
    the sum of eta_1 lambda over the unfrozen steps in half gaps at the initial rate, lambda growing linearly (default 0.3,
    3 for "hard"; with norm "l2", which has no unit, the plain sum of eta_1 lambda); center_lr a, eta_2 = a eta_1 m / n for n
    weights a row. Absolute ones instead: P, lam, eta_2. Each is a number or a function of the step.
    center_prox: "counted", "exact", "authors" (for comparison) or None.
    QuPeD, Ozkara et al. 2021 (arXiv:2107.13892), Algorithm 1.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        variant: str = "simultaneous",
        norm: str = "l1",
        dose: float | None = None,
        center_lr: Schedule = 3.0,
        sharpness: Schedule = 10.0,
        center_prox: str | None = "counted",
        freeze_at: float | None = 0.8,
        *,
        total_steps: int,
        lam: Schedule | None = None,
        eta_2: Schedule | None = None,
        P: Schedule | None = None,
        center_clip: Schedule = 10.0,
        finetune_rate: Schedule = 0.1,
    ) -> None:
        for name, value, choices in (("variant", variant, tuple(EVALUATIONS)), ("norm", norm, ("l1", "l2"))):
            if value not in choices:
                raise ValueError(f"QuPeD: {name} must be one of {', '.join(choices)}, got {value!r}")
        if center_prox is not None and center_prox not in CENTER_PROXES:
            raise ValueError(
                f"QuPeD: center_prox must be one of {', '.join(CENTER_PROXES)} or None, got {center_prox!r}"
            )
        if dose is not None and lam is not None:
            raise ValueError(f"QuPeD: give dose or lam, not both, got dose={dose} and lam={lam}")
        if callable(dose) or isinstance(dose, str):
            raise TypeError(
                f"QuPeD: dose must be a number or None, got {type(dose).__name__}; a schedule goes into lam"
            )
        check_schedule("QuPeD", "dose", dose)
        check_schedule("QuPeD", "lam", lam)
        check_schedule("QuPeD", "sharpness", sharpness, zero=False)
        check_schedule("QuPeD", "P", P, zero=False)
        self.variant, self.norm, self.center_prox = variant, norm, center_prox
        self.dose = _DOSE[variant] if dose is None else dose
        self.sharpness, self.P, self.lam = sharpness, P, lam
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

    def _check_codebooks(self, codebooks: list[Codebook]) -> None:
        still = [book.name for book in codebooks if not book.initial_rate > 0]
        if self.lam is None and self.dose > 0 and still:
            raise ValueError(
                f"QuPeD: a dose is spent at the initial rate, which is 0 for {', '.join(still)}; give lam instead"
            )

    def _lambdas(self) -> list[Tensor | float]:
        """lambda of this step, for each codebook: absolute, or the rows' share of the dose, [G]."""
        if self.lam is not None:
            return [value_at(self.lam, self.steps_done)] * len(self.codebooks)
        share = self.dose * linear_share(self.steps_done, min(self.freeze_step, self.total_steps))
        shares = [share / book.initial_rate for book in self.codebooks]
        if self.norm != "l1":
            return list(shares)
        # half a gap: the way of an untrained weight to its center
        half_gaps = torch._foreach_mul(all_row_gaps([book.centers for book in self.codebooks]), 0.5)
        return list(torch._foreach_mul(half_gaps, shares))

    def _soft(self) -> dict[str, Any]:
        if self.P is not None:
            return {"P": value_at(self.P, self.steps_done)}
        return {"sharpness": value_at(self.sharpness, self.steps_done)}

    def _train_step(self, closure: Closure, scaler: Any) -> Tensor:
        self._clear()
        loss, _ = self._evaluate(closure, scaler, "float", statistics=False)
        if self.variant == "hard":
            relaxed = self._hard_evaluation(closure, scaler)
        else:
            _, relaxed = self._evaluate(
                closure, scaler, "soft", statistics=self.variant == "simultaneous", **self._soft()
            )
        again = self.variant == "alternating"  # the centers' gradient comes from an evaluation at the new weights
        lambdas = self._lambdas()
        strengths = [book.rate * lam for book, lam in zip(self.codebooks, lambdas, strict=True)]
        if not self._update_weights(relaxed, scaler, strengths, self.norm, center_gradients=not again):
            return loss
        if again:
            self._clear()
            _, relaxed = self._evaluate(closure, scaler, "soft", statistics=True, **self._soft())
            if relaxed is not None:
                chain_gradients(self.codebooks, relaxed, self.codebooks, to_weights=False)
            if not unscale_centers(scaler, self.codebooks):
                return loss
        strengths = [self._center_rate(book) * lam for book, lam in zip(self.codebooks, lambdas, strict=True)]
        self._update_centers(strengths, self.norm, self.center_prox)
        return loss

    def _hard_evaluation(self, closure: Closure, scaler: Any) -> Relaxed | None:
        """f(Q_c(x)), from which only the centers learn."""
        kept = [(p, p.grad) for group in self.param_groups for p in group["params"]]
        for p, _ in kept:
            p.grad = None
        _, relaxed = self._evaluate(closure, scaler, "hard", statistics=True)
        for p, gradient in kept:
            p.grad = gradient
        return relaxed
