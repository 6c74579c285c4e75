"""One quantized weight and its centers, as the optimizers see them, and how a model's are found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qupedkern.nn import QuantizedLayer, quantized_layers


@dataclass(frozen=True)
class Statistics:
    """What the centers' step needs of the weights just written, in the cells of the centers as they were."""

    counts: Tensor  # int64 [3, m] or [G, 3, m]: members, members above their center, members below it
    sums: Tensor | None  # sum of x - c_k over cell k; norm "l2" alone


@dataclass
class Codebook:
    """One quantized weight and its centers, as the optimizers see them."""

    name: str
    layer: QuantizedLayer
    group: dict[str, Any]  # the inner optimizer's group that holds the weight
    layers: list[QuantizedLayer] = field(default_factory=list)  # all that multiply with this weight
    codes: Tensor | None = None  # uint8, set at the freeze
    statistics: Statistics | None = None  # of the latest step's weights, where quped_step made it

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    @property
    def x(self) -> Tensor:
        """The weight as ops take it: a view in the order in which the rows of centers split it."""
        return self.layer.by_rows(self.layer.weight)

    @property
    def centers(self) -> nn.Parameter:
        return self.layer.centers

    @property
    def rate(self) -> float:
        """eta_1, the inner optimizer's present rate for this weight."""
        return float(self.group["lr"])

    @property
    def initial_rate(self) -> float:
        """The rate a dose is spent against: the largest of the rate when wrapped and what a scheduler starts from or climbs to."""
        known = (self.group.get(key) for key in ("_quped_initial_lr", "initial_lr", "max_lr"))
        return max((float(rate) for rate in known if rate is not None), default=self.rate)

    @property
    def members_per_center(self) -> float:
        """n / m: weights a center has on average."""
        return self.weight.numel() / self.centers.numel()


def find_codebooks(op: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Codebook]:
    """One codebook per distinct weight of the model. op: the optimizer's name, for errors."""
    layers = quantized_layers(model)
    if not layers:
        raise ValueError(f"{op}: the model has no quantized layers; call quantize_ on it first")
    holder = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    codebooks: dict[int, Codebook] = {}
    for name, layer in layers.items():
        if id(layer.weight) not in holder:
            raise ValueError(f"{op}: the optimizer must hold {name}.weight; pass it model.parameters()")
        known = codebooks.get(id(layer.weight))
        if known is not None and known.centers is not layer.centers:
            raise ValueError(f"{op}: {known.name} and {name} share a weight but not its centers")
        book = codebooks.setdefault(id(layer.weight), Codebook(name, layer, holder[id(layer.weight)]))
        book.layers.append(layer)
    if len({id(book.centers) for book in codebooks.values()}) != len(codebooks):
        raise ValueError(f"{op}: two weights share one centers parameter; give each its own")
    return list(codebooks.values())


def take_centers_out(codebooks: list[Codebook], optimizer: torch.optim.Optimizer) -> None:
    """The centers leave the inner optimizer, where momentum and decay would move them; its initial rates are noted."""
    centers = {id(book.centers) for book in codebooks}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in centers]
        group["_quped_initial_lr"] = float(group["lr"])
    for center in [p for p in optimizer.state if id(p) in centers]:
        del optimizer.state[center]
