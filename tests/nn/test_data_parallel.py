"""Quantized and packed models under DistributedDataParallel, one process, gloo."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from layer_cases import convolutional, quantized
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import qupedkern as qk


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this build of torch has no gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def train(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    optimizer = qk.QuPeD(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=4, freeze_at=0.5)
    for x, y in batches:
        optimizer.step(lambda x=x, y=y: nn.functional.cross_entropy(model(x), y))
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:find_unused_parameters=True was specified")
def test_a_quantized_model_trains_the_same_under_ddp() -> None:
    # the float evaluation does not use the centers, hence find_unused_parameters
    data = [(torch.randn(8, 1, 8, 8), torch.randint(3, (8,))) for _ in range(4)]
    torch.manual_seed(0)
    alone = train(quantized(convolutional(), bits=2), data)
    torch.manual_seed(0)
    model = quantized(convolutional(), bits=2)
    together = train(DistributedDataParallel(model, find_unused_parameters=True), data)
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    with qk.mode(model, "hard"):
        expected = model.eval()(data[0][0])
    torch.testing.assert_close(qk.pack_(model)(data[0][0]), expected)


@pytest.mark.usefixtures("one_process")
def test_a_packed_model_learns_its_centers_under_ddp() -> None:
    torch.manual_seed(0)
    model = qk.pack_(quantized(convolutional(), bits=2))
    wrapped = DistributedDataParallel(model)
    nn.functional.cross_entropy(wrapped(torch.randn(8, 1, 8, 8)), torch.randint(3, (8,))).backward()
    assert all(p.grad is not None for p in model.parameters())
