"""Worker processes: the bits of the serial engine, whoever dies."""

import dataclasses
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from fl import Client, Federation, algorithms, storage
from fl.algorithms import Algorithm
from fl.core import ClientState, Job, Update
from fl.engines import pool, shared
from fl.engines.shared import share
from fl.errors import DivergedError, WorkerError

Build = Callable[..., Federation]
Outcome = Callable[[Path], dict[str, Any]]
ALL = [algorithms.QuPeD(local_steps=2), algorithms.FedAvg(local_steps=2)]  # personal models, and one for all

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")


@pytest.fixture(autouse=True)
def _own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared directories of this process: other runs of this machine come and go meanwhile."""
    monkeypatch.setattr(shared, "PREFIX", f"qupedkern-test{os.getpid()}-")


def workers() -> list[int]:
    return [child.pid for child in multiprocessing.active_children() if child.pid is not None]


def shared_directories() -> set[str]:
    return (
        {name for name in os.listdir("/dev/shm") if name.startswith(shared.PREFIX)}
        if os.path.isdir("/dev/shm")
        else set()
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deadly(algorithms.QuPeD):
    """QuPeD in which client 3's step of the second round kills its process, while there is a file of deaths left."""

    deaths: str
    local_steps: int = 2

    name: ClassVar[str] = "deadly"

    def client_step(
        self, job: Job, client: Client, state: ClientState, broadcast: storage.Tensors, round_index: int
    ) -> Update:
        left = sorted(Path(self.deaths).glob("*"))
        if client.id == 3 and round_index == 1 and left:
            left[0].unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().client_step(job, client, state, broadcast, round_index)


@pytest.mark.parametrize("algorithm", ALL, ids=lambda algorithm: algorithm.name)
def test_the_pool_gives_the_bits_of_the_serial_engine(
    outcome: Outcome, federation: Build, algorithm: Algorithm, tmp_path: Path
) -> None:
    federation(algorithm, rounds=2).run(tmp_path / "serial")
    before = shared_directories()
    federation(algorithm, rounds=2, engine="pool", workers=2).run(tmp_path / "pool")
    assert outcome(tmp_path / "pool") == outcome(tmp_path / "serial")
    assert workers() == []
    assert shared_directories() == before


def test_a_killed_workers_clients_are_done_again_and_a_run_goes_on_with_the_other_engine(
    outcome: Outcome, federation: Build, tmp_path: Path
) -> None:
    """Two deaths are mended; a third ends the round with a sentence, and the serial engine continues it."""
    deaths = tmp_path / "deaths"
    deaths.mkdir()
    run = federation(Deadly(deaths=str(deaths)), sample=1.0, rounds=2)
    run.run(tmp_path / "serial")
    pooled = dataclasses.replace(run, engine="pool", workers=1)
    for number in range(2):
        (deaths / str(number)).touch()
    pooled.run(tmp_path / "mended")
    assert list(deaths.iterdir()) == []
    assert outcome(tmp_path / "mended") == outcome(tmp_path / "serial")
    for number in range(3):
        (deaths / str(number)).touch()
    with pytest.raises(WorkerError, match="a worker was killed by signal 9 while it worked on client 3, 3 times"):
        pooled.run(tmp_path / "cut")
    assert workers() == []
    run.run(tmp_path / "cut", resume=True)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "serial")


def test_workers_killed_at_random_cost_time_alone(outcome: Outcome, federation: Build, tmp_path: Path) -> None:
    run = federation(algorithms.QuPeD(local_steps=2), sample=1.0, rounds=4)
    run.run(tmp_path / "serial")
    over = threading.Event()
    killed = []

    def killer() -> None:
        while not over.wait(0.05):
            records = tmp_path / "pool" / "records.jsonl"
            if records.exists() and records.read_bytes().count(b"\n") > len(killed) + 1:  # one a round
                victims = workers()
                if victims:
                    os.kill(victims[0], signal.SIGKILL)
                    killed.append(victims[0])

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        dataclasses.replace(run, engine="pool", workers=2).run(tmp_path / "pool")
    finally:
        over.set()
        thread.join()
    assert len(killed) >= 2
    assert outcome(tmp_path / "pool") == outcome(tmp_path / "serial")


def test_what_a_worker_raises_ends_the_run_as_it_would_in_one_process(federation: Build, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"client \d in round 1: training has diverged, .* choose a lower rate"):
        federation(algorithms.FedAvg(rate=1e6, local_steps=20), engine="pool", workers=1).run(tmp_path / "run")
    assert workers() == []


def test_workers_end_with_the_process_that_started_them(federation: Build, tmp_path: Path) -> None:
    """The parent is killed while its workers live: they leave, and take the shared memory with them."""
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    before = shared_directories()
    run = federation(algorithms.QuPeD(local_steps=2), rounds=10_000, engine="pool", workers=2)
    parent = context.Process(target=run.run, args=(tmp_path / "run",))
    parent.start()
    records = tmp_path / "run" / "records.jsonl"
    deadline = time.monotonic() + 120
    while not (records.exists() and records.read_bytes().count(b"\n") > 1):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(shared_directories() - before) == 1
    parent.kill()
    parent.join()
    while shared_directories() - before:
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


def test_shared_tensors_are_seen_by_whoever_opens_them(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(5, dtype=torch.float32),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(7),
        "half": torch.ones(3, 2, dtype=torch.bfloat16),
        "strided": torch.arange(12.0).reshape(3, 4).T,
    }
    layout = share(tmp_path / "shared", tensors)
    one, two = layout.open(), layout.open()
    for name, tensor in tensors.items():
        assert torch.equal(one[name], tensor)
        assert one[name].data_ptr() % 64 == 0
    one["a"].fill_(3.0)
    assert torch.equal(two["a"], torch.full((5,), 3.0))
    assert share(tmp_path / "none", {}).open() == {}


def test_a_pool_has_as_many_workers_as_there_is_work_for(federation: Build, tmp_path: Path) -> None:
    run = federation(algorithms.Local(), sample=0.25)
    with pool.open_pool(run.job, run.algorithm, run.clients, tmp_path, 1, None) as opened:
        assert opened.count == 1
    with pool.open_pool(run.job, run.algorithm, run.clients, tmp_path, 1, 7) as opened:
        assert opened.count == 7
