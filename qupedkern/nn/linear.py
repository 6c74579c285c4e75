"""QuantLinear (trainable) and PackedLinear (1 to 8 bits a weight)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qupedkern.ops import lut_linear
from qupedkern.ops._call import attempt

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
    """A linear layer stored at `bits` bits a weight: y = x W^T + b with W = dequantize(codes, centers), never written out.

    Sums are float32 for float32 and half types, in lut_linear's own order: within the bound of a float32 dot product of
    QuantLinear in mode "hard", whose weight is the same to the bit.
    """

    plain = nn.Linear
    ARGUMENTS = ("in_features", "out_features")

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        args = (input, *self.stored(), self.bits, self._stored_shape)
        return attempt("lut_linear", args, lut_linear)
