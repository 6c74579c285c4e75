"""What holds for every kind of layer, quantized and packed: copies, types, compilers, exporters, data-parallel training."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import KIND_CASES, Alone, LayerCase
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import qupedkern as qk
from qupedkern.nn import KINDS, PackedLayer, kind_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel lengths"
)  # torch's own, of its speed

EVERY_KIND = pytest.mark.parametrize("kind", list(KINDS))
FLOAT32 = (torch.float32,)


def test_every_kind_has_cases() -> None:
    assert set(KIND_CASES) == set(KINDS)


@EVERY_KIND
@pytest.mark.parametrize("form", ["trainable", "packed"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
@settings(deadline=None, max_examples=4)
@given(data=st.data())
def test_a_layer_survives(kind: str, form: str, way: str, data: st.DataObject) -> None:
    case = data.draw(KIND_CASES[kind]())
    float_layer = copy.deepcopy(case.layer)
    model = case.quantized()
    if form == "packed":
        qk.pack_(model)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        other = LayerCase(float_layer, case.x, case.levels, case.groups, case.rest).quantized()
        with torch.no_grad():  # another layer, to be overwritten
            other[0].weight.copy_(torch.randn_like(other[0].weight))
        if form == "packed":
            qk.pack_(other)
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
    assert type(other[0]) is getattr(KINDS[kind], form)
    assert repr(other) == repr(model)
    assert {id(p) for p in model.parameters()}.isdisjoint({id(p) for p in other.parameters()})
    with qk.mode(model, "hard"), qk.mode(other, "hard"):
        assert torch.equal(other(*case.inputs), model(*case.inputs))


@EVERY_KIND
def test_a_packed_layer_stores_codes_centers_and_bias_only(kind: str) -> None:
    case = _simple(kind)
    layer = qk.pack_(case.quantized())[0]
    has_bias = getattr(case.layer, "bias", None) is not None
    assert list(layer.state_dict()) == ["centers", *(["bias"] if has_bias else []), "packed"]
    assert layer.packed.numel() == -(-case.layer.weight.numel() * layer.bits // 8)
    for name in layer.ARGUMENTS:
        assert getattr(layer, name) == getattr(case.layer, name)


def _simple(kind: str) -> LayerCase:
    """One plain layer of each kind."""
    torch.manual_seed(5)
    image, ids = torch.randn(2, 3, 6, 5), torch.tensor([[1, 0, 6, 6], [2, 2, 5, 3]])
    layer, x = {
        "linear": (nn.Linear(9, 4), torch.randn(2, 3, 9)),
        "conv1d": (nn.Conv1d(3, 4, 3, padding="same", padding_mode="circular"), image[..., 0]),
        "conv2d": (nn.Conv2d(3, 4, 3, padding=1), image),
        "conv_transpose2d": (nn.ConvTranspose2d(3, 4, 3, stride=2), image),
        "embedding": (nn.Embedding(7, 5, padding_idx=6), ids),
        "embedding_bag": (nn.EmbeddingBag(7, 5, padding_idx=6, mode="sum"), ids),
    }[kind]
    return LayerCase(layer, x, 3, "channel")


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_layer_moves_to_another_type_and_keeps_its_codes(kind: str, dtype: torch.dtype) -> None:
    case = _simple(kind)
    model = qk.pack_(case.quantized())
    codes, weight = model[0].packed.clone(), model[0].weight.detach()
    model.to(dtype)
    assert torch.equal(model[0].packed, codes)
    assert torch.equal(model[0].weight, weight.to(dtype))
    x = case.x.to(dtype) if case.x.is_floating_point() else case.x
    assert model(x).dtype == dtype
    assert model.half()[0].weight.dtype == torch.float16


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "conv_transpose2d"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_taken_beside_float32_centers(kind: str, dtype: torch.dtype) -> None:
    case = _simple(kind)
    model = qk.pack_(case.quantized())
    x = case.x.to(dtype)
    y = model(x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert model[0].centers.grad.dtype == torch.float32
    # centers, input and output are rounded: three relative errors of 2^-8 or 2^-11, of sums of about ten terms of order one
    u = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(y.float(), model(x.float()), rtol=8 * u, atol=32 * u)


@pytest.mark.parametrize("kind", list(KINDS))
def test_under_autocast_a_layer_gives_the_type_that_torch_s_own_does(kind: str) -> None:
    case = _simple(kind)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = case.layer(*case.inputs).dtype
        assert qk.pack_(case.quantized())(*case.inputs).dtype == wanted


@EVERY_KIND
@settings(deadline=None, max_examples=2)
@given(data=st.data())
def test_compiled_and_exported_layers_give_the_same_and_the_same_gradients(kind: str, data: st.DataObject) -> None:
    case = data.draw(KIND_CASES[kind](FLOAT32).filter(lambda case: case.x.numel() > 1 and case.x.dim() > 0))
    model = qk.pack_(case.quantized())
    expected = model(*case.inputs)
    (wanted,) = torch.autograd.grad(expected.sum(), [model[0].centers])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = compiled(*case.inputs)
    assert torch.equal(got, expected)
    assert torch.equal(torch.autograd.grad(got.sum(), [model[0].centers])[0], wanted)
    with torch.no_grad():
        assert torch.equal(compiled(*case.inputs), expected)
    program = torch.export.export(model, case.inputs)
    assert torch.equal(program.module()(*case.inputs), expected)
    assert {str(node.target) for node in program.graph.nodes} & {
        f"qupedkern.{op}.default" for op in ("lut_linear", "dequantize_packed", "packed_embedding")
    }


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this build of torch has no gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@EVERY_KIND
@pytest.mark.parametrize("form", ["trainable", "packed"])
def test_a_layer_learns_its_centers_under_data_parallel_training(kind: str, form: str) -> None:
    case = _simple(kind)
    model = case.quantized()
    if form == "packed":
        qk.pack_(model)
    alone = copy.deepcopy(model)
    for replica in (DistributedDataParallel(model), alone):
        with qk.mode(replica, "hard", straight_through=True) if form == "trainable" else torch.enable_grad():
            replica(*case.inputs).square().sum().backward()
    assert torch.equal(model[0].centers.grad, alone[0].centers.grad)


@EVERY_KIND
def test_nothing_but_a_tensor_of_its_own_is_kept_by_a_forward_without_gradients(kind: str) -> None:
    case = _simple(kind)
    model = qk.pack_(case.quantized())
    with torch.no_grad():
        first = model(*case.inputs)
        kept = first.clone()
        with torch.no_grad():
            model[0].centers.add_(1.0)
        second = model(*case.inputs)
    assert torch.equal(first, kept)  # an earlier output is no view of scratch
    assert not torch.equal(second, first)


class Tied(nn.Module):
    """An embedding tied to the output layer, as in language models, and to a bag."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.bag = nn.Embedding(11, 6), nn.EmbeddingBag(11, 6)
        self.hidden, self.head = nn.Linear(6, 6), nn.Linear(6, 11)
        self.bag.weight = self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(self.embedding(ids).mean(1) + self.bag(ids)).tanh())


