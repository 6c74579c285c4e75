"""Clients that are drawn, fail or are late by seed: what it costs them, and that it costs nobody else anything."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fl import Client, Federation, algorithms, data, make_clients
from fl.cohort import JITTER, draw_cohort
from fl.core import ClientState, Job, sample_clients
from fl.storage import load_state

JOB = Job(rounds=9, sample=0.5, seed=1, architecture="mlp", input_shape=(1, 2, 2), num_classes=2)
Outcome = Callable[[Path], dict[str, Any]]


@given(st.integers(1, 40), st.floats(0, 0.99), st.none() | st.floats(0.1, 3), st.integers(0, 9), st.integers(0, 2**60))
def test_a_cohort_is_fixed_by_seed_and_round(
    count: int, dropout: float, deadline: float | None, turn: int, seed: int
) -> None:
    job = dataclasses.replace(JOB, dropout=dropout, deadline=deadline, seed=seed)
    cohort = draw_cohort(job, turn, count)
    assert cohort == draw_cohort(job, turn, count)
    assert cohort.drawn == sample_clients(seed, turn, count, job.sample)  # chances do not change who is drawn
    assert set(cohort.failed) | set(cohort.late) <= set(cohort.drawn)
    assert set(cohort.failed).isdisjoint(cohort.late)
    assert sorted([*cohort.failed, *cohort.late, *cohort.punctual]) == cohort.drawn
    assert sorted([*cohort.failed, *cohort.working]) == cohort.drawn
    more = draw_cohort(dataclasses.replace(job, dropout=min(0.99, dropout + 0.2)), turn, count)
    assert set(cohort.failed) <= set(more.failed)
    assert cohort.failed == draw_cohort(dataclasses.replace(job, deadline=None), turn, count).failed


def test_clients_fail_and_are_late_as_often_as_they_should() -> None:
    speeds = (1.0,) * 100 + (0.5,) * 100
    job = dataclasses.replace(JOB, sample=1.0, dropout=0.2, deadline=1.4, speeds=speeds)
    cohorts = [draw_cohort(job, turn, 200) for turn in range(50)]
    failed = sum(len(cohort.failed) for cohort in cohorts)
    assert abs(failed - 2000) < 5 * (10000 * 0.2 * 0.8) ** 0.5  # five standard deviations of a binomial
    normal = torch.distributions.Normal(0.0, JITTER)
    for slow, clients in ((1.0, range(100)), (2.0, range(100, 200))):
        late = sum(number in clients for cohort in cohorts for number in cohort.late)
        worked = sum(number in clients for cohort in cohorts for number in cohort.working)
        chance = 1 - float(normal.cdf(torch.tensor(1.4 / slow).log()))
        assert abs(late - chance * worked) < 5 * (worked * chance * (1 - chance)) ** 0.5


@pytest.fixture(scope="module")
def clients(digits: data.Dataset) -> list[Client]:
    return make_clients(digits, [("mlp", 2)] * 6, 5, seed=0)


def states(directory: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: load_state(path)[0] for path in (directory / "state").iterdir()}


def test_a_failed_client_costs_its_own_work_and_nothing_else(clients: list[Client], tmp_path: Path) -> None:
    """Local training: what every client does depends on itself alone, so a failure may show in that client alone."""
    algorithm = algorithms.Local(local_steps=1)
    run = Federation(algorithm=algorithm, clients=clients, rounds=4, sample=0.7)
    whole = run.run(tmp_path / "whole")
    torn = dataclasses.replace(run, dropout=0.15).run(tmp_path / "torn")
    failures = {number for record in torn.records[1:] for number in record["failed"]}
    assert failures
    assert failures != set(range(6))
    for record, without in zip(torn.records[1:], whole.records[1:], strict=True):
        assert record["drawn"] == without["drawn"]
        assert set(record["evaluations"]) == {str(number) for number in record["drawn"]} - set(
            map(str, record["failed"])
        )
    for number in set(range(6)) - failures:
        assert torn.clients[number] == whole.clients[number]


def test_late_messages_are_not_counted_and_their_clients_keep_what_they_learned(
    clients: list[Client], tmp_path: Path
) -> None:
    slow = [dataclasses.replace(client, speed=0.01 if client.id == 2 else 1.0) for client in clients]
    algorithm = algorithms.QuPeD(local_steps=1)
    run = Federation(algorithm=algorithm, clients=slow, rounds=1, sample=1.0, deadline=10.0)
    result = run.run(tmp_path / "run")
    record = result.records[1]
    assert (record["late"], record["failed"], record["aggregated"]) == ([2], [], True)
    torch.set_num_threads(1)  # as the run: torch sums in another order with more
    job, server = run.job, algorithm.start_server(run.job)
    updates = [algorithm.client_step(job, one, algorithm.start_client(job, one), server, 0) for one in slow]
    messages = {n: update.message for n, update in enumerate(updates) if n != 2 and update.message is not None}
    expected = algorithm.server_step(job, server, messages)
    got = states(tmp_path / "run")
    assert all(torch.equal(got["server.1.safetensors"][name], expected[name]) for name in expected)
    kept = ClientState.load(tmp_path / "run" / "state" / "client_002.1.safetensors")
    assert all(torch.equal(kept.tensors[name], updates[2].state.tensors[name]) for name in kept.tensors)
    assert record["bytes_up"] == sum(up for _, up in record["bytes_by_client"].values())
    assert record["bytes_by_client"]["2"][1] > 0  # it was sent all the same


def test_a_round_without_quorum_leaves_the_server_as_it_was(clients: list[Client], tmp_path: Path) -> None:
    algorithm = algorithms.FedAvg(local_steps=1)
    run = Federation(algorithm=algorithm, clients=clients, rounds=6, sample=0.7, dropout=0.25, quorum=0.75)
    result = run.run(tmp_path / "run")
    voided = [not record["aggregated"] for record in result.records[1:]]
    assert any(voided)
    assert not all(voided)
    for record, before in zip(result.records[1:], result.records, strict=False):
        enough = len(record["drawn"]) - len(record["failed"]) >= 0.75 * len(record["drawn"])
        assert record["aggregated"] == enough
        assert enough or record["accuracy"] == before["accuracy"]


@pytest.mark.parametrize("algorithm", [algorithms.QuPeD(local_steps=1), algorithms.FedAvg(local_steps=1)])
def test_a_round_may_lose_everyone_and_the_run_goes_on_to_the_same_bits(
    outcome: Outcome, algorithm: algorithms.Algorithm, clients: list[Client], tmp_path: Path
) -> None:
    run = Federation(algorithm=algorithm, clients=clients, rounds=5, sample=0.3, dropout=0.8, deadline=1.2)
    result = run.run(tmp_path / "one")
    assert any(record["failed"] == record["drawn"] for record in result.records[1:])
    dataclasses.replace(run, engine="pool", workers=2).run(tmp_path / "two")
    assert outcome(tmp_path / "one") == outcome(tmp_path / "two")


def test_every_round_counts_its_bytes_by_client(clients: list[Client], tmp_path: Path) -> None:
    algorithm = algorithms.QuPeD(local_steps=1)
    result = Federation(algorithm=algorithm, clients=clients, rounds=3, sample=0.5, dropout=0.3).run(tmp_path / "run")
    size = 4 * 17226
    for record in result.records[1:]:
        down, up = len(record["drawn"]) * size, (len(record["drawn"]) - len(record["failed"])) * size
        assert (record["bytes_down"], record["bytes_up"]) == (down, up)
        assert (record["bytes_down_float32"], record["bytes_up_float32"]) == (down, up)
        for number in record["drawn"]:
            assert record["bytes_by_client"][str(number)] == [size, 0 if number in record["failed"] else size]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"quorum": 1.5}, "quorum must be between 0 and 1, got 1.5"),
        ({"deadline": 0.0}, "deadline must be positive, got 0.0"),
    ],
)
def test_chances_that_are_none_are_refused(clients: list[Client], changes: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Federation(algorithm=algorithms.Local(), clients=clients, rounds=1, sample=0.5, **changes)  # type: ignore[arg-type]
    still = [dataclasses.replace(clients[0], speed=0.0), *clients[1:]]
    with pytest.raises(ValueError, match="speeds must be positive and finite"):
        Federation(algorithm=algorithms.Local(), clients=still, rounds=1, sample=0.5)
