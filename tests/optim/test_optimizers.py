"""What QuPeD and StraightThrough share: the freeze, state dicts, schedulers, gradient scaling."""

from __future__ import annotations

import copy
import io
import re

import pytest
import torch
import torch.nn.functional as F
from small_problems import INNER, MAKERS, batch, closure_of, differences, network, normalised, sgd, tensors_of, train
from torch import nn

import qupedkern as qk
from qupedkern.optim import schedules

# -- the inner optimizer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", list(MAKERS))
def test_centers_leave_the_inner_optimizer_with_their_state(maker: str) -> None:
    model = network()
    inner = sgd(model)
    with qk.mode(model, "hard"):
        closure_of(model, *batch(0))().backward()
    inner.step()
    centers = [layer.centers for layer in (model[0], model[2])]
    assert all(c in inner.state for c in centers)
    optimizer = MAKERS[maker](model, inner, total_steps=4)
    held = {id(p) for group in inner.param_groups for p in group["params"]}
    assert held == {id(p) for name, p in model.named_parameters() if not name.endswith("centers")}
    assert not any(c in inner.state for c in centers)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state


def test_an_optimizer_without_the_centers_is_as_good() -> None:
    results = []
    for everything in (True, False):
        model = network()
        held = [p for name, p in model.named_parameters() if everything or not name.endswith("centers")]
        optimizer = qk.QuPeD(model, torch.optim.SGD(held, lr=0.1), total_steps=4)
        train(model, optimizer, 0, 4)
        results.append(tensors_of(model))
    assert not differences(*results)


@pytest.mark.parametrize("on", ["wrapper", "inner"])
@pytest.mark.parametrize("maker", list(MAKERS))
def test_learning_rate_schedulers_drive_it(maker: str, on: str) -> None:
    model = network()
    inner = sgd(model)
    optimizer = MAKERS[maker](model, inner, total_steps=6, freeze_at=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer if on == "wrapper" else inner, step_size=2, gamma=0.5)
    rates = []
    for step in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        train(model, optimizer, step, step + 1)
        scheduler.step()
    assert rates == [0.1, 0.1, 0.05, 0.05, 0.025, 0.025]


def test_a_lower_rate_lowers_the_prox_and_the_centers_steps_with_it() -> None:
    # eta_1 lambda and eta_2 are proportional to the present rate, the dose to the initial one
    model = network()
    optimizer = qk.QuPeD(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=4)
    book = optimizer.codebooks[0]
    (lam, *_), eta_2 = optimizer._lambdas(), optimizer._center_rate(book)
    optimizer.param_groups[0]["lr"] = 0.01
    assert torch.equal(optimizer._lambdas()[0], lam)
    assert optimizer._center_rate(book) == pytest.approx(0.1 * eta_2)


# -- the freeze ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", list(MAKERS))
@pytest.mark.parametrize("inner", list(INNER))
def test_after_the_freeze_weights_lie_on_their_centers_and_codes_stay(maker: str, inner: str) -> None:
    model = network(groups="channel")
    optimizer = MAKERS[maker](model, INNER[inner](model), total_steps=12, freeze_at=0.5)
    train(model, optimizer, 0, 6)
    assert not optimizer.frozen
    codes = None
    for step in range(6, 12):
        before = tensors_of(model)
        train(model, optimizer, step, step + 1)
        assert optimizer.frozen
        now = [book.codes for book in optimizer.codebooks]
        for book in optimizer.codebooks:
            assert torch.equal(book.weight, qk.dequantize(book.codes, book.centers))
            assert torch.equal(book.weight, qk.hard_quantize(book.weight, book.centers))
        if codes is not None:
            assert all(torch.equal(a, b) for a, b in zip(codes, now, strict=True))  # none crossed at this rate
        codes = [c.clone() for c in now]
        assert {"0.bias", "0.centers", "2.centers"} <= set(differences(before, tensors_of(model)))
    x, _ = batch(0)
    with qk.mode(model, "hard"):
        expected = model(x)
    assert torch.equal(model(x), expected)  # the float weights are the quantized ones
    torch.testing.assert_close(qk.pack_(model)(x), expected)


