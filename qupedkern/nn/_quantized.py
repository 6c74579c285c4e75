"""What every trainable quantized layer shares: a float weight, its centers, and the choice of which weight multiplies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qupedkern.ops import assign, hard_quantize, init_centers, soft_quantize

from ._centers import CenteredLayer
from ._packed import packed_layers

MODES = ("float", "soft", "hard")
# What every nn.Module has of its own: anything else on a layer is its geometry, or its user's.
_MODULE_STATE = frozenset(vars(nn.Module())) | {"_compiled_call_impl"}
DEFAULT_SHARPNESS = 10.0  # in 1/gap: 8 to 16 trained alike, 4 and 32 lost one to three points at 1 bit


@dataclass(frozen=True)
class WeightMode:
    """Which weight a layer multiplies with: x ("float"), S_c(x) ("soft") or Q_c(x) ("hard")."""

    name: str = "float"
    sharpness: float = DEFAULT_SHARPNESS  # soft: p, in 1/gap of each row
    P: float | None = None  # soft: absolute, in 1/unit of x; takes the place of sharpness
    straight_through: bool = False  # hard: the weight's gradient passes through the quantizer

    def __post_init__(self) -> None:
        if self.name not in MODES:
            raise ValueError(f"mode: the mode must be one of {', '.join(MODES)}, got {self.name!r}")
        for key, value in (("sharpness", self.sharpness), ("P", self.P)):
            if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
                raise TypeError(f"mode: {key} must be a number, got {type(value).__name__}")
            if value is not None and not value > 0:
                raise ValueError(f"mode: {key} must be positive, got {value}")


def check_model(op: str, model: Any) -> None:
    """A sentence for the commonest slip: a factory, a state dict or a path where a module belongs."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be a torch.nn.Module, got {type(model).__name__}")


def row_gaps(centers: Tensor) -> Tensor:
    """(c_m - c_1) / (m - 1) of each row, [G], detached, at least float32: the mean distance of neighbouring centers."""
    return all_row_gaps([centers])[0]


@torch.no_grad()
def all_row_gaps(centers: Sequence[Tensor]) -> list[Tensor]:
    """row_gaps of each, in two calls: for small networks one by one takes a share of the step."""
    rows = [c.reshape(-1, c.shape[-1]) for c in centers]
    rows = [c if c.dtype == torch.float64 else c.float() for c in rows]  # p / gap would leave the range of float16
    gaps = torch._foreach_sub([c[:, -1] for c in rows], [c[:, 0] for c in rows])
    torch._foreach_div_(gaps, [float(c.shape[1] - 1) for c in rows])
    return list(gaps)


def absolute_sharpness(centers: Tensor, sharpness: float) -> Tensor:
    """P = p / gap of each row, [G], finite; a row whose centers are all equal is constant for any P and gets 1."""
    return sharpness_of(row_gaps(centers), sharpness)


def sharpness_of(gaps: Tensor, sharpness: float) -> Tensor:
    """absolute_sharpness of rows with these gaps."""
    return torch.where(gaps > 0, sharpness / gaps, 1.0).clamp_(max=torch.finfo(gaps.dtype).max)


