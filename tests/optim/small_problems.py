"""A small network and its data, as a model and as plain tensors; shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qupedkern as qk
from qupedkern.ops import _call, _define

Closure = Callable[[], Tensor]


def network(
    seed: int = 0, *, levels: int = 4, groups: str | int = "tensor", dtype: torch.dtype = torch.float32
) -> nn.Module:
    """6 -> 8 -> 3 with both weights quantized; nothing in it depends on the mode but the weights."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    qk.quantize_(model, levels=levels, groups=groups, rule=lambda *_: True)
    return model


def normalised(seed: int = 0) -> nn.Module:
    """The same with batch norm and dropout-free convolution in front: 1 x 4 x 4 -> 3."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    qk.quantize_(model, bits=2, rule=lambda *_: True)
    return model


def batch(step: int, shape: tuple[int, ...] = (6,), dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(16, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(3, (16,), generator=generator)


def closure_of(model: nn.Module, x: Tensor, y: Tensor) -> Closure:
    return lambda: F.cross_entropy(model(x), y)


def train(model: nn.Module, optimizer: Any, first: int, last: int, shape: tuple[int, ...] = (6,)) -> list[float]:
    """Steps first .. last - 1, each on its own batch; the returned losses."""
    return [float(optimizer.step(closure_of(model, *batch(step, shape)))) for step in range(first, last)]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that differ in any bit (there is no NaN in these tests)."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


Make = Callable[..., Any]
MAKERS: dict[str, Make] = {
    **{
        variant: (lambda model, inner, variant=variant, **options: qk.QuPeD(model, inner, variant, **options))
        for variant in ("simultaneous", "alternating", "hard")
    },
    "straight_through": qk.StraightThrough,
}
INNER: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
}


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def ops_that_run(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops as they run from here on, by the direct way or the dispatcher's."""
    ran: list[str] = []
    compute, run = _call._compute, _define.run
    monkeypatch.setattr(_call, "_compute", lambda op, *rest: (ran.append(op), compute(op, *rest))[1])
    for module in (_call, _define):
        monkeypatch.setattr(module, "run", lambda op, args: (ran.append(op.name), run(op, args))[1])
    return ran
