"""quantize_, pack_ and unpack_: swap the layers of a model in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from qupedkern.ops import pack_codes

from ._packed import PackedLayer, packed_layers
from ._quantized import QuantizedLayer, check_model, inherit_hooks, quantized_layers
from .kinds import Kind, kind_of, plain_names
from .selection import Rule, default_rule, select

INITS = ("kmeans", "linspace", "quantile", "signed_mean")


@dataclass(frozen=True)
class Conversion:
    """What quantize_ did: names of the layers it quantized, and why each other layer with a weight matrix was left alone."""

    quantized: tuple[str, ...]
    left: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"quantized {len(self.quantized)} layers: {', '.join(self.quantized)}"]
        lines += [f"left {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def levels_of(op: str, bits: int | None, levels: int | None, default_bits: int = 2) -> int:
    """The number of centers a row that bits or levels ask for."""
    if bits is not None and levels is not None:
        raise ValueError(f"{op}: give bits or levels, not both (got bits={bits}, levels={levels})")
    if levels is None:
        bits = default_bits if bits is None else bits
        if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
            raise ValueError(f"{op}: bits must be an integer from 1 to 8, got {bits!r}")
        return 1 << bits
    if isinstance(levels, bool) or not isinstance(levels, int) or not 2 <= levels <= 256:
        raise ValueError(f"{op}: levels must be an integer from 2 to 256, got {levels!r}")
    return levels


def _num_groups(op: str, name: str, kind: Kind, layer: nn.Module, groups: str | int) -> int:
    """Rows of centers for one weight: "tensor" 1, "channel" its output channels, an int the length of a block."""
    if groups == "tensor":
        return 1
    weight, outputs = layer.weight, kind.trainable.outputs_of(layer)
    assert isinstance(weight, torch.Tensor)
    if groups == "channel":
        return outputs
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ValueError(f"{op}: groups must be 'tensor', 'channel' or a block length, got {groups!r}")
    row = weight.numel() // outputs
    if row % groups:
        raise ValueError(f"{op}: a block of {groups} weights must divide the {row} weights of an output of {name}")
    return weight.numel() // groups


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Swap modules wherever they are used, hooks included; a module used twice is swapped for one and the same module."""
    for old, new in replacements.items():
        inherit_hooks(new, old)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]


def quantize_(
    model: nn.Module,
    bits: int | None = None,
    levels: int | None = None,
    groups: str | int = "tensor",
    init: str = "kmeans",
    rule: Rule | None = None,
    overrides: Mapping[str, int] | None = None,
) -> Conversion:
    """Replace nn.Linear, nn.Conv1d, ... by QuantLinear, QuantConv1d, ..., in place; weights keep their values, mode is "float".

    bits: 1..8 (default 2), or levels: 2..256 (3 for ternary).  groups: one row of centers per "tensor", per output
    "channel" (an embedding's row, a transposed convolution's output), or per block of that many weights, which must divide
    those of one channel.  init: "kmeans" (exact), "linspace", "quantile" or "signed_mean" (2 levels).
    rule(name, module) -> bool: which layers; default all but the first convolution and the last linear.  overrides: exact
    module name -> bits, quantized whatever the rule says.
    Parameters stay the same objects: tied weights stay tied, across kinds too, and share their centers; layers that share
    a weight are quantized together or, where one of them is left, not at all. Modules that read the `weight` of a child
    instead of calling it get the float weight in every mode: nn.MultiheadAttention is known and its out_proj left alone,
    leave others of that kind out by a rule. Create optimizers after this call, for the new centers. Returns a Conversion that
    names what was quantized and why the rest was not.
    Raises ValueError or TypeError, before anything is changed, for bad arguments, an override of a layer that is unknown or
    cannot be quantized, an uneven block, or different bits for layers that share a weight.
    """
    replacements, report = plan("quantize_", model, levels_of("quantize_", bits, levels), groups, init, rule, overrides)
    replace_modules(model, replacements)
    return report


def plan(
    op: str,
    model: nn.Module,
    levels: int,
    groups: str | int,
    init: str,
    rule: Rule | None,
    overrides: Mapping[str, int] | None,
    importance: Callable[[str, QuantizedLayer], torch.Tensor | None] = lambda name, layer: None,
    beside_quantized: bool = True,
) -> tuple[dict[nn.Module, QuantizedLayer], Conversion]:
    """The Quant* layers to put in place of the model's, and the report of it; the model stays as it is.

    importance: what weighs a layer's weights in its k-means; None: all count alike.  beside_quantized: as in select.
    """
    special = _checked_overrides(op, model, overrides)
    if rule is not None and not callable(rule):
        raise TypeError(f"{op}: rule must be a function of (name, module) or None, got {type(rule).__name__}")
    if init not in INITS:
        raise ValueError(f"{op}: init must be one of {', '.join(INITS)}, got {init!r}")
    wanted = rule or default_rule(model)
    chosen, left = select(
        model, lambda name, module: name in special or bool(wanted(name, module)), beside_quantized=beside_quantized
    )
    for name in special:
        if name not in chosen:
            raise ValueError(f"{op}: overrides names {name!r}, but {left[name]}")

    replacements: dict[nn.Module, QuantizedLayer] = {}
    owners = {id(layer.weight): (name, layer) for name, layer in quantized_layers(model).items()}
    for name, module in chosen.items():
        count = special.get(name, levels)
        if init == "signed_mean" and count != 2:
            raise ValueError(f"{op}: init 'signed_mean' gives 2 levels, got {count} for {name}")
        kind = kind_of(module)
        assert kind is not None
        num_groups = _num_groups(op, name, kind, module, groups)
        layer = kind.trainable.from_float(module, levels=count, num_groups=num_groups, init=None)
        owner = _sharer(op, owners, name, layer)
        if owner is layer:
            layer.draw_centers(init, importance(name, layer))
        layer.centers = owner.centers
        replacements[module] = layer
    return replacements, Conversion(tuple(chosen), left)


