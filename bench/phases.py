"""Where the time of a training step goes, measured from outside: the optimizer's methods and the closure are wrapped.

Phases exclude one another: time in an inner phase is not counted again in the one around it, and what no phase covers is
"rest" (modes switched, gradients kept and added, schedules).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

FLOAT, QUANTIZED = "float evaluation", "quantized evaluation"
EVALUATIONS = (FLOAT, QUANTIZED)
METHODS = {  # of QuantizedOptimizer: the phase each of its methods is
    "_quantize_weights": "weight quantization",
    "_update_weights": "weight step",
    "_update_centers": "center step",
}
REST = "rest"
PHASES = (*EVALUATIONS, *METHODS.values(), REST)


class Clock:
    """Seconds by phase since the last reset; phases may nest, and time belongs to the innermost."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._open: list[str] = [REST]
        self._since = time.perf_counter()

    def _turn(self) -> None:
        now = time.perf_counter()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def stop(self) -> dict[str, float]:
        """Microseconds by phase, which sum to the time since the reset."""
        self._turn()
        return {name: 1e6 * seconds for name, seconds in self.seconds.items()}

    def wrap(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            with self.phase(name):
                return function(*args, **options)

        return run


@contextmanager
def backward_counts(clock: Clock, evaluation: Callable[[], str]) -> Iterator[None]:
    """Inside the block the backward pass of a loss belongs to the evaluation that made it."""
    plain = torch.Tensor.backward

    def backward(loss: Tensor, *args: Any, **options: Any) -> Any:
        with clock.phase(evaluation()):
            return plain(loss, *args, **options)

    torch.Tensor.backward = backward  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.backward = plain  # type: ignore[method-assign]


class Watched:
    """One optimizer and its model's closure, with a clock on its phases. `step` returns microseconds by phase.

    A plain torch optimizer evaluates once and steps; a quantized one runs the closure as often as its variant needs.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, closure: Callable[[], Tensor]) -> None:
        self.optimizer, self.clock, self._evaluation = optimizer, Clock(), FLOAT
        self.closure = lambda: self._forward(closure)
        self.quantized = hasattr(optimizer, "_evaluate")
        if self.quantized:
            self._watch_methods()

    def _forward(self, closure: Callable[[], Tensor]) -> Tensor:
        with self.clock.phase(self._evaluation):
            return closure()

    def _watch_methods(self) -> None:
        for method, phase in METHODS.items():
            setattr(self.optimizer, method, self.clock.wrap(getattr(self.optimizer, method), phase))
        evaluate = self.optimizer._evaluate  # type: ignore[attr-defined]

        def watched(closure: Any, scaler: Any, key: str, *args: Any, **options: Any) -> Any:
            self._evaluation = FLOAT if key == "float" else QUANTIZED
            return evaluate(closure, scaler, key, *args, **options)

        self.optimizer._evaluate = watched  # type: ignore[attr-defined]

    def step(self) -> dict[str, float]:
        self.clock.reset()
        with backward_counts(self.clock, lambda: self._evaluation):
            if self.quantized:
                self.optimizer.step(self.closure)  # type: ignore[arg-type]
            else:
                self.optimizer.zero_grad()
                self.closure().backward()
                with self.clock.phase("weight step"):
                    self.optimizer.step()
        return self.clock.stop()