IDS = torch.tensor([[1, 10, 3], [0, 5, 5]])


@pytest.mark.parametrize("groups", ["tensor", "channel", 3])
def test_a_weight_tied_across_kinds_stays_one_through_training_packing_and_files(groups: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tied()
    report = qk.quantize_(model, bits=2, groups=groups, rule=lambda *_: True)
    assert report.quantized == ("embedding", "bag", "hidden", "head")
    optimizer = qk.QuPeD(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=6, freeze_at=0.5)
    for _ in range(6):
        optimizer.step(lambda: nn.functional.cross_entropy(model(IDS), torch.tensor([4, 7])))
    with qk.mode(model, "hard"):
        expected = model(IDS)
    qk.pack_(model)
    torch.testing.assert_close(model(IDS), expected)  # the head sums in its own order
    qk.save(model, tmp_path / "tied")
    for tied in (model, qk.load(Tied, tmp_path / "tied"), copy.deepcopy(model)):
        parts = (tied.embedding, tied.bag, tied.head)
        assert len({id(part.packed) for part in parts}) == 1
        assert len({id(part.centers) for part in parts}) == 1
        assert torch.equal(tied(IDS), model(IDS))
    moved = copy.deepcopy(model).double()
    assert moved.embedding.packed is moved.head.packed
    assert moved.embedding.centers is moved.head.centers
    qk.unpack_(model)
    assert model.embedding.weight is model.head.weight


def test_layers_that_share_a_weight_are_left_together() -> None:
    model = Tied()
    report = qk.quantize_(model)  # the default rule leaves the last linear layer, which has the embedding's weight
    assert report.quantized == ("hidden",)
    reason = "its weight is also that of head, which stays as it is"
    assert report.left == {"embedding": reason, "bag": reason, "head": "the rule leaves it in float"}
    with pytest.raises(
        ValueError, match=r"^quantize_: overrides names 'embedding', but its weight is also that of head"
    ):
        qk.quantize_(Tied(), overrides={"embedding": 4})
    assert qk.quantize_(Tied(), overrides={"embedding": 4, "bag": 4, "head": 4}).quantized[0] == "embedding"


def test_a_weight_used_in_other_ways_is_left() -> None:
    model = nn.ModuleDict({"linear": nn.Linear(4, 4), "view": nn.Linear(4, 4), "own": nn.Linear(4, 4)})
    model["view"].weight = nn.Parameter(model["linear"].weight.data.T)
    model.register_parameter("alias", model["own"].weight)
    report = qk.quantize_(model, rule=lambda *_: True)
    assert report.quantized == ()
    assert report.left == {
        "linear": "its weight is also that of view, which stays as it is",
        "view": "its weight is also that of linear, which stays as it is",
        "own": "its weight is also the alias of the model, which stays as it is",
        "ModuleDict": report.left["ModuleDict"],
    }


def test_a_tied_weight_that_two_kinds_would_split_differently_is_refused() -> None:
    model = nn.ModuleDict({"down": nn.Conv2d(4, 4, 2), "up": nn.ConvTranspose2d(4, 4, 2)})
    model["up"].weight = model["down"].weight
    with pytest.raises(
        ValueError, match=r"^quantize_: up shares its weight with down, but the two split it into other"
    ):
        qk.quantize_(model, groups="channel", rule=lambda *_: True)
    qk.quantize_(model, rule=lambda *_: True)
    qk.pack_(model)
    assert model["up"].packed is model["down"].packed
    assert torch.equal(model["up"].weight, model["down"].weight)


def encoder() -> nn.Module:
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Embedding(20, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 20)).eval()


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage")
def test_a_transformer_keeps_working_in_every_form(fast: bool) -> None:
    model, ids = encoder(), torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(0))
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        with torch.no_grad():
            expected = model(ids)
            report = qk.quantize_(model, bits=4)
            assert report.quantized == ("0", *(f"1.layers.{i}.linear{k}" for i in (0, 1) for k in (1, 2)))
            reader = "MultiheadAttention '1.layers.0.self_attn' reads its weight and does not call it"
            assert report.left["1.layers.0.self_attn.out_proj"] == reader
            assert torch.equal(model(ids), expected)  # mode float
            with qk.mode(model, "soft", sharpness=1e4):
                soft = model(ids)
            with qk.mode(model, "hard"):
                hard = model(ids)
            packed = qk.pack_(model)(ids)
            unpacked = qk.unpack_(model)(ids)
        # float32, other orders of sums of at most 32 terms through two normalised layers
        torch.testing.assert_close(packed, hard, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(unpacked, hard, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(soft, hard, rtol=1e-2, atol=1e-2)
        assert float((hard - expected).abs().max()) > 1e-3  # quantizing reached the outputs
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_attention_of_packed_neighbours_learns_through_its_own_parameters() -> None:
    model, ids = encoder().train(), torch.tensor([[1, 2, 3]])
    qk.quantize_(model, bits=2)
    qk.pack_(model)
    model(ids).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert sum(isinstance(m, PackedLayer) for m in model.modules()) == 5
    assert kind_of(model[1].layers[0].self_attn.out_proj) is None


def test_what_the_quantized_layers_refuse_they_refuse_by_hand_too() -> None:
    with pytest.raises(ValueError, match=r"^QuantEmbedding: the layer cannot be quantized: max_norm rewrites rows"):
        qk.nn.QuantEmbedding(4, 3, max_norm=1.0)
    with pytest.raises(
        ValueError, match=r"^QuantEmbeddingBag: the layer cannot be quantized: its gradients are sparse$"
    ):
        qk.nn.QuantEmbeddingBag(4, 3, sparse=True)
    layer = qk.nn.QuantConvTranspose2d(2, 6, 3, groups=2, levels=3, num_groups=6)
    assert layer.centers.shape == (6, 3)
    assert torch.equal(layer.centers[5], qk.init_centers(layer.weight[1:, 2].contiguous(), 3))


def test_an_index_outside_a_packed_table_is_a_sentence() -> None:
    model = qk.pack_(_simple("embedding").quantized())
    with pytest.raises(ValueError, match=r"^packed_embedding: indices must be from 0 to 6, got 7$"):
        model(torch.tensor([[7]]))
    with pytest.raises(TypeError, match=r"^packed_embedding: indices must be int64 or int32, got torch.float32$"):
        model(torch.tensor([0.5]))
    assert isinstance(model, Alone)
