"""State dicts of packed models: torch.save and torch.load(weights_only=True), and codes that a layer cannot have."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from packed_models import Zoo, packed_zoo, state
from torch import Tensor, nn

import qupedkern as qk
from qupedkern.nn import KINDS, packed_layers

FORMS = ({}, {"groups": "channel"}, {"levels": 2}, {"levels": 5, "groups": "channel"}, {"levels": 16}, {"levels": 256})


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("assign", [False, True])
def test_every_kind_comes_back_through_a_state_dict(options: dict[str, Any], assign: bool) -> None:
    model, other = packed_zoo(seed=0, **options), packed_zoo(seed=1, **options)
    assert state(other) != state(model)
    loaded = through_a_file(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.items())
    other.load_state_dict(loaded, assign=assign)
    assert state(other) == state(model)
    for ours, theirs in zip(model(), other(), strict=True):
        assert torch.equal(ours, theirs)
    assert {type(layer).__name__ for layer in packed_layers(other).values()} == {
        kind.packed.__name__ for kind in KINDS.values()
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_so_in_every_type(dtype: torch.dtype) -> None:
    model, other = packed_zoo(seed=0).to(dtype), packed_zoo(seed=1).to(dtype)
    other.load_state_dict(through_a_file(model.state_dict()))
    assert state(other) == state(model)


def test_centers_that_training_has_made_cross_are_no_error() -> None:
    model, other = packed_zoo(), packed_zoo(seed=1)
    with torch.no_grad():
        model.layers["linear"].centers.copy_(model.layers["linear"].centers.flip(0))
    other.load_state_dict(through_a_file(model.state_dict()))
    assert state(other) == state(model)


CODES = "layers.conv2d.packed"
CENTERS = "layers.conv2d.centers"


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({CODES: lambda p: p | 192}, f"{CODES} has code 3, the layer has 3 levels"),
        ({CODES: lambda p: p[:-1]}, f"{CODES} must be torch.uint8 (18,), got torch.uint8 (17,)"),
        ({CODES: lambda p: p.reshape(2, 9)}, f"{CODES} must be torch.uint8 (18,), got torch.uint8 (2, 9)"),
        ({CODES: lambda p: p.to(torch.int8)}, f"{CODES} must be torch.uint8 (18,), got torch.int8 (18,)"),
        ({CODES: lambda p: p.float()}, f"{CODES} must be torch.uint8 (18,), got torch.float32 (18,)"),
        ({CENTERS: lambda c: torch.zeros(4)}, f"{CENTERS} must be (3,), got (4,)"),
        # 4 levels take the bits of 3: without the check the codes are loaded, and one beyond the centers with them
        ({CENTERS: lambda c: torch.zeros(4), CODES: lambda p: p | 192}, f"{CENTERS} must be (3,), got (4,)"),
        ({CENTERS: lambda c: torch.zeros(6, 3)}, f"{CENTERS} must be (3,), got (6, 3)"),
    ],
)
def test_codes_that_a_layer_cannot_have_are_refused_and_it_keeps_its_own(
    changes: dict[str, Callable[[Tensor], Tensor]], sentence: str, assign: bool, strict: bool
) -> None:
    values = packed_zoo(seed=1).state_dict()
    values.update({name: change(values[name]) for name, change in changes.items()})
    model = packed_zoo(seed=0)
    layer = model.layers["conv2d"]
    before = state(layer)
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(values, strict=strict, assign=assign)
    assert f"\t{sentence}." in str(caught.value) or str(caught.value).rstrip().endswith(sentence)
    assert state(layer) == before
    model()


def test_bits_behind_the_last_code_must_be_zero() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    qk.quantize_weights_(model, bits=1, rule=lambda *_: True)
    values = model.state_dict()
    values["0.packed"] = values["0.packed"] | 128
    with pytest.raises(RuntimeError, match=r"0.packed has bits behind its last code, which must be 0"):
        model.load_state_dict(values)


def test_a_float_state_dict_is_told_from_a_packed_one() -> None:
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: .*"layers.linear.packed"'):
        packed_zoo().load_state_dict(Zoo().state_dict())
