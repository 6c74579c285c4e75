"""QuantEmbedding, QuantEmbeddingBag (trainable), PackedEmbedding and PackedEmbeddingBag (1 to 8 bits a weight)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qupedkern.ops import packed_embedding
from qupedkern.ops._call import attempt

from ._packed import PackedLayer
from ._quantized import QuantizedLayer


def _refusal(layer: nn.Module) -> str | None:
    """What of torch's embeddings has no meaning for a table of a few values."""
    if layer.max_norm is not None:
        return "max_norm rewrites rows of its weight as they are looked up"
    if layer.sparse:
        return "its gradients are sparse"
    if layer.scale_grad_by_freq:
        return "scale_grad_by_freq scales the gradients of rows, which a packed table does not have"
    return None


class QuantEmbedding(QuantizedLayer, nn.Embedding):
    """nn.Embedding whose weight can live on `levels` learned centers: rows of the weight of the layer's mode.

    weight [V, D] float; centers [levels], or [num_groups, levels] rows that split the flattened weight, V of them giving each
    row of the table its own. The row padding_idx is quantized like any other (zeros stay zeros where a center is 0), and is
    never learned from. Arguments: those of nn.Embedding without max_norm, sparse and scale_grad_by_freq, then levels=4,
    num_groups=1, init="kmeans" by keyword.
    """

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        return _refusal(layer)

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.active_weight(), self.padding_idx)


class QuantEmbeddingBag(QuantizedLayer, nn.EmbeddingBag):
    """nn.EmbeddingBag whose weight can live on `levels` learned centers; else as QuantEmbedding."""

    @classmethod
    def refusal(cls, layer: nn.Module) -> str | None:
        return _refusal(layer)

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        return F.embedding_bag(
            input,
            self.active_weight(),
            offsets,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
        )


class _PackedTable(PackedLayer):
    @classmethod
    def _empty(cls, arguments: Mapping[str, Any]) -> nn.Module:
        sizes = [arguments.get(name) for name in ("num_embeddings", "embedding_dim")]
        # a weight of its own: without one torch draws random numbers on the meta device, and imports its compiler to do so
        return super()._empty({**arguments, "_weight": torch.empty(sizes, device="meta")})  # type: ignore[arg-type]

    def _rows(self, indices: Tensor) -> Tensor:
        """[..., D]: the rows of the table that these name."""
        packed, centers, _ = self.stored()
        index = indices.long() if indices.dtype == torch.int32 else indices
        args = (index, packed, centers, self.bits, self._stored_shape)
        return attempt("packed_embedding", args, packed_embedding)


class PackedEmbedding(_PackedTable):
    """An embedding stored at `bits` bits a weight; equal to QuantEmbedding in mode "hard" to the bit.

    Only the rows looked up are dequantized. An index outside the table is a ValueError on the CPU.
    """

    plain = nn.Embedding
    ARGUMENTS = ("num_embeddings", "embedding_dim", "padding_idx")
    padding_idx: int | None

    def forward(self, input: Tensor) -> Tensor:
        rows = self._rows(input)
        if self.padding_idx is not None and torch.is_grad_enabled() and self.centers.requires_grad:
            return torch.where((input == self.padding_idx)[..., None], rows.detach(), rows)
        return rows


class PackedEmbeddingBag(_PackedTable):
    """An embedding bag stored at `bits` bits a weight; equal to QuantEmbeddingBag in mode "hard" to the bit.

    The rows looked up are dequantized, then torch reduces them ("sum", "mean" or "max").
    """

    plain = nn.EmbeddingBag
    ARGUMENTS = ("num_embeddings", "embedding_dim", "mode", "include_last_offset", "padding_idx")
    mode: str
    include_last_offset: bool
    padding_idx: int | None

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        indices, padding = input.flatten(), None
        places = torch.arange(indices.numel(), device=input.device)
        if self.padding_idx is not None:  # one row more stands for every entry that is left out
            padding = indices.numel()
            places = torch.where(indices == self.padding_idx, padding, places)
            indices = torch.cat([indices, indices.new_full((1,), self.padding_idx)])
        rows = self._rows(indices)
        return F.embedding_bag(
            places.reshape(input.shape),
            rows,
            offsets if offsets is None else offsets.long(),
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=padding,
        )