def test_where_centers_cross_their_codes_are_renamed_and_the_weights_move_with_them() -> None:
    model = network(levels=4, groups="channel")
    optimizer = qk.StraightThrough(model, sgd(model), total_steps=4, freeze_at=0.0, eta_2=5.0)
    optimizer.freeze()
    crossings = 0
    for step in range(4):
        old = [(book.codes.clone(), book.centers.detach().clone()) for book in optimizer.codebooks]
        x, y = batch(step)
        with qk.mode(model, "hard"):
            gradients = torch.autograd.grad(closure_of(model, x, y)(), [book.centers for book in optimizer.codebooks])
        train(model, optimizer, step, step + 1)
        for book, (codes, centers), h in zip(optimizer.codebooks, old, gradients, strict=True):
            moved = centers - 5.0 * h.clamp(-10, 10)
            assert torch.equal(book.weight, qk.dequantize(codes, moved))  # every weight follows its own center
            assert torch.equal(book.weight, qk.dequantize(book.codes, book.centers))
            assert torch.equal(book.centers, moved.sort(dim=-1).values)
            crossings += int((moved.diff(dim=-1) < 0).sum())
    assert crossings > 5


@pytest.mark.parametrize("maker", list(MAKERS))
@pytest.mark.parametrize("inner", list(INNER))
def test_after_the_freeze_neither_momentum_nor_decay_moves_a_weight(maker: str, inner: str) -> None:
    model = network()
    for layer in (model[0], model[2]):
        layer.centers.requires_grad_(False)  # so that nothing else moves it
    optimizer = MAKERS[maker](model, INNER[inner](model), total_steps=6, freeze_at=0.5)
    train(model, optimizer, 0, 4)
    before = tensors_of(model)
    train(model, optimizer, 4, 6)
    assert differences(before, tensors_of(model)) == ["0.bias", "2.bias"]


@pytest.mark.parametrize("maker", list(MAKERS))
def test_after_the_freeze_the_rate_is_the_fine_tuning_rate(maker: str) -> None:
    moves = []
    for finetune_rate in (0.1, 0.2):
        model = network(dtype=torch.float64)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = MAKERS[maker](model, inner, total_steps=4, freeze_at=0.0, finetune_rate=finetune_rate)
        optimizer.freeze()
        before = tensors_of(model)
        x, y = batch(0, dtype=torch.float64)
        optimizer.step(closure_of(model, x, y))
        after = tensors_of(model)
        moves.append({name: after[name] - before[name] for name in ("0.bias", "2.bias", "0.centers", "2.centers")})
        assert optimizer.param_groups[0]["lr"] == 0.1
    for name, move in moves[0].items():
        assert bool(move.any())
        torch.testing.assert_close(2 * move, moves[1][name], rtol=1e-9, atol=1e-15)


def test_finish_freezes_and_seek_moves_the_schedules_and_the_freeze() -> None:
    model = network()
    optimizer = qk.QuPeD(model, sgd(model), total_steps=10, freeze_at=None)
    train(model, optimizer, 0, 10)
    assert not optimizer.frozen
    optimizer.finish()
    optimizer.finish()
    assert optimizer.frozen
    for book in optimizer.codebooks:
        assert torch.equal(book.weight, qk.dequantize(book.codes, book.centers))

    steps: list[int] = []
    model = network()
    schedule = lambda step: steps.append(step) or 0.1  # noqa: E731
    optimizer = qk.QuPeD(model, sgd(model), total_steps=10, freeze_at=0.8, lam=schedule)
    optimizer.seek(6)
    train(model, optimizer, 0, 1)
    assert set(steps) == {6}
    optimizer.seek(8)
    train(model, optimizer, 1, 2)
    assert optimizer.frozen
    assert optimizer.steps_done == 9


@pytest.mark.parametrize(("share", "steps"), [(0.0, 0), (0.5, 5), (0.8, 8), (1.0, 10), (None, 10)])
def test_the_freeze_comes_after_its_share_of_the_steps(share: float | None, steps: int) -> None:
    model = network()
    optimizer = qk.QuPeD(model, sgd(model), total_steps=10, freeze_at=share)
    unfrozen = 0
    for step in range(10):
        train(model, optimizer, step, step + 1)
        unfrozen += not optimizer.frozen
    assert unfrozen == steps


