"""Every algorithm's client and server step against its update rule, written out by hand in float64."""

# ruff: noqa: B023 (functions over loop variables are called within the loop)

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

import qupedkern as qk
from fl import Client, algorithms, data, models
from fl.algorithms import Algorithm
from fl.core import ClientState, Job, Message, training_batches
from fl.seeds import derive_seed

RATE, MOMENTUM, STEPS, BATCH = 0.1, 0.5, 2, 4
SGD = {"rate": RATE, "momentum": MOMENTUM, "local_steps": STEPS, "batch_size": BATCH}
JOB = Job(rounds=10, sample=1.0, seed=5, architecture="mlp", input_shape=(1, 2, 2), num_classes=3)
NET = models.MLP((1, 2, 2), 3)  # its shapes and its forward; the values are always given
Weights = dict[str, Tensor]


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def client(number: int, bits: int | str = "float", architecture: str = "mlp") -> Client:
    random = torch.Generator().manual_seed(number)

    def part(size: int) -> data.Part:
        return data.Part(torch.randn(size, 1, 2, 2, generator=random), torch.randint(3, (size,), generator=random))

    return Client(number, architecture, bits, data.ClientData((0, 1, 2), part(9 + number), part(3), part(3)))


def logits(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(NET, dict(weights), (x,))


def entropy(weights: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits(weights, x), y)


def kl(teacher: Tensor, student: Tensor, teacher_t: float, student_t: float) -> Tensor:
    """T^2 KL(softmax(teacher / teacher_t) || softmax(student / student_t)) of the batch, T the teacher's."""
    p, q = (teacher / teacher_t).softmax(1), (student / student_t).softmax(1)
    return teacher_t**2 * (p * (p.log() - q.log())).sum(1).mean()


def gradient(loss: Callable[[Weights], Tensor], at: Weights) -> Weights:
    leaves = {name: value.detach().clone().requires_grad_() for name, value in at.items()}
    return dict(zip(leaves, torch.autograd.grad(loss(leaves), list(leaves.values())), strict=True))


def plus(a: Weights, b: Mapping[str, Tensor], scale: float = 1.0) -> Weights:
    return {name: a[name] + scale * b[name] for name in a}


def minus(a: Weights, b: Mapping[str, Tensor]) -> Weights:
    return plus(a, b, -1.0)


def zeros(a: Weights) -> Weights:
    return {name: torch.zeros_like(value) for name, value in a.items()}


def drawn(one: Client, count: int = STEPS, round_index: int = 0) -> list[tuple[Tensor, Tensor]]:
    return list(training_batches(JOB, one, BATCH, count, round_index))


def heavy_ball(w: Weights, one: Client, gradient_at: Callable[[Weights, Tensor, Tensor], Weights]) -> Weights:
    velocity = zeros(w)
    for x, y in drawn(one):
        velocity = plus({n: MOMENTUM * v for n, v in velocity.items()}, gradient_at(w, x, y))
        w = plus(w, velocity, -RATE)
    return w


def start(architecture_seed: str = "global", *numbers: int) -> Weights:
    model = models.build("mlp", (1, 2, 2), 3, derive_seed(JOB.seed, architecture_seed, *numbers))
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def assert_close(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Within 1e-11: a few thousand operations of float64, u = 1.1e-16, on numbers of order one."""
    assert set(got) == set(expected)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-11, atol=1e-11)


def check(
    algorithm: Algorithm,
    shared_rule: Callable[[Client, Weights], Weights],
    server_rule: Callable[[Weights, list[Weights]], Weights] | None = None,
    evaluations: int = STEPS,
    bits: int | str = "float",
) -> list[ClientState]:
    """Run two clients and the server, and compare what travels with the rule; returns the clients' states."""
    clients = [client(0, bits), client(1, bits)]
    server = algorithm.start_server(JOB)
    messages: dict[int, Message] = {}
    states = []
    for one in clients:
        update = algorithm.client_step(JOB, one, algorithm.start_client(JOB, one), server, 0)
        assert update.evaluations == evaluations
        assert update.message is not None
        messages[one.id] = update.message
        states.append(update.state)
    expected = [shared_rule(one, start()) for one in clients]
    for number, weights in enumerate(expected):
        assert_close(messages[number].tensors, weights)
    mean = {name: (expected[0][name] + expected[1][name]) / 2 for name in expected[0]}
    new = server_rule(start(), expected) if server_rule else mean
    assert_close(algorithm.server_step(JOB, server, messages), new)
    return states


def own(state: ClientState) -> Weights:
    """The personal model's float weights."""
    names = [name for name, _ in NET.named_parameters()]
    return {name: state.tensors[f"model.{name}"] for name in names}


def fedavg_rule(one: Client, w: Weights) -> Weights:
    return heavy_ball(w, one, lambda at, x, y: gradient(lambda v: entropy(v, x, y), at))


def test_fedavg() -> None:
    check(algorithms.FedAvg(**SGD), fedavg_rule)


def test_fedavg_weighs_by_samples_if_asked() -> None:
    def by_samples(_: Weights, sent: list[Weights]) -> Weights:
        return {name: (9 * sent[0][name] + 10 * sent[1][name]) / 19 for name in sent[0]}

    check(algorithms.FedAvg(**SGD, weighted=True), fedavg_rule, by_samples)


def test_fedprox() -> None:
    def rule(one: Client, w: Weights) -> Weights:
        def pulled(at: Weights, x: Tensor, y: Tensor) -> Weights:
            return gradient(
                lambda v: entropy(v, x, y) + sum(0.35 * (v[n] - w[n]).square().sum() for n in v),  # mu / 2 = 0.35
                at,
            )

        return heavy_ball(w, one, pulled)

    check(algorithms.FedProx(**SGD, mu=0.7), rule)


@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_pfedme(beta: float) -> None:
    def rule(one: Client, w: Weights) -> Weights:
        theta = w
        for x, y in drawn(one):
            for _ in range(3):
                step = gradient(lambda v, x=x, y=y: entropy(v, x, y), theta)
                theta = plus(theta, plus(step, minus(theta, w), 4.0), -RATE)
            w = plus(w, minus(w, theta), -0.05 * 4.0)
        return w

    def server(before: Weights, sent: list[Weights]) -> Weights:
        return {n: (1 - beta) * before[n] + beta * (sent[0][n] + sent[1][n]) / 2 for n in before}

    sgd = {key: value for key, value in SGD.items() if key != "momentum"}
    algorithm = algorithms.PFedMe(**sgd, coupling=4.0, inner_steps=3, global_rate=0.05, beta=beta)
    check(algorithm, rule, server, evaluations=3 * STEPS)


@pytest.mark.parametrize("hessian", ["none", "difference"])
def test_per_fedavg(hessian: str) -> None:
    alpha, delta = 0.3, 1e-3

    def rule(one: Client, w: Weights) -> Weights:
        stream = iter(drawn(one, STEPS * (2 if hessian == "none" else 3)))
        velocity = zeros(w)

        def at(weights: Weights, batch: tuple[Tensor, Tensor]) -> Weights:
            return gradient(lambda v: entropy(v, *batch), weights)

        for first in stream:
            step = at(plus(w, at(w, first), -alpha), next(stream))
            if hessian == "difference":
                third = next(stream)
                bracket = minus(at(plus(w, step, delta), third), at(plus(w, step, -delta), third))
                step = plus(step, bracket, -alpha / (2 * delta))
            velocity = plus({n: MOMENTUM * v for n, v in velocity.items()}, step)
            w = plus(w, velocity, -RATE)
        return w

    algorithm = algorithms.PerFedAvg(**SGD, hessian=hessian, delta=delta, adapt_rate=alpha)
    check(algorithm, rule, evaluations=STEPS * (2 if hessian == "none" else 4))


def test_per_fedavgs_differences_are_the_hessian() -> None:
    """With a vanishing difference the step is the exact gradient of f(w - alpha grad f(w)), all batches alike."""
    everything = client(0)
    everything = replace(everything, data=replace(everything.data, train=data.Part(*drawn(everything, 1)[0])))
    server = algorithms.FedAvg().start_server(JOB)
    x, y = everything.data.train.x, everything.data.train.y

    def after_a_step(v: Weights) -> Tensor:
        inner = torch.autograd.grad(entropy(v, x, y), list(v.values()), create_graph=True)
        return entropy({n: value - 0.3 * g for (n, value), g in zip(v.items(), inner, strict=True)}, x, y)

    exact = plus(start(), gradient(after_a_step, start()), -RATE)
    one = algorithms.PerFedAvg(rate=RATE, local_steps=1, batch_size=BATCH, hessian="difference", adapt_rate=0.3)
    message = one.client_step(JOB, everything, one.start_client(JOB, everything), server, 0).message
    assert message is not None
    for name, value in exact.items():
        torch.testing.assert_close(message.tensors[name], value, rtol=0, atol=1e-7)  # delta^2 times third derivatives


def test_ditto() -> None:
    states = check(algorithms.Ditto(**SGD, coupling=0.6), fedavg_rule, evaluations=2 * STEPS)
    for one, state in zip([client(0), client(1)], states, strict=True):

        def pulled(at: Weights, x: Tensor, y: Tensor) -> Weights:
            return plus(gradient(lambda v: entropy(v, x, y), at), minus(at, start()), 0.6)

        assert_close(own(state), heavy_ball(start(), one, pulled))


def distilling(one: Client, shared_loss: str, tempered: str = "both") -> tuple[Weights, Weights]:
    """(w_i, a_i) after QuPeD's or FML's two steps with a float student, by hand."""
    w, a = start(), start("model", one.id)
    w_velocity, a_velocity = zeros(w), zeros(a)
    for x, y in drawn(one):
        at_w, at_a = logits(w, x), logits(a, x)
        if shared_loss == "quped":
            student_t = 2.0 if tempered == "both" else 1.0
            a_step = gradient(
                lambda v: 0.7 * entropy(v, x, y) + 0.3 * kl(at_w.detach(), logits(v, x), 2.0, student_t), a
            )
            w_step = gradient(lambda v: 0.3 * kl(logits(v, x), at_a.detach(), 2.0, student_t), w)
            w_rate = 2 * RATE
        else:
            a_step = gradient(lambda v: 0.7 * entropy(v, x, y) + 0.3 * kl(at_w.detach(), logits(v, x), 1.5, 1.5), a)
            w_step = gradient(lambda v: 0.4 * entropy(v, x, y) + 0.6 * kl(at_a.detach(), logits(v, x), 1.5, 1.5), w)
            w_rate = RATE
        a_velocity = plus({n: MOMENTUM * v for n, v in a_velocity.items()}, a_step)
        w_velocity = plus({n: MOMENTUM * v for n, v in w_velocity.items()}, w_step)
        a, w = plus(a, a_velocity, -RATE), plus(w, w_velocity, -w_rate)
    return w, a


@pytest.mark.parametrize("tempered", ["both", "teacher"])
def test_quped_in_float(tempered: str) -> None:
    algorithm = algorithms.QuPeD(**SGD, distill=0.3, temperature=2.0, tempered=tempered)
    states = check(algorithm, lambda one, w: distilling(one, "quped", tempered)[0], evaluations=2 * STEPS)
    for one, state in zip([client(0), client(1)], states, strict=True):
        assert_close(own(state), distilling(one, "quped", tempered)[1])


def test_fml() -> None:
    algorithm = algorithms.FML(**SGD, distill=0.3, global_distill=0.6, temperature=1.5)
    states = check(algorithm, lambda one, w: distilling(one, "fml")[0], evaluations=2 * STEPS)
    for one, state in zip([client(0), client(1)], states, strict=True):
        assert_close(own(state), distilling(one, "fml")[1])


def algorithm_1(
    one: Client, x_weights: Weights, pulled: Callable[[Weights, Weights], Weights]
) -> Iterator[tuple[Weights, Weights]]:
    """Algorithm 1, "hard", 2 bits, by hand from the ops: (x, Q_c(x)) after each step.

    pulled(x, Q): what is added to grad f(x).  dose 3, linear; eta_2 = 3 eta_1 m / n; the counted center prox.
    """
    weights = {name: value for name, value in x_weights.items() if name.endswith("weight")}
    centers = {name: qk.init_centers(value, 4) for name, value in weights.items()}
    velocity, total = zeros(x_weights), 8 * STEPS  # the freeze falls on round 8 of 10

    def quantized(v: Weights, c: Weights) -> Weights:
        return {name: qk.hard_quantize(value, c[name]) if name in c else value for name, value in v.items()}

    x_now = x_weights
    for number, (x, y) in enumerate(drawn(one)):
        g = plus(gradient(lambda v: entropy(v, x, y), x_now), pulled(x_now, quantized(x_now, centers)))
        h = gradient(lambda c: entropy(quantized(x_now, c), x, y), centers)
        velocity = plus({n: MOMENTUM * v for n, v in velocity.items()}, g)
        moved = plus(x_now, velocity, -RATE)
        lam_share = (
            3.0 * 2 * (number + 1) / (total * (total + 1)) / RATE
        )  # sums to dose / eta_1 over the unfrozen steps
        new = dict(centers)
        for name in weights:
            c = centers[name]
            lam = lam_share * 0.5 * (c[-1] - c[0]) / 3
            moved[name] = qk.prox_weights(moved[name], c, RATE * lam)
            eta_2 = 3 * RATE * 4 / moved[name].numel()
            mu = c - eta_2 * h[name].clamp(-10, 10)
            new[name] = qk.prox_centers(mu, moved[name], eta_2 * lam, "l1", "counted", at=c).sort().values
        x_now, centers = moved, new
        yield x_now, quantized(x_now, centers)


def test_local_at_two_bits() -> None:
    algorithm = algorithms.Local(**SGD, variant="hard")
    for one in (client(0, 2), client(1, 2)):
        update = algorithm.client_step(JOB, one, algorithm.start_client(JOB, one), {}, 0)
        *_, (x, _) = algorithm_1(one, start("model", one.id), lambda v, q: zeros(v))
        assert_close(own(update.state), x)
        assert (update.evaluations, update.message) == (2 * STEPS, None)
        assert algorithm.server_step(JOB, {}, {}) == {}


@pytest.mark.parametrize("bits", [2, "float"])
def test_qupel(bits: int | str) -> None:
    coupling, eta_3 = 0.4, 0.25
    finals: dict[int, Weights] = {}

    def rule(one: Client, w: Weights) -> Weights:
        if bits == "float":
            x_now, velocity = start(), zeros(w)
            for x, y in drawn(one):
                step = plus(gradient(lambda v: entropy(v, x, y), x_now), minus(x_now, w), coupling)
                velocity = plus({n: MOMENTUM * v for n, v in velocity.items()}, step)
                x_now = plus(x_now, velocity, -RATE)
                w = plus(w, minus(w, x_now), -eta_3 * coupling)
            finals[one.id] = x_now
            return w
        anchor = [w]
        for x_now, q in algorithm_1(one, start(), lambda v, q: {n: coupling * (q[n] - anchor[0][n]) for n in v}):
            anchor[0] = plus(anchor[0], minus(anchor[0], q), -eta_3 * coupling)
            finals[one.id] = x_now
        return anchor[0]

    algorithm = algorithms.QuPeL(**SGD, variant="hard", coupling=coupling, global_rate=eta_3)
    states = check(algorithm, rule, evaluations=(2 if bits == 2 else 1) * STEPS, bits=bits)
    for number, state in enumerate(states):
        assert_close(own(state), finals[number])


@pytest.mark.parametrize("algorithm", [algorithms.QuPeL(), algorithms.Ditto()], ids=lambda one: one.name)
def test_an_algorithm_that_compares_weights_refuses_other_architectures(algorithm: Algorithm) -> None:
    algorithm.check(JOB, [client(0), client(1, 2)])
    sentence = "clients must have the global model's architecture, mlp, got resnet8 for client 1"
    with pytest.raises(ValueError, match=sentence) as caught:
        algorithm.check(JOB, [client(0), client(1, 2, "resnet8")])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "share"),
    [
        (algorithms.FedAvg, "decay_at"),
        (algorithms.FedProx, "decay_at"),
        (algorithms.PerFedAvg, "decay_at"),
        (algorithms.FML, "freeze_at"),
        (algorithms.Ditto, "freeze_at"),
        (algorithms.QuPeD, "freeze_at"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_in_the_last_rounds_w_learns_at_a_tenth_of_the_rate(kind: type, share: str) -> None:
    moves = []
    for at in (1.0, 0.8):  # round 9 of 10 is one of the last with 0.8
        algorithm = kind(rate=RATE, local_steps=1, batch_size=BATCH, **{share: at})
        server = algorithm.start_server(JOB)
        one = client(0)
        message = algorithm.client_step(JOB, one, algorithm.start_client(JOB, one), server, 9).message
        assert message is not None
        moves.append(minus(message.tensors, server))
    assert max(float(move.abs().max()) for move in moves[0].values()) > 1e-4
    assert_close(moves[1], {name: 0.1 * move for name, move in moves[0].items()})
