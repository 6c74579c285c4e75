"""Schedules as plain functions of the step; every option that takes a number also takes such a function."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Schedule = float | Callable[[int], float]


def value_at(schedule: Schedule, step: int) -> float:
    """The number itself, or the function's value at this step (0-based). ValueError where that is not finite and >= 0."""
    value = float(schedule(step) if callable(schedule) else schedule)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"schedule: its value at step {step} must be finite and >= 0, got {value}")
    return value


def check_schedule(owner: str, name: str, value: Any, *, zero: bool = True) -> None:
    """A function of the step, None, or a finite number >= 0 (> 0 where zero is not allowed)."""
    if value is None or callable(value):
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}: {name} must be a number or a function of the step, got {type(value).__name__}")
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{owner}: {name} must be finite and {'>=' if zero else '>'} 0, got {value}")


def linear_share(step: int, steps: int) -> float:
    """Share of a dose spent in this step when the rate grows linearly: 2 (k + 1) / (K (K + 1)); sums to 1 over K steps."""
    return 2.0 * (step + 1) / (steps * (steps + 1)) if step < steps else 0.0


def geometric(start: float, stop: float, steps: int) -> Callable[[int], float]:
    """From start to stop by equal factors over `steps` steps, then constant: for annealing the sharpness."""
    if not (start > 0 and stop > 0 and steps >= 1):
        raise ValueError(f"geometric: start and stop must be positive and steps >= 1, got {start}, {stop}, {steps}")
    return lambda step: start * (stop / start) ** min(step / max(steps - 1, 1), 1.0)


def freeze_step(freeze_at: float | None, total_steps: int) -> int:
    """The first step with frozen weights: freeze_at is a share of total_steps; None never freezes by itself."""
    return total_steps + 1 if freeze_at is None else min(round(freeze_at * total_steps), total_steps)
