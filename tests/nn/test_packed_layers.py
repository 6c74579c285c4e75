"""Packed* layers: equal to mode "hard" to the bit, still differentiable in their input and centers."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from layer_cases import LayerCase, convolutional, layer_cases, quantized
from torch import Tensor, nn
from torch.func import functional_call

import qupedkern as qk
from qupedkern.nn import PackedLayer, PackedLinear, kind_of
from qupedkern.ops import OPS
from qupedkern.ops._rows import compute_dtype
from qupedkern.testing.bounds import ROUNDOFF, smallest_of
from qupedkern.testing.tolerances import BOUNDS, with_output_rounding
from qupedkern.testing.tolerances import assert_close as close

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel lengths"
)  # torch's own, of its speed


def assert_output_of_hard_weights(layer: PackedLayer, case: LayerCase, got: Tensor, expected: Tensor) -> None:
    """Equal to the bit where torch multiplies with the dequantized weight; within the bound of lut_linear where that sums."""
    if not isinstance(layer, PackedLinear):
        assert torch.equal(got, expected)
        return
    assert got.dtype == expected.dtype
    compute = compute_dtype(case.x)
    u, eta = ROUNDOFF[compute], smallest_of("lut_linear", (case.x,), compute)
    bias = None if layer.bias is None else layer.bias.detach().double()
    args = (case.x.double(), layer.packed, layer.centers.detach().double(), bias, layer.bits, list(layer.weight_shape))
    (bound,) = BOUNDS["lut_linear"](*args, u=u, eta=eta)
    exact = OPS["lut_linear"].reference(*args)
    close(got.detach(), exact, with_output_rounding(bound, exact, got.dtype, u), "packed linear")


@settings(deadline=None, max_examples=150)
@given(layer_cases())
def test_packed_weights_equal_mode_hard_to_the_bit_and_so_do_outputs_but_for_the_order_of_sums(case: LayerCase) -> None:
    model = case.quantized()
    layer = model[0]
    with qk.mode(model, "hard"):
        expected, weight, codes = model(*case.inputs), layer.active_weight(), layer.codes()
    assert qk.pack_(model) is model
    packed = model[0]
    assert type(packed) is kind_of(case.layer).packed
    assert packed.packed.numel() == -(-weight.numel() * packed.bits // 8)
    assert torch.equal(packed.codes(), codes)
    assert torch.equal(packed.weight, weight)
    assert_output_of_hard_weights(packed, case, model(*case.inputs), expected)
    assert qk.unpack_(model) is model
    assert type(model[0]) is type(case.layer)
    assert torch.equal(model(*case.inputs), expected)


@settings(deadline=None, max_examples=20)
@given(layer_cases((torch.float64,)))
def test_packing_what_was_unpacked_gives_the_same_weights(case: LayerCase) -> None:
    model = qk.unpack_(qk.pack_(case.quantized()))
    weight = model[0].weight.detach().clone()
    qk.quantize_(model, levels=case.levels, groups=case.groups, rule=lambda *_: True)
    assert torch.equal(qk.pack_(model)[0].weight, weight)  # k-means of at most m distinct values finds them


@settings(deadline=None, max_examples=15)
@given(layer_cases((torch.float64,)).filter(lambda case: case.learns_from_all))
def test_gradients_to_input_and_centers_equal_finite_differences(case: LayerCase) -> None:
    layer = qk.pack_(LayerCase(case.layer, case.x, min(case.levels, 5), case.groups).quantized())[0]
    centers = layer.centers.detach().clone().requires_grad_()
    x = case.x.clone().requires_grad_(case.x.is_floating_point())

    def output(x: Tensor, centers: Tensor) -> Tensor:
        return functional_call(layer, {"centers": centers}, (x, *case.rest))

    assert torch.autograd.gradcheck(output, (x, centers), eps=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(layer_cases((torch.float64,)))
def test_gradients_are_those_of_mode_hard_padding_included(case: LayerCase) -> None:
    # cells of at most a few hundred terms of order one, added in another order
    model = case.quantized()
    inputs = [[value.clone() if isinstance(value, Tensor) else value for value in case.inputs] for _ in range(2)]
    leaves = [
        [v.requires_grad_() for v in given if isinstance(v, Tensor) and v.is_floating_point()] for given in inputs
    ]
    with qk.mode(model, "hard"):
        expected = model(*inputs[0])
        cotangent = torch.randn_like(expected)
        (expected * cotangent).sum().backward()
    quantized_layer = model[0]
    (qk.pack_(model)(*inputs[1]) * cotangent).sum().backward()
    torch.testing.assert_close(model[0].centers.grad, quantized_layer.centers.grad, rtol=1e-12, atol=1e-12)
    for value, wanted in zip(leaves[1], leaves[0], strict=True):
        torch.testing.assert_close(value.grad, wanted.grad, rtol=1e-12, atol=1e-12)


def test_a_few_steps_on_a_packed_model_s_centers_reduce_a_loss_and_keep_its_codes() -> None:
    torch.manual_seed(0)
    model = qk.pack_(quantized(convolutional().eval(), bits=2, groups="channel"))
    x, y = torch.randn(32, 1, 8, 8), torch.randint(3, (32,))
    codes = [module.packed.clone() for module in model if hasattr(module, "packed")]
    optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if name.endswith("centers")], lr=0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.005
    assert losses == sorted(losses, reverse=True)
    for before, module in zip(codes, (m for m in model if hasattr(m, "packed")), strict=True):
        assert torch.equal(before, module.packed)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
def test_a_packed_model_survives(way: str) -> None:
    torch.manual_seed(3)
    model = qk.pack_(quantized(convolutional(), levels=3, groups="channel")).eval()
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        other = qk.pack_(quantized(convolutional(), levels=3, groups="channel")).eval()
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(model(x), other(x))
    assert {id(p) for p in model.parameters()}.isdisjoint({id(p) for p in other.parameters()})
    assert not other.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_packed_model_moves_to_another_type_and_keeps_its_codes(dtype: torch.dtype) -> None:
    model = qk.pack_(quantized(nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)), bits=3))
    codes, weight = model[0].packed.clone(), model[0].weight.detach()
    model.to(dtype)
    assert torch.equal(model[0].packed, codes)
    assert torch.equal(model[0].weight, weight.to(dtype))
    assert model(torch.randn(4, 7, dtype=dtype)).dtype == dtype


def test_repr_names_geometry_levels_groups_and_bits() -> None:
    model = qk.pack_(quantized(nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Linear(6, 5, bias=False)), levels=3))
    geometry = "2, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1)"
    assert repr(model[0]) == f"PackedConv2d({geometry}, levels=3, groups=1, bits=2)"
    assert repr(model[1]) == "PackedLinear(in_features=6, out_features=5, bias=False, levels=3, groups=1, bits=2)"


def test_frozen_parameters_and_training_flags_are_kept() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)).eval()
    model[1].train()
    model[0].requires_grad_(False)
    quantized(model)
    assert not any(p.requires_grad for p in model[0].parameters())
    assert all(p.requires_grad for p in model[1].parameters())
    assert [layer.training for layer in model] == [False, True, False]
    qk.pack_(model)
    assert not any(p.requires_grad for p in model[0].parameters())
    assert all(p.requires_grad for p in model[1].parameters())
    assert [layer.training for layer in qk.unpack_(model)] == [False, True, False]


def test_a_compiled_and_an_exported_packed_model_give_the_same() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding="same", padding_mode="reflect"), nn.Flatten(), nn.Linear(192, 4))
    qk.pack_(quantized(model, levels=3, groups="channel"))
    x = torch.randn(2, 1, 8, 8)
    expected = model(x)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)


def test_pack_and_unpack_refuse_what_they_cannot_do_and_change_nothing() -> None:
    plain = nn.Sequential(nn.Linear(4, 3))
    broken = quantized(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
    with torch.no_grad():
        broken[1].weight[0, 0] = float("nan")
    root = qk.nn.QuantLinear(4, 3)
    for model, sentence in (
        (plain, "no quantized layers to pack; call quantize_ on it first"),
        (broken, "the weight and centers of 1 must be finite"),
        (root, "the model is itself a quantized layer; wrap it"),
    ):
        before = [type(module) for module in model.modules()]
        with pytest.raises(ValueError, match=r"^pack_: ") as caught:
            qk.pack_(model)
        assert sentence in str(caught.value)
        assert [type(module) for module in model.modules()] == before
    with pytest.raises(ValueError, match=r"^unpack_: the model has no packed layers; call pack_ on it first$"):
        qk.unpack_(plain)
    with pytest.raises(ValueError, match=r"^unpack_: the model is itself a packed layer"):
        qk.unpack_(qk.pack_(nn.Sequential(root))[0])
    for function in (qk.pack_, qk.unpack_):
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got OrderedDict"):
            function(plain.state_dict())


@pytest.mark.parametrize("groups", [1, 2])
def test_a_channel_of_a_transposed_convolution_is_an_output_of_it(groups: int) -> None:
    torch.manual_seed(2)
    layer = nn.ConvTranspose2d(4, 6, (2, 3), groups=groups)
    weight = layer.weight.detach().clone()
    model = nn.Sequential(layer)
    qk.quantize_(model, levels=3, groups="channel", rule=lambda *_: True)
    assert model[0].centers.shape == (6, 3)
    qk.pack_(model)
    for output in range(6):
        part, place = divmod(output, 6 // groups)
        own = slice(part * (4 // groups), (part + 1) * (4 // groups))
        x = weight[own, place]  # what makes this output: the inputs of its group
        centers = qk.init_centers(x.contiguous(), 3)
        assert torch.equal(model[0].centers[output], centers)
        assert torch.equal(model[0].weight[own, place], qk.hard_quantize(x.contiguous(), centers))


def test_a_transposed_convolution_takes_the_size_of_its_output() -> None:
    model = quantized(nn.Sequential(nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1)), groups="channel")
    x = torch.randn(1, 2, 4, 5)
    with qk.mode(model, "hard"):
        expected = model[0](x, output_size=[8, 10])
    qk.pack_(model)
    assert expected.shape == (1, 3, 8, 10)
    assert torch.equal(model[0](x, output_size=[8, 10]), expected)
    assert torch.equal(model[0](x, [8, 10]), expected)