# -- state -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", list(INNER))
@pytest.mark.parametrize("stop", [3, 9])
@pytest.mark.parametrize("maker", list(MAKERS))
def test_a_run_continued_from_its_state_dicts_ends_in_the_same_bits(maker: str, stop: int, inner: str) -> None:
    options = {"total_steps": 12, "freeze_at": 0.5}
    whole = network()
    losses = train(whole, MAKERS[maker](whole, INNER[inner](whole), **options), 0, 12)

    first = network()
    optimizer = MAKERS[maker](first, INNER[inner](first), **options)
    train(first, optimizer, 0, stop)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    second = network(seed=1)
    resumed = MAKERS[maker](second, INNER[inner](second), **options)
    second.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert (resumed.steps_done, resumed.evaluations, resumed.frozen) == (stop, optimizer.evaluations, stop > 6)
    assert train(second, resumed, stop, 12) == losses[stop:]
    assert not differences(tensors_of(whole), tensors_of(second))


def test_a_scheduler_continues_with_the_optimizer() -> None:
    model = network()
    optimizer = qk.QuPeD(model, sgd(model), total_steps=8)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for step in range(3):
        train(model, optimizer, step, step + 1)
        scheduler.step()
    resumed = qk.QuPeD(model, sgd(model), total_steps=8)
    again = torch.optim.lr_scheduler.ExponentialLR(resumed, 0.9)
    resumed.load_state_dict(optimizer.state_dict())
    again.load_state_dict(scheduler.state_dict())
    assert resumed.param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**3)
    assert resumed.codebooks[0].initial_rate == 0.1
    train(model, resumed, 3, 4)
    again.step()
    assert resumed.param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**4)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_copy_of_model_and_optimizer_goes_its_own_way_to_the_same_bits(frozen: bool) -> None:
    model = network()
    optimizer = qk.QuPeD(model, sgd(model), total_steps=8, freeze_at=0.25 if frozen else None)
    train(model, optimizer, 0, 4)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    before = tensors_of(twin)
    train(model, optimizer, 4, 8)
    assert not differences(before, tensors_of(twin))
    train(twin, twin_optimizer, 4, 8)
    assert not differences(tensors_of(model), tensors_of(twin))


def test_a_state_dict_of_something_else_is_refused_and_changes_nothing() -> None:
    model = network()
    optimizer = qk.QuPeD(model, sgd(model), total_steps=8, freeze_at=0.5)
    train(model, optimizer, 0, 2)
    good, before = optimizer.state_dict(), copy.deepcopy(optimizer.state_dict())
    other = network(levels=2)
    frozen = qk.QuPeD(other, sgd(other), total_steps=8)
    frozen.freeze()
    wrong_shape = frozen.state_dict()
    wrong_shape["quped"]["codes"]["0"] = wrong_shape["quped"]["codes"]["0"][:3]
    for state, sentence in (
        (sgd(model).state_dict(), "this state dict is not one of a quantized optimizer (no 'quped' entry)"),
        ({**good, "quped": {"steps_done": 3}}, "the 'quped' entry of the state dict is damaged, it has ['steps_done']"),
        (wrong_shape, "the state dict has codes for {'0': (3, 6), '2': (3, 8)}, this model needs {'0': (8, 6)"),
        ({**good, "param_groups": []}, "different number of parameter groups"),
    ):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            optimizer.load_state_dict(state)
        assert repr(optimizer.state_dict()) == repr(before)


# -- gradient scaling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("maker", list(MAKERS))
def test_an_overflow_changes_nothing_and_lowers_the_scale(maker: str, frozen: bool) -> None:
    model = network()
    optimizer = MAKERS[maker](model, sgd(model), total_steps=8)
    if frozen:
        optimizer.freeze()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    before = tensors_of(model)
    x, y = batch(0)
    optimizer.step(lambda: 1000 * F.cross_entropy(model(x), y), grad_scaler=scaler)
    assert not differences(before, tensors_of(model))
    assert scaler.get_scale() == 2.0**125


