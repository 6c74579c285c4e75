"""QuantConv1d, QuantConv2d (trainable), PackedConv1d and PackedConv2d (1 to 8 bits a weight)."""

from __future__ import annotations

from torch import Tensor, nn

from ._packed import PackedLayer
from ._quantized import QuantizedLayer


class QuantConv1d(QuantizedLayer, nn.Conv1d):
    """nn.Conv1d whose weight can live on `levels` learned centers; the weight of the layer's mode is convolved.

    weight [out, in / groups, k] float; centers [levels], or [num_groups, levels] rows that split the flattened weight
    (`groups` stays the convolution's own). Arguments: those of nn.Conv1d, then levels=4, num_groups=1, init="kmeans".
    """

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.active_weight(), self.bias)


class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """nn.Conv2d whose weight can live on `levels` learned centers: weight [out, in / groups, kh, kw]; else as QuantConv1d."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.active_weight(), self.bias)


class _PackedConv(PackedLayer):
    """The weight is dequantized for the call, then torch convolves: the same bits as mode "hard"."""

    plain: type[nn.Conv1d] | type[nn.Conv2d]
    ARGUMENTS = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    )

    def forward(self, input: Tensor) -> Tensor:
        return self.plain._conv_forward(self, input, *self.weight_and_bias_for(input))  # type: ignore[arg-type]


class PackedConv1d(_PackedConv):
    """A 1-D convolution stored at `bits` bits a weight; equal to QuantConv1d in mode "hard" to the bit."""

    plain = nn.Conv1d


class PackedConv2d(_PackedConv):
    """A 2-D convolution stored at `bits` bits a weight; equal to QuantConv2d in mode "hard" to the bit."""

    plain = nn.Conv2d
