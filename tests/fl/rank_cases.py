"""Runs that test_torchrun.py compares with the serial engine's, and the program that torchrun's ranks play them in."""

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from fl import Client, Federation, algorithms, core, data, make_clients
from fl.algorithms import Algorithm
from fl.core import ClientState, Job, Message, Update
from fl.errors import UserError
from fl.storage import Tensors
from fl.wire import Wire

# Values whose bits a sum, or one with zero, would not keep: -0, the smallest and the largest numbers.
HOSTILE = torch.tensor([-0.0, 1e-45, -1e-40, 3.4028235e38, -3.4028235e38])
MIXED: list[tuple[str, core.Bits]] = [("mlp", 1), ("cnn", 2), ("mlp", "float"), ("cnn", "ternary")]


@dataclass(frozen=True, kw_only=True)
class Exact(algorithms.FedAvg):
    """FedAvg whose server takes the last client's message as it is, and whose clients send HOSTILE among their weights."""

    name: ClassVar[str] = "exact"

    def client_step(self, job: Job, client: Client, state: ClientState, broadcast: Tensors, round_index: int) -> Update:
        update = super().client_step(job, client, state, broadcast, round_index)
        assert update.message is not None
        tensors = {name: _hostile(tensor) for name, tensor in update.message.tensors.items()}
        return replace(update, message=replace(update.message, tensors=tensors))

    def server_step(self, job: Job, server: Tensors, messages: Any) -> Tensors:
        last: Message = messages[max(messages)]
        return last.tensors


def _hostile(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    if changed.is_floating_point():
        changed.view(-1)[: len(HOSTILE)] = HOSTILE[: changed.numel()]
    return changed


@dataclass(frozen=True, kw_only=True)
class Failing(algorithms.FedAvg):
    """FedAvg in which the step of client 3 fails, and before it, in the order of the draw, those of clients 2 and 1."""

    how: str

    name: ClassVar[str] = "failing"

    def client_step(self, job: Job, client: Client, state: ClientState, broadcast: Tensors, round_index: int) -> Update:
        update = super().client_step(job, client, state, broadcast, round_index)
        if client.id == 0:
            return update
        if self.how == "bug":
            raise ZeroDivisionError(f"client {client.id}, {torch.get_num_threads()} threads")
        return replace(update, loss=float("nan"))


def images() -> data.Dataset:
    """Ten classes that a small network can tell apart, made at once: each rank makes them again."""
    random = np.random.default_rng(0)
    y = np.arange(400) % 10
    x = random.random((10, 1, 8, 8))[y] + 0.3 * random.random((400, 1, 8, 8))
    return data.Dataset("blobs", x.astype(np.float32), y.astype(np.int64), 10)


def run_of(algorithm: Algorithm, **changes: Any) -> Federation:
    clients = make_clients(images(), MIXED, (4, 5), seed=3)
    speeds = changes.pop("speeds", [1.0] * 4)
    clients = [replace(client, speed=speed) for client, speed in zip(clients, speeds, strict=True)]
    return Federation(**{"algorithm": algorithm, "clients": clients, "rounds": 2, "sample": 1.0, **changes})


def cases() -> dict[str, Federation]:
    """Runs that come to their end, by name."""
    steps: Any = {"local_steps": 2, "batch_size": 8}
    unreliable = {"dropout": 0.3, "deadline": 1.1, "quorum": 0.5, "speeds": [1.0, 0.8, 1.0, 2.0], "score_every": 2}
    return {
        "quped": run_of(algorithms.QuPeD(**steps), rounds=3, sample=0.5),
        "fedavg": run_of(algorithms.FedAvg(**steps), architecture="cnn"),
        "batch_norm": run_of(algorithms.FedAvg(**steps, batch_norm="local", adapt_steps=2), architecture="cnn"),
        "one_client": run_of(algorithms.Local(**steps), sample=0.25),
        "wire": run_of(Wire(algorithms.QuPeD(**steps, variant="hard"), up_bits=2, down_bits=4)),
        "unreliable": run_of(algorithms.FML(**steps), rounds=4, **unreliable),
        "exact": run_of(Exact(**steps), rounds=1),
    }


def failures(rank: int) -> dict[str, Federation]:
    """Runs that end with an exception."""
    return {
        "diverged": run_of(Failing(how="diverged", local_steps=1)),
        "bug": run_of(Failing(how="bug", local_steps=1), threads=2),
        "another": run_of(algorithms.Local(local_steps=1), seed=rank),
        "full": run_of(algorithms.Local(local_steps=1)),
    }


def main(out: Path) -> None:
    """Every run by torchrun's ranks, the failures first: the ranks must be of use after them."""
    rank = int(os.environ["RANK"])
    told: dict[str, Any] = {}
    for name, run in (failures(rank) | cases()).items():
        try:
            result = replace(run, engine="torchrun").run(out / name)
            told[name] = [str(result.directory), result.mean_accuracy, result.evaluations]
        except Exception as error:
            told[name] = [type(error).__name__, str(error)]
    run = replace(cases()["quped"], engine="torchrun")
    rounds: list[int] = []

    def stop(done: int, record: dict[str, Any]) -> None:
        rounds.append(done)
        if done == 1:
            raise UserError("enough")

    for resume, on_round in ((False, stop), (True, None)):
        try:
            run.run(out / "resumed", resume=resume, on_round=on_round)
        except UserError as error:
            told["stopped"] = [str(error), rounds]
    told["temporary"] = str(run.run().directory)
    (out / f"rank{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
