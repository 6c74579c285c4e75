"""quantize_, pack_ and unpack_: swap the layers of a model in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from qupedkern.ops import pack_codes

from ._packed import PackedLayer, packed_layers
from ._quantized import QuantizedLayer, check_model, inherit_hooks, quantized_layers
from .kinds import KINDS, Kind, kind_of, plain_names

_CONVOLUTIONS = tuple(kind.plain for kind in KINDS.values() if issubclass(kind.plain, _ConvNd))
INITS = ("kmeans", "linspace", "quantile", "signed_mean")
Rule = Callable[[str, nn.Module], bool]


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


def _default_rule(model: nn.Module) -> Rule:
    """All but the first convolution and the last linear layer."""
    layers = [(name, type(module)) for name, module in model.named_modules()]
    convolutions = [name for name, kind in layers if kind in _CONVOLUTIONS]
    linears = [name for name, kind in layers if kind is nn.Linear]
    kept = {*convolutions[:1], *linears[-1:]}
    return lambda name, module: name not in kept


def _has_matrix(module: nn.Module) -> bool:
    """Whether a weight of the module's own has two or more dimensions, or a shape still unknown."""
    own: list[torch.Tensor] = list(module.parameters(recurse=False))
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor):  # computed ones too, as under a parametrization
        own = [*own, weight]
    return any(nn.parameter.is_lazy(value) or value.dim() >= 2 for value in own)


def _unsuited(name: str, module: nn.Module, chosen: bool) -> str | None:
    """Why a layer with a weight matrix stays as it is; None where it can be quantized."""
    if isinstance(module, QuantizedLayer):
        return "already quantized"
    kind = kind_of(module)
    if kind is None:
        return f"{type(module).__name__} is not one of {plain_names()}"
    if not name:
        return "it is the model itself; wrap it, for example in nn.Sequential"
    if not chosen:
        return "the rule leaves it in float"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed from other parameters"
    if weight.device.type == "meta" or not weight.is_floating_point():
        return f"its weight is {weight.dtype} on {weight.device}"
    if weight.numel() == 0:
        return "its weight is empty"
    if not bool(weight.isfinite().all()):
        return "its weight is not finite"
    return kind.trainable.refusal(module)


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
    "channel", or per block of that many weights (must divide weight[0].numel()).  init: "kmeans" (exact), "linspace",
    "quantile" or "signed_mean" (2 levels).  rule(name, module) -> bool: which layers; default all but the first
    convolution and the last linear.  overrides: exact module name -> bits, quantized whatever the rule says.
    Parameters stay the same objects: tied weights stay tied, and share their centers. Create optimizers after this call,
    for the new centers. Returns a Conversion that names what was quantized and why the rest was not.
    Raises ValueError or TypeError, before anything is changed, for bad arguments, an unknown name in overrides, an uneven
    block, or different bits for layers that share a weight.
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
) -> tuple[dict[nn.Module, QuantizedLayer], Conversion]:
    """The Quant* layers to put in place of the model's, and the report of it; the model stays as it is.

    importance: what weighs a layer's weights in its k-means; None: all count alike.
    """
    special = _checked_overrides(op, model, overrides)
    if rule is not None and not callable(rule):
        raise TypeError(f"{op}: rule must be a function of (name, module) or None, got {type(rule).__name__}")
    if init not in INITS:
        raise ValueError(f"{op}: init must be one of {', '.join(INITS)}, got {init!r}")
    rule = rule or _default_rule(model)

    replacements: dict[nn.Module, QuantizedLayer] = {}
    owners = {id(layer.weight): (name, layer) for name, layer in quantized_layers(model).items()}
    quantized, left = [], {}
    for name, module in model.named_modules():
        if isinstance(module, PackedLayer) or not _has_matrix(module):
            continue
        reason = _unsuited(name, module, name in special or bool(rule(name, module)))
        if reason is not None:
            left[name or type(module).__name__] = reason
            continue
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
        quantized.append(name)
    return replacements, Conversion(tuple(quantized), left)


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
    if owner.centers.shape != layer.centers.shape:
        raise ValueError(
            f"{op}: {name} shares its weight with {owner_name} and needs the same levels and groups, centers "
            f"{tuple(owner.centers.shape)}, got {tuple(layer.centers.shape)}"
        )
    return owner


def pack_layer(layer: QuantizedLayer) -> PackedLayer:
    """The packed form of one Quant* layer, equal to its mode "hard" to the bit."""
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

    Outputs equal mode "hard" to the bit (inside torch's fused transformer inference, which sums in another order, to
    rounding); layers that share a weight share its codes and centers. Returns the model.
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
