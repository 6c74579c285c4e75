"""Quant* layers: which weight multiplies in each mode, and what learns."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import LayerCase, convolutional, layer_cases, quantized
from torch import Tensor, nn
from torch.func import functional_call

import qupedkern as qk
from qupedkern.nn import QuantConv2d, QuantizedLayer, QuantLinear, absolute_sharpness, quantized_layers

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel lengths"
)  # torch's own, of its speed


def apply(layer: nn.Module, inputs: tuple[Any, ...], weight: Tensor) -> Tensor:
    """What torch's own layer gives with this weight."""
    return functional_call(layer, {"weight": weight}, inputs)


@settings(deadline=None, max_examples=60)
@given(layer_cases())
def test_mode_float_is_the_float_layer_to_the_bit(case: LayerCase) -> None:
    expected = case.layer(*case.inputs)
    assert torch.equal(case.quantized()(*case.inputs), expected)


@settings(deadline=None, max_examples=60)
@given(layer_cases())
def test_mode_hard_multiplies_with_the_nearest_centers(case: LayerCase) -> None:
    model = case.quantized()
    layer = model[0]
    expected = apply(case.layer, case.inputs, on_rows(layer, lambda x: qk.hard_quantize(x, layer.centers)))
    with qk.mode(model, "hard"):
        assert torch.equal(model(*case.inputs), expected)


@settings(deadline=None, max_examples=40)
@given(layer_cases((torch.float32, torch.float64)), st.sampled_from([{}, {"sharpness": 4.0}, {"P": 30.0}]))
def test_mode_soft_multiplies_with_the_soft_quantized_weight(case: LayerCase, options: dict[str, float]) -> None:
    model = case.quantized()
    layer = model[0]
    P = options.get("P") or absolute_sharpness(layer.centers, options.get("sharpness", 10.0))
    expected = apply(case.layer, case.inputs, on_rows(layer, lambda x: qk.soft_quantize(x, layer.centers, P)))
    with qk.mode(model, "soft", **options):
        assert torch.equal(model(*case.inputs), expected)


def on_rows(layer: QuantizedLayer, quantize: Callable[[Tensor], Tensor]) -> Tensor:
    """The weight quantized by the op, in the order of its rows of centers."""
    return layer.like_weight(quantize(layer.by_rows(layer.weight)))


def smooth(case: LayerCase) -> nn.Module:
    """The quantized layer with weights well inside their cells, so that finite differences cross no midpoint."""
    layer = case.quantized()[0]
    with torch.no_grad():
        rows = torch.arange(layer.centers.numel(), dtype=torch.float64).reshape(layer.centers.shape)
        layer.centers.copy_(0.25 * (rows - rows.mean()))
        x = layer.by_rows(layer.weight)
        codes = torch.randint(layer.levels, x.shape, dtype=torch.uint8)
        jitter = 0.1 * torch.rand(x.shape, dtype=torch.float64) - 0.05
        x.copy_(qk.dequantize(codes, layer.centers) + jitter)
    return layer


@st.composite
def small_cases(draw: st.DrawFn) -> LayerCase:
    case = draw(layer_cases((torch.float64,)).filter(lambda case: case.learns_from_all))
    levels = draw(st.sampled_from([2, 3, 5]))
    return LayerCase(case.layer, case.x, levels, draw(st.sampled_from(["tensor", "channel"])), case.rest)


@settings(deadline=None, max_examples=20)
@given(small_cases(), st.sampled_from([20.0, 100.0, 1e4]))
def test_mode_soft_tends_to_mode_hard(case: LayerCase, sharpness: float) -> None:
    # |S - Q| <= sum_j d_j exp(-P |x - t_j|), and the rounding of a sum of m terms below max|c|, m u max|c|
    layer = smooth(case)
    with torch.no_grad():
        with qk.mode(layer, "hard"):
            hard = layer.active_weight()
        with qk.mode(layer, "soft", sharpness=sharpness):
            soft = layer.active_weight()
        c = layer.centers.reshape(layer.num_groups, 1, -1)
        x = layer.by_rows(layer.weight).reshape(layer.num_groups, -1, 1)
        t, d = 0.5 * (c[..., 1:] + c[..., :-1]), c.diff(dim=-1)
        P = absolute_sharpness(layer.centers, sharpness).reshape(-1, 1, 1)
        bound = (d * torch.exp(-P * (x - t).abs())).sum(-1) + 2 * case.levels * 2.0**-52 * c.abs().max()
    assert bool((layer.by_rows(soft - hard).abs().reshape(bound.shape) <= bound).all())
    assert float(bound.max()) < 4 * float(d.max()) * 2.718 ** (
        -0.3 * min(sharpness, 100.0)
    )  # so the bound says something


