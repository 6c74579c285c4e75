"""What every packed layer shares: codes as a bit stream, their centers, and the geometry of the torch layer it stands for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qupedkern.ops import dequantize_packed, unpack_codes
from qupedkern.ops._call import attempt

from ._centers import CenteredLayer
from ._codes import codes_problem, pieces_of

_HALVES = (torch.bfloat16, torch.float16)


class PackedLayer(CenteredLayer):
    """Base of the Packed* layers: codes as a bit stream and one row of centers per group; no float weight is stored.

    packed: uint8 bit stream of the codes.  centers: [m] or [G, m].  bias: as in the float layer.
    A kind sets `plain` and `ARGUMENTS` and writes a forward that uses `weight`. Its attributes are those of the plain layer.
    """

    plain: type[nn.Module]  # torch's layer
    ARGUMENTS: tuple[str, ...]  # of its constructor; its attributes have the same names

    packed: Tensor
    bias: nn.Parameter | None
    bits: int
    weight_shape: tuple[int, ...]  # of the float weight

    def __init__(
        self, arguments: Mapping[str, Any], packed: Tensor, centers: Tensor, bias: Tensor | None = None
    ) -> None:
        """arguments: of the plain layer's constructor, without bias; tuples may be lists, as in JSON."""
        super().__init__()
        plain = self._empty(arguments)
        assert isinstance(plain.weight, Tensor)
        for name in vars(plain).keys() - vars(self).keys():
            setattr(self, name, getattr(plain, name))
        self.register_buffer("packed", packed)
        self.centers = nn.Parameter(centers.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.bits = (centers.shape[-1] - 1).bit_length()
        self.weight_shape = tuple(plain.weight.shape)
        self._stored_shape = tuple(self.by_rows(plain.weight).shape)

    @classmethod
    def _empty(cls, arguments: Mapping[str, Any]) -> nn.Module:
        """The plain layer without storage, with its bias if it can have one."""
        built = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
        with torch.device("meta"):
            return cls.plain(**built)

    @classmethod
    def arguments_of(cls, layer: nn.Module) -> dict[str, Any]:
        """What, beside the tensors, rebuilds a float, Quant* or Packed* layer of this kind; JSON-able: tuples become lists."""
        values = {name: getattr(layer, name) for name in cls.ARGUMENTS}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def bias_length(cls, arguments: Mapping[str, Any], weight_shape: tuple[int, ...]) -> int:
        """Length of the bias, from what a file says."""
        return weight_shape[0]

    def codes(self) -> Tensor:
        """uint8 codes in the order of storage, shaped like by_rows of the weight."""
        return unpack_codes(self.packed, self.bits, self._stored_shape)

    @property
    def weight(self) -> Tensor:
        """The weight, dequantized anew at each access; differentiable in the centers."""
        return self._dequantized(self.packed, self.centers)

    def stored(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """packed, centers and bias: by name, for nn.Module takes a third of a microsecond to find each."""
        own = self._parameters
        packed, centers, bias = self._buffers.get("packed"), own.get("centers"), own.get("bias")
        if packed is None or centers is None:  # something has put other tensors in their place
            packed, centers = self.packed, self.centers
        return packed, centers, self.bias if bias is None else bias

    def _dequantized(self, packed: Tensor, centers: Tensor, reader: tuple[Tensor, ...] | None = None) -> Tensor:
        """reader: see attempt."""
        args = packed, centers, self.bits, self._stored_shape
        return self.like_weight(attempt("dequantize_packed", args, dequantize_packed, reader=reader))

    def weight_and_bias_for(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        """What to multiply input with, at once: in inference the weight is memory that the next layer's will take.

        For a half type beside float32 centers these are rounded, not the weight.
        """
        packed, centers, bias = self.stored()
        if input.dtype in _HALVES and centers.dtype == torch.float32:
            centers = centers.to(input.dtype)
            bias = None if bias is None else bias.to(input.dtype)
        reader = (input,) if bias is None else (input, bias)
        return self._dequantized(packed, centers, reader), bias

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        """As in nn.Module, which copies whatever has the right shape, but codes that this layer cannot have are refused.

        lists: missing keys, unexpected keys, messages; load_state_dict raises RuntimeError where there are messages. The
        layer then keeps its codes and its centers.
        """
        problem = self._problem_of(state_dict.get(f"{prefix}packed"), state_dict.get(f"{prefix}centers"))
        if problem is not None:
            lists[-1].append(f"{prefix}{problem}")
        else:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)

    def _problem_of(self, packed: Any, centers: Any) -> str | None:
        """Why codes and centers of a state dict are not this layer's; None too where they are missing, which nn.Module tells."""
        if isinstance(centers, Tensor) and centers.shape != self.centers.shape:
            return f"centers must be {tuple(self.centers.shape)}, got {tuple(centers.shape)}"
        if not isinstance(packed, Tensor):
            return None
        if packed.dtype != torch.uint8 or packed.shape != self.packed.shape:
            return f"packed must be torch.uint8 {tuple(self.packed.shape)}, got {packed.dtype} {tuple(packed.shape)}"
        if packed.device.type == "meta":
            return None
        problem = codes_problem(pieces_of(packed, self.bits), math.prod(self.weight_shape), self.bits, self.levels)
        return None if problem is None else f"packed {problem}"

    def to_float(self) -> nn.Module:
        """The plain torch layer with the quantized values."""
        layer = self._empty(self.arguments_of(self))
        layer.weight = nn.Parameter(self.weight.detach().contiguous())
        if "bias" in layer._parameters:
            own = None if self.bias is None else nn.Parameter(self.bias.detach().clone())
            layer.register_parameter("bias", own)
        return layer.train(self.training)

    def extra_repr(self) -> str:
        own = f"levels={self.levels}, groups={self.num_groups}, bits={self.bits}"
        return f"{self.plain.extra_repr(self)}, {own}"


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """Packed layers by name, each once."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLayer)}
