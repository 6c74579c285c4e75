"""QuantLinear (trainable) and PackedLinear (1 to 8 bits a weight)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ._packed import PackedLayer
from ._quantized import QuantizedLayer


class QuantLinear(QuantizedLayer, nn.Linear):
    """nn.Linear whose weight can live on `levels` learned centers: y = x W^T + b, W the weight of the layer's mode.

    weight [out, in] float; centers [levels], or [num_groups, levels] where several rows of centers split the flattened weight.
    Arguments: those of nn.Linear, then levels=4, num_groups=1, init="kmeans" by keyword.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.active_weight(), self.bias)


class PackedLinear(PackedLayer):
    """A linear layer stored at `bits` bits a weight: y = x W^T + b with W = dequantize(codes, centers)."""

    plain = nn.Linear
    ARGUMENTS = ("in_features", "out_features")

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)
