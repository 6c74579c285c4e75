"""save: a packed model as one safetensors file."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from qupedkern.nn import PackedLayer, packed_layers, quantized_layers
from qupedkern.nn._quantized import check_model, sorted_codebook
from qupedkern.ops import pack_codes

from . import container
from .atomic import write_atomically
from .header import record_of, to_metadata
from .model import state_outside


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a packed model as one safetensors file, atomically: codes at `bits` bits a weight, centers, and the rest as it is.

    model: packed by pack_ (quantized layers that are not packed yet are refused).  path: replaced only once the new file
    is complete. Centers that training has made cross are written in order, with their codes; the model stays as it is.
    Raises ValueError for a model without packed layers, with centers that are not finite or with a state that is not
    dense tensors, OSError where the file cannot be written.
    """
    check_model("save", model)
    unpacked = quantized_layers(model)
    layers = packed_layers(model)
    if unpacked or not layers:
        what = f"has layers that are not packed ({', '.join(unpacked)})" if unpacked else "has no packed layers"
        raise ValueError(f"save: the model {what}; call pack_ on it first")
    if "" in layers:
        raise ValueError("save: the model is itself a packed layer; wrap it, for example in nn.Sequential")
    in_order: dict[int, Tensor] = {}
    for name, layer in layers.items():
        in_order.update(_in_order(name, layer))
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    stored: dict[int, str] = {}
    for name, tensor in state_outside(model, layers.values(), keep=set(layers)).items():
        _check_state(name, tensor)
        if id(tensor) in stored:
            aliases[name] = stored[id(tensor)]
        else:
            stored[id(tensor)] = name
            tensors[name] = in_order.get(id(tensor), tensor)
    metadata = to_metadata({name: record_of(layer) for name, layer in layers.items()}, aliases)
    write_atomically(path, lambda temporary: container.write(temporary, tensors, metadata))


def _check_state(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"save: the state of the model must be tensors, got {type(value).__name__} for {name}")
    reason = container.why_not_stored(value)
    if reason is not None:
        raise ValueError(f"save: {name} must be a dense tensor of a type that safetensors knows, got {reason}")


@torch.no_grad()
def _in_order(name: str, layer: PackedLayer) -> dict[int, Tensor]:
    """What to write in place of a layer's codes and centers where its centers have crossed; a file has them ascending."""
    if not bool(layer.centers.isfinite().all()):
        raise ValueError(f"save: the centers of {name} must be finite, got a NaN or an infinity")
    if bool((layer.centers.diff(dim=-1) >= 0).all()):
        return {}
    codes, centers = sorted_codebook(layer.codes(), layer.centers)
    return {id(layer.packed): pack_codes(codes, layer.bits), id(layer.centers): centers}
