"""What every algorithm must be beside its update rule: pure, within its budget, the same bits again and after a resume."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qupedkern as qk
from fl import Client, Federation, algorithms, data, make_clients, report
from fl.algorithms import Algorithm
from fl.algorithms._global import Global
from fl.checkpoint import Checkpoint
from fl.core import ClientState, Update
from fl.evaluation import accuracy
from fl.storage import load_state

Outcome = Callable[[Path], dict[str, Any]]
SMALL: dict[str, Any] = {"local_steps": 3, "batch_size": 8}
ALL: list[Algorithm] = [
    algorithms.Ditto(**SMALL),
    algorithms.FedAvg(**SMALL, batch_norm="local"),
    algorithms.FedProx(**SMALL, adapt_steps=2, quantize=True),
    algorithms.FML(**SMALL),
    algorithms.PerFedAvg(**SMALL, batch_norm="recalibrated"),
    algorithms.PFedMe(**SMALL, quantize=True, adapt_steps=2),
    algorithms.QuPeL(**SMALL),
    algorithms.QuPeD(**SMALL, tempered="teacher"),
]


@pytest.fixture(scope="module")
def clients(digits: data.Dataset) -> list[Client]:
    """Three small clients of one architecture, with batch norm, that differ in bits and granularity."""
    three = make_clients(digits, [("cnn", 2), ("cnn", "float"), ("cnn", 1)], (5, 6), seed=3)
    return [*three[:2], dataclasses.replace(three[2], groups="channel")]


def federation(algorithm: Algorithm, clients: list[Client], **changes: Any) -> Federation:
    settings: dict[str, Any] = {"rounds": 3, "sample": 0.7, "architecture": "cnn", **changes}
    return Federation(algorithm=algorithm, clients=clients, **settings)


def names(algorithm: Algorithm) -> str:
    return algorithm.name


def step(run: Federation, number: int, round_index: int = 0) -> Update:
    client = run.clients[number]
    state = run.algorithm.start_client(run.job, client)
    return run.algorithm.client_step(run.job, client, state, run.algorithm.start_server(run.job), round_index)


@pytest.mark.parametrize("algorithm", ALL, ids=names)
def test_a_client_step_changes_nothing_it_was_given(algorithm: Algorithm, clients: list[Client]) -> None:
    run = federation(algorithm, clients)
    for client in clients:
        server = algorithm.start_server(run.job)
        state = algorithm.client_step(run.job, client, algorithm.start_client(run.job, client), server, 0).state
        before = [tensor.clone() for tensor in [*state.tensors.values(), *server.values()]]
        random = torch.get_rng_state()
        one = algorithm.client_step(run.job, client, state, server, 1)
        two = algorithm.client_step(run.job, client, state, server, 1)
        assert torch.equal(torch.get_rng_state(), random)
        after = [*state.tensors.values(), *server.values()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert one.message is not None
        assert two.message is not None
        for tensors, again in [(one.state.tensors, two.state.tensors), (one.message.tensors, two.message.tensors)]:
            assert list(tensors) == list(again)
            assert all(torch.equal(tensors[name], again[name]) for name in tensors)
        assert list(one.message.tensors) == list(server)
        moved = [name for name, tensor in one.message.tensors.items() if not torch.equal(tensor, server[name])]
        assert len(moved) > len(server) / 2


@pytest.mark.parametrize("algorithm", ALL, ids=names)
def test_runs_repeat_and_resume_to_the_same_bits(
    outcome: Outcome, algorithm: Algorithm, clients: list[Client], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = federation(algorithm, clients)
    run.run(tmp_path / "whole")
    save, done = Checkpoint.save, []

    def dying(*arguments: Any, **named: Any) -> None:
        save(*arguments, **named)
        done.append(arguments)
        if len(done) == 3:  # the start and two rounds
            raise InterruptedError

    monkeypatch.setattr(Checkpoint, "save", dying)
    with pytest.raises(InterruptedError):
        run.run(tmp_path / "cut")
    monkeypatch.undo()
    run.run(tmp_path / "cut", resume=True)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("algorithm", ALL, ids=names)
def test_a_budget_buys_each_as_many_steps_as_it_costs(algorithm: Algorithm, clients: list[Client]) -> None:
    run = federation(algorithm, clients, evaluations=12, rounds=10)  # every algorithm's cost of a step divides 12
    for number in range(3):
        assert step(run, number).evaluations == 12


def test_a_step_that_the_budget_cannot_pay_is_refused(clients: list[Client]) -> None:
    with pytest.raises(ValueError, match="pfedme: evaluations must be at least inner_steps, got 4"):
        federation(algorithms.PFedMe(inner_steps=5), clients, evaluations=4)


def test_fedprox_without_a_pull_is_fedavg(clients: list[Client]) -> None:
    one = step(federation(algorithms.FedProx(**SMALL, mu=0.0), clients), 0).message
    two = step(federation(algorithms.FedAvg(**SMALL), clients), 0).message
    assert one is not None
    assert two is not None
    assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in two.tensors)


def test_a_strong_pull_keeps_a_personal_model_at_the_global_one(clients: list[Client]) -> None:
    """With rate coupling = 1 a step without momentum lands on w, but for its gradient."""

    def distance(coupling: float) -> float:
        run = federation(algorithms.Ditto(rate=0.05, momentum=0.0, local_steps=10, coupling=coupling), clients)
        server, state = run.algorithm.start_server(run.job), step(run, 1).state
        return sum(float((state.tensors[f"model.{n}"] - server[n]).square().sum()) for n in server if "weight" in n)

    assert distance(20.0) < 0.2 * distance(0.0)


@pytest.mark.parametrize("kind", [algorithms.FedAvg, algorithms.FedProx, algorithms.PerFedAvg, algorithms.PFedMe])
def test_batch_norm_buffers_travel_stay_or_are_estimated_anew(kind: type[Global], clients: list[Client]) -> None:
    buffers = {name for name, _ in qk_free_model(federation(kind(**SMALL), clients)).named_buffers()}
    assert buffers
    for policy, travels in [("averaged", True), ("local", False), ("recalibrated", False)]:
        run = federation(kind(**SMALL, batch_norm=policy), clients)
        update = step(run, 1)
        assert update.message is not None
        assert (buffers <= set(update.message.tensors)) == travels
        assert buffers.isdisjoint(update.message.tensors) != travels
        assert set(update.state.tensors) == (buffers if policy == "local" else set())


def qk_free_model(run: Federation) -> nn.Module:
    from fl.algorithms._base import global_model

    return global_model(run.job)


def test_local_buffers_are_the_clients_own_and_recalibrated_ones_those_of_its_images(clients: list[Client]) -> None:
    local = federation(algorithms.FedAvg(**SMALL, batch_norm="local"), clients)
    update = step(local, 1)
    server = local.algorithm.start_server(local.job)
    model = local.algorithm.model(local.job, clients[1], update.state, server)
    assert torch.equal(model.norm1.running_mean, update.state.tensors["norm1.running_mean"])
    assert torch.equal(model.conv1.weight, server["conv1.weight"])

    anew = federation(algorithms.FedAvg(**SMALL, batch_norm="recalibrated"), clients)
    state = anew.algorithm.start_client(anew.job, clients[1])
    model = anew.algorithm.model(anew.job, clients[1], state, server)
    with torch.no_grad():
        inputs = model.conv1(clients[1].data.train.x)
    # batches of 8 and a last smaller one: the mean of batch means, a few percent from the mean of all images
    torch.testing.assert_close(model.norm1.running_mean, inputs.mean((0, 2, 3)), rtol=0.1, atol=0.01)


def test_adaptation_is_counted_once_and_fits_the_client(clients: list[Client], tmp_path: Path) -> None:
    plain = federation(algorithms.FedAvg(local_steps=10), clients, sample=1.0, rounds=4).run(tmp_path / "plain")
    tuned = federation(algorithms.FedAvg(local_steps=10, adapt_steps=20), clients, sample=1.0, rounds=4)
    result = tuned.run(tmp_path / "tuned")
    assert [row.evaluations for row in result.clients] == [row.evaluations + 20 for row in plain.clients]
    assert result.mean_accuracy > plain.mean_accuracy


@pytest.mark.parametrize("kind", [algorithms.FedAvg, algorithms.PFedMe])
def test_a_global_model_ships_at_the_clients_own_bits(
    kind: type[Global], clients: list[Client], tmp_path: Path
) -> None:
    run = federation(kind(**SMALL, quantize=True, adapt_steps=4), clients)
    result = run.run(tmp_path / "run")
    assert [row.bits for row in result.clients] == [2, "float", 1]
    for row, client in zip(result.clients, clients, strict=True):
        path = tmp_path / "run" / row.model_file
        if row.bits != "float":
            model = qk.load(run.algorithm.factory(run.job, client), path).eval()
            groups = {layer.num_groups for layer in qk.nn.packed_layers(model).values()}
            assert groups == ({1} if client.groups == "tensor" else {10, 16, 32, 128})
            assert row.accuracy == accuracy(model, client.data.test)
    assert result.clients[0].model_bytes < result.clients[1].model_bytes / 4


def test_a_state_that_was_adapted_ships_what_was_kept(clients: list[Client]) -> None:
    run = federation(algorithms.PerFedAvg(**SMALL, quantize=True), clients)
    server = run.algorithm.start_server(run.job)
    finished = run.algorithm.finish_client(run.job, clients[0], ClientState({}, {"adapted": False}), server)
    other = {name: torch.zeros_like(tensor) for name, tensor in server.items()}
    x = clients[0].data.test.x
    models = [run.algorithm.model(run.job, clients[0], finished.state, w) for w in (server, other)]
    with torch.no_grad():
        assert torch.equal(models[0](x), models[1](x))


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: algorithms.FedProx(mu=-1), "fedprox: mu must be at least 0 and finite, got -1"),
        (lambda: algorithms.PFedMe(inner_steps=0), "pfedme: inner_steps must be at least 1, got 0"),
        (lambda: algorithms.PFedMe(coupling=0), "pfedme: coupling must be positive and finite, got 0"),
        (lambda: algorithms.PFedMe(coupling=2), "pfedme: global_rate times coupling must be between 0 and 1, got 2"),
        (lambda: algorithms.PerFedAvg(hessian="exact"), "per_fedavg: hessian must be one of none, difference, got"),
        (lambda: algorithms.FedAvg(batch_norm="frozen"), "fedavg: batch_norm must be one of averaged, local, recal"),
        (lambda: algorithms.FedAvg(adapt_steps=-1), "fedavg: adapt_steps must be at least 0, got -1"),
        (lambda: algorithms.FedAvg(adapt_rate=0.0), "fedavg: adapt_rate must be positive and finite, got 0"),
        (lambda: algorithms.FML(global_distill=2), "fml: global_distill must be between 0 and 1, got 2"),
        (lambda: algorithms.QuPeL(coupling=30), "qupel: eta_3 times coupling must be between 0 and 1, got 3"),
        (lambda: algorithms.Ditto(coupling=-1), "ditto: coupling must be at least 0 and finite, got -1"),
        (lambda: algorithms.QuPeD(tempered="student"), "quped: tempered must be one of both, teacher, got 'student'"),
    ],
)
def test_a_wrong_hyper_parameter_is_one_sentence(build: Callable[[], Algorithm], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build()


def test_a_granularity_that_does_not_divide_the_layers_is_refused(clients: list[Client]) -> None:
    odd = [dataclasses.replace(clients[0], groups=7), *clients[1:]]
    with pytest.raises(ValueError, match="a block of 7 weights must divide"):
        federation(algorithms.Local(), odd)


@pytest.mark.parametrize("algorithm", [algorithms.QuPeD(**SMALL), algorithms.FedAvg(**SMALL)], ids=names)
def test_the_global_model_is_scored_on_the_global_test_set(
    algorithm: Algorithm, clients: list[Client], tmp_path: Path
) -> None:
    run = federation(algorithm, clients, rounds=2)
    result = run.run(tmp_path / "run")
    server, _ = load_state(tmp_path / "run" / "state" / "server.2.safetensors")
    model = algorithm.shared_model(run.job, server)
    assert model is not None
    x, y = (torch.cat([getattr(client.data.test, name) for client in clients]) for name in "xy")
    assert result.shared_accuracy == pytest.approx(accuracy(model, data.Part(x, y)))
    assert result.summary()["shared_accuracy"] == result.shared_accuracy


def test_algorithms_without_a_whole_global_model_score_none(clients: list[Client]) -> None:
    """Local has no global model; the others' has batch norm, whose statistics stay with the clients."""
    for algorithm in (algorithms.Local(), algorithms.QuPeL(), algorithms.FedAvg(batch_norm="local")):
        run = federation(algorithm, clients)
        assert algorithm.shared_model(run.job, algorithm.start_server(run.job)) is None


def test_a_table_of_many_classes_says_how_many_each_client_holds(
    clients: list[Client], capsys: pytest.CaptureFixture[str]
) -> None:
    report.print_classes(clients, 62)
    lines = capsys.readouterr().out.splitlines()
    for client in clients:
        cells = next(line for line in lines if line.split()[:1] == [str(client.id)]).split()
        assert str(len(client.data.classes)) in cells
        assert cells[-3:] == [str(len(part)) for part in (client.data.train, client.data.val, client.data.test)]
