"""The fused update is the inner optimizer's step, the prox and the centers' step made one by one, and keeps torch's state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_problems import MAKERS, batch, closure_of, differences, network, ops_that_run, tensors_of

import qupedkern as qk
from qupedkern.optim._fused import can_fuse

Inner = Callable[[Any], torch.optim.Optimizer]
EXACT: dict[str, Inner] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.02),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "dampening": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.3, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8, nesterov=True, weight_decay=0.01),
}
ADAM: dict[str, Inner] = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.02),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.95), eps=1e-6),
}
BEYOND: dict[str, Inner] = {
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "maximize": lambda p: torch.optim.SGD(p, lr=0.01, maximize=True),
    "torch's fused": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
}


def run(maker: str, inner: Inner, dtype: torch.dtype, *, composed: bool, **options: Any) -> tuple[Any, Any]:
    """Model and optimizer after six steps, two of them frozen; composed: a hook on the inner step rules the fused one out."""
    model = network(dtype=dtype)
    wrapped = inner(model.parameters())
    if composed:
        wrapped.register_step_pre_hook(lambda *_: None)
    assert can_fuse(wrapped) != composed or type(wrapped) is torch.optim.RMSprop
    optimizer = MAKERS[maker](model, wrapped, total_steps=6, freeze_at=0.7, **options)
    for step in range(6):
        optimizer.step(closure_of(model, *batch(step, dtype=dtype)))
    return model, optimizer


def flat(state: dict[str, Any]) -> dict[str, Any]:
    return {f"{index}.{key}": value for index, entry in state["state"].items() for key, value in entry.items()}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("inner", [*EXACT, *ADAM])
def test_weights_centers_and_state_have_the_bits_of_the_composition(maker: str, inner: str) -> None:
    dtype = torch.float64 if inner in ADAM else torch.float32  # torch's float32 square root is not rounded correctly
    make = {**EXACT, **ADAM}[inner]
    (model, optimizer), (other, reference) = (run(maker, make, dtype, composed=c) for c in (False, True))
    assert differences(tensors_of(model), tensors_of(other)) == []
    state, expected = flat(optimizer.state_dict()), flat(reference.state_dict())
    assert {key: type(value) for key, value in state.items()} == {key: type(value) for key, value in expected.items()}
    for key, value in state.items():
        assert (value is None) == (expected[key] is None)
        if value is not None:
            assert torch.equal(value, expected[key]), key
            assert value.dtype == expected[key].dtype


@pytest.mark.parametrize("inner", ADAM)
def test_adam_in_float32_is_within_an_ulp_of_its_square_root(inner: str) -> None:
    (model, _), (other, _) = (run("simultaneous", ADAM[inner], torch.float32, composed=c) for c in (False, True))
    for name, value in tensors_of(model).items():
        torch.testing.assert_close(value, tensors_of(other)[name], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("center_prox", ["counted", "exact", "authors", None])
def test_every_center_prox_is_that_of_the_composition(norm: str, center_prox: str | None) -> None:
    options = {"norm": norm, "center_prox": center_prox, "lam": 0.2, "eta_2": 0.01}
    models = [run("simultaneous", EXACT["momentum"], torch.float64, composed=c, **options)[0] for c in (False, True)]
    for name, value in tensors_of(models[0]).items():
        torch.testing.assert_close(value, tensors_of(models[1])[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("inner", BEYOND)
def test_what_quped_step_does_not_know_takes_the_inner_optimizers_own_step(
    inner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = ops_that_run(monkeypatch)
    run("simultaneous", BEYOND[inner], torch.float32, composed=False)
    assert "quped_step" not in calls
    assert "prox_weights" in calls


def test_one_call_updates_all_weights_and_one_their_centers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = ops_that_run(monkeypatch)
    model = network()
    optimizer = qk.QuPeD(model, EXACT["momentum"](model.parameters()), total_steps=10)
    calls.clear()
    optimizer.step(closure_of(model, *batch(0)))
    assert calls == ["foreach_soft_quantize", "quped_step", "center_step"]


def test_each_parameter_group_keeps_its_own_settings() -> None:
    after = []
    for composed in (False, True):
        model = network()
        groups = [
            {"params": [model[0].weight], "lr": 0.01},
            {"params": [model[2].weight, model[0].bias, model[2].bias]},
        ]
        inner = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        if composed:
            inner.register_step_pre_hook(lambda *_: None)
        optimizer = qk.QuPeD(model, inner, total_steps=10)
        for step in range(3):
            optimizer.step(closure_of(model, *batch(step)))
        after.append(tensors_of(model))
    assert differences(*after) == []


def test_weights_in_another_memory_format_are_updated_in_place() -> None:
    after = []
    for channels_last in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 3))
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
        qk.quantize_(model, bits=2, groups="channel", rule=lambda *_: True)
        optimizer = qk.QuPeD(model, EXACT["momentum"](model.parameters()), total_steps=10)
        for step in range(3):
            optimizer.step(closure_of(model, *batch(step, (2, 4, 4))))
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last) == channels_last
        after.append(tensors_of(model))
    for name, value in after[0].items():  # convolutions of another memory format add in another order
        torch.testing.assert_close(value, after[1][name], rtol=1e-4, atol=1e-5)
