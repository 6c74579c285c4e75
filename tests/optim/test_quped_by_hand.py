"""QuPeD equals Algorithm 1 written out with the public ops, and spends what it says it spends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_problems import batch, differences, network, normalised, tensors_of, train
from torch import Tensor, nn

import qupedkern as qk

VARIANTS = ("simultaneous", "alternating", "hard")
MakeOptimizer = Callable[[list[Any]], torch.optim.Optimizer]


class ByHand:
    """Algorithm 1 on the network of small_problems, in plain tensors. x: weights, c: centers, b: biases.

    F(x, c) = f(x) + f(S_c(x)) + lambda R(x, c)
    """

    def __init__(self, model: nn.Module, make: MakeOptimizer) -> None:
        layers = [model[0], model[2]]
        self.x = [layer.weight.detach().clone().requires_grad_() for layer in layers]
        self.c = [layer.centers.detach().clone().requires_grad_() for layer in layers]
        self.b = [layer.bias.detach().clone().requires_grad_() for layer in layers]
        self.inner = make([self.x[0], self.b[0], self.x[1], self.b[1]])

    def f(self, weights: list[Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        hidden = torch.tanh(F.linear(inputs, weights[0], self.b[0]))
        return F.cross_entropy(F.linear(hidden, weights[1], self.b[1]), labels)

    def soft(self, P: list[Any]) -> list[Tensor]:
        return [qk.soft_quantize(x, c, p) for x, c, p in zip(self.x, self.c, P, strict=True)]

    def hard(self) -> list[Tensor]:
        return [qk.hard_quantize(x, c) for x, c in zip(self.x, self.c, strict=True)]

    def step(
        self,
        data: tuple[Tensor, Tensor],
        variant: str,
        norm: str,
        prox: str | None,
        lam: list[Any],
        eta_2: list[float],
        P: list[Any],
    ) -> Tensor:
        own = [*self.x, *self.b]
        loss = self.f(self.x, *data)
        g = list(torch.autograd.grad(loss, own))  # grad_x f(x)
        if variant == "hard":
            h = torch.autograd.grad(self.f(self.hard(), *data), self.c)  # grad_c f(Q_c(x))
        else:
            both = torch.autograd.grad(self.f(self.soft(P), *data), [*own, *self.c])
            g = [a + b for a, b in zip(g, both[:4], strict=True)]  # + grad_x f(S_c(x))
            h = both[4:]  # grad_c f(S_c(x)), the same evaluation
        for parameter, gradient in zip(own, g, strict=True):
            parameter.grad = gradient
        self.inner.step()  # y = x - eta_1 g, or what the inner optimizer makes of g
        with torch.no_grad():
            for x, c, lam_row, rate in zip(self.x, self.c, lam, self.rates(), strict=True):
                x.copy_(qk.prox_weights(x, c, rate * lam_row, norm))
        if variant == "alternating":
            h = torch.autograd.grad(self.f(self.soft(P), *data), self.c)  # at the new x
        with torch.no_grad():
            for x, c, gradient, lam_row, rate_2 in zip(self.x, self.c, h, lam, eta_2, strict=True):
                old = c.clone()
                mu = old - rate_2 * gradient.clamp(-10, 10)
                mu = mu if prox is None else qk.prox_centers(mu, x, rate_2 * lam_row, norm, prox, at=old)
                c.copy_(mu.sort(dim=-1).values)
        return loss.detach()

    def rates(self) -> list[float]:
        holder = {id(p): group["lr"] for group in self.inner.param_groups for p in group["params"]}
        return [holder[id(x)] for x in self.x]

    def state(self) -> dict[str, Tensor]:
        return {
            f"{index}.{part}": values[position].detach().clone()
            for position, index in enumerate((0, 2))
            for part, values in (("weight", self.x), ("bias", self.b), ("centers", self.c))
        }


def two_groups(parameters: list[Any]) -> list[dict[str, Any]]:
    matrices = [p for p in parameters if p.dim() == 2]
    return [{"params": matrices, "lr": 0.05, "weight_decay": 0.02}, {"params": [p for p in parameters if p.dim() == 1]}]


INNER: dict[str, MakeOptimizer] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(two_groups(p), lr=0.02),
}


def parameters_in_order(model: nn.Module) -> list[nn.Parameter]:
    return [model[0].weight, model[0].bias, model[2].weight, model[2].bias]


@pytest.mark.parametrize("groups", ["tensor", "channel"])
@pytest.mark.parametrize("center_prox", ["counted", "exact", "authors", None])
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_is_algorithm_1_to_the_bit(variant: str, norm: str, center_prox: str | None, groups: str) -> None:
    model = network(groups=groups)
    by_hand = ByHand(model, INNER["momentum"])
    lam, eta_2, P = 0.4, 0.003, 25.0
    options: dict[str, Any] = {"variant": variant, "norm": norm, "center_prox": center_prox}
    optimizer = qk.QuPeD(
        model, INNER["momentum"](parameters_in_order(model)), lam=lam, eta_2=eta_2, P=P, total_steps=10, **options
    )
    start = tensors_of(model)
    for step in range(4):
        data = batch(step)
        expected = by_hand.step(data, variant, norm, center_prox, [lam, lam], [eta_2, eta_2], [P, P])
        got = optimizer.step(lambda data=data: F.cross_entropy(model(data[0]), data[1]))
        assert torch.equal(got, expected)
        assert not differences(tensors_of(model), by_hand.state()), step
    assert differences(start, tensors_of(model)) == list(start)  # every tensor moved


@pytest.mark.parametrize("center_prox", ["counted", "exact", None])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_in_which_centers_cross_is_algorithm_1_and_leaves_sorted_rows(
    variant: str, center_prox: str | None
) -> None:
    model, eta_2, P, crossings = network(), 5.0, 25.0, 0
    by_hand = ByHand(model, INNER["sgd"])
    options: dict[str, Any] = {"variant": variant, "center_prox": center_prox, "lam": 0.001, "eta_2": eta_2, "P": P}
    optimizer = qk.QuPeD(model, INNER["sgd"](parameters_in_order(model)), total_steps=10, **options)
    for step in range(4):
        data, centers = batch(step), model[0].centers.detach().clone()
        by_hand.step(data, variant, "l1", center_prox, [0.001] * 2, [eta_2] * 2, [P] * 2)
        optimizer.step(lambda data=data: F.cross_entropy(model(data[0]), data[1]))
        h = model[0].centers.grad  # what the step has used
        crossings += int(((centers - eta_2 * h.clamp(-10, 10)).diff() < 0).sum())
        assert not differences(tensors_of(model), by_hand.state()), step
        assert bool((model[0].centers.diff() >= 0).all())
    assert crossings > 0


@pytest.mark.parametrize("inner", list(INNER))
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_inner_optimizer_makes_the_step_inside_the_prox(variant: str, inner: str) -> None:
    # In float32 torch's square root, and so its Adam, is off by an ulp in a fifth of the cases; in float64 it is not.
    dtype = torch.float64 if inner.startswith("adam") else torch.float32
    model = network(levels=3, dtype=dtype)
    by_hand = ByHand(model, INNER[inner])
    options: dict[str, Any] = {
        "lam": lambda k: 0.1 * (k + 1),
        "eta_2": lambda k: 0.01 / (k + 1),
        "P": lambda k: 20.0 + k,
    }
    optimizer = qk.QuPeD(model, INNER[inner](parameters_in_order(model)), variant, total_steps=10, **options)
    for step in range(4):
        data = batch(step, dtype=dtype)
        lam, eta_2, P = (options[name](step) for name in ("lam", "eta_2", "P"))
        by_hand.step(data, variant, "l1", "counted", [lam, lam], [eta_2, eta_2], [P, P])
        optimizer.step(lambda data=data: F.cross_entropy(model(data[0]), data[1]))
        assert not differences(tensors_of(model), by_hand.state()), step


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_scale_free_settings_are_what_they_say(variant: str, norm: str) -> None:
    # P = p / gap, eta_2 = a eta_1 m / n, eta_1 lambda = dose 2 (k + 1) / (K (K + 1)) gap / 2 (l2: without the gap); the same
    # numbers computed in another order, so equal to a few units of 2^-52 a step
    dose, a, p, rate, freeze = 0.8, 2.0, 12.0, 0.1, 5
    model = network(groups="channel", levels=3, dtype=torch.float64)
    by_hand = ByHand(model, INNER["sgd"])
    options: dict[str, Any] = {"dose": dose, "center_lr": a, "sharpness": p, "center_prox": "exact"}
    inner = INNER["sgd"](parameters_in_order(model))
    optimizer = qk.QuPeD(model, inner, variant, norm, total_steps=10, freeze_at=0.5, **options)
    for step in range(freeze):
        data = batch(step, dtype=torch.float64)
        gaps = [(c[:, -1] - c[:, 0]).detach() / 2 for c in by_hand.c]  # m - 1 = 2
        share = dose * 2 * (step + 1) / (freeze * (freeze + 1)) / rate
        lam = [share * gap / 2 if norm == "l1" else share for gap in gaps]
        eta_2 = [a * rate * 3 / 6, a * rate * 3 / 8]  # n: 6 and 8 weights a row
        by_hand.step(data, variant, norm, "exact", lam, eta_2, [p / gap for gap in gaps])
        optimizer.step(lambda data=data: F.cross_entropy(model(data[0]), data[1]))
        for name, value in by_hand.state().items():
            torch.testing.assert_close(tensors_of(model)[name], value, rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.parametrize(("variant", "default"), [("simultaneous", 0.3), ("alternating", 0.3), ("hard", 3.0)])
@pytest.mark.parametrize("dose", [None, 1.7])
def test_the_strengths_of_the_unfrozen_steps_sum_to_the_dose_in_half_gaps(
    variant: str, default: float, dose: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent: dict[int, Tensor] = {}
    update = qk.QuPeD._update_weights

    def spy(self: Any, relaxed: Any, scaler: Any, strengths: list[Tensor], *rest: Any, **options: Any) -> bool:
        for i, (book, strength) in enumerate(zip(self.codebooks, strengths, strict=True)):
            rows = book.centers.detach().reshape(-1, book.centers.shape[-1])
            half_gap = (rows[:, -1] - rows[:, 0]) / (rows.shape[1] - 1) / 2
            spent[i] = spent.get(i, 0) + strength / half_gap
        return update(self, relaxed, scaler, strengths, *rest, **options)

    monkeypatch.setattr(qk.QuPeD, "_update_weights", spy)
    model = network(groups="channel", dtype=torch.float64)
    optimizer = qk.QuPeD(model, torch.optim.SGD(model.parameters(), lr=0.05), variant, dose=dose, total_steps=20)
    for step in range(20):
        x, y = batch(step, dtype=torch.float64)
        optimizer.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
    assert optimizer.frozen
    assert len(spent) == 2
    for total in spent.values():
        torch.testing.assert_close(total, torch.full_like(total, default if dose is None else dose), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("variant", "evaluations"), [("simultaneous", 2), ("alternating", 3), ("hard", 2)])
def test_a_step_takes_the_evaluations_its_variant_needs_and_one_after_the_freeze(
    variant: str, evaluations: int
) -> None:
    model, seen = network(), []
    optimizer = qk.QuPeD(model, torch.optim.SGD(model.parameters(), lr=0.1), variant, total_steps=5, freeze_at=0.6)
    x, y = batch(0)

    def closure() -> Tensor:
        seen.append(model[0].weight_mode.name)
        return F.cross_entropy(model(x), y)

    names = {"simultaneous": ["float", "soft"], "alternating": ["float", "soft", "soft"], "hard": ["float", "hard"]}[
        variant
    ]
    for step in range(5):
        seen.clear()
        before = optimizer.evaluations
        with torch.no_grad():
            value = F.cross_entropy(model(x), y)
        loss = optimizer.step(closure)
        expected = names if step < 3 else ["hard"]
        assert seen == expected
        assert optimizer.evaluations - before == len(expected) == (evaluations if step < 3 else 1)
        assert set(optimizer.last) == set(expected)
        assert not loss.requires_grad
        if step < 3:
            assert torch.equal(loss, value)  # f(x), before the step
        assert model[0].weight_mode.name == "float"


@pytest.mark.parametrize("variant", VARIANTS)
def test_statistics_of_batch_norm_come_from_one_quantized_evaluation(variant: str) -> None:
    model, other = normalised(), normalised()
    optimizer = qk.QuPeD(model, torch.optim.SGD(model.parameters(), lr=0.1), variant, total_steps=5)
    x, y = batch(0, (1, 4, 4))
    if variant == "alternating":  # statistics belong to the weights after the step
        optimizer.step(lambda: F.cross_entropy(model(x), y))
        for name in ("weight", "bias"):
            getattr(other[0], name).data.copy_(getattr(model[0], name))
        with qk.mode(other, "soft"):
            other(x)
    else:
        with qk.mode(other, "hard" if variant == "hard" else "soft"):
            other(x)
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert int(model[1].num_batches_tracked) == 1
    assert torch.equal(model[1].running_mean, other[1].running_mean)
    assert torch.equal(model[1].running_var, other[1].running_var)
    assert model[1].track_running_stats


@pytest.mark.parametrize("eta_2", [0.01, 5.0])  # centers cross at 5
def test_straight_through_is_the_inner_step_at_the_hard_weight_and_the_cells_gradient(eta_2: float) -> None:
    model = network(groups="channel")
    by_hand = ByHand(model, INNER["momentum"])
    optimizer = qk.StraightThrough(model, INNER["momentum"](parameters_in_order(model)), total_steps=10, eta_2=eta_2)
    for step in range(4):
        data = batch(step)
        weights = [w.detach().requires_grad_() for w in by_hand.hard()]
        loss = by_hand.f(weights, *data)
        gradients = torch.autograd.grad(loss, [*weights, *by_hand.b])
        h = torch.autograd.grad(by_hand.f(by_hand.hard(), *data), by_hand.c)
        for parameter, gradient in zip([*by_hand.x, *by_hand.b], gradients, strict=True):
            parameter.grad = gradient
        by_hand.inner.step()
        with torch.no_grad():
            for c, gradient in zip(by_hand.c, h, strict=True):
                c.copy_((c - eta_2 * gradient.clamp(-10, 10)).sort(dim=-1).values)
        got = optimizer.step(lambda data=data: F.cross_entropy(model(data[0]), data[1]))
        assert torch.equal(got, loss.detach())  # f(Q_c(x))
        assert not differences(tensors_of(model), by_hand.state()), step
    assert optimizer.evaluations == 4
    assert set(optimizer.last) == {"hard"}


@pytest.mark.parametrize("clip", [10.0, 1e-3])
def test_center_gradients_are_clipped_before_the_step(clip: float) -> None:
    model, eta_2 = network(), 1e-3
    layer, (x, y) = model[0], batch(0)
    with qk.mode(model, "hard"):
        (h,) = torch.autograd.grad(1000 * F.cross_entropy(model(x), y), layer.centers)
    assert float(h.abs().max()) > 10
    expected = (layer.centers - eta_2 * h.clamp(-clip, clip)).sort().values.detach()
    sgd = torch.optim.SGD(model.parameters(), lr=1e-6)
    optimizer = qk.StraightThrough(model, sgd, total_steps=5, eta_2=eta_2, center_clip=clip)
    optimizer.step(lambda: 1000 * F.cross_entropy(model(x), y))
    assert torch.equal(layer.centers, expected)


@pytest.mark.parametrize("make", [qk.QuPeD, qk.StraightThrough])
def test_a_frozen_parameter_is_not_moved(make: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    model[0].requires_grad_(False)
    qk.quantize_(model, rule=lambda *_: True)
    optimizer = make(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=5, freeze_at=None)
    before = tensors_of(model)
    train(model, optimizer, 0, 3)
    assert differences(before, tensors_of(model)) == ["2.weight", "2.bias", "2.centers"]


@pytest.mark.parametrize("variant", [*VARIANTS, "straight_through"])
def test_training_ends_below_post_training_k_means(variant: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 6)
    y = (x @ torch.randn(6, 3) + 0.5 * torch.randn(256, 3)).argmax(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    inner = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for _ in range(60):  # a float network that fits
        inner.zero_grad()
        F.cross_entropy(model(x), y).backward()
        inner.step()
    qk.quantize_(model, bits=1, rule=lambda *_: True)
    with qk.mode(model, "hard"), torch.no_grad():
        post_training = float(F.cross_entropy(model(x), y))
    options = {"total_steps": 60}
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = (
        qk.StraightThrough(model, sgd, **options)
        if variant == "straight_through"
        else qk.QuPeD(model, sgd, variant, **options)
    )
    for _ in range(60):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    qk.pack_(model)
    with torch.no_grad():
        share = 0.9 if variant == "hard" else 0.8  # the weakest at 1 bit with every layer quantized
        assert float(F.cross_entropy(model(x), y)) < share * post_training