@settings(deadline=None, max_examples=15)
@given(small_cases(), st.sampled_from(["soft", "hard"]))
def test_gradients_equal_finite_differences(case: LayerCase, name: str) -> None:
    layer = smooth(case)
    options = {"P": 8.0} if name == "soft" else {}  # absolute: the scale-free P is constant in the gradient by design
    moving = ["centers"] if name == "hard" else ["centers", "weight"]
    values = [getattr(layer, part).detach().clone().requires_grad_() for part in moving]
    x = case.x.clone().requires_grad_(case.x.is_floating_point())

    def output(x: Tensor, *parts: Tensor) -> Tensor:
        with qk.mode(layer, name, **options):
            return functional_call(layer, dict(zip(moving, parts, strict=True)), (x, *case.rest))

    assert torch.autograd.gradcheck(output, (x, *values), eps=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=15)
@given(small_cases())
def test_straight_through_hands_the_weight_the_gradient_of_the_hard_weight(case: LayerCase) -> None:
    model = case.quantized()
    layer = model[0]
    weight = on_rows(layer, lambda x: qk.hard_quantize(x, layer.centers)).detach().requires_grad_()
    cotangent = torch.randn_like(apply(case.layer, case.inputs, weight))
    (apply(case.layer, case.inputs, weight) * cotangent).sum().backward()
    with qk.mode(model, "hard", straight_through=True):
        (model(*case.inputs) * cotangent).sum().backward()
    assert torch.equal(layer.weight.grad, weight.grad)
    cells = F.one_hot(layer.codes().long(), case.levels).to(weight.dtype)
    by_cell = (cells * layer.by_rows(weight.grad)[..., None]).reshape(layer.num_groups, -1, case.levels).sum(1)
    torch.testing.assert_close(layer.centers.grad.reshape(by_cell.shape), by_cell, rtol=1e-12, atol=1e-12)
    layer.weight.grad = None
    with qk.mode(model, "hard"):
        (model(*case.inputs) * cotangent).sum().backward()
    assert not layer.weight.grad.any()


def test_a_layer_built_by_hand_draws_its_centers_from_its_weight() -> None:
    linear = QuantLinear(6, 5, levels=3, num_groups=5)
    assert torch.equal(linear.centers, qk.init_centers(linear.weight, 3, 5))
    conv = QuantConv2d(2, 4, 3, padding=1, levels=2, init="signed_mean", bias=False)
    assert torch.equal(conv.centers, qk.init_centers(conv.weight, 2, method="signed_mean"))
    empty = QuantConv2d(2, 4, 3, padding=1, levels=2, init=None, bias=False)
    assert not empty.centers.any()
    empty.load_state_dict(conv.state_dict())
    x = torch.randn(1, 2, 5, 5)
    with qk.mode(empty, "hard"), qk.mode(conv, "hard"):
        assert torch.equal(empty(x), conv(x))


def test_repr_names_levels_groups_and_mode() -> None:
    linear = QuantLinear(6, 5, levels=3, num_groups=5)
    text = "in_features=6, out_features=5, bias=True, levels=3, groups=5, mode=float"
    assert repr(linear) == f"QuantLinear({text})"
    with qk.mode(linear, "hard"):
        assert "mode=hard" in repr(linear)
    assert "levels=2, groups=1, mode=float" in repr(QuantConv2d(2, 4, 3, levels=2))


def saved_and_loaded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
@pytest.mark.parametrize("groups", ["tensor", "channel"])
def test_a_quantized_model_survives(way: str, groups: str) -> None:
    torch.manual_seed(3)
    model = quantized(convolutional(), levels=3, groups=groups)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        other = quantized(convolutional(), levels=3, groups=groups)
        other.load_state_dict(saved_and_loaded(model.state_dict()))
    x = torch.randn(4, 1, 8, 8)
    for name in ("float", "soft", "hard"):
        with qk.mode(model, name), qk.mode(other, name):
            assert torch.equal(model.eval()(x), other.eval()(x))
    own = {id(p) for p in model.parameters()}
    assert not any(id(p) in own for p in other.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_quantized_model_moves_to_another_type(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = quantized(nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)), bits=2, groups="channel").to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    x = torch.randn(4, 7, dtype=dtype)
    for name in ("float", "soft", "hard"):
        with qk.mode(model, name):
            y = model(x)
            assert y.dtype == dtype
            assert bool(y.isfinite().all())
    with qk.mode(model, "hard"):
        expected = model(x)
    torch.testing.assert_close(qk.pack_(model)(x), expected)


