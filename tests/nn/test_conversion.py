"""quantize_: which layers change, which stay and why, and that an error changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_cases import convolutional, quantized
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close  # packed linear layers sum in their own order

import qupedkern as qk
from qupedkern.nn import QuantConv2d, QuantLinear, packed_layers, quantized_layers


def kinds(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules()]


def test_by_default_the_first_convolution_and_the_last_linear_stay_float() -> None:
    model = convolutional()
    report = qk.quantize_(model)
    assert report.quantized == ("3", "7")
    assert report.left == {"0": "the rule leaves it in float", "9": "the rule leaves it in float"}
    assert type(model[3]) is QuantConv2d
    assert type(model[7]) is QuantLinear
    assert "quantized 2 layers: 3, 7" in str(report)
    assert "left 0: the rule leaves it in float" in str(report)


def test_a_rule_sees_every_layer_and_overrides_go_before_it() -> None:
    model, seen = convolutional(), []

    def rule(name: str, module: nn.Module) -> bool:
        seen.append((name, type(module)))
        return isinstance(module, nn.Conv2d)

    qk.quantize_(model, bits=1, rule=rule, overrides={"9": 4})
    assert seen == [("0", nn.Conv2d), ("3", nn.Conv2d), ("7", nn.Linear)]  # what overrides name is decided already
    assert {name: layer.levels for name, layer in quantized_layers(model).items()} == {"0": 2, "3": 2, "9": 16}


def test_quantizing_keeps_every_parameter_object_value_and_the_mode_float() -> None:
    model = convolutional()
    before = dict(model.named_parameters())
    x = torch.randn(3, 1, 8, 8)
    expected = model(x)
    quantized(model, levels=5, groups="channel")
    after = dict(model.named_parameters())
    assert {name for name in after if name not in before} == {f"{i}.centers" for i in (0, 3, 7, 9)}
    assert all(after[name] is parameter for name, parameter in before.items())
    assert torch.equal(model(x), expected)


def test_quantizing_again_is_idempotent() -> None:
    model = quantized(convolutional(), bits=3)
    centers = {name: layer.centers for name, layer in quantized_layers(model).items()}
    modules = list(model.modules())
    report = qk.quantize_(model, bits=1, rule=lambda *_: True)
    assert report.quantized == ()
    assert set(report.left.values()) == {"already quantized"}
    assert list(model.modules()) == modules
    assert all(layer.centers is centers[name] for name, layer in quantized_layers(model).items())


@pytest.mark.parametrize(
    ("arguments", "kind", "sentence"),
    [
        ({"bits": 0}, ValueError, "bits must be an integer from 1 to 8, got 0"),
        ({"bits": 9}, ValueError, "bits must be an integer from 1 to 8, got 9"),
        ({"bits": 2.0}, ValueError, "bits must be an integer from 1 to 8, got 2.0"),
        ({"bits": True}, ValueError, "bits must be an integer from 1 to 8, got True"),
        ({"levels": 1}, ValueError, "levels must be an integer from 2 to 256, got 1"),
        ({"levels": 257}, ValueError, "levels must be an integer from 2 to 256, got 257"),
        ({"bits": 2, "levels": 4}, ValueError, "give bits or levels, not both (got bits=2, levels=4)"),
        ({"groups": 4}, ValueError, "a block of 4 weights must divide the 9 weights of an output of 0"),
        ({"groups": "row"}, ValueError, "groups must be 'tensor', 'channel' or a block length, got 'row'"),
        ({"groups": 0}, ValueError, "groups must be 'tensor', 'channel' or a block length, got 0"),
        ({"init": "random"}, ValueError, "init must be one of kmeans, linspace, quantile, signed_mean, got 'random'"),
        ({"init": "signed_mean"}, ValueError, "init 'signed_mean' gives 2 levels, got 4 for 0"),
        (
            {"overrides": {"1": 4}},
            ValueError,
            "overrides names '1', which is no nn.Linear, nn.Conv1d, ",
        ),
        (
            {"overrides": {"nine": 4}},
            ValueError,
            "overrides names 'nine', which is no nn.Linear, nn.Conv1d, ",
        ),
        ({"overrides": {"9": 12}}, ValueError, "bits must be an integer from 1 to 8, got 12"),
        ({"rule": "all"}, TypeError, "rule must be a function of (name, module) or None, got str"),
    ],
)
def test_bad_arguments_are_refused_with_a_sentence_before_any_change(
    arguments: dict[str, Any], kind: type[Exception], sentence: str
) -> None:
    model = convolutional()
    before = kinds(model)
    with pytest.raises(kind, match=r"^quantize_: ") as caught:
        qk.quantize_(model, **{"rule": lambda *_: True, **arguments})
    assert sentence in str(caught.value)
    assert kinds(model) == before


def test_a_block_that_fits_only_the_first_layers_changes_none() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 6), nn.Linear(6, 2))
    with pytest.raises(ValueError, match=r"a block of 4 weights must divide the 6 weights of an output of 2"):
        quantized(model, groups=4)
    assert not quantized_layers(model)


def test_an_error_of_the_rule_changes_nothing() -> None:
    model = convolutional()

    def rule(name: str, module: nn.Module) -> bool:
        if name == "9":
            raise KeyError(name)
        return True

    with pytest.raises(KeyError):
        qk.quantize_(model, rule=rule)
    assert not quantized_layers(model)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 2)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.first(x).relu()))


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.again = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.again(self.first(x).relu()))


def test_layers_that_share_a_weight_share_its_centers_and_stay_one_in_every_step() -> None:
    torch.manual_seed(0)
    model = quantized(Tied(), bits=1)
    assert model.first.weight is model.second.weight
    assert model.first.centers is model.second.centers
    assert len(list(model.parameters())) == 6  # two weights, two centers, two biases
    optimizer = qk.QuPeD(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=4, freeze_at=0.5)
    x = torch.randn(8, 4)
    for _ in range(4):
        optimizer.step(lambda: model(x).square().mean())
    with qk.mode(model, "hard"):
        expected = model(x)
    qk.pack_(model)
    assert model.first.packed is model.second.packed
    assert model.first.centers is model.second.centers
    assert_close(model(x), expected)


def test_a_weight_is_shared_with_a_layer_quantized_earlier() -> None:
    model = Tied()
    model.second.weight = nn.Parameter(torch.ones(4, 4))
    qk.quantize_(model, rule=lambda name, _: name == "first")
    model.second.weight = model.first.weight
    qk.quantize_(model, rule=lambda name, _: name == "second")
    assert model.first.centers is model.second.centers


def test_different_bits_for_layers_that_share_a_weight_are_refused_before_any_change() -> None:
    model = Tied()
    with pytest.raises(ValueError, match=r"second shares its weight with first and needs the same levels and groups"):
        quantized(model, bits=1, overrides={"second": 4})
    assert not quantized_layers(model)


def test_a_module_used_twice_stays_one_module() -> None:
    model = quantized(Reused(), bits=1)
    assert model.first is model.again
    assert list(quantized_layers(model)) == ["first", "last"]
    x = torch.randn(3, 4)
    with qk.mode(model, "hard"):
        expected = model(x)
    qk.pack_(model)
    assert model.first is model.again
    assert_close(model(x), expected)
    qk.unpack_(model)
    assert model.first is model.again
    assert_close(model(x), expected)


def test_layers_of_other_types_are_left_with_a_reason_and_still_run() -> None:
    class Own(nn.Linear):
        pass

    patched = nn.Linear(8, 8)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(8, 2, batch_first=True),
            "spectral": parametrizations.spectral_norm(nn.Linear(8, 8)),
            "lstm": nn.LSTM(8, 4),
            "gru": nn.GRUCell(8, 4),
            "bilinear": nn.Bilinear(2, 3, 4),
            "normed": nn.Embedding(5, 8, max_norm=1.0),
            "sparse": nn.EmbeddingBag(5, 8, sparse=True),
            "frequent": nn.Embedding(5, 8, scale_grad_by_freq=True),
            "patched": patched,
            "own": Own(8, 8),
            "lazy": nn.LazyLinear(3),
            "plain": nn.Linear(8, 8),
        }
    )
    report = qk.quantize_(model, rule=lambda *_: True)
    assert report.quantized == ("plain",)
    known = "nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Embedding and nn.EmbeddingBag"
    assert report.left == {
        "attention": "MultiheadAttention multiplies with parameters of its own, not with layers",
        "attention.out_proj": "MultiheadAttention 'attention' reads its weight and does not call it",
        "spectral": "its weight is parametrized",
        "lstm": "LSTM multiplies with parameters of its own, not with layers",
        "gru": "GRUCell multiplies with parameters of its own, not with layers",
        "bilinear": f"Bilinear is not one of {known}",
        "own": f"Own is not one of {known}",
        "lazy": "LazyLinear does not know its shape yet; run the model once before quantizing it",
        "normed": "max_norm rewrites rows of its weight as they are looked up",
        "sparse": "its gradients are sparse",
        "frequent": "scale_grad_by_freq scales the gradients of rows, which a packed table does not have",
        "patched": "its forward has been replaced",
    }
    x = torch.randn(2, 3, 8)
    for training in (True, False):
        model.train(training)
        with qk.mode(model, "hard"):
            y = model["own"](model["spectral"](model["lstm"](x)[0].repeat(1, 1, 2)))
            assert model["attention"](y, y, y)[0].shape == x.shape


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_a_weight_computed_by_a_hook_is_left_alone() -> None:
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    report = qk.quantize_(model, rule=lambda *_: True)
    assert report.quantized == ("1",)
    assert report.left == {"0": "its weight is computed from other parameters"}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
def test_weights_that_have_no_centers_are_left_with_a_reason() -> None:
    model = nn.Sequential(
        nn.Linear(4, 4), nn.Linear(0, 4), nn.Linear(4, 4, device="meta"), nn.Linear(4, 4), nn.Linear(4, 2)
    )
    with torch.no_grad():
        model[0].weight[1, 1] = float("inf")
        model[3].weight[0, 0] = float("nan")
    report = qk.quantize_(model, rule=lambda *_: True)
    assert report.quantized == ("4",)
    assert report.left == {
        "0": "its weight is not finite",
        "1": "its weight is empty",
        "2": "its weight is torch.float32 on meta",
        "3": "its weight is not finite",
    }


def test_a_model_that_is_itself_a_layer_is_left_with_a_reason() -> None:
    layer = nn.Linear(4, 3)
    report = qk.quantize_(layer, rule=lambda *_: True)
    assert report.quantized == ()
    assert report.left == {"Linear": "it is the model itself; wrap it, for example in nn.Sequential"}
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
@pytest.mark.parametrize("groups", ["tensor", "channel", 2])
def test_equal_weights_work_from_end_to_end(value: float, groups: str | int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.fill_(value)
    x = torch.randn(6, 4)
    expected = model(x)
    quantized(model, bits=2, groups=groups)
    with qk.mode(model[0], "soft"):
        assert torch.equal(model[0](x), model[0](x))
        assert torch.equal(model(x), expected)
    optimizer = qk.QuPeD(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=5, freeze_at=0.6)
    for _ in range(5):
        assert bool(optimizer.step(lambda: model(x).square().mean()).isfinite())
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    with qk.mode(model, "hard"):
        expected = model(x)
    assert_close(qk.pack_(model)(x), expected)


def test_hooks_follow_the_layers_and_can_still_be_removed() -> None:
    model, calls = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), []
    handle = model[0].register_forward_hook(lambda module, args, output: calls.append(type(module).__name__))
    x = torch.randn(2, 4)
    for change in (quantized, qk.pack_, qk.unpack_):
        change(model)
        model(x)
    assert calls == ["QuantLinear", "PackedLinear", "Linear"]
    handle.remove()
    model(x)
    assert len(calls) == 3


def test_partly_packed_models_count_both_kinds() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    qk.quantize_(model, rule=lambda name, _: name == "0")
    qk.pack_(model)
    qk.quantize_(model, rule=lambda *_: True)
    assert list(packed_layers(model)) == ["0"]
    assert list(quantized_layers(model)) == ["1"]
    with pytest.raises(ValueError, match=r"has layers that are not packed \(1\)"):
        qk.save(model, "never-written")


def test_unpacking_keeps_shared_weights_shared() -> None:
    model = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})
    model["b"].weight = model["a"].weight
    qk.quantize_(model, bits=2, rule=lambda *_: True)
    qk.unpack_(qk.pack_(model))
    assert model["a"].weight is model["b"].weight


def test_wrong_overrides_are_told_apart() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    with pytest.raises(TypeError, match=r"^quantize_: overrides must map module names to bits, got list$"):
        qk.quantize_(model, overrides=["0"])  # type: ignore[arg-type]
    qk.quantize_(model, rule=lambda *_: True)
    with pytest.raises(ValueError, match=r"^quantize_: overrides names '0', which is already quantized"):
        qk.quantize_(model, overrides={"0": 4})
