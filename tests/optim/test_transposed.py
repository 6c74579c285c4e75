"""Transposed convolutions: their rows of centers are their output channels', in every step of every optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_problems import batch
from torch import nn

import qupedkern as qk

INNER: dict[str, Any] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.02),
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=0.01),  # one that quped_step does not know
}


def pair() -> tuple[nn.Module, nn.Module]:
    """The same map twice: two linear layers, and transposed convolutions of one pixel, the first in two groups."""
    torch.manual_seed(0)
    first, second = nn.ConvTranspose2d(6, 8, 1, groups=2), nn.ConvTranspose2d(8, 3, 1)
    convolutions = nn.Sequential(first, nn.Tanh(), second, nn.Flatten())
    linears = nn.Sequential(nn.ModuleList([nn.Linear(3, 4), nn.Linear(3, 4)]), nn.Linear(8, 3))
    with torch.no_grad():
        for part, linear in enumerate(linears[0]):
            linear.weight.copy_(first.weight[3 * part : 3 * part + 3, :, 0, 0].T)
            linear.bias.copy_(first.bias[4 * part : 4 * part + 4])
        linears[1].weight.copy_(second.weight[:, :, 0, 0].T)
        linears[1].bias.copy_(second.bias)
    linears.forward = lambda x: linears[1](torch.cat([linears[0][0](x[:, :3]), linears[0][1](x[:, 3:])], 1).tanh())
    for model in (convolutions, linears):
        qk.quantize_(model, levels=3, groups="channel", rule=lambda *_: True)
    return convolutions, linears


@pytest.mark.parametrize("inner", list(INNER))
@pytest.mark.parametrize("method", ["simultaneous", "hard", "straight through"])
def test_a_transposed_convolution_learns_what_a_linear_layer_of_the_same_weights_does(inner: str, method: str) -> None:
    models = pair()
    for model, image in zip(models, (True, False), strict=True):
        options: dict[str, Any] = {"total_steps": 8, "freeze_at": 0.5}
        if method == "straight through":
            optimizer = qk.StraightThrough(model, INNER[inner](model), **options)
        else:
            optimizer = qk.QuPeD(model, INNER[inner](model), variant=method, **options)
        for step in range(8):
            x, y = batch(step)
            inputs = x[:, :, None, None] if image else x
            optimizer.step(lambda inputs=inputs, y=y, model=model: nn.functional.cross_entropy(model(inputs), y))
        assert optimizer.frozen
    convolutions, linears = models
    first = torch.cat([linear.centers for linear in linears[0]])
    # float32 after 8 steps: torch sums a convolution and a matrix product in different orders
    torch.testing.assert_close(convolutions[0].centers, first, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(convolutions[2].centers, linears[1].centers, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(convolutions[2].weight[:, :, 0, 0].T, linears[1].weight, rtol=1e-4, atol=1e-5)
    x, _ = batch(0)
    with qk.mode(convolutions, "hard"):
        expected = convolutions(x[:, :, None, None])
    assert torch.equal(qk.pack_(convolutions)(x[:, :, None, None]), expected)