def test_mode_soft_is_finite_where_centers_are_a_float16_step_apart() -> None:
    # p / gap passes 65504, the largest float16, once a gap is below 1.5e-4: P must not be computed in the weight's type
    model = quantized(nn.Sequential(nn.Linear(4, 4, bias=False)), bits=1).half()
    with torch.no_grad():
        model[0].centers.copy_(torch.tensor([0.0, 1e-4]))
        model[0].weight.fill_(5e-5)
    with qk.mode(model, "soft"):
        assert bool(model[0].active_weight().isfinite().all())


@pytest.mark.parametrize("gap", [1e-40, 3e-39, 1e-30])
def test_mode_soft_is_finite_for_centers_however_close(gap: float) -> None:
    model = quantized(nn.Sequential(nn.Linear(4, 4, bias=False)), bits=1)
    with torch.no_grad():
        model[0].centers.copy_(torch.tensor([0.0, gap]))
        model[0].weight.copy_(torch.tensor([0.0, 0.5 * gap, gap, 2 * gap]))
    with qk.mode(model, "soft"):
        weight = model[0].active_weight()
        weight.sum().backward()
    assert bool(weight.isfinite().all())
    assert bool(model[0].weight.grad.isfinite().all())
    assert bool(model[0].centers.grad.isfinite().all())


def modes(model: nn.Module) -> list[str]:
    return [layer.weight_mode.name for layer in quantized_layers(model).values()]


def test_modes_come_back_after_nesting_and_after_errors() -> None:
    model = quantized(convolutional())
    with qk.mode(model, "soft", sharpness=3.0):
        with qk.mode(model[0], "hard"):
            assert modes(model) == ["hard", "soft", "soft", "soft"]
        assert modes(model) == ["soft"] * 4
        assert model[0].weight_mode.sharpness == 3.0
        with pytest.raises(KeyError), qk.mode(model, "hard"):
            raise KeyError
        assert modes(model) == ["soft"] * 4
    assert modes(model) == ["float"] * 4


def test_train_and_eval_never_change_the_mode() -> None:
    model = quantized(convolutional())
    for name in ("float", "soft", "hard"):
        with qk.mode(model, name):
            model.eval()
            assert modes(model) == [name] * 4
            model.train()
            assert modes(model) == [name] * 4


def test_mode_hard_holds_in_torch_s_fused_transformer_inference() -> None:
    # the fused kernel reads linear1.weight and never calls the layer: in eval mode without gradients it gave float results
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    quantized(encoder, bits=1)
    x = torch.randn(2, 3, 16)
    with qk.mode(encoder, "hard"):
        expected = encoder(x)
        with torch.no_grad():
            assert torch.equal(encoder(x), expected)
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        qk.pack_(encoder)
        torch.testing.assert_close(encoder(x), expected, rtol=1e-5, atol=1e-5)  # the fused kernel sums in another order


@pytest.mark.parametrize("name", ["float", "soft", "hard"])
def test_a_compiled_quantized_model_gives_the_same(name: str) -> None:
    torch.manual_seed(1)
    model = quantized(nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 4)), bits=2)
    x = torch.randn(2, 1, 8, 8)
    torch._dynamo.reset()
    with qk.mode(model, name):
        expected = model(x)
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        assert torch.equal(got, expected)
        expected.sum().backward()
        gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        got.sum().backward()
    for key, gradient in gradients.items():
        assert torch.equal(gradient, dict(model.named_parameters())[key].grad), key


@pytest.mark.parametrize("name", ["soft", "hard"])
def test_an_exported_quantized_model_gives_the_same(name: str) -> None:
    model = quantized(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), levels=3, groups="channel")
    x = torch.randn(4, 6)
    with qk.mode(model, name):
        program = torch.export.export(model, (x,))
        assert torch.equal(program.module()(x), model(x))


def test_wrong_modes_and_models_are_refused_with_a_sentence() -> None:
    model = quantized(nn.Sequential(nn.Linear(4, 3)))
    cases: list[tuple[object, tuple[object, ...], dict[str, object], type[Exception], str]] = [
        (model, ("firm",), {}, ValueError, "the mode must be one of float, soft, hard, got 'firm'"),
        (model, ("soft",), {"sharpness": 0.0}, ValueError, "sharpness must be positive, got 0.0"),
        (model, ("soft",), {"P": float("nan")}, ValueError, "P must be positive, got nan"),
        (
            model,
            ("soft",),
            {"temperature": 2},
            TypeError,
            "options are sharpness, P and straight_through, got temperature",
        ),
        (nn.Linear(2, 2), ("hard",), {}, ValueError, "no layer that can be in mode 'hard'; call quantize_ on it first"),
        ("model", ("hard",), {}, TypeError, "model must be a torch.nn.Module, got str"),
    ]
    for target, arguments, options, kind, sentence in cases:
        with pytest.raises(kind, match=r"^mode: ") as caught, qk.mode(target, *arguments, **options):
            pass
        assert sentence in str(caught.value)
    assert modes(model) == ["float"]