def test_an_overflow_of_the_centers_alone_changes_nothing_and_lowers_the_scale() -> None:
    # the inner optimizer, and so the scaler, sees no gradient of the centers
    model = network()
    optimizer = qk.StraightThrough(model, sgd(model), total_steps=8)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    model[0].centers.register_hook(lambda gradient: gradient * float("inf"))
    before = tensors_of(model)
    optimizer.step(closure_of(model, *batch(0)), grad_scaler=scaler)
    assert not differences(before, tensors_of(model))
    assert scaler.get_scale() == 2.0


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("maker", list(MAKERS))
def test_a_power_of_two_scale_leaves_every_bit_as_it_is(maker: str, enabled: bool) -> None:
    plain, scaled = network(), network()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
    one = MAKERS[maker](plain, sgd(plain), total_steps=6, freeze_at=0.5)
    two = MAKERS[maker](scaled, sgd(scaled), total_steps=6, freeze_at=0.5)
    for step in range(6):
        one.step(closure_of(plain, *batch(step)))
        two.step(closure_of(scaled, *batch(step)), grad_scaler=scaler)
    assert not differences(tensors_of(plain), tensors_of(scaled))


def test_scaling_works_where_only_centers_learn_after_the_freeze() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3, bias=False))
    qk.quantize_(model, rule=lambda *_: True)
    optimizer = qk.QuPeD(model, sgd(model), total_steps=4, freeze_at=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(4):
        before = tensors_of(model)
        optimizer.step(closure_of(model, *batch(step)), grad_scaler=scaler)
        assert differences(before, tensors_of(model)) == ["0.weight", "0.centers"]


# -- other types and forms of a model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("maker", list(MAKERS))
def test_a_model_of_another_float_type_trains_freezes_and_packs(maker: str, dtype: torch.dtype) -> None:
    model = network(groups="channel", dtype=dtype)
    optimizer = MAKERS[maker](model, sgd(model), total_steps=10)
    x, y = batch(0, dtype=dtype)
    losses = [float(optimizer.step(lambda: F.cross_entropy(model(x).float(), y))) for _ in range(10)]
    assert losses[-1] < losses[0]
    assert {p.dtype for p in model.parameters()} == {dtype}
    with qk.mode(model, "hard"):
        expected = model(x)
    assert torch.equal(model(x), expected)
    torch.testing.assert_close(qk.pack_(model)(x), expected)


@pytest.mark.parametrize("maker", list(MAKERS))
def test_a_compiled_model_trains_to_the_same_bits(maker: str) -> None:
    plain, inside = network(), network()
    torch._dynamo.reset()
    compiled = torch.compile(inside, fullgraph=True, backend="aot_eager")
    train(plain, MAKERS[maker](plain, sgd(plain), total_steps=5, freeze_at=0.6), 0, 5)
    train(compiled, MAKERS[maker](compiled, sgd(inside), total_steps=5, freeze_at=0.6), 0, 5)
    assert not differences(tensors_of(plain), tensors_of(inside))


# -- same bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", list(MAKERS))
def test_the_same_seed_gives_the_same_bits(maker: str) -> None:
    runs = []
    for _ in range(2):
        model = normalised()
        train(model, MAKERS[maker](model, sgd(model), total_steps=6), 0, 6, (1, 4, 4))
        runs.append(tensors_of(model))
    assert not differences(*runs)


@pytest.mark.parametrize("maker", list(MAKERS))
def test_one_and_two_threads_give_the_same_bits(maker: str) -> None:
    # the loss is elementwise in the weight, so that torch's own kernels give the same gradient for any number of threads
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(256, 300, bias=False))
            qk.quantize_(model, bits=2, rule=lambda *_: True, init="quantile")
            target = torch.randn(300, 256)
            optimizer = MAKERS[maker](model, sgd(model), total_steps=4, freeze_at=0.75)
            for _ in range(4):
                optimizer.step(lambda m=model, t=target: (m[0].active_weight() - t).square().sum())
            results.append(tensors_of(model))
    finally:
        torch.set_num_threads(before)
    assert not differences(*results)


def test_zero_grad_clears_weights_and_centers() -> None:
    model = network()
    optimizer = qk.QuPeD(model, sgd(model), total_steps=3)
    with qk.mode(model, "soft"):
        closure_of(model, *batch(0))().backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_schedules_follow_their_formulas() -> None:
    assert sum(schedules.linear_share(step, 7) for step in range(9)) == pytest.approx(1.0, abs=1e-15)
    assert schedules.linear_share(5, 7) == pytest.approx(2 * schedules.linear_share(2, 7))
    annealed = schedules.geometric(2.0, 32.0, 5)
    assert [annealed(step) for step in range(6)] == pytest.approx([2, 4, 8, 16, 32, 32])
    assert schedules.value_at(annealed, 1) == pytest.approx(4)
    assert schedules.value_at(3, 1) == 3.0
