"""summary: what a quantized or packed model costs, layer by layer, in true bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qupedkern._table import aligned
from qupedkern.ops import distance

from ._packed import PackedLayer, packed_layers
from ._quantized import QuantizedLayer, check_model, quantized_layers
from ._sizes import SIZE_COLUMNS, LayerSize
from .kinds import kind_of

_COLUMNS = (*SIZE_COLUMNS, "share", "R (l1)", "members per center")


@dataclass(frozen=True)
class LayerSummary(LayerSize):
    """LayerSize, and how the weights lie. share: its weights among the model's parameters, 0 where they are an earlier layer's."""

    share: float
    distance: float  # R(x, c), l1, over the weights; 0 once packed
    members: tuple[int, ...]  # weights at each center, summed over the groups


@dataclass(frozen=True)
class Summary:
    """Layers and totals; str() is a table. other_bytes: state outside of these layers; float_bytes: all with float32 weights.

    total_bytes: the whole state once packed, what a file holds behind its header.
    """

    layers: tuple[LayerSummary, ...]
    other_bytes: int
    float_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(layer.total_bytes for layer in self.layers) + self.other_bytes

    @property
    def ratio(self) -> float:
        """float_bytes / total_bytes"""
        return self.float_bytes / self.total_bytes

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            (
                *layer.cells(),
                f"{100 * layer.share:.1f} %",
                f"{layer.distance:.4g}",
                " ".join(map(str, layer.members[:8])) + (" ..." if len(layer.members) > 8 else ""),
            )
            for layer in self.layers
        ]
        total = (
            f"packed {self.total_bytes:,} bytes ({self.other_bytes:,} of them not quantized), "
            f"float32 {self.float_bytes:,} bytes: {self.ratio:.1f} times smaller"
        )
        return "\n".join([*aligned(_COLUMNS, rows, left=("layer", "kind", "members per center")), total])


@torch.no_grad()
def summary(model: nn.Module) -> Summary:
    """Per layer: kind, shape, levels, groups, bytes of codes, centers and bias once packed, share of parameters, R (l1), members.

    model: quantized or packed. Sizes are those of the state dict's tensors once packed, to the byte: a file is larger by its
    header alone. Raises ValueError where the model has neither quantized nor packed layers.
    """
    check_model("summary", model)
    layers: dict[str, QuantizedLayer | PackedLayer] = {**quantized_layers(model), **packed_layers(model)}
    if not layers:
        raise ValueError("summary: the model has no quantized or packed layers; call quantize_ on it first")
    others = _state_of_the_rest(model, set(layers.values()))
    owners: dict[int, QuantizedLayer | PackedLayer] = {}  # id of a stored weight -> the first layer that uses it
    for layer in layers.values():
        owners.setdefault(_weight_id(layer), layer)
    weights = sum(layer.codes().numel() for layer in owners.values())
    biases = {id(bias): bias.numel() for bias in map(_bias, layers.values()) if bias is not None}
    parameters = weights + sum(biases.values()) + sum(t.numel() for t in others if isinstance(t, nn.Parameter))
    seen: set[int] = set()
    rows = tuple(_layer_summary(name, layer, parameters, seen) for name, layer in layers.items())
    other_bytes = sum(map(_nbytes, others))
    return Summary(rows, other_bytes, 4 * weights + sum(row.bias_bytes for row in rows) + other_bytes)


def _bias(layer: QuantizedLayer | PackedLayer) -> Tensor | None:
    """Embeddings have none, not even the attribute."""
    return layer._parameters.get("bias")


def _layer_summary(name: str, layer: QuantizedLayer | PackedLayer, parameters: int, seen: set[int]) -> LayerSummary:
    """seen: what earlier layers hold, by id; this one's is added."""
    codes, kind = layer.codes(), kind_of(layer)
    packed_bytes = -(-codes.numel() * layer.bits // 8)
    away = float(distance(layer.by_rows(layer.weight), layer.centers)) if isinstance(layer, QuantizedLayer) else 0.0
    bias = _bias(layer)
    # pack_ gives every layer a bias of its own
    keys = (_weight_id(layer), id(layer.centers), id(bias) if isinstance(layer, PackedLayer) else id(layer))
    own = [key not in seen for key in keys]
    seen.update(keys)
    return LayerSummary(
        name=name,
        kind=type(layer).__name__ if kind is None else kind.name,
        shape=tuple(layer.weight.shape) if isinstance(layer, QuantizedLayer) else layer.weight_shape,
        levels=layer.levels,
        bits=layer.bits,
        groups=layer.num_groups,
        codes_bytes=own[0] * packed_bytes,
        centers_bytes=own[1] * _nbytes(layer.centers),
        bias_bytes=0 if bias is None else own[2] * _nbytes(bias),
        share=own[0] * codes.numel() / parameters,
        distance=away,
        members=tuple(torch.bincount(codes.flatten().int(), minlength=layer.levels).tolist()),
    )


def _state_of_the_rest(model: nn.Module, layers: set[nn.Module]) -> list[Tensor]:
    """Tensors of the state dict that modules other than these hold, each once."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        if module in layers:
            continue
        kept = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        found.update({id(t): t for t in (*module._parameters.values(), *kept.values()) if t is not None})
    return list(found.values())


def _weight_id(layer: QuantizedLayer | PackedLayer) -> int:
    return id(layer.packed if isinstance(layer, PackedLayer) else layer.weight)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
