"""The networks that clients train, by name, with an initialisation of their own seed."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, int, int]


class MLP(nn.Module):
    """Three linear layers, inputs - 128 - 64 - classes, ReLU between. x: [batch, ...] -> logits [batch, classes]."""

    def __init__(self, input_shape: Shape, num_classes: int) -> None:
        super().__init__()
        channels, height, width = input_shape
        self.linear1 = nn.Linear(channels * height * width, 128)
        self.linear2 = nn.Linear(128, 64)
        self.linear3 = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.linear1(x.flatten(1)))
        return self.linear3(F.relu(self.linear2(x)))


class CNN(nn.Module):
    """Two 3 x 3 convolutions (16, 32 channels) with batch norm, ReLU and 2 x 2 max-pooling, then linear 128 - classes.

    x: [batch, channels, height, width], height and width at least 4 -> logits [batch, classes].
    22,698 parameters for 8 x 8 images of one channel and 10 classes.
    """

    def __init__(self, input_shape: Shape, num_classes: int) -> None:
        super().__init__()
        channels, height, width = input_shape
        if height < 4 or width < 4:
            raise ValueError(f"CNN: images must be at least 4 x 4, got {height} x {width}")
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(32)
        self.linear1 = nn.Linear(32 * (height // 4) * (width // 4), 128)
        self.linear2 = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        return self.linear2(F.relu(self.linear1(x.flatten(1))))


ARCHITECTURES: dict[str, Callable[[Shape, int], nn.Module]] = {"mlp": MLP, "cnn": CNN}


def build(name: str, input_shape: Shape, num_classes: int, seed: int) -> nn.Module:
    """A new model with PyTorch's default initialisation drawn from `seed`; the global generator is left as it was.

    name: a key of ARCHITECTURES.  input_shape: (channels, height, width).
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"build: architecture must be one of {', '.join(sorted(ARCHITECTURES))}, got {name!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ARCHITECTURES[name](input_shape, num_classes)
