"""A pull of one model's weights towards another's: the coupling of QuPeL and Ditto, and pFedMe's proximal term."""

import torch
from torch import Tensor, nn

import qupedkern as qk
from fl import devices
from fl.losses import squared_norm
from fl.storage import Tensors


def parameters(model: nn.Module) -> Tensors:
    """The model's parameters as tensors of its own, without buffers: what a client's weights are compared with."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def quantized_parameters(model: nn.Module) -> Tensors:
    """Q_c(x) of every quantized weight and the other parameters as they are, by the float model's names, detached."""
    layers = qk.nn.quantized_layers(model)
    values = {}
    for name, parameter in model.named_parameters():
        layer, _, kind = name.rpartition(".")
        if layer in layers and kind == "centers":
            continue
        values[name] = parameter.detach()
        if layer in layers and kind == "weight":
            book = layers[layer]
            values[name] = book.like_weight(qk.hard_quantize(book.by_rows(values[name]), book.centers.detach()))
    return values


def pull(model: nn.Module, anchor: Tensors, strength: float, size: int = 1) -> Tensor:
    """(strength / 2) |Q_c(x) - anchor|^2 over all parameters; its gradient strength (Q_c(x) - anchor) goes to x.

    size: K of a stack's model, for which it is [K].

    Straight through the quantizer, whose centers it leaves alone; in a float model Q_c(x) = x. It acts in evaluations of
    f(x) and is 0 in those of a quantized weight, so that a step of Algorithm 1 pulls once.
    """
    layers = qk.nn.quantized_layers(model).values()
    if any(layer.weight_mode.name != "float" for layer in layers):
        return torch.zeros((), device=devices.of(model))
    values, own = quantized_parameters(model), dict(model.named_parameters())
    total: Tensor | None = None
    for name, value in values.items():
        gap = own[name] + (value - own[name]).detach() - anchor[name]
        square = squared_norm(gap, size)
        total = square if total is None else total + square
    assert total is not None
    return 0.5 * strength * total
