"""What is timed on a GPU beyond single ops: training steps of networks, as they are, compiled and as CUDA graphs; and the kernels
against torch.compile of the references."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qupedkern as qk

from .gpu_cases import GpuCase, single_tensors

_COMPILED = ("soft_quantize", "soft_quantize_backward", "prox_weights", "assign", "distance", "dequantize")
_STEPS = 1_000_000  # far more than are taken: no step is after the freeze
_WARM = 11  # steps on a side stream before a capture: kernels compile, cuDNN plans, modules load


class _Block(nn.Module):
    """Two 3 x 3 convolutions with batch norm and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


def _stages(widths: tuple[int, ...], blocks: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    inputs = widths[0]
    for i, outputs in enumerate(widths):
        for j in range(blocks):
            layers.append(_Block(inputs, outputs, 2 if i and not j else 1))
            inputs = outputs
    return layers


def _network(architecture: str) -> tuple[nn.Module, int, int]:
    """Model, side of its images, classes. ResNet-20 for CIFAR, ResNet-18 for ImageNet: He et al. 2015 (arXiv:1512.03385)."""
    if architecture == "resnet18":
        stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        layers, side, width, classes = _stages((64, 128, 256, 512), 2), 224, 512, 1000
    elif architecture == "resnet20":
        stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        layers, side, width, classes = _stages((16, 32, 64), 3), 32, 64, 10
    else:
        stem, layers, side, width, classes = [nn.Conv2d(3, 4, 3)], _stages((4,), 1), 8, 4, 10
    return (
        nn.Sequential(*stem, *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)),
        side,
        classes,
    )


def training_step(
    architecture: str, batch: int, device: str, variant: str | None, compiled: bool = False
) -> Callable[[], object]:
    """One training step on random images; variant None is plain SGD."""
    model, side, classes = _network(architecture)
    model = model.train().to(device)
    if variant is not None:
        qk.quantize_(model, bits=2)
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    x, y = torch.randn(batch, 3, side, side, device=device), torch.randint(classes, (batch,), device=device)
    forward = torch.compile(model) if compiled else model

    def loss() -> Tensor:
        return F.cross_entropy(forward(x), y)

    if variant is not None:
        optimizer = qk.QuPeD(model, sgd, variant=variant, total_steps=_STEPS)
        return lambda: optimizer.step(loss)

    def plain() -> None:
        sgd.zero_grad()
        loss().backward()
        sgd.step()

    return plain


_AS_GRAPH, _AS_COMPILED = ", CUDA graph", ", torch.compile"  # what the names of rows end with


def captured(step: Callable[[], object], device: str) -> Callable[[], object]:
    """The step as a CUDA graph. RuntimeError where something in it cannot be captured."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _way(name: str, step: Callable[[], object], plain: Callable[[], object] | None) -> GpuCase:
    candidates = {"kernel": step} if plain is None else {"kernel": step, "plain SGD": plain}
    return GpuCase(name, "chosen", 0.0, candidates, lambda: None)


def _against_plain(name: str, network: tuple[str, int], device: str, variant: str, way: str) -> GpuCase:
    """A QuPeD step beside the plain one, both as they are, as graphs or compiled."""
    pair = [training_step(*network, device, kind, compiled=way == _AS_COMPILED) for kind in (variant, None)]
    return _way(name, *([captured(step, device) for step in pair] if way == _AS_GRAPH else pair))


def steps(device: str, sizes: tuple[tuple[str, int], ...]) -> Iterator[tuple[str, Callable[[], GpuCase]]]:
    """Each network's plain and QuPeD step as it is, then as a graph, then compiled. A step is made when its turn comes: one that
    cannot be captured or compiled is a failure with its name, and the others go on."""
    graph = [("simultaneous", _AS_GRAPH)] if torch.device(device).type == "cuda" else []
    plan = [(network, how) for network in sizes for how in (("simultaneous", ""), ("hard", ""), *graph)]
    plan += [(network, ("simultaneous", _AS_COMPILED)) for network in sizes]
    for network, (variant, way) in plan:
        name = f"{network[0]} batch {network[1]}, QuPeD {variant}{way}"
        yield name, partial(_against_plain, name, network, device, variant, way)


def compiled(device: str, numel: int, levels: tuple[int, ...] = (4, 2, 16)) -> Iterator[GpuCase]:
    """The reference under torch.compile beside the kernel; each takes a while to compile."""
    for m in levels:
        for case in single_tensors(device, numel, (m,), bits=()):
            if case.name.split()[0] in _COMPILED and "eager" in case.candidates:
                fast = torch.compile(case.candidates["eager"], dynamic=False)
                yield GpuCase(
                    f"{case.name} against torch.compile", case.backend, case.bytes,
                    {"kernel": case.candidates["kernel"], "torch.compile": fast}, case.check,
                )  # fmt: skip
