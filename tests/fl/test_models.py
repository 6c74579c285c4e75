"""The networks: pooling that equals torch's to the bit, before the ReLU as after it."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fl import models


@st.composite
def images(draw: st.DrawFn) -> Tensor:
    """[batch, channels, height, width] of small whole numbers, so that blocks have ties, contiguous or not."""
    shape = [draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(2, 9)), draw(st.integers(2, 9))]
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randint(-2, 3, shape, generator=random).to(draw(st.sampled_from([torch.float32, torch.float64])))
    return x.contiguous(memory_format=torch.channels_last) if draw(st.booleans()) else x


@given(images())
def test_pooling_is_torchs_to_the_bit_also_before_the_relu(x: Tensor) -> None:
    grad = torch.arange(x[:, :, ::2, ::2].numel(), dtype=x.dtype)
    results = []
    for pool in (
        lambda x: F.relu(models.max_pool(x)),
        lambda x: F.max_pool2d(F.relu(x), 2),
        models.max_pool,
        lambda x: F.max_pool2d(x, 2),
    ):
        leaf = x.clone().requires_grad_()
        y = pool(leaf)
        (gradient,) = torch.autograd.grad(y, leaf, grad[: y.numel()].view(y.shape))
        results.append((y.detach(), gradient))
    for one, two in ((results[0], results[1]), (results[2], results[3])):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])


@pytest.mark.parametrize("name", ["cnn", "cnn1", "cnn2"])
def test_the_convolutional_networks_pool_twice(name: str) -> None:
    model = models.build(name, (1, 14, 14), 10, seed=0).eval()
    assert model.linear1.in_features == model.conv2.out_channels * 3 * 3
    assert model(torch.rand(2, 1, 14, 14)).shape == (2, 10)
