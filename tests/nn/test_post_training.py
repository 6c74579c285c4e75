"""quantize_weights_: the nearest exact centers and straight to packed, with or without importance, all or nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import LayerCase, bits_of, convolutional, layer_cases
from torch import Tensor, nn

import qupedkern as qk
from qupedkern.nn import PackedLayer, packed_layers, quantized_layers

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def everything(*_: Any) -> bool:
    return True


def rows_of(value: Tensor, layer: PackedLayer) -> Tensor:
    """By rows of centers, float64."""
    return layer.by_rows(value).detach().double().reshape(layer.num_groups, -1)


def weighted_error(weight: Tensor, layer: PackedLayer, mass: Tensor) -> Tensor:
    """sum_i w_i (x_i - Q(x_i))^2 of each row."""
    away = rows_of(weight, layer) - rows_of(layer.weight, layer)
    return (rows_of(mass, layer) * away.square()).sum(1)


def rounding(weight: Tensor, layer: PackedLayer, mass: Tensor) -> Tensor:
    """By how much the error of exact centers may rise when they and their midpoints are rounded to the type of x, per row.

    A center moved by d <= u max|x| from its cell's mean adds w d^2 for each weight; a weight given to the neighbour of its
    nearest center lies within 2 u max|x| of their midpoint and adds w 2 (c_m - c_1) 2 u max|x|. The float64 program itself
    compares sums of n terms: 8 n u64 of the spread around any center.
    """
    u, u64 = torch.finfo(weight.dtype).eps / 2, torch.finfo(torch.float64).eps / 2
    x, w = rows_of(weight, layer), rows_of(mass, layer)
    top, spread = x.abs().amax(1), x.amax(1) - x.amin(1)
    per_weight = (u * top).square() + 4 * u * top * spread + 8 * x.shape[1] * u64 * spread.square()
    return w.sum(1) * per_weight


@st.composite
def weighed_cases(draw: Any) -> tuple[LayerCase, Tensor]:
    """A layer and the importance of its weights: over many orders of magnitude, zeros and rows of zeros among them."""
    case = draw(layer_cases((torch.float32, torch.float64)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    weight = case.layer.weight
    mass = torch.randn(weight.shape, generator=generator).mul(draw(st.sampled_from([0.0, 1.0, 6.0]))).exp()
    mass = mass * (torch.rand(weight.shape, generator=generator) >= draw(st.sampled_from([0.0, 0.5])))
    if draw(st.booleans()):
        mass[0] = 0
    return case, mass.to(draw(st.sampled_from([torch.float32, torch.float64])))


@settings(deadline=None, max_examples=100)
@given(weighed_cases())
def test_the_weighted_error_is_never_above_that_of_the_unweighted_centers(case: tuple[LayerCase, Tensor]) -> None:
    layer_case, mass = case
    weight = layer_case.layer.weight.detach().clone()
    options = {"levels": layer_case.levels, "groups": layer_case.groups, "rule": everything}
    plain, weighed = nn.Sequential(layer_case.layer), nn.Sequential(layer_case.layer)
    qk.quantize_weights_(plain, **options)
    report = qk.quantize_weights_(weighed, **options, importance={"0.weight": mass})
    assert report.quantized == ("0",)
    best, other = (weighted_error(weight, model[0], mass) for model in (weighed, plain))
    assert bool((best <= other + rounding(weight, plain[0], mass)).all()), (best, other)
    silent = (rows_of(mass, plain[0]) == 0).all(1)  # they count alike: the very centers of no importance
    both = [model[0].centers.detach().reshape(len(silent), -1)[silent] for model in (weighed, plain)]
    assert torch.equal(*both)


@settings(deadline=None, max_examples=60)
@given(layer_cases(), st.sampled_from([1.0, 0.37, 1e-30, 1e30]))
def test_equal_importance_is_none(case: LayerCase, value: float) -> None:
    options = {"levels": case.levels, "groups": case.groups, "rule": everything}
    plain, weighed = nn.Sequential(case.layer), nn.Sequential(case.layer)
    qk.quantize_weights_(plain, **options)
    importance = {"0.weight": torch.full(case.layer.weight.shape, value)}
    qk.quantize_weights_(weighed, **options, importance=importance)
    if value == 1.0:
        assert bits_of(weighed.state_dict()) == bits_of(plain.state_dict())
    ones = torch.ones_like(case.layer.weight)
    best, other = (weighted_error(case.layer.weight, model[0], ones) for model in (weighed, plain))
    assert bool((best <= other + rounding(case.layer.weight, plain[0], ones)).all())


@settings(deadline=None, max_examples=40)
@given(layer_cases())
def test_it_is_quantize_and_pack_in_one_call(case: LayerCase) -> None:
    at_once, in_two = nn.Sequential(case.layer), nn.Sequential(case.layer)
    options: dict[str, Any] = {"levels": case.levels, "groups": case.groups, "rule": everything}
    report = qk.quantize_weights_(at_once, **options)
    assert report == qk.quantize_(in_two, **options)
    qk.pack_(in_two)
    assert type(at_once[0]) is type(in_two[0])
    assert bits_of(at_once.state_dict()) == bits_of(in_two.state_dict())
    assert torch.equal(at_once[0](*case.inputs), in_two[0](*case.inputs))


def test_defaults_are_4_bits_and_the_rule_of_quantize() -> None:
    model = convolutional()
    report = qk.quantize_weights_(model)
    assert report.quantized == ("3", "7")
    assert report.left == {"0": "the rule leaves it in float", "9": "the rule leaves it in float"}
    assert [layer.bits for layer in packed_layers(model).values()] == [4, 4]
    assert not quantized_layers(model)


def test_overrides_modes_and_gradients_are_kept() -> None:
    model = convolutional().eval()
    model[3].requires_grad_(False)
    qk.quantize_weights_(model, bits=2, overrides={"0": 8})
    assert model[0].bits == 8
    assert not model[3].centers.requires_grad
    assert not model[3].bias.requires_grad
    assert model[7].centers.requires_grad
    assert not any(module.training for module in model.modules())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = (nn.Linear(4, 4) for _ in range(4))
        self.b.weight = self.a.weight
        self.again = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.c(self.b(self.a(x).relu()).relu()).relu()))


@pytest.mark.parametrize("name", ["a.weight", "b.weight", "again.weight"])
def test_tied_weights_stay_tied_and_any_of_their_names_carries_the_importance(name: str) -> None:
    model, mass = Tied(), torch.rand(4, 4)
    expected = qk.init_centers(model.a.weight, 4, weights=mass)
    qk.quantize_weights_(model, bits=2, importance={name: mass, "c.weight": torch.ones(4, 4)})
    assert model.a.packed is model.b.packed
    assert model.a.centers is model.b.centers
    assert model.again is model.a
    assert torch.equal(model.a.centers, expected)
    assert type(model.head) is nn.Linear


def test_a_weight_that_something_else_needs_as_floats_is_left_with_a_reason() -> None:
    model = Tied()
    model.head.weight = model.a.weight  # the default rule leaves the last linear layer in float
    report = qk.quantize_weights_(model)
    assert report.quantized == ("c",)
    reason = "its weight is also that of head, which stays as it is"
    assert (report.left["a"], report.left["b"]) == (reason, reason)
    assert type(model.a) is nn.Linear
    assert model.a.weight is model.head.weight
    with pytest.raises(
        ValueError, match=r"^quantize_weights_: overrides names 'a', but its weight is also that of head"
    ):
        qk.quantize_weights_(model, overrides={"a": 4})
    quantized = Tied()
    quantized.b.weight = nn.Parameter(torch.ones(4, 4))
    qk.quantize_(quantized, rule=lambda name, _: name == "a")
    quantized.b.weight = quantized.a.weight
    assert qk.quantize_weights_(quantized, bits=2, rule=everything).left["b"].startswith("its weight is also that of a")
    assert quantized.a.weight is quantized.b.weight


def full_importance(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.rand_like(p) for name, p in model.named_parameters()}


def bad(name: str, change: Any) -> Any:
    def importance(model: nn.Module) -> dict[str, Any]:
        values: dict[str, Any] = full_importance(model)
        values[name] = change(values[name]) if callable(change) else change
        return values

    return importance


@pytest.mark.parametrize(
    ("importance", "error", "sentence"),
    [
        (lambda model: [1], TypeError, "importance must map parameter names to tensors, got list"),
        (lambda model: {}, ValueError, "importance must have an entry for 3.weight, got none"),
        (
            bad("7.weight", lambda v: v.mT.contiguous()),
            ValueError,
            "importance of 7.weight must be (5, 54) on cpu, got",
        ),
        (
            bad("7.weight", lambda v: v.long()),
            TypeError,
            "importance of 7.weight must be a float tensor, got torch.int64",
        ),
        (bad("7.weight", "all"), TypeError, "importance of 7.weight must be a float tensor, got str"),
        (bad("7.weight", lambda v: -v), ValueError, "importance of 7.weight must be finite and not negative"),
        (bad("7.weight", lambda v: v / 0), ValueError, "importance of 7.weight must be finite and not negative"),
        (bad("8.weight", torch.ones(2)), ValueError, "importance names '8.weight', which is no parameter of the model"),
    ],
)
def test_importance_that_does_not_fit_is_refused_and_nothing_changes(
    importance: Any, error: type[Exception], sentence: str
) -> None:
    model = convolutional()
    before, modules = bits_of(model.state_dict()), list(model.modules())
    with pytest.raises(error) as caught:
        qk.quantize_weights_(model, importance=importance(model))
    assert str(caught.value).startswith("quantize_weights_: " + sentence)
    assert (bits_of(model.state_dict()), list(model.modules())) == (before, modules)


def test_one_shared_parameter_has_one_importance() -> None:
    model = Tied()
    with pytest.raises(ValueError, match=r"^quantize_weights_: importance names one shared parameter twice"):
        qk.quantize_weights_(model, importance={"a.weight": torch.ones(4, 4), "b.weight": torch.zeros(4, 4)})


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"bits": 9}, ValueError, "bits must be an integer from 1 to 8, got 9"),
        ({"bits": 2, "levels": 3}, ValueError, "give bits or levels, not both"),
        ({"groups": 7}, ValueError, "a block of 7 weights must divide the 36 weights of an output of 3"),
        ({"groups": "row"}, ValueError, "groups must be 'tensor', 'channel' or a block length, got 'row'"),
        ({"init": "random"}, ValueError, "init must be one of kmeans"),
        ({"init": "signed_mean"}, ValueError, "init 'signed_mean' gives 2 levels, got 16 for 3"),
        ({"rule": 3}, TypeError, "rule must be a function of (name, module) or None, got int"),
        ({"overrides": {"2": 2}}, ValueError, "overrides names '2', which is no"),
        ({"init": "linspace", "importance": {}}, ValueError, "importance is for init 'kmeans', got init 'linspace'"),
    ],
)
def test_bad_arguments_are_refused_with_a_sentence_and_nothing_changes(
    options: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    model = convolutional()
    before, modules = bits_of(model.state_dict()), list(model.modules())
    with pytest.raises(error) as caught:
        qk.quantize_weights_(model, **options)
    assert str(caught.value).startswith("quantize_weights_: " + sentence)
    assert (bits_of(model.state_dict()), list(model.modules())) == (before, modules)


def test_an_error_of_the_rule_changes_nothing() -> None:
    model = convolutional()

    def rule(name: str, module: nn.Module) -> bool:
        if name == "9":
            raise KeyError(name)
        return True

    with pytest.raises(KeyError):
        qk.quantize_weights_(model, rule=rule)
    assert not packed_layers(model)
