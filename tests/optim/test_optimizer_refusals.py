"""What QuPeD and StraightThrough refuse, with which sentence, and that a refusal changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_problems import MAKERS, batch, differences, network, sgd, tensors_of, train
from torch import Tensor, nn

import qupedkern as qk
from qupedkern.optim import schedules


@pytest.mark.parametrize(
    ("options", "kind", "sentence"),
    [
        ({"total_steps": 0}, ValueError, "total_steps must be a positive integer, got 0"),
        ({"total_steps": 5.0}, ValueError, "total_steps must be a positive integer, got 5.0"),
        ({"total_steps": True}, ValueError, "total_steps must be a positive integer, got True"),
        ({"freeze_at": 1.5}, ValueError, "freeze_at must be None or a share of the steps in [0, 1], got 1.5"),
        ({"freeze_at": float("nan")}, ValueError, "freeze_at must be None or a share of the steps in [0, 1], got nan"),
        ({"variant": "fast"}, ValueError, "variant must be one of simultaneous, alternating, hard, got 'fast'"),
        ({"norm": "l3"}, ValueError, "norm must be one of l1, l2, got 'l3'"),
        ({"center_prox": "soft"}, ValueError, "center_prox must be one of counted, exact, authors or None, got 'soft'"),
        ({"dose": -1.0}, ValueError, "dose must be finite and >= 0, got -1.0"),
        ({"dose": float("inf")}, ValueError, "dose must be finite and >= 0, got inf"),
        ({"dose": 1.0, "lam": 0.1}, ValueError, "give dose or lam, not both, got dose=1.0 and lam=0.1"),
        ({"dose": "much"}, TypeError, "dose must be a number or None, got str; a schedule goes into lam"),
        (
            {"dose": lambda step: 0.1},
            TypeError,
            "dose must be a number or None, got function; a schedule goes into lam",
        ),
        ({"lam": float("nan")}, ValueError, "lam must be finite and >= 0, got nan"),
        ({"sharpness": 0.0}, ValueError, "sharpness must be finite and > 0, got 0.0"),
        ({"P": -2.0}, ValueError, "P must be finite and > 0, got -2.0"),
        ({"center_lr": -1.0}, ValueError, "center_lr must be finite and >= 0, got -1.0"),
        ({"eta_2": float("inf")}, ValueError, "eta_2 must be finite and >= 0, got inf"),
        ({"center_clip": 0.0}, ValueError, "center_clip must be finite and > 0, got 0.0"),
        ({"finetune_rate": 0.0}, ValueError, "finetune_rate must be finite and > 0, got 0.0"),
    ],
)
def test_bad_options_are_refused_and_leave_the_inner_optimizer_as_it_was(
    options: dict[str, Any], kind: type[Exception], sentence: str
) -> None:
    model = network()
    inner = sgd(model)
    before = repr(inner.state_dict())
    with pytest.raises(kind, match=r"^QuPeD: ") as caught:
        qk.QuPeD(model, inner, **{"total_steps": 5, **options})
    assert sentence in str(caught.value)
    assert repr(inner.state_dict()) == before


@pytest.mark.parametrize("make", [qk.QuPeD, qk.StraightThrough])
def test_models_and_optimizers_that_do_not_fit_are_refused(make: Any) -> None:
    model, plain = network(), nn.Sequential(nn.Linear(6, 3))
    biases = torch.optim.SGD([model[0].bias, model[2].bias], lr=0.1)
    inner = sgd(model)
    split = network()
    split[2].centers = split[0].centers
    cases: list[tuple[Any, Any, type[Exception], str]] = [
        (plain, sgd(plain), ValueError, "the model has no quantized layers; call quantize_ on it first"),
        (model, biases, ValueError, "the optimizer must hold 0.weight; pass it model.parameters()"),
        (model, torch.optim.LBFGS(model.parameters()), TypeError, "LBFGS evaluates by itself"),
        (model, "sgd", TypeError, "optimizer must be a plain torch optimizer, got str"),
        (model, make(model, inner, total_steps=3), TypeError, f"must be a plain torch optimizer, got {make.__name__}"),
        ("model", sgd(model), TypeError, "model must be a torch.nn.Module, got str"),
        (split, sgd(split), ValueError, "two weights share one centers parameter; give each its own"),
    ]
    for target, optimizer, kind, sentence in cases:
        with pytest.raises(kind, match=f"^{make.__name__}: ") as caught:
            make(target, optimizer, total_steps=3)
        assert sentence in str(caught.value)


def test_a_dose_needs_a_rate_to_be_spent_at() -> None:
    model = network()
    inner = torch.optim.SGD(model.parameters(), lr=0.0)
    before = repr(inner.state_dict())
    with pytest.raises(ValueError, match=r"^QuPeD: a dose is spent at the initial rate, which is 0 for 0, 2; give lam"):
        qk.QuPeD(model, inner, total_steps=3)
    assert repr(inner.state_dict()) == before
    qk.QuPeD(model, inner, total_steps=3, lam=0.1)


@pytest.mark.parametrize("maker", list(MAKERS))
def test_a_closure_that_is_none_or_gives_no_loss_is_refused_and_nothing_moves(maker: str) -> None:
    model = network()
    optimizer = MAKERS[maker](model, sgd(model), total_steps=3)
    before = tensors_of(model)
    x, y = batch(0)

    def without_gradient() -> Tensor:
        with torch.no_grad():
            return F.cross_entropy(model(x), y)

    def broken() -> Tensor:
        raise KeyError("no such batch")

    cases: list[tuple[Any, type[Exception], str]] = [
        (None, TypeError, "a closure that returns the loss is needed, got None"),
        (F.cross_entropy(model(x), y), TypeError, "a closure that returns the loss is needed, got tensor"),
        (without_gradient, ValueError, "the closure must return a differentiable scalar loss, got tensor"),
        (lambda: model(x), ValueError, "the closure must return a differentiable scalar loss, got tensor"),
        (lambda: 0.5, ValueError, "the closure must return a differentiable scalar loss, got 0.5"),
        (broken, KeyError, "no such batch"),
    ]
    for closure, kind, sentence in cases:
        with pytest.raises(kind) as caught:
            optimizer.step(closure)
        assert sentence in str(caught.value)
        assert not differences(before, tensors_of(model))
        assert optimizer.steps_done == 0
        assert model[0].weight_mode.name == "float"
    train(model, optimizer, 0, 1)
    assert optimizer.steps_done == 1


def test_other_wrong_calls_are_refused() -> None:
    model = network()
    optimizer = qk.QuPeD(model, sgd(model), total_steps=3)
    for step in (-1, 1.0, True, "two"):
        with pytest.raises(ValueError, match=r"^QuPeD.seek: step must be an integer >= 0, got "):
            optimizer.seek(step)
    with pytest.raises(RuntimeError, match=r"^QuPeD: add parameter groups to the inner optimizer before wrapping it$"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(ValueError, match=r"^geometric: start and stop must be positive and steps >= 1"):
        schedules.geometric(0.0, 1.0, 3)
