"""The networks that clients train, by name, with an initialisation of their own seed."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, int, int]


class _MaxPool(torch.autograd.Function):
    """F.max_pool2d(x, 2), to the bit, values and gradient. torch's forward pools along channels: beside each other in memory
    they go through vector registers, which for 25 x 64 images of 14 x 14 takes a fifth of the time, copies included."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        pooled = torch.ops.aten.max_pool2d_with_indices(x.contiguous(memory_format=torch.channels_last), [2, 2])
        y, indices = (one.contiguous() for one in pooled)
        ctx.save_for_backward(x, indices)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, indices = ctx.saved_tensors
        options = [2, 2], [2, 2], [0, 0], [1, 1], False
        return torch.ops.aten.max_pool2d_with_indices_backward(grad.contiguous(), x.contiguous(), *options, indices)


def max_pool(x: Tensor) -> Tensor:
    """The largest of each 2 x 2 block: [batch, channels, height, width] -> [.., height // 2, width // 2].

    Before a ReLU, which then has a quarter of the work: the two commute, and neither sends a gradient to what is not positive.
    """
    if x.device.type != "cpu":
        return F.max_pool2d(x, 2)
    return _MaxPool.apply(x)


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
    """Two 3 x 3 convolutions (16, 32 channels) with batch norm, 2 x 2 max-pooling and ReLU, then linear 128 - classes.

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
        x = F.relu(max_pool(self.norm1(self.conv1(x))))
        x = F.relu(max_pool(self.norm2(self.conv2(x))))
        return self.linear2(F.relu(self.linear1(x.flatten(1))))


class PlainCNN(nn.Module):
    """CNN1: two 3 x 3 convolutions of 16 channels, each with 2 x 2 max-pooling and ReLU, then linear 48 - classes.
    CNN2 (third=True): between them a 5 x 5 convolution of 32 channels. No batch norm.

    x: [batch, channels, height, width], height and width at least 4 -> logits [batch, classes].
    CNN1 has 9,930 parameters for 14 x 14 images of one channel and 10 classes, CNN2 25,066.
    """

    def __init__(self, input_shape: Shape, num_classes: int, third: bool = False) -> None:
        super().__init__()
        channels, height, width = input_shape
        if height < 4 or width < 4:
            raise ValueError(f"CNN: images must be at least 4 x 4, got {height} x {width}")
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1)
        self.between = nn.Conv2d(16, 32, 5, padding=2) if third else None
        self.conv2 = nn.Conv2d(32 if third else 16, 16, 3, padding=1)
        self.linear1 = nn.Linear(16 * (height // 4) * (width // 4), 48)
        self.linear2 = nn.Linear(48, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(max_pool(self.conv1(x)))
        if self.between is not None:
            x = F.relu(self.between(x))
        x = F.relu(max_pool(self.conv2(x)))
        return self.linear2(F.relu(self.linear1(x.flatten(1))))


class _ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm around a shortcut; where the size changes, the shortcut is a 1 x 1 convolution."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """Residual network for small images: a 3 x 3 convolution, three stages of blocks (16, 32, 64 channels), one linear layer.

    x: [batch, channels, height, width], height and width at least 4 -> logits [batch, classes]. 6 blocks_per_stage + 2 layers
    deep, shortcuts not counted; ResNet-20 has 272,474 parameters for images of three channels and 10 classes.
    He, Zhang, Ren, Sun 2016 (arXiv:1512.03385), section 4.2, with projections where the size changes (option B).
    """

    def __init__(self, input_shape: Shape, num_classes: int, blocks_per_stage: int) -> None:
        super().__init__()
        channels_in, height, width = input_shape
        if height < 4 or width < 4:
            raise ValueError(f"ResNet: images must be at least 4 x 4, got {height} x {width}")
        self.conv1 = nn.Conv2d(channels_in, 16, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        blocks, before = [], 16
        for channels in (16, 32, 64):
            for block in range(blocks_per_stage):
                blocks.append(_ResidualBlock(before, channels, stride=2 if block == 0 and channels > 16 else 1))
                before = channels
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm1(self.conv1(x))))
        return self.linear(x.mean(dim=(2, 3)))


ARCHITECTURES: dict[str, Callable[[Shape, int], nn.Module]] = {
    "mlp": MLP,
    "cnn": CNN,
    "cnn1": PlainCNN,
    "cnn2": partial(PlainCNN, third=True),
    "resnet8": partial(ResNet, blocks_per_stage=1),
    "resnet20": partial(ResNet, blocks_per_stage=3),
    "resnet32": partial(ResNet, blocks_per_stage=5),
}


def build(name: str, input_shape: Shape, num_classes: int, seed: int) -> nn.Module:
    """A new model with PyTorch's default initialisation drawn from `seed`; the global generator is left as it was.

    name: a key of ARCHITECTURES.  input_shape: (channels, height, width).
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"build: architecture must be one of {', '.join(sorted(ARCHITECTURES))}, got {name!r}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed asks every accelerator too, for 3 ms a model
        return ARCHITECTURES[name](input_shape, num_classes)


# What a module has from nn.Module itself, hooks and all: its own in every copy.
_MODULE_STATE = frozenset(vars(nn.Module()))


def filled(prototype: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A model built as the prototype is, with copies of these tensors as its state and no hooks.

    What copy.deepcopy and load_state_dict give, in a tenth of their time. Raises ValueError unless names and shapes are
    those of the prototype's state.
    """
    own = {name: tensor.shape for name, tensor in prototype.state_dict().items()}
    if own != {name: tensor.shape for name, tensor in tensors.items()}:
        raise ValueError(
            "filled: the tensors must be a state of this model, by names and shapes; was it another architecture?"
        )

    def copy(module: nn.Module, prefix: str) -> nn.Module:
        new = module.__class__.__new__(module.__class__)
        nn.Module.__init__(new)
        new.__dict__.update({name: value for name, value in vars(module).items() if name not in _MODULE_STATE})
        new.training = module.training
        for name, parameter in module._parameters.items():
            value = None if parameter is None else tensors[prefix + name].detach().clone()
            new._parameters[name] = (
                None if value is None or parameter is None else nn.Parameter(value, parameter.requires_grad)
            )
        for name in module._buffers:
            new._buffers[name] = tensors[prefix + name].detach().clone()
        for name, child in module._modules.items():
            new._modules[name] = None if child is None else copy(child, f"{prefix}{name}.")
        return new

    return copy(prototype, "")
