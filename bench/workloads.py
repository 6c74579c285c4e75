"""The tensors that are timed, by name, and what training would give with them: weights, centers, sharpness, gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

import qupedkern as qk

SHARPNESS = 10.0  # in 1/gap, what training uses


@dataclass(frozen=True)
class Workload:
    """Tensors of one call, and the threads they are timed with."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    threads: int

    @property
    def numel(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    @property
    def title(self) -> str:
        return f"{self.name}, {self.threads} thread{'s' if self.threads > 1 else ''}"


@lru_cache(maxsize=1)
def resnet20_shapes() -> tuple[tuple[int, ...], ...]:
    """The 20 weights of ResNet-20 that quantize_ picks: all but the first convolution's and the last layer's."""
    from fl import models

    model = models.build("resnet20", (3, 32, 32), 10, seed=0)
    qk.quantize_(model, bits=1)
    return tuple(tuple(layer.weight.shape) for layer in qk.nn.quantized_layers(model).values())


def workload(name: str, threads: int | None = None) -> Workload:
    """layer (one of ResNet-20), 64k, 1M (these stay in the last cache), 16M, 64M (these do not), ResNet-20 (20 tensors).

    threads: other than the workload's own, which are 1 for what fits the cache and 2 for what does not.
    """
    known = {
        "64k": lambda: Workload("64k", ((256, 256),), 1),
        "layer": lambda: Workload("64 x 64 x 3 x 3", ((64, 64, 3, 3),), 1),
        "1M": lambda: Workload("1M", ((1024, 1024),), 1),
        "ResNet-20": lambda: Workload("ResNet-20", resnet20_shapes(), 1),
        "16M": lambda: Workload("16M", ((4096, 4096),), 2),
        "64M": lambda: Workload("64M", ((8192, 8192),), 2),
    }
    if name not in known:
        raise KeyError(f"workload must be one of {', '.join(known)}, got {name!r}")
    found = known[name]()
    return found if threads is None else replace(found, threads=threads)


@dataclass(frozen=True)
class Tensors:
    """One entry a tensor. x, grads: the workload's shapes; centers: [m], float32; sharpness: [1], float32."""

    xs: list[Tensor]
    centers: list[Tensor]
    sharpness: list[Tensor]
    grads: list[Tensor]


def tensors(work: Workload, m: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensors:
    """Normal weights of standard deviation 0.1 with centers at their quantiles, and normal gradients."""
    generator = torch.Generator().manual_seed(seed)
    xs = [0.1 * torch.randn(shape, generator=generator) for shape in work.shapes]
    centers = [qk.init_centers(x.flatten()[:20000], m, method="quantile") for x in xs]
    sharpness = [SHARPNESS / qk.nn.row_gaps(c) for c in centers]
    grads = [torch.randn(shape, generator=generator) for shape in work.shapes]
    return Tensors([x.to(dtype) for x in xs], centers, sharpness, [g.to(dtype) for g in grads])
