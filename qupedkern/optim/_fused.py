"""The weight update of QuPeD in one call a parameter group: the inner optimizer's rule and state as arguments of quped_step."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qupedkern.ops._call import attempt

from ._codebook import Codebook, Statistics
from ._evaluation import Relaxed

_UNSUPPORTED = ("maximize", "amsgrad", "differentiable", "capturable", "fused")


@dataclass(frozen=True)
class _Rule:
    """One parameter group of torch.optim.SGD, Adam or AdamW in quped_step's terms."""

    optimizer: str
    lr: float
    weight_decay: float
    beta1: float  # SGD: momentum
    beta2: float  # SGD: dampening
    eps: float
    nesterov: bool


def _rule(inner: torch.optim.Optimizer, group: dict[str, Any]) -> _Rule | None:
    """None where the group asks for something quped_step does not do."""
    if any(group.get(option) for option in _UNSUPPORTED):
        return None
    lr, decay = float(group["lr"]), float(group["weight_decay"])
    if type(inner) is torch.optim.SGD:
        momentum, dampening = float(group["momentum"]), float(group["dampening"])
        return _Rule("sgd", lr, decay, momentum, dampening, 0.0, bool(group["nesterov"]))
    decoupled = type(inner) is torch.optim.AdamW or group.get("decoupled_weight_decay", False)
    beta1, beta2 = (float(beta) for beta in group["betas"])
    return _Rule("adamw" if decoupled else "adam", lr, decay, beta1, beta2, float(group["eps"]), False)


def _state(inner: torch.optim.Optimizer, weight: Tensor, rule: _Rule) -> tuple[int, list[Tensor]]:
    """The step to take, from 1, and the buffers in torch's own state, made as torch makes them at the first."""
    state = inner.state[weight]
    if rule.optimizer == "sgd":
        if rule.beta1 == 0:
            return 1, []
        first = state.get("momentum_buffer") is None
        if first:
            state["momentum_buffer"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        return 1 if first else 2, [state["momentum_buffer"]]
    if not state:
        default = torch.get_default_dtype()
        state["step"] = torch.tensor(0.0, dtype=default if default == torch.float64 else torch.float32)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(weight, memory_format=torch.preserve_format)
    return int(state["step"]) + 1, [state["exp_avg"], state["exp_avg_sq"]]


def can_fuse(inner: torch.optim.Optimizer) -> bool:
    """Whether the inner optimizer is one whose rule quped_step knows, with nothing hooked to its step."""
    known = type(inner) in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
    return known and not (inner._optimizer_step_pre_hooks or inner._optimizer_step_post_hooks)


@torch.no_grad()
def fused_update(
    inner: torch.optim.Optimizer,
    codebooks: list[Codebook],
    relaxed: Relaxed | None,
    strengths: list[Tensor | float] | None,
    norm: str,
) -> None:
    """Step, prox and count every weight it can, in one call a parameter group.

    A codebook it has done has its .statistics, and its centers the gradient of this evaluation where there was a relaxed one.
    """
    calls: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    rules: dict[int, _Rule | None] = {}
    for i, book in enumerate(codebooks):
        x = book.weight
        rule = rules.setdefault(id(book.group), _rule(inner, book.group))
        through = None if relaxed is None else relaxed.weights[i].grad
        given = through is not None and relaxed is not None and relaxed.chain != "hard"
        if rule is not None and x.requires_grad and (given or x.grad is not None):
            step, _ = _state(inner, x, rule)
            key = (id(book.group), step, x.dtype, x.device, through is None, x.grad is None)
            calls[key].append(i)
    for (group, step, _, _, no_chain, no_grad), members in calls.items():
        rule, books = rules[group], [codebooks[i] for i in members]
        assert rule is not None
        chain = "none" if no_chain or relaxed is None else relaxed.chain
        buffers = [[book.layer.by_rows(b) for b in _state(inner, book.weight, rule)[1]] for book in books]
        arguments = (
            [book.x for book in books],
            [] if no_grad else [book.layer.by_rows(book.weight.grad) for book in books],  # type: ignore[arg-type]
            [] if chain == "none" else [relaxed.weights[i].grad for i in members],  # type: ignore[union-attr]
            [b[0] for b in buffers if b],
            [b[1] for b in buffers if len(b) > 1],
            [book.centers for book in books],
            [relaxed.sharpness[i] for i in members] if chain == "soft" else [],  # type: ignore[union-attr]
            [
                _strength(book, None if strengths is None else strengths[i])
                for i, book in zip(members, books, strict=True)
            ],
            chain,
            rule.optimizer,
            norm,
            rule.lr,
            rule.weight_decay,
            rule.beta1,
            rule.beta2,
            rule.eps,
            rule.nesterov,
            step,
            False,
            False,
            0,
        )
        center_grad, counts, sums, _, _ = attempt("quped_step", arguments)
        for k, book in enumerate(books):
            book.statistics = Statistics(counts[k], sums[k] if sums else None)
            if center_grad and book.centers.requires_grad:
                book.centers.grad = center_grad[k]
            if rule.optimizer != "sgd":
                inner.state[book.weight]["step"] += 1


def _strength(book: Codebook, value: Tensor | float | None) -> Tensor:
    """[1] or [G] in the type of the centers; no prox is one of strength 0."""
    if isinstance(value, Tensor):
        return value.to(book.centers.dtype)
    return book.centers.new_full((1,), 0.0 if value is None else value)


@torch.no_grad()
def fused_center_step(
    codebooks: list[Codebook],
    rates: list[float],
    strengths: list[Tensor | float] | None,
    norm: str,
    method: str | None,
    clip: float,
) -> None:
    """The centers' step of codebooks that have statistics, in one call."""
    if not codebooks:
        return
    statistics = [book.statistics for book in codebooks]
    arguments = (
        [book.centers for book in codebooks],
        [torch.zeros_like(b.centers) if b.centers.grad is None else b.centers.grad for b in codebooks],
        [s.counts for s in statistics if s is not None],
        [s.sums for s in statistics if s is not None and s.sums is not None],
        [_strength(book, None if strengths is None else strengths[i]) for i, book in enumerate(codebooks)],
        _filled(rates, codebooks[0].centers),
        norm,
        method or "none",
        clip,
    )
    attempt("center_step", arguments)


def _filled(values: list[float], like: Tensor) -> Tensor:
    """Numbers as a tensor beside another. Filled in there: what comes from the host cannot be captured in a graph."""
    if len(set(values)) == 1:
        return like.new_full((len(values),), values[0])
    return torch.cat([like.new_full((1,), value) for value in values])
