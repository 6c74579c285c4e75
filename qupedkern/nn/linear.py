"""QuantLinear (trainable) and PackedLinear (1 to 8 bits a weight)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._quantized import PackedLayer, QuantizedLayer


class QuantLinear(QuantizedLayer, nn.Linear):
    """nn.Linear whose weight can live on `levels` learned centers: y = x W^T + b, W the weight of the layer's mode.

    weight [out, in] float; centers [levels], or [groups, levels] where groups > 1 rows of centers split the flattened weight.
    init: how centers are drawn from the weight ("kmeans", "linspace", "quantile", "signed_mean"); None leaves zeros to be loaded.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        levels: int = 4,
        num_groups: int = 1,
        init: str | None = "kmeans",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device=device, dtype=dtype)
        self._init_quantizer(levels, num_groups, init)

    @classmethod
    def from_float(cls, layer: nn.Linear, *, levels: int, num_groups: int = 1, init: str = "kmeans") -> QuantLinear:
        """A quantized layer around the very parameters of `layer`: tied weights stay tied, values are kept."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.in_features, new.out_features = layer.in_features, layer.out_features
        new.weight, new.bias = layer.weight, layer.bias
        new.train(layer.training)
        new._init_quantizer(levels, num_groups, init)
        return new

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.active_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"{nn.Linear.extra_repr(self)}, {self._quantizer_repr()}"


class PackedLinear(PackedLayer):
    """A linear layer stored at `bits` bits a weight: y = x W^T + b with W = dequantize(codes, centers).

    packed: uint8 bit stream of the codes; centers [levels] or [groups, levels]; equal to QuantLinear in mode "hard" to the bit.
    """

    kind = "linear"

    def __init__(
        self, in_features: int, out_features: int, packed: Tensor, centers: Tensor, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._init_packed(packed, centers, (out_features, in_features))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def arguments(self) -> dict[str, Any]:
        """What, beside the tensors, rebuilds the layer."""
        return {"in_features": self.in_features, "out_features": self.out_features}

    @staticmethod
    def arguments_of(layer: nn.Module) -> dict[str, Any]:
        """The same of a float or Quant* layer."""
        assert isinstance(layer, nn.Linear)
        return {"in_features": layer.in_features, "out_features": layer.out_features}

    def to_float(self) -> nn.Linear:
        """A plain nn.Linear with the quantized values."""
        with torch.device("meta"):
            layer = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        layer.weight = nn.Parameter(self.weight.detach())
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().clone())
        return layer.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        has_bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={has_bias}, {self._quantizer_repr()}"