def sorted_codebook(codes: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """The same values with every row of centers ascending: where centers have crossed, codes are renamed with them."""
    rows, order = centers.reshape(-1, centers.shape[-1]).sort(dim=-1, stable=True)
    rank = order.argsort(dim=-1).to(torch.uint8)  # [G, m]: where each center went
    by_row = codes.reshape(rank.shape[0], -1).long()
    return rank.gather(1, by_row).reshape(codes.shape), rows.reshape(centers.shape)


class QuantizedLayer(CenteredLayer):
    """Mixin of the Quant* layers: `weight` (float), `centers` [m] or [G, m], and a mode that train() and eval() never change.

    A kind is `class QuantX(QuantizedLayer, nn.X)` with a forward that uses active_weight().
    """

    weight: Tensor
    weight_mode: WeightMode
    stand_in: Tensor | None = (
        None  # S_c(x) or Q_c(x), made outside for all layers in one call; belongs to the present mode
    )

    def __init__(
        self, *args: Any, levels: int = 4, num_groups: int = 1, init: str | None = "kmeans", **options: Any
    ) -> None:
        """args, options: those of the float layer.  levels, num_groups: m and G.

        init: how centers are drawn from the weight ("kmeans", "linspace", "quantile", "signed_mean"); None leaves zeros to
        be loaded.
        """
        super().__init__(*args, **options)
        reason = self.refusal(self)
        if reason is not None:
            raise ValueError(f"{type(self).__name__}: the layer cannot be quantized: {reason}")
        self._init_quantizer(levels, num_groups, init)

    @classmethod
    def from_float(
        cls, layer: nn.Module, *, levels: int, num_groups: int = 1, init: str | None = "kmeans"
    ) -> QuantizedLayer:
        """A quantized layer around the very parameters of `layer`: tied weights stay tied, values are kept."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.__dict__.update({name: value for name, value in vars(layer).items() if name not in _MODULE_STATE})
        new._parameters.update(layer._parameters)
        new.train(layer.training)
        new._init_quantizer(levels, num_groups, init)
        return new

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        """Why a float layer of this kind must stay as it is, None where it need not."""
        return None

    @classmethod
    def outputs_of(cls, layer: nn.Module) -> int:
        """Rows of centers that groups="channel" gives a float layer of this kind: its outputs."""
        weight = layer.weight
        assert isinstance(weight, Tensor)
        return int(weight.shape[0])

    def _init_quantizer(self, levels: int, num_groups: int, init: str | None) -> None:
        """Give the layer its centers, frozen where the weight is; init=None leaves them zero, to be loaded."""
        self.weight_mode = WeightMode()
        centers = self.weight.detach().new_zeros((levels,) if num_groups == 1 else (num_groups, levels))
        self.centers = nn.Parameter(centers, requires_grad=self.weight.requires_grad)
        if init is not None:
            self.draw_centers(init)

    @torch.no_grad()
    def draw_centers(self, method: str, importance: Tensor | None = None) -> None:
        """Set the centers from the weight by init_centers(method); importance: the weights of its k-means, shaped like weight.

        A row whose importance is all zero says nothing of its weights: they then count alike.
        """
        x, mass = self.by_rows(self.weight.detach()), None
        if importance is not None:
            rows = self.by_rows(importance).reshape(self.num_groups, -1)
            mass = torch.where((rows > 0).any(1, keepdim=True), rows, 1.0).reshape(x.shape)
        self.centers.copy_(init_centers(x, self.levels, self.num_groups, method, mass))

    @property
    def bits(self) -> int:
        """Bits a packed weight takes, ceil(log2 m)."""
        return (self.levels - 1).bit_length()

    def codes(self) -> Tensor:
        """uint8 codes in the order of storage, shaped like by_rows(weight)."""
        return assign(self.by_rows(self.weight), self.centers)

    def _multiply_with(self, mode: WeightMode, stand_in: Tensor | None) -> None:
        """Past nn.Module.__setattr__, which looks for parameters: several times a step, it is time one sees in small networks."""
        self.__dict__["weight_mode"], self.__dict__["stand_in"] = mode, stand_in

    def active_weight(self) -> Tensor:
        """The weight the layer multiplies with in its present mode, differentiable as the mode allows."""
        mode = self.weight_mode
        if mode.name == "float":
            return self.weight
        if self.stand_in is not None:
            return self.like_weight(self.stand_in)
        x = self.by_rows(self.weight)
        if mode.name == "hard":
            return self.like_weight(hard_quantize(x, self.centers, mode.straight_through))
        sharpness = absolute_sharpness(self.centers, mode.sharpness) if mode.P is None else mode.P
        return self.like_weight(soft_quantize(x, self.centers, sharpness))

    def extra_repr(self) -> str:
        own = f"levels={self.levels}, groups={self.num_groups}, mode={self.weight_mode.name}"
        return f"{super().extra_repr()}, {own}"


# What nn.Module keeps its hooks in: shared with a replacement, so that a handle's remove() still finds its hook.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def inherit_hooks(new: nn.Module, old: nn.Module) -> None:
    """Give the hooks registered on a module to the one that takes its place."""
    new.__dict__.update({name: old.__dict__[name] for name in _HOOKS if name in old.__dict__})


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Trainable quantized layers by name, each once."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLayer)}


@contextmanager
def mode(model: nn.Module, name: str, **options: Any) -> Iterator[nn.Module]:
    """Let every Quant* layer multiply with x ("float"), S_c(x) ("soft") or Q_c(x) ("hard") inside a with block.

    sharpness: soft only, p in 1/gap of each row (default 10); P: soft only, absolute, in 1/unit of x, instead of it;
    straight_through: hard only, pass the weight's gradient through the quantizer.
    The modes the layers had come back at the end, also after an error. Packed layers are always "hard". Inside the block
    torch's fused transformer inference is off, for it reads the float weights and passes the layers by. Raises ValueError
    for an unknown mode or a model without quantized layers.
    """
    check_model("mode", model)
    unknown = set(options) - {"sharpness", "P", "straight_through"}
    if unknown:
        raise TypeError(f"mode: options are sharpness, P and straight_through, got {', '.join(sorted(unknown))}")
    chosen = WeightMode(name, **options)
    layers = list(quantized_layers(model).values())
    if not layers and not (name == "hard" and packed_layers(model)):
        raise ValueError(f"mode: the model has no layer that can be in mode {name!r}; call quantize_ on it first")
    before = [(layer.weight_mode, layer.stand_in) for layer in layers]
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(fused and name == "float")
        for layer in layers:
            layer._multiply_with(chosen, None)
        yield model
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for layer, old in zip(layers, before, strict=True):
            layer._multiply_with(*old)
