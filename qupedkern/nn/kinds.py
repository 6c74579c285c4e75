"""The one list of kinds of layers that can be quantized and packed: quantize_, pack_, files and inspect all read it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ._packed import PackedLayer
from ._quantized import QuantizedLayer
from .conv import PackedConv1d, PackedConv2d, QuantConv1d, QuantConv2d
from .conv_transpose import PackedConvTranspose2d, QuantConvTranspose2d
from .embedding import PackedEmbedding, PackedEmbeddingBag, QuantEmbedding, QuantEmbeddingBag
from .linear import PackedLinear, QuantLinear


@dataclass(frozen=True)
class Kind:
    """Torch's layer and its two forms here. name: what files call it, never to be changed."""

    name: str
    plain: type[nn.Module]
    trainable: type[QuantizedLayer]
    packed: type[PackedLayer]

    @property
    def types(self) -> tuple[type[nn.Module], ...]:
        return (self.plain, self.trainable, self.packed)


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("linear", nn.Linear, QuantLinear, PackedLinear),
        Kind("conv1d", nn.Conv1d, QuantConv1d, PackedConv1d),
        Kind("conv2d", nn.Conv2d, QuantConv2d, PackedConv2d),
        Kind("conv_transpose2d", nn.ConvTranspose2d, QuantConvTranspose2d, PackedConvTranspose2d),
        Kind("embedding", nn.Embedding, QuantEmbedding, PackedEmbedding),
        Kind("embedding_bag", nn.EmbeddingBag, QuantEmbeddingBag, PackedEmbeddingBag),
    )
}
_BY_TYPE = {type_: kind for kind in KINDS.values() for type_ in kind.types}


def kind_of(module: nn.Module) -> Kind | None:
    """The kind whose float, Quant* or Packed* layer this is: of that very type, for a subclass may compute something else."""
    return _BY_TYPE.get(type(module))


def plain_names() -> str:
    """For messages: "nn.Linear, nn.Conv1d and nn.Conv2d"."""
    *most, last = (f"nn.{kind.plain.__name__}" for kind in KINDS.values())
    return f"{', '.join(most)} and {last}"
