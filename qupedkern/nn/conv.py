"""QuantConv2d (trainable) and PackedConv2d (1 to 8 bits a weight)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._quantized import PackedLayer, QuantizedLayer

_ARGUMENTS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


def _conv_arguments(layer: nn.Module) -> dict[str, Any]:
    """Constructor arguments of a convolution, JSON-able: tuples become lists."""
    values = {name: getattr(layer, name) for name in _ARGUMENTS}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _empty_conv(arguments: dict[str, Any], bias: bool) -> nn.Conv2d:
    """nn.Conv2d without storage, from what _conv_arguments gives."""
    built: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()
    }
    with torch.device("meta"):
        return nn.Conv2d(**built, bias=bias)


class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """nn.Conv2d whose weight can live on `levels` learned centers; the weight of the layer's mode is convolved.

    weight [out, in / groups, kh, kw] float; centers [levels], or [num_groups, levels] rows that split the flattened weight
    (`groups` stays the convolution's own). init: as in QuantLinear.
    """

    def __init__(
        self, *args: Any, levels: int = 4, num_groups: int = 1, init: str | None = "kmeans", **options: Any
    ) -> None:
        nn.Conv2d.__init__(self, *args, **options)
        self._init_quantizer(levels, num_groups, init)

    @classmethod
    def from_float(cls, layer: nn.Conv2d, *, levels: int, num_groups: int = 1, init: str = "kmeans") -> QuantConv2d:
        """A quantized layer around the very parameters of `layer`: tied weights stay tied, values are kept."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        for name in (*_ARGUMENTS, "transposed", "output_padding", "_reversed_padding_repeated_twice"):
            setattr(new, name, getattr(layer, name))
        new.weight, new.bias = layer.weight, layer.bias
        new.train(layer.training)
        new._init_quantizer(levels, num_groups, init)
        return new

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.active_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"{nn.Conv2d.extra_repr(self)}, {self._quantizer_repr()}"


class PackedConv2d(PackedLayer):
    """A 2-D convolution stored at `bits` bits a weight; equal to QuantConv2d in mode "hard" to the bit.

    arguments: in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode as in nn.Conv2d.
    """

    kind = "conv2d"

    def __init__(self, arguments: dict[str, Any], packed: Tensor, centers: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        conv = _empty_conv(arguments, bias=False)
        self._arguments = dict(arguments)
        self._geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
        self._pad_sizes = tuple(conv._reversed_padding_repeated_twice)
        self.padding_mode = conv.padding_mode
        self._init_packed(packed, centers, tuple(conv.weight.shape))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def arguments(self) -> dict[str, Any]:
        """What, beside the tensors, rebuilds the layer."""
        return dict(self._arguments)

    @staticmethod
    def arguments_of(layer: nn.Module) -> dict[str, Any]:
        """The same of a float or Quant* layer."""
        return _conv_arguments(layer)

    def to_float(self) -> nn.Conv2d:
        """A plain nn.Conv2d with the quantized values."""
        layer = _empty_conv(self._arguments, bias=self.bias is not None)
        layer.weight = nn.Parameter(self.weight.detach())
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().clone())
        return layer.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        stride, padding, dilation, groups = self._geometry
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._pad_sizes, mode=self.padding_mode), (0, 0)
        return F.conv2d(input, self.weight, self.bias, stride, padding, dilation, groups)

    def extra_repr(self) -> str:
        geometry = ", ".join(f"{name}={value}" for name, value in self._arguments.items())
        return f"{geometry}, bias={self.bias is not None}, {self._quantizer_repr()}"
