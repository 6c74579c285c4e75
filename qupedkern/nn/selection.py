"""Which layers of a model can be quantized, and why each other one that holds a weight matrix is left alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from ._packed import PackedLayer
from ._quantized import QuantizedLayer
from .kinds import KINDS, kind_of, plain_names

_CONVOLUTIONS = tuple(kind.plain for kind in KINDS.values() if issubclass(kind.plain, _ConvNd))
Rule = Callable[[str, nn.Module], bool]


def default_rule(model: nn.Module) -> Rule:
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


def _unknown(module: nn.Module) -> str:
    """Why a module of no kind is left alone."""
    name = type(module).__name__
    if parametrize.is_parametrized(module, "weight"):
        return "its weight is parametrized"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return f"{name} does not know its shape yet; run the model once before quantizing it"
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)):
        return f"{name} multiplies with parameters of its own, not with layers"
    return f"{name} is not one of {plain_names()}"


def _unsuited(name: str, module: nn.Module, readers: dict[nn.Module, str]) -> str | None:
    """Why a layer with a weight matrix cannot be quantized, whatever the rule says; None where it can."""
    if isinstance(module, QuantizedLayer):
        return "already quantized"
    if module in readers:
        return f"{readers[module]} reads its weight and does not call it"
    kind = kind_of(module)
    if kind is None:
        return _unknown(module)
    if not name:
        return "it is the model itself; wrap it, for example in nn.Sequential"
    if "forward" in vars(module):
        return "its forward has been replaced"
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


def select(model: nn.Module, rule: Rule, *, beside_quantized: bool) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers to quantize by name, and the reason for each other layer that has a weight matrix.

    Layers that share a weight are all quantized or none: with one of them alone the weight would be stored twice, and the
    two would part.  beside_quantized: whether a layer is quantized whose weight a Quant* layer has already. Modules that read
    the weight of a child are known for nn.MultiheadAttention only.
    """
    readers: dict[nn.Module, str] = {
        parent.out_proj: f"{type(parent).__name__} {name!r}".replace(" ''", "")
        for name, parent in model.named_modules()
        if isinstance(parent, nn.MultiheadAttention)
    }
    chosen: dict[str, nn.Module] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, (PackedLayer, parametrize.ParametrizationList)) or not _has_matrix(module):
            continue
        reason = _unsuited(name, module, readers)
        if reason is None and not rule(name, module):
            reason = "the rule leaves it in float"
        if reason is None:
            chosen[name] = module
        else:
            left[name or type(module).__name__] = reason
    parted = _parted(model, chosen, beside_quantized)
    return {name: module for name, module in chosen.items() if name not in parted}, {**left, **parted}


def _memory(tensor: torch.Tensor) -> int:
    """What tells whether two tensors are, or are views of, the same one."""
    return id(tensor) if nn.parameter.is_lazy(tensor) else tensor.untyped_storage().data_ptr() or id(tensor)


def _parted(model: nn.Module, chosen: dict[str, nn.Module], beside_quantized: bool) -> dict[str, str]:
    """Chosen layers whose weight something that stays as it is uses too, as its weight or otherwise, with the reason."""
    holders: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for part, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(_memory(parameter), []).append((name, module, part))
    modules = set(chosen.values())
    reasons = {}
    for name, module in chosen.items():
        weight = module._parameters["weight"]
        assert weight is not None
        for other, holder, part in holders[_memory(weight)]:
            goes_along = holder in modules or (beside_quantized and isinstance(holder, QuantizedLayer))
            if not (goes_along and part == "weight" and holder._parameters[part] is weight):
                where = f"that of {other}" if part == "weight" else f"the {part} of {other or 'the model'}"
                reasons[name] = f"its weight is also {where}, which stays as it is"
                break
    return reasons
