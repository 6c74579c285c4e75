"""Random layers, their quantized forms and inputs for them; shared by the tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import qupedkern as qk

LEVELS = (2, 3, 4, 5, 16, 256)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Alone(nn.Sequential):
    """A model of one layer, called with all of its inputs."""

    def forward(self, *inputs: Any) -> Tensor:
        return self[0](*inputs)


@dataclass(frozen=True)
class LayerCase:
    """A float layer, an input for it, and how to quantize it."""

    layer: nn.Module
    x: Tensor
    levels: int
    groups: str | int
    rest: tuple[Any, ...] = ()  # further inputs

    @property
    def learns_from_all(self) -> bool:
        """Whether every row looked up gives its gradient; padding does not."""
        return not isinstance(self.layer, nn.Embedding) or self.layer.padding_idx is None

    @property
    def inputs(self) -> tuple[Any, ...]:
        return (self.x, *self.rest)

    def quantized(self) -> nn.Sequential:
        """The layer, quantized, as the only child of a model. The float layer keeps its parameters."""
        model = Alone(self.layer)
        report = qk.quantize_(model, levels=self.levels, groups=self.groups, rule=lambda *_: True)
        assert report.quantized == ("0",)
        return model


def _grouping(draw: Any, weight: Tensor, outputs: int | None = None) -> str | int:
    row = weight.numel() // (outputs or weight.shape[0])
    blocks = [length for length in range(1, row + 1) if row % length == 0]
    return draw(st.sampled_from(["tensor", "channel", draw(st.sampled_from(blocks))]))


@st.composite
def linear_cases(draw: Any, dtypes: tuple[torch.dtype, ...] = DTYPES) -> LayerCase:
    dtype = draw(st.sampled_from(dtypes))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    layer = nn.Linear(draw(st.integers(1, 9)), draw(st.integers(1, 7)), draw(st.booleans()), dtype=dtype)
    shape = (*draw(st.sampled_from([(), (0,), (4,), (2, 3)])), layer.in_features)
    return LayerCase(
        layer, torch.randn(shape, dtype=dtype), draw(st.sampled_from(LEVELS)), _grouping(draw, layer.weight)
    )


@st.composite
def conv1d_cases(draw: Any, dtypes: tuple[torch.dtype, ...] = DTYPES) -> LayerCase:
    dtype = draw(st.sampled_from(dtypes))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    groups = draw(st.sampled_from([1, 2]))
    padding = draw(st.sampled_from([0, 1, (2,), "same", "valid"]))
    layer = nn.Conv1d(
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 2, 3])),
        stride=1 if padding == "same" else draw(st.sampled_from([1, 2])),
        padding=padding,
        dilation=draw(st.sampled_from([1, 2])),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        dtype=dtype,
    )
    x = torch.randn((*draw(st.sampled_from([(), (2,)])), layer.in_channels, 7), dtype=dtype)
    return LayerCase(layer, x, draw(st.sampled_from(LEVELS)), _grouping(draw, layer.weight))


@st.composite
def conv_cases(draw: Any, dtypes: tuple[torch.dtype, ...] = DTYPES) -> LayerCase:
    dtype = draw(st.sampled_from(dtypes))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    groups = draw(st.sampled_from([1, 2]))
    padding = draw(st.sampled_from([0, 1, (2, 0), (0, 1), "same", "valid"]))
    layer = nn.Conv2d(
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 2, 3, (3, 1), (1, 2)])),
        stride=1 if padding == "same" else draw(st.sampled_from([1, 2, (2, 1)])),
        padding=padding,
        dilation=draw(st.sampled_from([1, 2, (1, 2)])),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        dtype=dtype,
    )
    x = torch.randn((*draw(st.sampled_from([(), (2,)])), layer.in_channels, 6, 7), dtype=dtype)
    return LayerCase(layer, x, draw(st.sampled_from(LEVELS)), _grouping(draw, layer.weight))


@st.composite
def conv_transpose_cases(draw: Any, dtypes: tuple[torch.dtype, ...] = DTYPES) -> LayerCase:
    dtype = draw(st.sampled_from(dtypes))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    groups, stride, dilation = (
        draw(st.sampled_from([1, 2])),
        draw(st.sampled_from([1, 2, (2, 1)])),
        draw(st.integers(1, 2)),
    )
    layer = nn.ConvTranspose2d(
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 2, 3, (3, 1), (1, 2)])),
        stride=stride,
        padding=draw(st.sampled_from([0, 1, (0, 1)])),
        output_padding=draw(st.sampled_from([0, (1, 0)])) if stride != 1 or dilation != 1 else 0,
        groups=groups,
        bias=draw(st.booleans()),
        dilation=dilation,
        dtype=dtype,
    )
    x = torch.randn((*draw(st.sampled_from([(), (2,)])), layer.in_channels, 4, 5), dtype=dtype)
    return LayerCase(layer, x, draw(st.sampled_from(LEVELS)), _grouping(draw, layer.weight, layer.out_channels))


def _ids(draw: Any, layer: nn.Embedding | nn.EmbeddingBag, shape: tuple[int, ...]) -> Tensor:
    ids = torch.randint(0, layer.num_embeddings, shape, dtype=draw(st.sampled_from([torch.int64, torch.int32])))
    if layer.padding_idx is not None and shape and draw(st.booleans()):
        ids[..., 1:] = layer.padding_idx
    return ids


@st.composite
def embedding_cases(draw: Any, dtypes: tuple[torch.dtype, ...] = DTYPES) -> LayerCase:
    dtype = draw(st.sampled_from(dtypes))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    layer = nn.Embedding(
        draw(st.integers(1, 9)), draw(st.integers(1, 7)), padding_idx=draw(st.sampled_from([None, 0, -1])), dtype=dtype
    )
    ids = _ids(draw, layer, draw(st.sampled_from([(), (0,), (4,), (2, 3)])))
    return LayerCase(layer, ids, draw(st.sampled_from(LEVELS)), _grouping(draw, layer.weight))


@st.composite
def embedding_bag_cases(draw: Any, dtypes: tuple[torch.dtype, ...] = DTYPES) -> LayerCase:
    """x: ids, with offsets (and weights) as further inputs where ids have one dimension."""
    mode = draw(st.sampled_from(["sum", "mean", "max"]))
    dtype = draw(st.sampled_from(dtypes))
    if dtype == torch.bfloat16 and mode == "max":
        mode = "sum"  # torch reduces no bfloat16 that way
    torch.manual_seed(draw(st.integers(0, 2**16)))
    last = draw(st.booleans())
    layer = nn.EmbeddingBag(
        draw(st.integers(1, 9)),
        draw(st.integers(1, 7)),
        mode=mode,
        include_last_offset=last,
        padding_idx=draw(st.sampled_from([None, 0, -1])),
        dtype=dtype,
    )
    flat = last or draw(st.booleans())
    ids = _ids(draw, layer, (6,) if flat else draw(st.sampled_from([(1, 4), (3, 2)])))
    rest: tuple[Tensor | None, ...] = ()
    if flat:
        rest = (torch.tensor([0, 2, 2, 5, 6] if last else [0, 2, 2, 5], dtype=ids.dtype),)
    if mode == "sum" and draw(st.booleans()):
        rest = (*(rest or (None,)), torch.randn(ids.shape, dtype=dtype))
    return LayerCase(layer, ids, draw(st.sampled_from(LEVELS)), _grouping(draw, layer.weight), rest)


KIND_CASES = {
    "linear": linear_cases,
    "conv1d": conv1d_cases,
    "conv2d": conv_cases,
    "conv_transpose2d": conv_transpose_cases,
    "embedding": embedding_cases,
    "embedding_bag": embedding_bag_cases,
}


def layer_cases(dtypes: tuple[torch.dtype, ...] = DTYPES) -> st.SearchStrategy[LayerCase]:
    return st.one_of(*(cases(dtypes) for cases in KIND_CASES.values()))


def convolutional() -> nn.Sequential:
    """Two convolutions with batch norm, two linear layers: 1 x 8 x 8 -> 3 classes."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(54, 5),
        nn.ReLU(),
        nn.Linear(5, 3),
    )


def quantized(model: nn.Module, **options: Any) -> nn.Module:
    """The model with every layer quantized, in place."""
    qk.quantize_(model, rule=lambda *_: True, **options)
    return model


def bits_of(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    """A state dict as bytes: equality to the bit, NaN included."""
    return {
        name: t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        for name, t in tensors.items()
        if t.dim()
    } | {name: repr(t.item()).encode() for name, t in tensors.items() if not t.dim()}
