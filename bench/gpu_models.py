"""What is timed on a GPU beyond single ops: a training step of a network, and the kernels against torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F

import qupedkern as qk
from fl import models

from .gpu_cases import GpuCase, single_tensors

_COMPILED = ("soft_quantize", "soft_quantize_backward", "prox_weights", "assign")
_STEPS = 1_000_000  # far more than are taken: no step is after the freeze


def _step(architecture: str, batch: int, device: str, variant: str | None) -> Callable[[], object]:
    """One training step on random images; variant None is plain SGD."""
    model = models.build(architecture, (3, 32, 32), 10, seed=0).train().to(device)
    if variant is not None:
        qk.quantize_(model, bits=2)
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    x, y = torch.randn(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(x), y)

    if variant is not None:
        optimizer = qk.QuPeD(model, sgd, variant=variant, total_steps=_STEPS)
        return lambda: optimizer.step(loss)

    def plain() -> None:
        sgd.zero_grad()
        loss().backward()
        sgd.step()

    return plain


def steps(device: str, architecture: str = "resnet20", batch: int = 128) -> Iterator[GpuCase]:
    """A QuPeD step as it is, against plain SGD: ratios below 1 say how much dearer it is."""
    plain = _step(architecture, batch, device, None)
    for variant in ("simultaneous", "hard"):
        case = GpuCase("models", f"{architecture} batch {batch}, QuPeD {variant}", "chosen", 0.0, {}, lambda: None)
        yield replace(case, candidates={"kernel": _step(architecture, batch, device, variant), "plain SGD": plain})


def compiled(device: str, numel: int, levels: tuple[int, ...] = (4,)) -> Iterator[GpuCase]:
    """The reference under torch.compile instead of eager; each takes a while to compile."""
    for case in single_tensors(device, numel, levels):
        if case.name.split()[0] in _COMPILED:
            fast = torch.compile(case.candidates["eager"], dynamic=False)
            yield replace(case, candidates={"kernel": case.candidates["kernel"], "torch.compile": fast})
