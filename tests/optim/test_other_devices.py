"""QuPeD's steps on a device that is not the CPU: all that they compute with is there, and the bits are the CPU's."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from elsewhere import NAME, Elsewhere, Machine
from torch import Tensor, nn

import qupedkern as qk
from fl.models import filled


def trained(variant: str, device: str, center_rates: tuple[float, ...]) -> dict[str, Tensor]:
    """A state after steps before and after the freeze."""
    draw = torch.Generator().manual_seed(0)
    sizes = (6, 5, 4)[: len(center_rates) + 1]
    model: nn.Module = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    qk.quantize_(model, bits=2, rule=lambda *_: True)
    x, y = torch.randn(7, 6, generator=draw), torch.randint(sizes[-1], (7,), generator=draw)
    model = filled(model, {name: tensor.to(device) for name, tensor in model.state_dict().items()})
    layers = qk.nn.quantized_layers(model).values()
    groups = [
        {"params": [layer.weight, layer.bias], "lr": rate} for layer, rate in zip(layers, center_rates, strict=True)
    ]
    inner = torch.optim.SGD(groups, lr=0.1, momentum=0.9, foreach=True)
    optimizer = qk.QuPeD(model, inner, variant=variant, total_steps=5, freeze_at=0.6)
    x, y = x.to(device), y.to(device)
    for _ in range(5):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    return dict(model.state_dict())


@pytest.mark.parametrize("variant", ["simultaneous", "alternating", "hard"])
@pytest.mark.parametrize("center_rates", [(0.1, 0.1), (0.1, 0.02)])
def test_a_step_computes_where_the_model_is(variant: str, center_rates: tuple[float, ...]) -> None:
    here = trained(variant, "cpu", center_rates)
    with Machine():
        there = trained(variant, NAME, center_rates)
        for name, tensor in there.items():
            assert isinstance(tensor, Elsewhere)
            assert torch.equal(tensor.values, here[name])
