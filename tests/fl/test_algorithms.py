"""Client and server steps: pure, within their budget, and what the method says they are."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import qupedkern as qk
from fl import Client, ClientState, Federation, algorithms
from fl.algorithms import Algorithm
from fl.algorithms._personal import EVALUATIONS
from fl.core import Message, Update

Build = Callable[..., Federation]
ALL = [algorithms.QuPeD(), algorithms.Local(), algorithms.FedAvg()]


def bits_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)


def step(run: Federation, number: int, round_index: int = 0, state: ClientState | None = None) -> Update:
    """One client step from the start of a run."""
    algorithm, job, client = run.algorithm, run.job, run.clients[number]
    start = algorithm.start_client(job, client) if state is None else state
    return algorithm.client_step(job, client, start, algorithm.start_server(job), round_index)


def personal(state: ClientState) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.tensors.items() if name.startswith("model.")}


@pytest.mark.parametrize("algorithm", ALL, ids=lambda algorithm: algorithm.name)
@pytest.mark.parametrize("number", range(4))
def test_a_client_step_is_a_pure_function(federation: Build, algorithm: Algorithm, number: int) -> None:
    run = federation(algorithm, evaluations=6)
    job, client = run.job, run.clients[number]
    state, server = algorithm.start_client(job, client), algorithm.start_server(job)
    state_before = {name: tensor.clone() for name, tensor in state.tensors.items()}
    server_before = {name: tensor.clone() for name, tensor in server.items()}
    generator_before = torch.get_rng_state()
    one = algorithm.client_step(job, client, state, server, 1)
    two = algorithm.client_step(job, client, state, server, 1)
    assert torch.equal(torch.get_rng_state(), generator_before)
    assert bits_equal(state.tensors, state_before)
    assert bits_equal(server, server_before)
    assert bits_equal(one.state.tensors, two.state.tensors)
    assert one.state.scalars == two.state.scalars
    assert (one.message is None) == (two.message is None) == (algorithm.name == "local")
    if one.message is not None and two.message is not None:
        assert bits_equal(one.message.tensors, two.message.tensors)
        assert not bits_equal(one.message.tensors, server)


def test_inner_layers_leave_the_first_convolution_and_the_last_linear_layer_in_float(federation: Build) -> None:
    for layers, expected in (
        ("inner", ["conv2", "linear1"]),
        ("all", ["conv1", "conv2", "linear1", "linear2"]),
    ):
        run = federation(algorithms.Local(layers=layers))
        state = run.algorithm.start_client(run.job, run.clients[1])  # a CNN of 2 bits
        model = run.algorithm.model(run.job, run.clients[1], state, {})
        assert sorted(qk.nn.packed_layers(model)) == expected
    with pytest.raises(ValueError, match="layers must be one of all, inner, got 'most'"):
        algorithms.QuPeD(layers="most")


@pytest.mark.parametrize("variant", sorted(EVALUATIONS))
@pytest.mark.parametrize("name", ["quped", "local"])
def test_a_round_spends_its_budget_and_no_more(federation: Build, variant: str, name: str) -> None:
    run = federation(
        algorithms.BY_NAME[name](variant=variant), evaluations=12, rounds=5
    )  # 12: every step's cost divides it
    for number in (0, 2):  # 1 bit, float
        update = step(run, number)
        assert update.evaluations == 12
        assert step(run, number, round_index=4, state=update.state).evaluations == 12  # after the freeze


def test_fedavg_spends_the_same_budget(federation: Build) -> None:
    assert step(federation(algorithms.FedAvg(), evaluations=12), 0).evaluations == 12
    assert step(federation(algorithms.FedAvg(local_steps=5)), 0).evaluations == 5


@pytest.mark.parametrize("number", range(4))
def test_quped_without_distillation_is_local_training(federation: Build, number: int) -> None:
    together = step(federation(algorithms.QuPeD(distill=0.0, local_steps=4)), number)
    alone = step(federation(algorithms.Local(local_steps=4)), number)
    assert bits_equal(personal(together.state), personal(alone.state))
    mixed = step(federation(algorithms.QuPeD(distill=0.5, local_steps=4)), number)
    assert not bits_equal(personal(mixed.state), personal(alone.state))


def test_the_global_model_learns_from_no_label(federation: Build, few_clients: list[Client]) -> None:
    client = few_clients[0]
    train = client.data.train
    relabelled = replace(client, data=replace(client.data, train=replace(train, y=train.y.flip(0))))
    run = federation(algorithms.QuPeD(distill=1.0, local_steps=4))
    other = replace(run, clients=[relabelled, *few_clients[1:]])
    one, two = step(run, 0).message, step(other, 0).message
    assert one is not None
    assert two is not None
    assert bits_equal(one.tensors, two.tensors)


def test_the_global_model_moves_towards_the_student(federation: Build) -> None:
    import qupedkern as qk

    run = federation(algorithms.QuPeD(local_steps=60), rounds=5)
    algorithm, job, client = run.algorithm, run.job, run.clients[2]
    server, update = algorithm.start_server(job), step(run, 2)
    assert update.message is not None

    def distance(tensors: dict[str, torch.Tensor]) -> float:
        teacher = algorithms.FedAvg().model(job, client, algorithms.FedAvg().start_client(job, client), tensors)
        student = algorithm.model(job, client, update.state, tensors)
        with torch.no_grad():
            return float(qk.distillation_loss(student(client.data.train.x), teacher(client.data.train.x), 2.0))

    assert distance(update.message.tensors) < 0.7 * distance(server)


def test_what_travels_is_the_global_model_alone(federation: Build) -> None:
    for architecture in ("mlp", "cnn"):
        run = federation(algorithms.QuPeD(local_steps=1), architecture=architecture)
        server = run.algorithm.start_server(run.job)
        message = step(run, 1).message
        assert message is not None
        assert {n: t.shape for n, t in message.tensors.items()} == {n: t.shape for n, t in server.items()}
        moved = [name for name in server if not torch.equal(server[name], message.tensors[name])]
        assert any("running_mean" in name for name in moved) == (architecture == "cnn")


def test_the_server_takes_the_plain_mean_or_the_weighted(federation: Build) -> None:
    messages = {0: Message({"w": torch.tensor([0.0])}, 10), 1: Message({"w": torch.tensor([4.0])}, 30)}
    for kind in (algorithms.QuPeD, algorithms.FedAvg):
        for weighted, mean in ((False, 2.0), (True, 3.0)):
            run = federation(kind(weighted=weighted))
            assert run.algorithm.server_step(run.job, {}, messages)["w"].item() == mean


@pytest.mark.parametrize("name", ["quped", "local"])
def test_frozen_weights_stay_on_their_centers_with_their_codes(federation: Build, name: str) -> None:
    from qupedkern.nn import quantized_layers

    run = federation(algorithms.BY_NAME[name](freeze_at=0.5), evaluations=12, rounds=4)
    algorithm, job, client = run.algorithm, run.job, run.clients[1]
    first = step(run, 1, round_index=2)
    second = step(run, 1, round_index=3, state=first.state)
    layers = [quantized_layers(algorithm._restore(job, client, s.state)[0]) for s in (first, second)]  # type: ignore[attr-defined]
    for layer_name, before in layers[0].items():
        after = layers[1][layer_name]
        for layer in (before, after):
            assert all((row[:, None] == layer.centers.flatten()).any(1).all() for row in layer.weight.flatten(1))
        assert not torch.equal(before.centers, after.centers)
        assert torch.equal(before.codes(), after.codes())


@pytest.mark.parametrize("name", ["quped", "local"])
def test_a_client_not_drawn_since_the_freeze_is_fine_tuned_once(federation: Build, name: str) -> None:
    run = federation(algorithms.BY_NAME[name](freeze_at=0.5), evaluations=6, rounds=4)
    algorithm, job, client = run.algorithm, run.job, run.clients[0]
    server = algorithm.start_server(job)
    early, late = step(run, 0, round_index=1), step(run, 0, round_index=2)
    finished = algorithm.finish_client(job, client, early.state, server)
    assert finished.evaluations == 6
    assert finished.message is None
    assert not bits_equal(personal(finished.state), personal(early.state))
    untouched = algorithm.finish_client(job, client, late.state, server)
    assert untouched.evaluations == 0
    assert untouched.state is late.state
    never = replace(algorithm, freeze_at=1.0).finish_client(job, client, early.state, server)  # type: ignore[type-var]
    assert never.state is early.state


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: algorithms.QuPeD(distill=-0.1), "quped: distill must be between 0 and 1, got -0.1"),
        (lambda: algorithms.QuPeD(temperature=0), "quped: temperature must be positive and finite"),
        (lambda: algorithms.QuPeD(global_rate=-1.0), "quped: global_rate must be positive and finite"),
        (lambda: algorithms.QuPeD(variant="soft"), "quped: variant must be one of simultaneous, alternating, hard"),
        (lambda: algorithms.Local(freeze_at=1.5), "local: freeze_at must be between 0 and 1, got 1.5"),
        (lambda: algorithms.Local(local_steps=0), "local: local_steps must be at least 1, got 0"),
        (lambda: algorithms.Local(batch_size=0), "local: batch_size must be at least 1, got 0"),
        (lambda: algorithms.FedAvg(rate=float("nan")), "fedavg: rate must be positive and finite"),
        (lambda: algorithms.FedAvg(momentum=1.0), "fedavg: momentum must be at least 0 and below 1"),
        (lambda: algorithms.FedAvg(decay_at=-1), "fedavg: decay_at must be between 0 and 1"),
    ],
)
def test_a_wrong_hyper_parameter_is_one_sentence(build: Callable[[], Algorithm], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build()


def test_a_federation_checks_its_numbers(federation: Build, few_clients: list[Client]) -> None:
    for changes, sentence in [
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"sample": 0.0}, "sample must be above 0 and at most 1, got 0.0"),
        ({"sample": 1.5}, "sample must be above 0 and at most 1, got 1.5"),
        ({"evaluations": 3}, "evaluations must be at least 4"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"architecture": "vgg"}, "architecture must be one of cnn, cnn1, cnn2, mlp, resnet20, resnet32, resnet8"),
        ({"clients": []}, "clients must be a non-empty list"),
        ({"clients": few_clients[1:]}, "with ids 0, 1, ..."),
    ]:
        with pytest.raises(ValueError, match=sentence):
            federation(algorithms.Local(), **changes)
