"""Calls past torch's dispatcher: the same bits as through it, and nothing that watches misses one."""

from __future__ import annotations

import copy
import pickle
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from native_modules import ISAS, NEEDS_A_BUILD, cpp
from packed_models import EXAMPLES, INPUTS
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import qupedkern as qk
from qupedkern.ops import OPS, _call
from qupedkern.ops._call import attempt
from qupedkern.testing.harness import poisoned_outputs, running_backends, same_bits

SHAPE = [5, 7]
CODES = torch.arange(35, dtype=torch.uint8).reshape(5, 7) % 4
NATIVE = pytest.mark.skipif("cpp" not in running_backends(), reason="the native CPU kernels do not run here")


def parts() -> tuple[Tensor, Tensor]:
    return qk.pack_codes(CODES, 2), torch.tensor([-1.0, 0.25, 0.5, 2.0])


def packed_layer(kind: str, bits: int = 2, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(EXAMPLES[kind]()).eval()
    qk.quantize_(model, bits=bits, rule=lambda *_: True, **options)
    return qk.pack_(model)


def typed(kind: str, dtype: torch.dtype) -> Tensor:
    x = INPUTS[kind]()
    return x.to(dtype) if x.is_floating_point() else x


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", EXAMPLES)
def test_a_packed_layer_in_plain_inference_takes_no_other_way(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = packed_layer(kind).to(dtype), typed(kind, dtype)
    monkeypatch.setattr(_call, "direct", lambda op: None)
    with torch.no_grad():
        expected = layer(x)
        monkeypatch.undo()
        monkeypatch.setattr(_call, "run", None)
        with poisoned_outputs():
            assert same_bits(layer(x), expected)


def test_an_op_is_tried_on_unchecked_arguments_only_where_its_kernel_says_no_to_wrong_ones() -> None:
    (packed, centers), x = parts(), torch.randn(3, 7)
    bias = torch.zeros(5)
    wrong: list[tuple[Any, ...]] = [
        (x[:, :6], packed, centers, bias, 2, SHAPE),
        (x.double(), packed, centers, bias, 2, SHAPE),
        (x, packed[:-1], centers, bias, 2, SHAPE),
        (x, packed.char(), centers, bias, 2, SHAPE),
        (x, packed, torch.rand(3, 4), bias, 2, SHAPE),
        (x, packed, centers.bfloat16(), bias, 2, SHAPE),
        (x, packed, torch.rand(5), bias, 2, SHAPE),
        (x, packed, centers, bias[:4], 2, SHAPE),
        (x, packed, centers, bias.half(), 2, SHAPE),
        (x, packed, centers, bias, 9, SHAPE),
        (x, packed, centers, bias, 2, [5, 7, 1]),
        (x.T.contiguous().T, packed, centers, bias, 2, SHAPE),
        (x.to("meta"), packed, centers, bias, 2, SHAPE),
        (x, packed.to("meta"), centers, bias, 2, SHAPE),
        (x.to_sparse(), packed, centers, bias, 2, SHAPE),
        (None, packed, centers, bias, 2, SHAPE),
    ]
    for args in wrong:
        assert attempt("lut_linear", args, lambda *given: given) == args
    got = attempt("lut_linear", (x, packed, centers, bias, 2, SHAPE), qk.lut_linear)
    assert same_bits(got, qk.lut_linear(x, packed, centers, bias, 2, SHAPE))


@NEEDS_A_BUILD
@pytest.mark.parametrize("isa", ISAS)
def test_kernels_read_tensors_as_they_are_and_say_what_they_cannot_read(isa: str) -> None:
    module = cpp._import(isa)
    if not module.read_tensors(torch.Tensor):
        pytest.skip(f"torch {torch.__version__} has no C exchange of DLPack")
    x, c, codes = torch.linspace(-2, 2, 6).reshape(2, 3), torch.tensor([-1.0, 0.0, 1.0]), torch.zeros(2, 3).byte()
    expected = torch.tensor([[0, 0, 1], [1, 2, 2]], dtype=torch.uint8)
    for given in (
        x,
        nn.Parameter(x),
        x.clone().requires_grad_(),
        torch.stack([x, x])[1],
        x[None].transpose(0, 1)[:, 0],
    ):
        module.assign(1, given, c, codes.zero_())
        assert torch.equal(codes, expected)
    module.assign(1, torch.empty(0, 3), c, torch.empty(0, 3, dtype=torch.uint8))
    for given, sentence in (
        (
            x.double(),
            "native kernels need float32, bfloat16, float16, uint8 or int64 tensors, got DLPack type 2 of 64 bits",
        ),
        (x.T, "native kernels need contiguous tensors, got strides (1, 3) for shape (3, 2)"),
        (x.to_sparse(), "native kernels need dense tensors of a plain type, got one that DLPack cannot describe"),
        (codes, "assign: x must be float32 or bfloat16 or float16, got uint8"),
        (x[0], "assign: codes must have shape (3,), got (2, 3)"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            module.assign(1, given, c, codes)
    with pytest.raises(ValueError, match=r"^native kernels need "):
        module.assign(1, x.to("meta"), c, codes)
    assert not module.read_tensors(int)


def test_values_types_places_and_shapes_may_change_between_calls() -> None:
    packed, centers = parts()

    def check() -> None:
        expected = qk.dequantize(qk.unpack_codes(packed, 2, SHAPE), centers)
        with poisoned_outputs():
            first, again = (
                attempt("dequantize_packed", (packed, centers, 2, SHAPE), qk.dequantize_packed) for _ in range(2)
            )
        assert torch.equal(first, expected)
        assert torch.equal(again, expected)
        assert first.data_ptr() != again.data_ptr()

    check()
    centers.mul_(3)
    packed.bitwise_xor_(0b11011000)
    check()
    centers = centers.bfloat16()
    check()
    centers = centers.double()  # eager
    check()
    centers = torch.stack([centers.float()] * 5)[:, :3]  # not contiguous, other levels
    packed = qk.pack_codes(CODES % 3, 2)
    check()
    centers.data = torch.rand(7, 3)[:5].sort(-1).values
    check()


@pytest.mark.parametrize("backend", running_backends())
def test_a_forced_backend_is_heard_after_another_has_run(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = packed_layer("conv2d"), INPUTS["conv2d"]()
    op, ran = OPS["dequantize_packed"], []
    counting = {**vars(op), "reference": lambda *args: ran.append(1) or op.reference(*args)}
    monkeypatch.setitem(OPS, "dequantize_packed", type(op)(**counting))
    with torch.no_grad():
        expected = layer(x)
        ran.clear()
        with qk.use_backend(backend):
            assert torch.equal(layer(x), expected)
    assert bool(ran) == (backend == "eager")


def test_wrong_codes_raise_and_a_replaced_tensor_is_the_one_that_counts() -> None:
    layer = packed_layer("conv2d", groups="tensor", bits=2)
    conv, x = layer[0], torch.ones_like(INPUTS["conv2d"]())
    replaced = torch.func.functional_call(layer, {"0.centers": torch.zeros(4), "0.bias": torch.zeros(6)}, (x,))
    assert not replaced.any()
    conv.centers = nn.Parameter(conv.centers.detach()[:3])
    with torch.no_grad(), pytest.raises(ValueError, match=r"^dequantize_packed: codes must be below m = 3, got 3$"):
        layer(x)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_layer_never_reads_the_tensors_of_the_first(way: Callable[[nn.Module], nn.Module]) -> None:
    model, x = packed_layer("conv2d"), INPUTS["conv2d"]()
    with torch.no_grad():
        expected = model(x)
        other = way(model)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(other(x), expected)
        assert not model(x).any()


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


OP_OF = {"linear": "lut_linear", "embedding": "packed_embedding", "embedding_bag": "packed_embedding"}


@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize("kind", EXAMPLES)
def test_modes_traces_and_the_profiler_see_the_op(kind: str, recording: bool) -> None:
    layer, x = packed_layer(kind), INPUTS[kind]()
    name = f"qupedkern.{OP_OF.get(kind, 'dequantize_packed')}"
    with torch.set_grad_enabled(recording):
        expected = layer(x)
        for mode in (Seen(), SeenFunctions()):
            with mode:
                assert torch.equal(layer(x), expected)
            assert any(name in op for op in mode.ops)
        with torch.profiler.profile() as profile:
            layer(x)
        assert name.replace(".", "::") in {event.key for event in profile.key_averages()}
        graph = torch.fx.experimental.proxy_tensor.make_fx(layer)(x)
        assert any(name in str(node.target) for node in graph.graph.nodes)


def test_a_tensor_subclass_sees_the_op() -> None:
    seen: list[str] = []

    class Watching(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    layer, x = packed_layer("linear"), INPUTS["linear"]().as_subclass(Watching)
    with torch.no_grad():
        assert isinstance(layer(x), Watching)
    assert any("lut_linear" in op for op in seen)


def leaves(count: int = 3) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(5 + i, 4, generator=generator).requires_grad_(i != 1) for i in range(count)]
    centers = [torch.linspace(-1, 1, 2 + i).requires_grad_(i != 2) for i in range(count)]
    return xs, centers, [torch.tensor([4.0 + i]) for i in range(count)]


def gradients(call: Callable[..., Any], args: tuple[list[Tensor], list[Tensor], list[Tensor]]) -> list[Tensor | None]:
    outputs = call(*args)
    wanted = [t for part in args[:2] for t in part]
    for leaf in wanted:
        leaf.grad = None
    sum((out * out).sum() for out in outputs[:-1]).backward()  # the last output gets no gradient
    return [*outputs, *(leaf.grad for leaf in wanted)]


def same(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    return all((p is None) == (q is None) and (p is None or same_bits(p, q)) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("backend", running_backends())
def test_gradients_of_lists_are_those_of_the_op_to_the_bit(backend: str) -> None:
    with qk.use_backend(backend):
        through = gradients(torch.ops.qupedkern.foreach_soft_quantize, leaves())
        assert same(gradients(qk.foreach_soft_quantize, leaves()), through)
        xs, centers, sharpness = leaves()
        strided = [x.detach().T.contiguous().T.requires_grad_(x.requires_grad) for x in xs]
        assert same(gradients(qk.foreach_soft_quantize, (strided, centers, sharpness)), through)


def test_what_a_gradient_needs_is_kept_as_torch_keeps_it() -> None:
    packs: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        packs.append(tensor)
        return tensor

    xs, centers, sharpness = leaves()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        qk.foreach_soft_quantize(xs, centers, sharpness)
    assert len(packs) == 9
    outputs = qk.foreach_soft_quantize(xs, centers, sharpness)
    with torch.no_grad():
        xs[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs[0].sum().backward()
    outputs = qk.foreach_soft_quantize(xs, centers, sharpness)
    (first,) = torch.autograd.grad(outputs[0].sum(), [xs[0]], create_graph=True)
    with pytest.raises(RuntimeError, match="there is no second derivative"):
        first.sum().backward()
    sharpness[1].requires_grad_()
    with pytest.raises(ValueError, match="there is no gradient with respect to sharpness"):
        qk.foreach_soft_quantize(xs, centers, sharpness)


def test_checkpointing_recomputes_a_direct_call() -> None:
    layer, x = packed_layer("conv2d"), INPUTS["conv2d"]().requires_grad_()
    layer(x).square().sum().backward()
    expected = [t.grad.clone() for t in (x, *layer.parameters())]
    x.grad = None
    layer.zero_grad()
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert all(torch.equal(t.grad, e) for t, e in zip((x, *layer.parameters()), expected, strict=True))


def test_threads_may_share_a_layer() -> None:
    layer = packed_layer("conv2d", bits=4)
    xs = [torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    with torch.no_grad():
        expected = [layer(x) for x in xs]
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad():
            wrong.extend(i for _ in range(200) if not torch.equal(layer(xs[i]), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@NATIVE
def test_memory_borrowed_first_in_inference_mode_serves_outside_of_it() -> None:
    layer, input = packed_layer("conv2d"), INPUTS["conv2d"]()
    found: list[Tensor] = []

    def run() -> None:  # a thread of its own has borrowed nothing yet
        with torch.inference_mode(), poisoned_outputs():
            found.append(layer(input).clone())
        with torch.no_grad(), poisoned_outputs():
            found.append(layer(input))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(found) == 2
    assert same_bits(found[0], found[1])
