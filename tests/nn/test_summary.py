"""summary: true sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from layer_cases import LayerCase, convolutional, layer_cases, quantized
from torch import nn

import qupedkern as qk
from qupedkern.nn import kind_of, packed_layers

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel lengths"
)  # torch's own, of its speed


def nbytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@settings(deadline=None, max_examples=40)
@given(layer_cases())
def test_sizes_are_those_of_the_packed_tensors(case: LayerCase) -> None:
    model = case.quantized()
    weight = model[0].weight
    before = qk.summary(model)
    packed = qk.pack_(model)[0]
    after = qk.summary(model)
    (row,) = before.layers
    assert (row.name, row.shape, row.levels, row.groups) == ("0", tuple(weight.shape), case.levels, packed.num_groups)
    for found in (row, after.layers[0]):
        assert (found.codes_bytes, found.centers_bytes) == (nbytes(packed.packed), nbytes(packed.centers))
        assert found.bias_bytes == (0 if packed.bias is None else nbytes(packed.bias))
        assert found.bits_per_weight == 8 * nbytes(packed.packed, packed.centers) / weight.numel()
    assert row.kind == after.layers[0].kind == kind_of(packed).name
    assert before.total_bytes == after.total_bytes == nbytes(*model.parameters(), *model.buffers())
    assert row.members == after.layers[0].members
    assert sum(row.members) == weight.numel()
    assert row.distance == float(qk.distance(packed.by_rows(weight), packed.centers).detach())
    assert after.layers[0].distance == 0


def test_totals_shares_and_ratio_follow_from_the_tensors() -> None:
    model = convolutional()
    float_bytes = nbytes(*model.parameters(), *model.buffers())
    total = sum(p.numel() for p in model.parameters())
    qk.quantize_(model, bits=2)
    summary = qk.summary(model)
    assert summary.float_bytes == float_bytes
    assert [row.share for row in summary.layers] == [216 / total, 270 / total]
    assert summary.ratio == float_bytes / summary.total_bytes
    assert summary.other_bytes == summary.total_bytes - sum(row.total_bytes for row in summary.layers)
    text = str(summary)
    assert f"packed {summary.total_bytes:,} bytes" in text
    assert f"float32 {float_bytes:,} bytes" in text
    assert len(text.splitlines()) == 2 + len(summary.layers)


def test_a_weight_used_by_two_layers_is_counted_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    float_bytes = nbytes(*model.parameters())
    before = qk.summary(quantized(model, bits=2))
    after = qk.summary(qk.pack_(model))
    for summary in (before, after):
        assert [row.weight_bytes for row in summary.layers] == [4 + 16, 0, 2 + 16]
        assert summary.total_bytes == nbytes(*model.parameters(), *model.buffers())
        assert summary.float_bytes == float_bytes
        assert summary.layers[1].share == 0
    assert list(packed_layers(model)) == ["0", "1", "2"]


def test_a_weight_that_a_float_module_needs_too_and_what_no_file_holds() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.register_buffer("cache", torch.zeros(100), persistent=False)

    model = Model()
    qk.quantize_(model, bits=2, rule=lambda name, _: name == "layer")
    model.head.weight = model.layer.weight  # tied later: together they would have been left in float
    before, after = qk.summary(model), qk.summary(qk.pack_(model))
    for summary in (before, after):
        assert (summary.layers[0].total_bytes, summary.other_bytes) == (4 + 16, 64)
        assert summary.total_bytes == 4 + 16 + 64


def test_a_model_without_quantized_layers_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^summary: the model has no quantized or packed layers; call quantize_ on it first$"
    ):
        qk.summary(convolutional())
    with pytest.raises(TypeError, match=r"^summary: model must be a torch.nn.Module, got list$"):
        qk.summary([convolutional()])
