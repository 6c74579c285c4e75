"""load and load_: a model from a file, which is validated against the model before the model changes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qupedkern.nn import KINDS, PackedLayer, kind_of
from qupedkern.nn._quantized import check_model
from qupedkern.nn.convert import replace_modules

from .container import Stored
from .errors import refusal
from .header import LayerRecord
from .model import state_outside
from .read import PackedFile, open_packed, owner_of


def load(model_factory: Callable[[], nn.Module], path: str | os.PathLike[str]) -> nn.Module:
    """A packed model from a file: model_factory() builds the float architecture, load_ fills it.

    Raises FileError (a ValueError) where the file is damaged or belongs to another architecture, FileNotFoundError.
    """
    with open_packed(path):  # before a large model is built for nothing
        pass
    if not callable(model_factory) or isinstance(model_factory, nn.Module):
        raise TypeError(
            f"load: model_factory must be a function that builds the model, got {type(model_factory).__name__}"
        )
    return load_(model_factory(), path)


def load_(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Turn a float (or quantized, or packed) model into the packed one of a file, in place. Returns the model.

    The file is checked against the model before anything changes: format, version, every layer's kind, shape and arguments,
    every tensor's name, shape and type before its values are read, codes below the levels, centers finite and ascending.
    Tensors go to the devices of the parameters they replace, and are trainable where those were. Raises FileError (a
    ValueError) with one sentence, FileNotFoundError, or ValueError for a model without storage.
    """
    check_model("load_", model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type == "meta":
            raise ValueError(
                f"load_: the model must hold its tensors, got {name} on the meta device; build it on a real one"
            )
    modules = dict(model.named_modules())
    with open_packed(path) as file:
        layers = file.header.layers
        for name, record in layers.items():
            _check_layer(path, name, record, modules.get(name), file.stored[f"{name}.centers"].dtype)
        own = state_outside(model, (modules[name] for name in layers))
        _check_rest(path, own, file)
        tensors = file.read()
    built = {name: _build(name, record, tensors, modules[name]) for name, record in layers.items()}
    _tie(built, file.header.aliases)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        for name, layer in built.items():
            layer.to(next(modules[name].parameters()).device)
    replace_modules(model, {modules[name]: layer for name, layer in built.items()})
    return model


def _check_layer(path: Any, name: str, record: LayerRecord, module: nn.Module | None, dtype: torch.dtype) -> None:
    """The model's own layer must be what the file describes, and of its type."""
    if module is None:
        raise refusal(path, f"the model has no layer {name!r}")
    if kind_of(module) is not KINDS[record.kind]:
        raise refusal(path, f"layer {name!r} is of kind {record.kind!r}, the model has there: {type(module).__name__}")
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    if tuple(weight.shape) != record.shape or weight.dtype != dtype or (bias is not None) != record.bias:
        came = f"{dtype} {record.shape}, {'with' if record.bias else 'without'} bias"
        own = f"{weight.dtype} {tuple(weight.shape)}, {'without' if bias is None else 'with'} bias"
        raise refusal(path, f"layer {name!r} does not fit the model's: file {came}; model {own}")
    arguments = KINDS[record.kind].packed.arguments_of(module)
    if arguments != record.arguments:
        raise refusal(path, f"layer {name!r} does not fit the model's: file {record.arguments}, model {arguments}")


def _check_rest(path: Any, own: dict[str, Any], file: PackedFile) -> None:
    """Every other tensor of the model is in the file and no more, of its shape and type."""
    rest: dict[str, Stored] = {
        name: stored for name, stored in file.stored.items() if owner_of(name) not in file.header.layers
    }
    if set(own) != set(rest):
        missing, extra = sorted(set(own) - set(rest)), sorted(set(rest) - set(own))
        raise refusal(
            path, f"its tensors do not fit the model (missing {missing or 'none'}, unexpected {extra or 'none'})"
        )
    for name, came in rest.items():
        if not isinstance(own[name], Tensor) or came.shape != tuple(own[name].shape) or came.dtype != own[name].dtype:
            needed = f"{getattr(own[name], 'dtype', 'no tensor')} {tuple(getattr(own[name], 'shape', ()))}"
            raise refusal(path, f"{name} must be {needed}, got {came.dtype} {came.shape}")
    first: dict[int, str] = {}
    for name, tensor in own.items():
        sharer = first.setdefault(id(tensor), name)
        if rest[sharer] != rest[name]:
            raise refusal(path, f"{sharer} and {name} are one tensor in the model and two in the file")


def _build(name: str, record: LayerRecord, tensors: dict[str, Tensor], module: nn.Module) -> PackedLayer:
    packed, centers = tensors[f"{name}.packed"], tensors[f"{name}.centers"]
    bias = tensors.get(f"{name}.bias") if record.bias else None
    form = KINDS[record.kind].packed
    layer = form(form.arguments_of(module), packed, centers, bias)  # the model's arguments, with which the file's agree
    own_centers, own_bias = getattr(module, "centers", module.weight), getattr(module, "bias", None)
    assert isinstance(own_centers, Tensor)
    layer.centers.requires_grad_(own_centers.requires_grad)
    if isinstance(layer.bias, Tensor) and isinstance(own_bias, Tensor):
        layer.bias.requires_grad_(own_bias.requires_grad)
    return layer.train(module.training)


def _tie(built: dict[str, PackedLayer], aliases: dict[str, str]) -> None:
    """Layers that shared codes, centers or a bias when they were saved share them again."""
    for alias, name in aliases.items():
        part = alias.rpartition(".")[2]
        layer, owner = built.get(owner_of(alias)), built.get(owner_of(name))
        if layer is not None and owner is not None and part == name.rpartition(".")[2]:
            setattr(layer, part, getattr(owner, part))
