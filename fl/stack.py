"""Clients side by side: K models as one, their states joined along the first dimension, and taken apart again.

Channels of all clients lie beside each other, so that whatever acts on single channels (batch norm, ReLU, pooling) needs no
change, and convolutions get K times the groups; linear layers multiply in batches, and what leaves them is [K, B, features].
A row of centers covers a K-th of what it did: K G rows split the joined weight as G rows split each client's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fl.core import Client, ClientState, Message, Stack, Update
from fl.data import ClientData, Part
from fl.storage import Tensors
from qupedkern.nn import QuantConv2d, QuantizedLayer, QuantLinear


class _Multiply(torch.autograd.Function):
    """x W^T + b for each client: x [K, B, in], W [K, out, in], b [K, 1, out] or None.

    torch's own gradient of W comes transposed and is copied into place: a quarter of the time of a small network's step.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        transposed = weight.transpose(1, 2)
        return torch.bmm(x, transposed) if bias is None else torch.baddbmm(bias, x, transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        to_x = torch.bmm(grad, weight) if ctx.needs_input_grad[0] else None
        to_weight = torch.bmm(grad.transpose(1, 2), x) if ctx.needs_input_grad[1] else None
        return to_x, to_weight, grad.sum(1, keepdim=True) if ctx.needs_input_grad[2] else None


class StackedLinear(nn.Module):
    """K linear layers: y_k = x_k W_k^T + b_k.  x: [B, K in] or [K, B, in] -> [K, B, out].

    weight: [K out, in].  bias: [K out] or None.
    """

    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: Tensor | None, size: int) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(weight)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    def forward(self, x: Tensor) -> Tensor:
        return self._multiply(x, self.weight)

    def _multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        inputs = weight.shape[1]
        if x.dim() == 2:
            x = x.view(-1, self.size, inputs).transpose(0, 1)
        bias = None if self.bias is None else self.bias.view(self.size, 1, -1)
        return _Multiply.apply(x, weight.view(self.size, -1, inputs), bias)


class StackedQuantLinear(QuantizedLayer, StackedLinear):
    """K QuantLinear: the weight of the layer's mode multiplies; centers [K G, m]."""

    weight: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        return self._multiply(x, self.active_weight())


def widen_(model: nn.Module, size: int) -> nn.Module:
    """Lay `size` copies of a model side by side, in place; it takes [B, size C, ...] and gives [size, B, classes].

    Known are models that are made of linear layers, 2-D convolutions, batch norms and what acts on single channels.
    Raises ValueError for any other layer that has parameters or buffers. A size of 1 leaves the model as it is.
    """
    if size == 1:
        return model
    for name, module in list(model.named_modules()):
        if type(module) in (nn.Conv2d, QuantConv2d):
            _widen_convolution_(module, size)
        elif type(module) is nn.BatchNorm2d:
            module.num_features *= size
            _repeat_(module, size)
        elif type(module) in (nn.Linear, QuantLinear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _stacked_linear(module, size))
        elif any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            raise ValueError(
                f"stack: {name or 'the model'} is a {type(module).__name__}, which cannot be stacked; use the engine 'serial'"
            )
    return model


def _widen_convolution_(module: nn.Conv2d, size: int) -> None:
    module.in_channels, module.out_channels = size * module.in_channels, size * module.out_channels
    module.groups *= size
    _repeat_(module, size)


@torch.no_grad()
def _repeat_(module: nn.Module, size: int) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        wide = nn.Parameter(_join(name, [parameter] * size), requires_grad=parameter.requires_grad)
        setattr(module, name, wide)
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, _join(name, [buffer] * size))


@torch.no_grad()
def _stacked_linear(layer: nn.Module, size: int) -> nn.Module:
    bias = layer.bias if isinstance(layer.bias, Tensor) else None
    assert isinstance(layer.weight, Tensor)  # which nn.Module does not say of its attributes
    wide = StackedLinear(layer.weight.repeat(size, 1), None if bias is None else bias.repeat(size), size)
    wide.train(layer.training)
    if not isinstance(layer, QuantizedLayer):
        return wide
    rows = size * layer.num_groups
    quantized = StackedQuantLinear.from_float(wide, levels=layer.levels, num_groups=rows, init=None)
    quantized.centers.copy_(layer.centers.reshape(-1, layer.levels).repeat(size, 1))
    return quantized


# -- states -----------------------------------------------------------------------------------------------------------


def _join(name: str, values: Sequence[Tensor]) -> Tensor:
    """Along the first dimension; a single row of centers becomes one of K, and what has no dimension stays the first's."""
    if values[0].dim() == 0:
        return values[0].clone()
    if values[0].dim() == 1 and name.rpartition(".")[2] == "centers":
        return torch.stack(list(values))
    return torch.cat(list(values))


def make_stack(clients: Sequence[Client]) -> Stack:
    """Clients of one kind as one, under the first one's number."""
    first, nothing = clients[0], Part(torch.empty(0), torch.empty(0))
    data = ClientData((), nothing, nothing, nothing)
    return Stack(first.id, first.architecture, first.bits, data, first.groups, members=tuple(clients))


def join_states(states: Sequence[ClientState]) -> ClientState:
    """The state of a stack, from those of its members, which hold the same tensors by name and shape."""
    first = states[0]
    tensors = {name: _join(name, [state.tensors[name] for state in states]) for name in first.tensors}
    return ClientState(tensors, first.scalars)


def spread(tensors: Tensors, size: int) -> Tensors:
    """What every member of a stack receives: the same tensors."""
    return {name: _join(name, [tensor] * size) for name, tensor in tensors.items()}


def split_update(update: Update, stack: Stack, states: Sequence[ClientState]) -> list[Update]:
    """Each member's update. states: the members' before the step."""
    updates = []
    for k, (client, before) in enumerate(zip(stack.members, states, strict=True)):
        kept = _cut(update.state.tensors, k, stack.size, before.tensors)
        for name, value in kept.items():  # a counter: the members share the step's, each from its own count
            if value.dim() == 0 and name in before.tensors:
                kept[name] = before.tensors[name] + (value - states[0].tensors[name])
        message = update.message
        if message is not None:
            message = Message(_cut(message.tensors, k, stack.size, {}), len(client.data.train))
        loss = update.each[k] if update.each else update.loss
        updates.append(Update(ClientState(kept, update.state.scalars), message, update.evaluations, loss))
    return updates


def _cut(tensors: Tensors, k: int, size: int, like: Tensors) -> Tensors:
    parts = {}
    for name, tensor in tensors.items():
        if tensor.dim() == 0:
            parts[name] = tensor.clone()
            continue
        length = len(tensor) // size
        part = tensor[k * length : (k + 1) * length]
        parts[name] = part.reshape(like[name].shape) if name in like else part
    return parts


def form(state: ClientState) -> tuple[object, ...]:
    """The tensors of a state by name, shape and type: they tell whether there is momentum yet, and whether weights are frozen."""
    return tuple(sorted((name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in state.tensors.items()))
