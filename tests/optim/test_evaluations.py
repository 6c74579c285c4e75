"""The evaluations of a step stand apart from what a closure, a schedule or a scheduler does around them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_problems import MAKERS, batch, closure_of, differences, network, ops_that_run, sgd, tensors_of
from torch import Tensor, nn

import qupedkern as qk


@pytest.mark.parametrize("maker", MAKERS)
def test_a_closure_that_clears_gradients_changes_no_bit(maker: str) -> None:
    after = []
    for clears in (False, True):
        model = network()
        optimizer = MAKERS[maker](model, sgd(model), total_steps=10)
        for step in range(3):
            plain = closure_of(model, *batch(step))

            def closure(optimizer=optimizer, model=model, plain=plain, clears=clears) -> Tensor:
                if clears:
                    optimizer.zero_grad()
                    model.zero_grad()
                return plain()

            optimizer.step(closure)
        after.append(tensors_of(model))
    assert differences(*after) == []


def test_an_overflow_in_the_last_evaluation_of_alternating_voids_the_centers_step_and_lowers_the_scale() -> None:
    model = network()
    optimizer = qk.QuPeD(model, sgd(model), variant="alternating", total_steps=10)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    before = [book.centers.detach().clone() for book in optimizer.codebooks]
    x, y = batch(0)
    calls: list[int] = []

    def closure() -> Tensor:
        calls.append(1)
        loss = F.cross_entropy(model(x), y)
        return loss * float("nan") if len(calls) == 3 else loss

    optimizer.step(closure, grad_scaler=scaler)
    assert len(calls) == 3
    assert all(torch.equal(book.centers, old) for book, old in zip(optimizer.codebooks, before, strict=True))
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert scaler.get_scale() == 32.0


def test_a_scaled_alternating_step_equals_a_plain_one_to_the_bit() -> None:
    after = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):  # a power of two scales without rounding
        model = network()
        optimizer = qk.QuPeD(model, sgd(model), variant="alternating", total_steps=10)
        optimizer.step(closure_of(model, *batch(0)), grad_scaler=scaler)
        after.append(tensors_of(model))
    assert differences(*after) == []


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("option", ["lam", "eta_2", "center_lr", "center_clip"])
def test_a_schedule_that_leaves_its_domain_is_refused(option: str, value: float) -> None:
    model = network()
    optimizer = qk.QuPeD(model, sgd(model), total_steps=10, **{option: lambda _: value})
    with pytest.raises(ValueError, match=r"^schedule: its value at step 0 must be finite and >= 0, got "):
        optimizer.step(closure_of(model, *batch(0)))


def test_clip_and_fine_tuning_rate_may_be_schedules() -> None:
    after = []
    for clip, rate in ((0.5, 0.2), (lambda _: 0.5, lambda _: 0.2)):
        model = network()
        options = {"center_clip": clip, "finetune_rate": rate}
        optimizer = qk.QuPeD(model, sgd(model), total_steps=4, freeze_at=0.5, **options)
        for step in range(4):
            optimizer.step(closure_of(model, *batch(step)))
        after.append(tensors_of(model))
    assert differences(*after) == []


def test_a_dose_is_spent_against_the_rate_a_warm_up_climbs_to() -> None:
    model = network()
    optimizer = qk.QuPeD(model, sgd(model, lr=0.1), total_steps=10)
    torch.optim.lr_scheduler.OneCycleLR(optimizer.inner, max_lr=0.1, total_steps=11)
    assert [book.initial_rate for book in optimizer.codebooks] == [0.1, 0.1]


def test_wrapping_again_takes_the_present_rate() -> None:
    model = network()
    inner = sgd(model, lr=0.1)
    qk.QuPeD(model, inner, total_steps=10)
    inner.param_groups[0]["lr"] = 0.001
    assert qk.QuPeD(model, inner, total_steps=10).codebooks[0].initial_rate == 0.001


def test_frozen_weights_cannot_seek_back() -> None:
    model = network()
    optimizer = qk.QuPeD(model, sgd(model), total_steps=10)
    optimizer.seek(8)
    optimizer.step(closure_of(model, *batch(0)))
    with pytest.raises(ValueError, match=r"^QuPeD.seek: the weights are frozen and cannot go back to step 3$"):
        optimizer.seek(3)
    assert optimizer.steps_done == 9


def test_instance_norm_in_eval_mode_keeps_its_statistics() -> None:
    torch.manual_seed(0)
    norm = nn.InstanceNorm2d(4, track_running_stats=True)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Flatten(), nn.Linear(16, 3)).eval()
    qk.quantize_(model, bits=2, rule=lambda *_: True)
    optimizer = qk.QuPeD(model, sgd(model), total_steps=10)
    before = norm.running_mean.clone()
    optimizer.step(closure_of(model, *batch(0, (1, 4, 4))))
    assert torch.equal(norm.running_mean, before)


@pytest.mark.parametrize("watched", ["hook", "post-accumulate hook", "distributed"])
@pytest.mark.parametrize("maker", MAKERS)
def test_gradients_that_others_wait_for_reach_the_weights_and_change_no_bit(
    maker: str, watched: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    after, seen = [], []
    for ordinary in (False, True):
        model = network()
        optimizer = MAKERS[maker](model, sgd(model), total_steps=10)
        if ordinary and watched == "hook":
            model[0].weight.register_hook(lambda grad: seen.append(grad.clone()))
        elif ordinary and watched == "post-accumulate hook":
            model[0].centers.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        elif ordinary:
            monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
            model[0].register_forward_hook(lambda layer, *_: seen.append(layer.stand_in is None))
        for step in range(3):
            optimizer.step(closure_of(model, *batch(step)))
        after.append(tensors_of(model))
    assert seen
    assert watched != "distributed" or all(seen)
    assert differences(*after) == []


def test_one_evaluation_quantizes_all_weights_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    optimizer = qk.QuPeD(model, sgd(model), total_steps=10)
    calls = ops_that_run(monkeypatch)
    optimizer.step(closure_of(model, *batch(0)))
    assert calls.count("foreach_soft_quantize") == 1
    assert "soft_quantize" not in calls


def test_a_closure_may_choose_a_mode_of_its_own() -> None:
    """The weights prepared for an evaluation belong to its mode: inside another the layers quantize for themselves."""
    model = network()
    optimizer = qk.QuPeD(model, sgd(model), total_steps=10)
    x, y = batch(0)
    seen: list[Tensor] = []

    def closure() -> Tensor:
        with torch.no_grad(), qk.mode(model, "hard"):
            seen.append(model(x))
        return F.cross_entropy(model(x), y)

    with qk.mode(model, "hard"):
        expected = model(x).detach()
    optimizer.step(closure)
    assert all(torch.equal(output, expected) for output in seen)
    assert all(layer.stand_in is None for layer in qk.nn.quantized_layers(model).values())
