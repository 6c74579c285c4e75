"""Packed messages: what comes out of a payload, what it weighs, and what error feedback keeps."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qupedkern as qk
from fl import Client, Federation, algorithms, config, data, make_clients
from fl.algorithms import Algorithm
from fl.config import tomllib
from fl.core import Message, payload_bytes
from fl.storage import Tensors
from fl.wire import Wire, decode, encode, is_packed

Outcome = Callable[[Path], dict[str, Any]]


@st.composite
def messages(draw: st.DrawFn) -> Tensors:
    """A weight of any size, a bias, a buffer and a counter."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    scale = draw(st.sampled_from([0.0, 1e-6, 1.0, 1e6]))
    return {
        "weight": scale * torch.randn(rows, columns, generator=random),
        "bias": torch.randn(rows, generator=random),
        "counter": torch.tensor(7),
    }


@given(messages(), st.integers(1, 8))
def test_a_payload_is_the_nearest_of_its_own_centers_and_the_rest_untouched(tensors: Tensors, bits: int) -> None:
    payload = encode(tensors, bits)
    values = decode(payload, tensors, bits)
    assert list(values) == list(tensors)
    assert torch.equal(values["bias"], tensors["bias"])
    assert torch.equal(values["counter"], tensors["counter"])
    weight = tensors["weight"]
    if is_packed(weight, bits):
        assert torch.equal(values["weight"], qk.hard_quantize(weight, payload["weight.centers"]))
        assert payload_bytes(payload) < payload_bytes(tensors)
        size = -(-weight.numel() * bits // 8) + 4 * 2**bits
        assert payload_bytes(payload) == size + 4 * len(tensors["bias"]) + 8
    else:
        assert torch.equal(values["weight"], weight)
        assert payload_bytes(payload) == payload_bytes(tensors)


@pytest.fixture(scope="module")
def clients(digits: data.Dataset) -> list[Client]:
    return make_clients(digits, [("mlp", 2), ("mlp", "float"), ("mlp", 1)], 5, seed=0)


def federation(algorithm: Algorithm, clients: list[Client], **changes: Any) -> Federation:
    settings: dict[str, Any] = {"rounds": 4, "sample": 0.7, **changes}
    return Federation(algorithm=algorithm, clients=clients, **settings)


KINDS = [algorithms.QuPeD(local_steps=2), algorithms.FedAvg(local_steps=2), algorithms.QuPeL(local_steps=2)]


@pytest.mark.parametrize("algorithm", KINDS, ids=lambda one: one.name)
def test_without_bits_it_is_the_algorithm_itself(
    outcome: Outcome, algorithm: Algorithm, clients: list[Client], tmp_path: Path
) -> None:
    federation(algorithm, clients).run(tmp_path / "plain")
    federation(Wire(algorithm), clients).run(tmp_path / "wire")
    assert outcome(tmp_path / "plain") == outcome(tmp_path / "wire")


@pytest.mark.parametrize("algorithm", [*KINDS, algorithms.Local(local_steps=2)], ids=lambda one: one.name)
def test_a_client_step_is_pure(algorithm: Algorithm, clients: list[Client]) -> None:
    run = federation(Wire(algorithm, up_bits=4, down_bits=8), clients)
    state = run.algorithm.start_client(run.job, clients[0])
    for round_index in range(2):  # the second carries error feedback and momentum
        sent = run.algorithm.broadcast(run.job, run.algorithm.start_server(run.job))
        before = {name: tensor.clone() for name, tensor in {**state.tensors, **sent}.items()}
        one, two = (run.algorithm.client_step(run.job, clients[0], state, sent, round_index) for _ in range(2))
        assert all(torch.equal(tensor, before[name]) for name, tensor in {**state.tensors, **sent}.items())
        assert all(torch.equal(tensor, two.state.tensors[name]) for name, tensor in one.state.tensors.items())
        state = one.state


def test_any_engine_gives_the_same_bits(outcome: Outcome, clients: list[Client], tmp_path: Path) -> None:
    run = federation(Wire(algorithms.QuPeD(local_steps=2), up_bits=4, down_bits=8), clients)
    run.run(tmp_path / "serial")
    replace(run, engine="pool", workers=2).run(tmp_path / "pool")
    assert outcome(tmp_path / "serial") == outcome(tmp_path / "pool")


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_error_feedback_makes_up_for_what_was_not_sent(clients: list[Client], bits: int) -> None:
    """Over rounds from one global model, sent + what is still owed = meant, to a float32 sum of 4 terms."""
    inner = algorithms.FedAvg(local_steps=3)
    run = federation(Wire(inner, up_bits=bits), clients)
    server = run.algorithm.start_server(run.job)
    state = run.algorithm.start_client(run.job, clients[1])
    meant = {name: torch.zeros_like(tensor) for name, tensor in server.items()}
    given_ = {name: torch.zeros_like(tensor) for name, tensor in server.items()}
    for round_index in range(4):
        plain = inner.client_step(run.job, clients[1], inner.start_client(run.job, clients[1]), server, round_index)
        update = run.algorithm.client_step(run.job, clients[1], state, server, round_index)
        state = update.state
        assert plain.message is not None
        assert update.message is not None
        for name, tensor in decode(update.message.tensors, server, bits).items():
            meant[name] += plain.message.tensors[name] - server[name]
            given_[name] += tensor
    for name, tensor in meant.items():
        owed = state.tensors.get("wire." + name, torch.zeros(()))
        torch.testing.assert_close(given_[name] + owed, tensor, rtol=0, atol=8 * 6e-8 * float(tensor.abs().max() + 1))
    assert ("wire.linear1.weight" in state.tensors) == is_packed(server["linear1.weight"], bits)
    without = Wire(inner, up_bits=bits, error_feedback=False)
    assert not without.client_step(run.job, clients[1], state, server, 0).state.tensors


def test_the_server_adds_differences_to_its_own_values(clients: list[Client]) -> None:
    """A download of 1 bit is coarse, yet a message that says "no change" changes nothing."""
    run = federation(Wire(algorithms.FedAvg(), up_bits=2, down_bits=1), clients)
    server = run.algorithm.start_server(run.job)
    nothing = encode({name: torch.zeros_like(tensor) for name, tensor in server.items()}, 2)
    new = run.algorithm.server_step(run.job, server, {0: Message(nothing, 1), 1: Message(nothing, 1)})
    assert all(torch.equal(new[name], tensor) for name, tensor in server.items())


@pytest.mark.parametrize(("bits", "share", "loss"), [(8, 0.32, 0.05), (4, 0.15, 0.15)])
def test_bytes_are_counted_as_they_travel_and_the_model_still_learns(
    clients: list[Client], tmp_path: Path, bits: int, share: float, loss: float
) -> None:
    """loss: a regression guard on three small clients and six rounds, where less than 0.001 and 0.01 were seen."""
    algorithm = algorithms.FedAvg(local_steps=10)
    plain = federation(algorithm, clients, rounds=6, sample=1.0).run(tmp_path / "plain")
    packed = federation(Wire(algorithm, bits, 8), clients, rounds=6, sample=1.0).run(tmp_path / "wire")
    assert packed.total("bytes_up_float32") == plain.total("bytes_up") == plain.total("bytes_up_float32")
    assert packed.total("bytes_up") < share * plain.total("bytes_up")
    assert packed.total("bytes_down") < 0.32 * plain.total("bytes_down")
    assert packed.mean_accuracy > plain.mean_accuracy - loss


def test_the_configuration_packs_what_travels(config_text: str) -> None:
    chosen = config.parse(tomllib.loads(config_text + "\n[wire]\nup_bits = 4\ndown_bits = 8\n"))
    assert chosen.algorithm("quped") == Wire(algorithms.QuPeD(distill=0.3), 4, 8)
    assert chosen.algorithm("fedavg").name == "fedavg"
    for line, sentence in [("up_bits = 9", "up_bits must be one of 1, 2, 3"), ("upload = 2", "unknown key 'upload'")]:
        with pytest.raises(config.ConfigError, match=sentence):
            config.parse(tomllib.loads(config_text + f"\n[wire]\n{line}\n"))
    with pytest.raises(ValueError, match="wire: down_bits must be between 1 and 8, got 0"):
        Wire(algorithms.QuPeD(), down_bits=0)
