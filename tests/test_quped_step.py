"""quped_step beside the bounds of test_every_op: torch's optimizers to the bit, laws between chains, statistics, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import qupedkern as qk
from qupedkern.ops import OPS
from qupedkern.testing.harness import run, running_backends, same_bits
from qupedkern.testing.strategies import HOSTILE, INPUTS, LONG

BACKENDS = running_backends()
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
FUSES = torch.backends.cpu.get_cpu_capability() != "DEFAULT"  # torch's kernels there round a product before they add it
FUSED = pytest.mark.skipif(
    not FUSES, reason="this processor, or ATEN_CPU_CAPABILITY, gives torch no fused multiply-add"
)
C = [torch.tensor([-0.4, 0.1, 0.5]), torch.tensor([[-1.0, 1.0], [-0.2, 0.3]])]
SHAPES = ((1033,), (6, 50))
EXACT = ("counts", "codes", "x", "first", "second")


def drawn(seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator) for shape in SHAPES]


def step(x: list[Tensor], grad: list[Tensor], **options: Any) -> Any:
    """quped_step with everything that is not given left out."""
    lists = [options.pop(name, []) for name in ("quantized_grad", "first", "second")]
    sharpness = options.pop("sharpness", [])
    return qk.quped_step(x, grad, *lists, C, sharpness, options.pop("strength", [0.01, 0.02]), **options)


def after_prox(x: list[Tensor], norm: str) -> list[Tensor]:
    return [qk.prox_weights(v, c, t, norm) for v, c, t in zip(x, C, (0.01, 0.02), strict=True)]


@FUSED
@EVERY_BACKEND
@settings(max_examples=15)
@given(
    st.sampled_from((0.0, 0.9, 0.3)), st.sampled_from((0.0, 0.1)), st.sampled_from((0.0, 1e-2)), st.booleans(),
    st.sampled_from(("l1", "l2")),
)  # fmt: skip
def test_sgd_then_prox_of_torch_gives_the_same_bits_over_several_steps(
    backend: str, momentum: float, dampening: float, decay: float, nesterov: bool, norm: str
) -> None:
    nesterov = nesterov and momentum > 0
    dampening = 0.0 if nesterov else dampening
    theirs = [v.clone().requires_grad_() for v in drawn(0)]
    ours, buffers = drawn(0), [torch.full(shape, float("nan")) for shape in SHAPES] if momentum else []
    torch_sgd = torch.optim.SGD(
        theirs, lr=0.05, momentum=momentum, dampening=dampening, weight_decay=decay, nesterov=nesterov
    )
    options = {"lr": 0.05, "weight_decay": decay, "beta1": momentum, "beta2": dampening, "nesterov": nesterov}
    for number in range(1, 4):
        grad = drawn(number)
        for v, g in zip(theirs, grad, strict=True):
            v.grad = g.clone()
        torch_sgd.step()
        with torch.no_grad(), qk.use_backend(backend):
            for v, moved in zip(theirs, after_prox(theirs, norm), strict=True):
                v.copy_(moved)
            result = step(ours, grad, first=buffers, norm=norm, step=number, codes=True, **options)
        assert all(same_bits(a, b.detach()) for a, b in zip(ours, theirs, strict=True))
        assert all(torch.equal(k, qk.assign(v, c)) for k, v, c in zip(result.codes, theirs, C, strict=True))
    for v, buffer in zip(theirs, buffers, strict=False):
        assert same_bits(torch_sgd.state[v]["momentum_buffer"], buffer)


@FUSED
@EVERY_BACKEND
@settings(max_examples=15)
@given(
    st.sampled_from((0.9, 0.0, 0.5, 0.3)), st.sampled_from((0.999, 0.0)), st.sampled_from((0.0, 1e-2)), st.booleans(),
    st.integers(1, 1000),
)  # fmt: skip
def test_adam_of_torch_has_the_same_moments_and_weights_but_for_the_square_root(
    backend: str, beta1: float, beta2: float, decay: float, decoupled: bool, number: int
) -> None:
    """sqrt within 1 ulp = 2u of either, the quotient, sum and last product and sum round once more: 2 (2u + 4u) of the step.

    A strength of 0 keeps the prox out of it: the identity, to the bit.
    """
    theirs = [v.clone().requires_grad_() for v in drawn(0)]
    make = torch.optim.AdamW if decoupled else torch.optim.Adam
    adam = make(theirs, lr=0.01, betas=(beta1, beta2), weight_decay=decay)
    ours, first, second = drawn(0), drawn(7, 1e-2), [v.square() for v in drawn(8, 1e-2)]
    for v, g, m1, m2 in zip(theirs, drawn(1), first, second, strict=True):
        v.grad = g
        adam.state[v] = {"step": torch.tensor(float(number - 1)), "exp_avg": m1.clone(), "exp_avg_sq": m2.clone()}
    adam.step()
    name = "adamw" if decoupled else "adam"
    options = {"lr": 0.01, "weight_decay": decay, "beta1": beta1, "beta2": beta2, "step": number, "optimizer": name}
    with qk.use_backend(backend):
        step(ours, drawn(1), first=first, second=second, strength=[0.0, 0.0], **options)
    u = 2.0**-24
    for v, mine, start, m1, m2 in zip(theirs, ours, drawn(0), first, second, strict=True):
        assert same_bits(adam.state[v]["exp_avg"], m1)
        assert same_bits(adam.state[v]["exp_avg_sq"], m2)
        moved = (v.detach() - start).abs() + decay * start.abs()
        assert bool(((mine - v.detach()).abs() <= 12 * u * moved + 2 * u * v.detach().abs()).all())


@settings(max_examples=60)
@given(st.data())
def test_the_kernel_equals_eager_to_the_bit_where_nothing_is_summed(data: st.DataObject) -> None:
    if not FUSES:
        pytest.skip("this processor, or ATEN_CPU_CAPABILITY, gives torch no fused multiply-add")
    args = OPS["quped_step"].prepare(*data.draw(INPUTS["quped_step"](HOSTILE)))
    for backend in BACKENDS:
        got, wanted = run("quped_step", args, backend), run("quped_step", args, "eager")
        if got is None or args[8] == "soft":
            continue
        assert wanted is not None
        for name, a, b in zip(names(args), got, wanted, strict=True):
            assert name not in EXACT or same_bits(a, b), f"{name} of {backend} differs in its bits"


def names(args: tuple[Any, ...]) -> list[str]:
    """What each tensor of harness.run is."""
    count = len(args[0])
    lists = [("center_grad", args[8] != "none"), ("counts", True), ("sums", args[10] == "l2")]
    found = [name for name, there in lists if there for _ in range(count)] + ["distance"]
    found += ["codes"] * (count if args[19] else 0) + ["x"] * count
    return found + ["first"] * len(args[3]) + ["second"] * len(args[4])


@EVERY_BACKEND
@settings(max_examples=4)
@given(st.data())
def test_a_list_gives_each_tensor_the_bits_it_has_alone(backend: str, data: st.DataObject) -> None:
    args = OPS["quped_step"].prepare(*data.draw(INPUTS["quped_step"](LONG)))
    together = run("quped_step", args, backend)
    if together is None:
        return
    places = names(args)
    for i in range(len(args[0])):
        alone = run("quped_step", tuple(a[i : i + 1] if isinstance(a, list) else a for a in args), backend)
        assert alone is not None
        for name, value in zip(dict.fromkeys(places), alone, strict=True):
            of_list = [v for place, v in zip(places, together, strict=True) if place == name]
            assert same_bits(value.reshape(-1), of_list[0][i : i + 1] if name == "distance" else of_list[i].reshape(-1))


@EVERY_BACKEND
@pytest.mark.parametrize("chain", ["soft", "straight_through", "hard"])
def test_a_chained_gradient_is_that_of_the_quantizer_added_by_hand(backend: str, chain: str) -> None:
    through, grad, sharpness = drawn(2), drawn(1), [8.0, torch.tensor([5.0, 20.0])]
    ours, theirs = drawn(0), drawn(0)
    with qk.use_backend(backend):
        result = step(
            ours, grad, quantized_grad=through, chain=chain, lr=0.1, sharpness=sharpness if chain == "soft" else []
        )
        pairs = []
        for g, v, c, p in zip(through, theirs, C, sharpness, strict=True):
            if chain == "soft":
                pairs.append(torch.ops.qupedkern.soft_quantize_backward(g, v, c, torch.as_tensor(p).reshape(-1)))
            else:
                pairs.append(torch.ops.qupedkern.hard_quantize_backward(g, v, c, chain == "straight_through"))
        total = grad if chain == "hard" else [g + pair[0] for g, pair in zip(grad, pairs, strict=True)]
        step(theirs, total, lr=0.1)
    assert all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))
    for got, pair, g in zip(result.center_grad, pairs, through, strict=True):
        assert bool(((got - pair[1]).abs() <= 2.0**-24 * (g.numel() + 40) * 40 * g.abs().sum()).all())


@EVERY_BACKEND
def test_without_a_float_gradient_the_chained_one_is_all(backend: str) -> None:
    ours, theirs = drawn(0), drawn(0)
    with qk.use_backend(backend):
        step(ours, [], quantized_grad=drawn(2), chain="straight_through", lr=0.1)
        step(theirs, drawn(2), lr=0.1)
    assert all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))


@EVERY_BACKEND
@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_codes_and_statistics_are_those_of_the_written_weights(backend: str, norm: str, clamp: bool) -> None:
    x = drawn(0)
    with qk.use_backend(backend):
        result = step(x, drawn(1), lr=0.3, norm=norm, clamp=clamp, codes=True, strength=[0.2, 0.3])
        distances = [qk.distance(v, c, norm) for v, c in zip(x, C, strict=True)]
    if clamp:
        assert all(float(v.abs().max()) <= 1 for v in x)
    assert torch.allclose(result.distance, torch.stack(distances), rtol=2.0**-24 * 1100, atol=0.0)
    assert not result.sums or norm == "l2"
    for i, (v, c, codes) in enumerate(zip(x, C, result.codes, strict=True)):
        assert torch.equal(codes, qk.assign(v, c))
        rows, index, values = c.reshape(-1, c.shape[-1]), codes.reshape(c.numel() // c.shape[-1], -1), v.reshape(-1)
        gap = values.reshape(index.shape) - rows.gather(1, index.long())
        counts = result.counts[i].reshape(rows.shape[0], 3, -1)
        for k in range(rows.shape[1]):
            here = index == k
            sides = [here, here & (gap > 0), here & (gap < 0)]
            assert counts[:, :, k].tolist() == torch.stack([side.sum(1) for side in sides], 1).tolist()
            if norm == "l2":
                wanted = torch.where(here, gap, 0.0).double().sum(1)
                got = result.sums[i].reshape(rows.shape)[:, k].double()
                assert bool(((got - wanted).abs() <= 2.0**-24 * 1100 * gap.abs().sum()).all())


@EVERY_BACKEND
@given(st.integers(2, 8), st.integers(0, 70), st.sampled_from((1, 2, 3, 7)), st.integers(2, 4))
@settings(max_examples=40)
def test_packed_codes_are_those_of_pack_codes(backend: str, bits: int, length: int, groups: int, m: int) -> None:
    """Rows end anywhere in a byte: a group of eight codes may belong to several."""
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(groups * length, generator=generator)
    centers = torch.randn(groups, m, generator=generator).sort(1).values
    with qk.use_backend(backend):
        arguments = ([x], [torch.zeros_like(x)], [], [], [], [centers], [], [0.1])
        packed = qk.quped_step(*arguments, lr=0.1, codes=True, pack_bits=bits).codes[0]
        assert torch.equal(packed, qk.pack_codes(qk.assign(x, centers), bits))


@EVERY_BACKEND
def test_half_types_are_computed_in_float32_and_rounded_once(backend: str) -> None:
    x, grad, first = ([v.bfloat16() for v in drawn(i)] for i in range(3))
    wide = [[v.float() for v in part] for part in (x, grad, first)]
    with qk.use_backend("eager" if backend != "eager" else backend):
        step(x, grad, first=first, lr=0.1, beta1=0.9, step=2)
        step(wide[0], wide[1], first=wide[2], lr=0.1, beta1=0.9, step=2)
    assert all(same_bits(a, b.bfloat16()) for a, b in zip(x + first, wide[0] + wide[2], strict=True))


@EVERY_BACKEND
def test_weights_of_other_strides_are_written_where_they_are(backend: str) -> None:
    flat = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    x = [drawn(0)[0], flat.t().contiguous().t()]
    theirs = [x[0].clone(), flat.clone()]
    with qk.use_backend(backend):
        step(x, drawn(1), lr=0.1)
        step(theirs, drawn(1), lr=0.1)
    assert not x[1].is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(x, theirs, strict=True))


def test_a_tensor_is_not_written_twice() -> None:
    x = torch.zeros(4)
    with pytest.raises(ValueError, match="must be different tensors, got one of them twice"):
        qk.quped_step([x, x], [x, x], [], [], [], [C[0], C[0]], [], [0.1, 0.1], lr=0.1)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the native kernels do not run on this machine")
def test_the_kernel_refuses_weights_that_share_memory() -> None:
    memory = torch.zeros(10)
    x, grad = [memory[:6], memory[5:]], [torch.zeros(6), torch.zeros(5)]
    with (
        qk.use_backend("cpp"),
        pytest.raises(ValueError, match="x, first and second must share no memory with another tensor of the call"),
    ):
        qk.quped_step(x, grad, [], [], [], [C[0], C[0]], [], [0.1, 0.1], lr=0.1)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown chain": ({"chain": "sof"}, ValueError, "chain must be 'none' or 'soft' or 'hard' or 'straight_through'"),
    "step zero": ({"step": 0}, ValueError, "step must be between 1 and"),
    "nesterov without momentum": ({"nesterov": True}, ValueError, "nesterov needs optimizer 'sgd' with momentum"),
    "momentum without buffers": (
        {"beta1": 0.9},
        ValueError,
        "first must hold 2 tensors for 'sgd' with beta1 0.9, got 0",
    ),
    "no second moments": (
        {"optimizer": "adam", "beta1": 0.9, "first": drawn(0)},
        ValueError,
        "second must hold 2 tensors for 'adam', got 0",
    ),
    "too few bits": ({"codes": True, "pack_bits": 1}, ValueError, "tensor 0: 3 centers need more than the 1 bits"),
    "beta of one": (
        {"optimizer": "adam", "beta2": 1.0, "first": drawn(0), "second": drawn(0)},
        ValueError,
        "beta1 and beta2 must be in",
    ),
    "rate is a tensor": ({"lr": torch.tensor(0.1)}, TypeError, "lr must be a number, got Tensor"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named_and_change_nothing(case: str) -> None:
    options, error, sentence = WRONG[case]
    x = drawn(0)
    with pytest.raises(error, match=f"quped_step: .*{sentence}".replace("(", r"\(")):
        step(x, drawn(1), **{"lr": 0.1, **options})
    assert all(torch.equal(a, b) for a, b in zip(x, drawn(0), strict=True))
