"""summary: what a quantized or packed model costs, layer by layer, in true bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from qupedkern.ops import distance

from ._packed import PackedLayer, packed_layers
from ._quantized import QuantizedLayer, check_model, quantized_layers

_TABLE = "{:<24} {:>18} {:>6} {:>6} {:>10} {:>7} {:>11}  {}"


@dataclass(frozen=True)
class LayerSummary:
    """One quantized or packed layer. weight_bytes: codes and centers once packed; share: of the model's parameters.

    Both are 0 where the layer uses the weight of an earlier one.
    """

    name: str
    shape: tuple[int, ...]
    levels: int
    bits: int
    groups: int
    weight_bytes: int
    share: float
    distance: float  # R(x, c), l1, over the weights; 0 once packed
    members: tuple[int, ...]  # weights at each center, summed over the groups


@dataclass(frozen=True)
class Summary:
    """Layers and totals; str() is a table. total_bytes: all parameters and buffers once packed; float_bytes: all in float32."""

    layers: tuple[LayerSummary, ...]
    other_bytes: int
    float_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(layer.weight_bytes for layer in self.layers) + self.other_bytes

    @property
    def ratio(self) -> float:
        """float_bytes / total_bytes"""
        return self.float_bytes / self.total_bytes

    def __str__(self) -> str:
        lines = [_TABLE.format("layer", "shape", "levels", "groups", "bytes", "share", "R (l1)", "members per center")]
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape))
            members = " ".join(map(str, layer.members[:8])) + (" ..." if len(layer.members) > 8 else "")
            share, gap = f"{100 * layer.share:.1f} %", f"{layer.distance:.4g}"
            row = (layer.name, shape, layer.levels, layer.groups, f"{layer.weight_bytes:,}", share, gap, members)
            lines.append(_TABLE.format(*row))
        lines.append(
            f"packed {self.total_bytes:,} bytes ({self.other_bytes:,} of them not quantized), "
            f"float32 {self.float_bytes:,} bytes: {self.ratio:.1f} times smaller"
        )
        return "\n".join(lines)


def _layer_summary(name: str, layer: QuantizedLayer | PackedLayer, parameters: int, own: bool) -> LayerSummary:
    codes = layer.codes()
    shape = tuple(codes.shape)
    packed_bytes = -(-codes.numel() * layer.bits // 8)
    away = float(distance(layer.by_rows(layer.weight), layer.centers)) if isinstance(layer, QuantizedLayer) else 0.0
    return LayerSummary(
        name=name,
        shape=shape,
        levels=layer.levels,
        bits=layer.bits,
        groups=layer.num_groups,
        weight_bytes=(packed_bytes + layer.centers.numel() * layer.centers.element_size()) if own else 0,
        share=codes.numel() / parameters if own else 0.0,
        distance=away,
        members=tuple(torch.bincount(codes.flatten().int(), minlength=layer.levels).tolist()),
    )


@torch.no_grad()
def summary(model: nn.Module) -> Summary:
    """Per layer: shape, levels, groups, bytes once packed, share of parameters, R (l1), members per center; and totals.

    model: quantized or packed. Sizes are those of the packed tensors, to the byte; a file adds its header.
    Raises ValueError where the model has neither quantized nor packed layers.
    """
    check_model("summary", model)
    layers: dict[str, QuantizedLayer | PackedLayer] = {**quantized_layers(model), **packed_layers(model)}
    if not layers:
        raise ValueError("summary: the model has no quantized or packed layers; call quantize_ on it first")
    owners: dict[int, QuantizedLayer | PackedLayer] = {}  # id of a stored weight -> the first layer that uses it
    for layer in layers.values():
        owners.setdefault(_weight_id(layer), layer)
    special = {*owners, *(id(layer.centers) for layer in layers.values())}
    others = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in special]
    weights = sum(layer.codes().numel() for layer in owners.values())
    parameters = weights + sum(p.numel() for p in model.parameters() if id(p) not in special)
    rows = tuple(
        _layer_summary(name, layer, parameters, own=owners[_weight_id(layer)] is layer)
        for name, layer in layers.items()
    )
    other_bytes = sum(t.numel() * t.element_size() for t in others)
    return Summary(rows, other_bytes, 4 * weights + other_bytes)


def _weight_id(layer: QuantizedLayer | PackedLayer) -> int:
    return id(layer.packed if isinstance(layer, PackedLayer) else layer.weight)
