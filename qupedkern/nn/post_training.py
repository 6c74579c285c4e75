"""quantize_weights_: a trained model packed in one call, without training."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ._quantized import QuantizedLayer, check_model
from .convert import Conversion, Rule, levels_of, packed_forms, plan, replace_modules

_DEFAULT_BITS = 4  # post-training; with training 2 are enough


def quantize_weights_(
    model: nn.Module,
    bits: int | None = None,
    levels: int | None = None,
    groups: str | int = "tensor",
    init: str = "kmeans",
    rule: Rule | None = None,
    overrides: Mapping[str, int] | None = None,
    importance: Mapping[str, Tensor] | None = None,
) -> Conversion:
    """Turn a float model's layers straight into packed ones, in place: post-training quantization to the nearest centers.

    Per row of centers, exactly: argmin_c sum_i w_i min_j (x_i - c_j)^2, w = importance, or 1

    bits: 1..8 (default 4), or levels: 2..256.  groups, init, rule, overrides: as in quantize_.
    importance: name of a parameter -> w, shaped like it, finite, >= 0, for every weight that is quantized (others are
    ignored), with init "kmeans" only: for example squared_gradients(model, batches, loss), so that what the loss feels is
    what is kept. A row whose w is all zero counts its weights alike.
    Layers that share a weight share codes and centers. A layer whose weight a module that stays as it is uses too is left
    alone, for packing it would store the weight twice. recalibrate_ afterwards helps batch norms at few bits.
    Returns a Conversion that names what was packed and why the rest was not. Raises ValueError or TypeError, before anything
    is changed, for what quantize_ refuses and for importance that does not fit.
    """
    op = "quantize_weights_"
    check_model(op, model)
    count = levels_of(op, bits, levels, _DEFAULT_BITS)
    weights = _by_parameter(op, model, importance, init)

    def weigh(name: str, layer: QuantizedLayer) -> Tensor | None:
        if weights is not None and id(layer.weight) not in weights:
            raise ValueError(
                f"{op}: importance must have an entry for {name}.weight, got none; squared_gradients gives all"
            )
        return None if weights is None else weights[id(layer.weight)]

    layers, report = plan(op, model, count, groups, init, rule, overrides, weigh, beside_quantized=False)
    forms = packed_forms(layers.values())
    replace_modules(model, {module: forms[layer] for module, layer in layers.items()})
    return report


def _by_parameter(
    op: str, model: nn.Module, importance: Mapping[str, Tensor] | None, init: str
) -> dict[int, Tensor] | None:
    """id of a parameter -> its importance, every entry checked."""
    if importance is None:
        return None
    if not isinstance(importance, Mapping):
        raise TypeError(f"{op}: importance must map parameter names to tensors, got {type(importance).__name__}")
    if init != "kmeans":
        raise ValueError(f"{op}: importance is for init 'kmeans', got init {init!r}; leave one of them out")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: dict[int, Tensor] = {}
    for name, value in importance.items():
        if name not in parameters:
            raise ValueError(f"{op}: importance names {name!r}, which is no parameter of the model")
        parameter = parameters[name]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            came = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{op}: importance of {name} must be a float tensor, got {came}")
        if value.shape != parameter.shape or value.device != parameter.device:
            needed, got = (f"{tuple(t.shape)} on {t.device}" for t in (parameter, value))
            raise ValueError(f"{op}: importance of {name} must be {needed}, got {got}")
        if not bool((value.isfinite() & (value >= 0)).all()):
            raise ValueError(f"{op}: importance of {name} must be finite and not negative, got an entry that is not")
        if found.setdefault(id(parameter), value) is not value:
            raise ValueError(f"{op}: importance names one shared parameter twice, the second time as {name}")
    return found
