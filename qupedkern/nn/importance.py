"""squared_gradients: how much a loss feels each weight, the diagonal of the empirical Fisher information."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ._quantized import check_model


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """The model in eval mode, every float parameter differentiable; on leaving, modes, buffers and flags are as they were."""
    training = {module: module.training for module in model.modules()}
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    values = {
        id(buffer): buffer.detach().clone() for _, own in buffers for buffer in own.values() if buffer is not None
    }
    parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    wanted = {name: p.requires_grad for name, p in parameters.items()}
    try:
        model.eval()
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        yield parameters
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(wanted[name])
        for module, flag in training.items():
            module.training = flag
        with torch.no_grad():
            for module, own in buffers:
                module._buffers.update(own)  # one that a forward has put in place of the old goes again
                for buffer in own.values():
                    if buffer is not None and not torch.equal(buffer, values[id(buffer)]):
                        buffer.copy_(values[id(buffer)])


def squared_gradients(
    model: nn.Module, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor]
) -> dict[str, Tensor]:
    """The mean over batches of the squared gradient of loss(model, batch), one tensor for each float parameter.

    F_i = (1 / B) sum_b (d loss(model, batch_b) / d x_i)^2

    With batches of one example and a negative log-likelihood as loss, F is the diagonal of the empirical Fisher
    information; larger batches give about F / batch size near a minimum, cheaper and noisier, and only ratios count.
    batches: whatever `loss` understands, at least one.  loss: returns a scalar tensor, for example
    lambda model, batch: cross_entropy(model(batch[0]), batch[1]).
    Returns names as in model.named_parameters() (a tied parameter once), shapes and devices of the parameters, float64 for
    float64 and float32 otherwise; a parameter that no loss depends on gets zeros. For quantize_weights_(importance=...).
    The model runs in eval mode, so that batch norms use their statistics and dropout is off; frozen parameters count too.
    Afterwards, and after any error, modes, buffers, .grad fields and requires_grad are what they were. Deterministic: the
    batches' sum is taken in their order. Raises TypeError or ValueError where a loss is no finite scalar that depends on
    the parameters, or there is no batch.
    """
    check_model("squared_gradients", model)
    if not callable(loss):
        raise TypeError(f"squared_gradients: loss must be a function of (model, batch), got {type(loss).__name__}")
    with torch.inference_mode(False), torch.enable_grad(), _unchanged(model) as parameters:
        sums = {
            name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32), requires_grad=False)
            for name, p in parameters.items()
        }
        count = 0
        for batch in batches:
            gradients = _gradients(loss(model, batch), count, list(parameters.values()))
            for total, gradient in zip(sums.values(), gradients, strict=True):
                if gradient is not None:
                    total.addcmul_(gradient.to(total.dtype), gradient.to(total.dtype))
            count += 1
    if not count:
        raise ValueError("squared_gradients: at least one batch is needed, got none")
    return {name: total / count for name, total in sums.items()}


def _gradients(value: Any, index: int, parameters: list[nn.Parameter]) -> tuple[Tensor | None, ...]:
    """Of one loss, without touching .grad; None where it does not depend on a parameter."""
    if not isinstance(value, Tensor):
        raise TypeError(f"squared_gradients: loss must return a tensor, got {type(value).__name__} for batch {index}")
    if value.numel() != 1 or not value.requires_grad:
        came = f"shape {tuple(value.shape)}" if value.numel() != 1 else "one that depends on no parameter"
        raise ValueError(
            f"squared_gradients: loss must be a scalar computed by the model, got {came} for batch {index}"
        )
    if not bool(value.isfinite()):
        raise ValueError(f"squared_gradients: loss must be finite, got {float(value.detach())} for batch {index}")
    return torch.autograd.grad(value, parameters, allow_unused=True)
