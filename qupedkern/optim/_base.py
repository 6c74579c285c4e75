"""What every optimizer of quantized weights shares: an inner torch optimizer, the centers' step, the freeze, the state dict."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from qupedkern.nn import mode
from qupedkern.nn._quantized import check_model, sorted_codebook
from qupedkern.ops import assign, dequantize, prox_centers, prox_weights

from ._codebook import Codebook, find_codebooks, take_centers_out
from ._evaluation import (
    Relaxed,
    chain_gradients,
    gradients_may_stay_outside,
    quantize_weights,
    stand_in,
    without_statistics,
)
from ._fused import can_fuse, fused_center_step, fused_update
from ._scaling import scaled_step
from .schedules import Schedule, check_schedule, freeze_step, value_at

Closure = Callable[[], Tensor]
Strengths = list[Tensor | float]  # of the prox, one for each codebook: a number or one for each row
_OWN_STATE = "quped"


class QuantizedOptimizer(torch.optim.Optimizer):
    """Base: subclasses implement _train_step. Its param_groups and state are the inner optimizer's own."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        total_steps: int,
        freeze_at: float | None,
        center_lr: Schedule,
        eta_2: Schedule | None,
        center_clip: Schedule,
        finetune_rate: Schedule,
    ) -> None:
        self._name = type(self).__name__
        check_model(self._name, model)
        self._check_options(optimizer, total_steps, freeze_at)
        check_schedule(self._name, "center_lr", center_lr)
        check_schedule(self._name, "eta_2", eta_2)
        check_schedule(self._name, "center_clip", center_clip, zero=False)
        check_schedule(self._name, "finetune_rate", finetune_rate, zero=False)
        self.model, self.inner = model, optimizer
        self.total_steps, self.freeze_step = total_steps, freeze_step(freeze_at, total_steps)
        self.center_lr, self.eta_2, self.center_clip, self.finetune_rate = center_lr, eta_2, center_clip, finetune_rate
        self.codebooks = find_codebooks(self._name, model, optimizer)
        self._check_codebooks(self.codebooks)
        take_centers_out(self.codebooks, optimizer)
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._share_state()
        self.steps_done = 0
        self.evaluations = 0  # gradient evaluations so far
        self.frozen = False
        self.last: dict[str, Tensor] = {}  # losses of the latest step, detached, by the mode they were taken in

    def _check_options(self, optimizer: Any, total_steps: Any, freeze_at: Any) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, QuantizedOptimizer):
            raise TypeError(f"{self._name}: optimizer must be a plain torch optimizer, got {type(optimizer).__name__}")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(
                f"{self._name}: LBFGS evaluates by itself and cannot be the inner optimizer; use SGD or Adam"
            )
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise ValueError(f"{self._name}: total_steps must be a positive integer, got {total_steps!r}")
        if freeze_at is not None and not 0 <= freeze_at <= 1:
            raise ValueError(f"{self._name}: freeze_at must be None or a share of the steps in [0, 1], got {freeze_at}")

    def _check_codebooks(self, codebooks: list[Codebook]) -> None:
        """What a subclass needs of the weights and their rates, before the inner optimizer is touched."""

    def _share_state(self) -> None:
        """The inner optimizer's groups and state, seen under this name: schedulers and state dicts work on either."""
        self.param_groups, self.state, self.defaults = self.inner.param_groups, self.inner.state, self.inner.defaults
        holder = {id(p): group for group in self.param_groups for p in group["params"]}
        for book in self.codebooks:
            book.group = holder[id(book.weight)]

    # -- one step -------------------------------------------------------------------------------------------------

    def step(self, closure: Closure | None = None, grad_scaler: Any = None) -> Tensor:  # type: ignore[override]
        """Run the evaluations of one step, their backward passes and every update; returns f(x), detached.

        closure: no arguments, returns the loss as a scalar tensor; called once per evaluation, each under the weights that
        evaluation needs; it must not call backward.  grad_scaler: a torch.amp.GradScaler; a step whose gradients overflow
        changes neither weights nor centers (where a variant evaluates once more at the new weights, an overflow there voids
        the centers' step alone).
        """
        if not callable(closure):
            raise TypeError(f"{self._name}.step: a closure that returns the loss is needed, got {closure!r}")
        if not self.frozen and self.steps_done >= self.freeze_step:
            self.freeze()
        self.last = {}
        scaler = grad_scaler if grad_scaler is not None and grad_scaler.is_enabled() else None
        loss = self._frozen_step(closure, scaler) if self.frozen else self._train_step(closure, scaler)
        self.steps_done += 1
        return loss

    def _train_step(self, closure: Closure, scaler: Any) -> Tensor:
        raise NotImplementedError(f"{self._name} must say what a step before the freeze does")

    def _clear(self) -> None:
        self.inner.zero_grad(set_to_none=True)
        for book in self.codebooks:
            book.centers.grad = None

    def _evaluate(
        self, closure: Closure, scaler: Any, key: str, statistics: bool, **options: Any
    ) -> tuple[Tensor, Relaxed | None]:
        """One forward and backward under a mode; gradients add to what is there, also if the closure clears them.

        Returns the loss, detached, and, where nothing else waits for the gradients of weights and centers, the quantized
        weights with theirs: these have then not reached x and c yet (chain_gradients).
        """
        learned = [*(p for group in self.param_groups for p in group["params"]), *(b.centers for b in self.codebooks)]
        kept = [(p, p.grad) for p in learned]
        for p in learned:
            p.grad = None
        relaxed = None
        with mode(self.model, key, **options), torch.enable_grad():
            if key != "float" and scaler is None and not self.frozen and gradients_may_stay_outside(self.codebooks):
                relaxed = self._quantize_weights(key, options)
                stand_in(self.codebooks, relaxed)
            with nullcontext() if statistics else without_statistics(self.model):
                loss = closure()
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                raise ValueError(
                    f"{self._name}.step: the closure must return a differentiable scalar loss, got {loss!r}"
                )
            (loss if scaler is None else scaler.scale(loss)).backward()
        for p, gradient in kept:
            if gradient is not None:
                p.grad = gradient if p.grad is None else gradient.add_(p.grad)
        self.evaluations += 1
        loss = loss.detach()
        self.last[key] = loss  # a tensor: reading its value here would make an accelerator wait
        return loss, relaxed

    def _quantize_weights(self, key: str, options: dict[str, Any]) -> Relaxed:
        return quantize_weights(self.codebooks, key, options)

    def _update_weights(
        self, relaxed: Relaxed | None, scaler: Any, strengths: Strengths | None, norm: str, *, center_gradients: bool
    ) -> bool:
        """x <- prox_{strength R(., c)}(the inner optimizer's step), where there are strengths; False where an overflow voided it.

        relaxed: what the quantized evaluation has left to be chained to x and c.
        center_gradients: whether those of the centers belong to this step and can void it.
        """
        for book in self.codebooks:
            book.statistics = None
        if scaler is None and can_fuse(self.inner):
            fused_update(self.inner, self.codebooks, relaxed, strengths, norm)
        rest = [book for book in self.codebooks if book.statistics is None]
        if relaxed is not None:
            chain_gradients(self.codebooks, relaxed, rest)
        kept = [(book.weight, book.weight.grad) for book in self.codebooks if book.statistics is not None]
        for weight, _ in kept:
            weight.grad = None  # the inner optimizer steps what has not been stepped
        try:
            if not self._inner_step(scaler, center_gradients=center_gradients):
                return False
        finally:
            for weight, gradient in kept:
                weight.grad = gradient
        with torch.no_grad():
            for book, strength in zip(self.codebooks, strengths or (), strict=False):
                if book.weight.requires_grad and book.statistics is None:
                    book.x.copy_(prox_weights(book.x, book.centers, strength, norm))
        return True

    def _update_centers(self, strengths: Strengths | None, norm: str, method: str | None) -> None:
        """c <- prox_{strength R(x, .)}(c - eta_2 h), the cells of the old centers; method None takes no prox, only sorts."""
        together: list[int] = []
        for i, book in enumerate(self.codebooks):
            if not book.centers.requires_grad:
                continue
            if book.statistics is not None and (method != "exact" or norm == "l2"):
                together.append(i)
            else:  # the exact l1 prox selects among the weights
                self._move_centers(book, 0.0 if strengths is None else strengths[i], norm, method)
        fused_center_step(
            [self.codebooks[i] for i in together],
            [self._center_rate(self.codebooks[i]) for i in together],
            None if strengths is None else [strengths[i] for i in together],
            norm,
            method if method in (None, "authors") else "counted",
            value_at(self.center_clip, self.steps_done),
        )

    def _inner_step(self, scaler: Any, *, center_gradients: bool = True) -> bool:
        """The inner optimizer's step, at the fine-tuning rate once frozen; False where an overflow made it void."""
        factor = self._finetune_factor()
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = group["lr"] * factor
        try:
            if scaler is None:
                self.inner.step()
                return True
            return scaled_step(scaler, self.inner, self.codebooks if center_gradients else [])
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate

    def _finetune_factor(self) -> float:
        return value_at(self.finetune_rate, self.steps_done) if self.frozen else 1.0

    def _center_rate(self, book: Codebook) -> float:
        """eta_2: absolute where given, else center_lr * eta_1 * m / n."""
        if self.eta_2 is not None:
            return value_at(self.eta_2, self.steps_done)
        factor = self._finetune_factor()
        return value_at(self.center_lr, self.steps_done) * book.rate * factor / book.members_per_center

    def _clipped(self, gradient: Tensor | None, centers: Tensor) -> Tensor:
        if gradient is None:
            return torch.zeros_like(centers)
        clip = value_at(self.center_clip, self.steps_done)
        return gradient.clamp(-clip, clip)

    @torch.no_grad()
    def _move_centers(self, book: Codebook, strength: Tensor | float, norm: str, method: str | None) -> None:
        old = book.centers.detach().clone()
        moved = old - self._center_rate(book) * self._clipped(book.centers.grad, old)
        if method is not None:
            moved = prox_centers(moved, book.x, strength, norm, method, at=old)
        book.centers.copy_(moved.sort(dim=-1).values)

    # -- after the freeze -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def freeze(self) -> None:
        """Store the codes and put every weight on its center; from here only centers and float parameters learn."""
        if self.frozen:
            return
        for book in self.codebooks:
            book.codes = assign(book.x, book.centers)
            book.x.copy_(dequantize(book.codes, book.centers))
        self.frozen = True

    def finish(self) -> None:
        """The end of a run: freeze if the schedule has not, so that weights lie on their centers."""
        self.freeze()

    def seek(self, step: int) -> None:
        """Continue the schedules and the freeze as if `step` steps had been done; ValueError where that would thaw weights."""
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"{self._name}.seek: step must be an integer >= 0, got {step!r}")
        if self.frozen and step < min(self.freeze_step, self.steps_done):
            raise ValueError(f"{self._name}.seek: the weights are frozen and cannot go back to step {step}")
        self.steps_done = step

    def _frozen_step(self, closure: Closure, scaler: Any) -> Tensor:
        self._clear()
        loss, _ = self._evaluate(closure, scaler, "hard", statistics=True)
        for book in self.codebooks:
            book.weight.grad = None
        if self._inner_step(scaler):
            for book in self.codebooks:
                self._follow(book)
        return loss

    @torch.no_grad()
    def _follow(self, book: Codebook) -> None:
        """Step the centers of frozen codes; where two cross, their codes are renamed with them. Weights move along."""
        assert book.codes is not None
        if not book.centers.requires_grad:
            return
        moved = book.centers - self._center_rate(book) * self._clipped(book.centers.grad, book.centers)
        book.codes, ascending = sorted_codebook(book.codes, moved)
        book.centers.copy_(ascending)
        book.x.copy_(dequantize(book.codes, book.centers))

    # -- state ----------------------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the inner optimizer's parameters and of the centers; step does so by itself."""
        self._clear()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "steps_done"):
            raise RuntimeError(f"{self._name}: add parameter groups to the inner optimizer before wrapping it")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)  # torch's own keeps only groups and state: a copy would have no model

    def state_dict(self) -> dict[str, Any]:
        """{"state", "param_groups"} of the inner optimizer and "quped": schedule position and, once frozen, the codes."""
        own: dict[str, Any] = {
            "steps_done": self.steps_done,
            "evaluations": self.evaluations,
            "frozen": self.frozen,
            "codes": {b.name: b.codes for b in self.codebooks if b.codes is not None},
        }
        return {**self.inner.state_dict(), _OWN_STATE: own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from state_dict(); the model's own state (weights, centers) is loaded separately."""
        if _OWN_STATE not in state_dict:
            raise ValueError(
                f"{self._name}: this state dict is not one of a quantized optimizer (no {_OWN_STATE!r} entry)"
            )
        own = state_dict[_OWN_STATE]
        if set(own) != {"steps_done", "evaluations", "frozen", "codes"}:
            raise ValueError(
                f"{self._name}: the {_OWN_STATE!r} entry of the state dict is damaged, it has {sorted(own)}"
            )
        expected = {b.name: tuple(b.x.shape) for b in self.codebooks} if own["frozen"] else {}
        came = {name: tuple(codes.shape) for name, codes in own["codes"].items()}
        if expected != came:
            raise ValueError(f"{self._name}: the state dict has codes for {came}, this model needs {expected}")
        self.inner.load_state_dict({key: value for key, value in state_dict.items() if key != _OWN_STATE})
        self._share_state()
        self.steps_done, self.evaluations = own["steps_done"], own["evaluations"]
        self.frozen = own["frozen"]
        for book in self.codebooks:
            codes = own["codes"].get(book.name)
            book.codes = None if codes is None else codes.to(book.weight.device, copy=True)
