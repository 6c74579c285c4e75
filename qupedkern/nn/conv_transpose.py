"""QuantConvTranspose2d (trainable) and PackedConvTranspose2d (1 to 8 bits a weight)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ._centers import CenteredLayer
from ._packed import PackedLayer
from ._quantized import QuantizedLayer


class _OutputsFirst(CenteredLayer):
    """Several rows of centers cut the weight with its output channels in front, an output channel's weights together."""

    groups: int

    def by_rows(self, value: Tensor) -> Tensor:
        """[in, out / groups, kh, kw] -> a view [groups, out / groups, in / groups, kh, kw]; as it is for one row of centers."""
        return value if self.num_groups == 1 else value.unflatten(0, (self.groups, -1)).transpose(1, 2)

    def like_weight(self, rows: Tensor) -> Tensor:
        return rows if self.num_groups == 1 else rows.transpose(1, 2).flatten(0, 1)


def _conv_transpose(layer: Any, input: Tensor, weight: Tensor, bias: Tensor | None, output_size: Any) -> Tensor:
    """What nn.ConvTranspose2d.forward does, with another weight; layer has its attributes."""
    geometry = (layer.stride, layer.padding, layer.kernel_size, 2, layer.dilation)
    output_padding = nn.ConvTranspose2d._output_padding(layer, input, output_size, *geometry)
    return F.conv_transpose2d(
        input, weight, bias, layer.stride, layer.padding, output_padding, layer.groups, layer.dilation
    )


class QuantConvTranspose2d(_OutputsFirst, QuantizedLayer, nn.ConvTranspose2d):
    """nn.ConvTranspose2d whose weight can live on `levels` learned centers; the weight of the layer's mode is used.

    weight [in, out / groups, kh, kw] float; centers [levels], or [num_groups, levels] rows that split the weight with its
    output channels in front, [out, in / groups, kh, kw] flattened: num_groups = out gives each output channel its own.
    Arguments: those of nn.ConvTranspose2d, then levels=4, num_groups=1, init="kmeans" by keyword.
    """

    @classmethod
    def outputs_of(cls, layer: nn.Module) -> int:
        assert isinstance(layer, nn.ConvTranspose2d)
        return layer.out_channels

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _conv_transpose(self, input, self.active_weight(), self.bias, output_size)


class PackedConvTranspose2d(_OutputsFirst, PackedLayer):
    """A 2-D transposed convolution stored at `bits` bits a weight; equal to QuantConvTranspose2d in mode "hard" to the bit.

    The weight is dequantized for the call, then torch convolves. With several rows of centers codes are stored with the
    output channels in front.
    """

    plain = nn.ConvTranspose2d
    ARGUMENTS = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "output_padding",
        "groups",
        "dilation",
        "padding_mode",
    )

    @classmethod
    def bias_length(cls, arguments: Mapping[str, Any], weight_shape: tuple[int, ...]) -> int:
        groups = arguments.get("groups")
        return weight_shape[1] * (groups if isinstance(groups, int) else 1)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _conv_transpose(self, input, *self.weight_and_bias_for(input), output_size)