def _checked_overrides(op: str, model: nn.Module, overrides: Mapping[str, int] | None) -> dict[str, int]:
    """Exact module name -> levels; every name must be a layer that can be quantized."""
    check_model(op, model)
    if overrides is not None and not isinstance(overrides, Mapping):
        raise TypeError(f"{op}: overrides must map module names to bits, got {type(overrides).__name__}")
    modules = dict(model.named_modules())
    for name in overrides or {}:
        if isinstance(modules.get(name), (QuantizedLayer, PackedLayer)):
            raise ValueError(f"{op}: overrides names {name!r}, which is already quantized; start from a float model")
        if name not in modules or kind_of(modules[name]) is None:
            known = plain_names().replace(" and ", " or ")
            raise ValueError(f"{op}: overrides names {name!r}, which is no {known} of the model")
    return {name: levels_of(op, bits, None) for name, bits in (overrides or {}).items()}


def _sharer(op: str, owners: dict[int, tuple[str, QuantizedLayer]], name: str, layer: QuantizedLayer) -> QuantizedLayer:
    """The layer whose centers this one takes: the first that has its weight, which may be itself."""
    owner_name, owner = owners.setdefault(id(layer.weight), (name, layer))
    if owner.by_rows(layer.weight).shape != layer.by_rows(layer.weight).shape:
        raise ValueError(
            f"{op}: {name} shares its weight with {owner_name}, but the two split it into other groups; use groups='tensor'"
        )
    if owner.centers.shape != layer.centers.shape:
        raise ValueError(
            f"{op}: {name} shares its weight with {owner_name} and needs the same levels and groups, centers "
            f"{tuple(owner.centers.shape)}, got {tuple(layer.centers.shape)}"
        )
    return owner


def pack_layer(layer: QuantizedLayer) -> PackedLayer:
    """The packed form of one Quant* layer; its weight equals that of mode "hard" to the bit."""
    centers = layer.centers.detach().to(layer.weight.dtype)
    with torch.no_grad():
        packed = pack_codes(layer.codes(), layer.bits)
    kind, bias = kind_of(layer), getattr(layer, "bias", None)
    if kind is None:
        raise TypeError(f"pack_: there is no packed form of {type(layer).__name__}")
    new = kind.packed(kind.packed.arguments_of(layer), packed, centers, bias)
    new.centers.requires_grad_(layer.centers.requires_grad)
    if bias is not None and new.bias is not None:
        new.bias.requires_grad_(bias.requires_grad)
    return new.train(layer.training)


def pack_(model: nn.Module) -> nn.Module:
    """Replace every Quant* layer by its packed form, in place: codes at `bits` bits a weight and the centers.

    Weights equal mode "hard" to the bit, and so do outputs where torch multiplies with them: convolutions and embeddings.
    Packed linear layers sum in lut_linear's own order, within the bound of a float32 dot product, as torch's fused transformer
    inference does in its. Layers that share a weight share its codes and centers. Returns the model.
    Raises ValueError where the model has no Quant* layer, or a weight is not finite; the model is then as it was.
    """
    check_model("pack_", model)
    layers = quantized_layers(model)
    if not layers:
        raise ValueError("pack_: the model has no quantized layers to pack; call quantize_ on it first")
    if "" in layers:
        raise ValueError("pack_: the model is itself a quantized layer; wrap it, for example in nn.Sequential")
    for name, layer in layers.items():
        if not bool(layer.weight.isfinite().all()) or not bool(layer.centers.isfinite().all()):
            raise ValueError(f"pack_: the weight and centers of {name} must be finite, got a NaN or an infinity")
    replace_modules(model, packed_forms(layers.values()))
    return model


def packed_forms(layers: Iterable[QuantizedLayer]) -> dict[nn.Module, PackedLayer]:
    """The packed form of each Quant* layer; those that share weight and centers share codes and centers."""
    forms: dict[nn.Module, PackedLayer] = {}
    owners: dict[tuple[int, int], PackedLayer] = {}
    for layer in layers:
        packed = forms[layer] = pack_layer(layer)
        owner = owners.setdefault((id(layer.weight), id(layer.centers)), packed)
        packed.packed, packed.centers = owner.packed, owner.centers
    return forms


def unpack_(model: nn.Module) -> nn.Module:
    """Replace every packed layer by the plain torch layer with the quantized values, in place (for export).

    Returns the model. Raises ValueError where the model has no packed layer.
    """
    check_model("unpack_", model)
    layers = packed_layers(model)
    if not layers:
        raise ValueError("unpack_: the model has no packed layers; call pack_ on it first")
    if "" in layers:
        raise ValueError("unpack_: the model is itself a packed layer; wrap it, for example in nn.Sequential")
    replacements: dict[nn.Module, nn.Module] = {}
    owners: dict[tuple[int, int], nn.Module] = {}
    for layer in layers.values():
        plain = layer.to_float()
        owner = owners.setdefault((id(layer.packed), id(layer.centers)), plain)
        plain.weight = owner.weight  # shared codes and centers: a shared weight again
        replacements[layer] = plain
    replace_modules(model, replacements)
    return model
