"""The round loop in one process: one client after the other, a checkpoint after every round."""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fl.algorithms import Algorithm
from fl.checkpoint import Checkpoint, Snapshot, describe
from fl.core import Client, Job, Message, Update, payload_bytes, sample_clients
from fl.errors import DivergedError
from fl.evaluation import Score, score
from fl.result import ClientRow, RunResult, row_from_json
from fl.shipping import load_model, save_model
from fl.storage import write_atomic

OnRound = Callable[[int, dict[str, Any]], None]


def run(
    job: Job,
    algorithm: Algorithm,
    clients: Sequence[Client],
    directory: Path,
    *,
    resume: bool = False,
    threads: int = 1,
    on_round: OnRound | None = None,
) -> RunResult:
    """Run a federation to its end, or from where its checkpoint stands.

    directory: absent or empty; with resume also one that holds this experiment.  threads: torch's thread count for the
    run, restored afterwards; a resumed run takes the count it was started with, which its bits depend on.
    on_round: called with (rounds done, record) once for the state found or made, then after each round.
    Raises CheckpointError before anything is written.
    """
    checkpoint = Checkpoint(directory, describe(job, algorithm, clients))
    continued = checkpoint.check(resume)
    if continued and checkpoint.finished:
        return _load_result(algorithm, directory)
    with _thread_count(checkpoint.threads if continued else threads):
        if continued:
            snapshot = checkpoint.load()
        else:
            checkpoint.start(threads)
            snapshot = _first_snapshot(job, algorithm, clients)
            checkpoint.save(snapshot, range(len(clients)))
        notify = on_round or (lambda *_: None)
        notify(snapshot.round, snapshot.records[-1])
        while snapshot.round < job.rounds:
            snapshot = _play_round(job, algorithm, clients, snapshot)
            checkpoint.save(snapshot, snapshot.records[-1]["drawn"])
            notify(snapshot.round, snapshot.records[-1])
        result = _finish(job, algorithm, clients, snapshot, directory)
        checkpoint.finish()
    return result


@contextmanager
def _thread_count(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _first_snapshot(job: Job, algorithm: Algorithm, clients: Sequence[Client]) -> Snapshot:
    started = time.perf_counter()
    server = algorithm.start_server(job)
    states = {client.id: algorithm.start_client(job, client) for client in clients}
    scores = [score(algorithm.model(job, client, states[client.id], server), client) for client in clients]
    record = _record(algorithm.name, 0, [], scores, losses=[], evaluations={}, bytes_down=0, bytes_up=0)
    return Snapshot(0, server, states, [{**record, "seconds": time.perf_counter() - started}])


def _play_round(job: Job, algorithm: Algorithm, clients: Sequence[Client], before: Snapshot) -> Snapshot:
    """One round as a function of the snapshot before it; only the record's seconds depend on the clock."""
    started = time.perf_counter()
    drawn = sample_clients(job.seed, before.round, len(clients), job.sample)
    updates: dict[int, Update] = {}
    for number in drawn:
        state = before.clients[number]
        updates[number] = algorithm.client_step(job, clients[number], state, before.server, before.round)
        _check_finite(updates[number], f"{algorithm.name}: client {number} in round {before.round + 1}")
    messages: dict[int, Message] = {
        number: update.message for number, update in updates.items() if update.message is not None
    }
    server = algorithm.server_step(job, before.server, messages)
    states = {**before.clients, **{number: update.state for number, update in updates.items()}}
    scores = _scores(before.records[-1])
    for client in clients:
        if not algorithm.personal or client.id in updates:
            scores[client.id] = score(algorithm.model(job, client, states[client.id], server), client)
    record = _record(
        algorithm.name,
        before.round + 1,
        drawn,
        scores,
        losses=[update.loss for update in updates.values() if update.loss is not None],
        evaluations={str(number): update.evaluations for number, update in updates.items()},
        bytes_down=payload_bytes(before.server) * len(drawn),
        bytes_up=sum(payload_bytes(message.tensors) for message in messages.values()),
    )
    record["seconds"] = time.perf_counter() - started
    return Snapshot(before.round + 1, server, states, [*before.records, record])


def _check_finite(update: Update, where: str) -> None:
    """Stop a run that has diverged before its numbers reach the server or a checkpoint."""
    tensors = [*update.state.tensors.values(), *(update.message.tensors.values() if update.message else ())]
    finite = update.loss is None or math.isfinite(update.loss)
    if not finite or not all(bool(tensor.isfinite().all()) for tensor in tensors if tensor.is_floating_point()):
        raise DivergedError(f"{where}: training has diverged, its loss is {update.loss}, choose a lower rate")


def _record(
    algorithm: str,
    round_number: int,
    drawn: list[int],
    scores: Sequence[Score],
    *,
    losses: list[float],
    evaluations: dict[str, int],
    bytes_down: int,
    bytes_up: int,
) -> dict[str, Any]:
    """A round's record, its seconds excepted; report.py says what each key means."""
    tests = [one.test for one in scores]
    validations = [one.validation for one in scores]
    return {
        "algorithm": algorithm,
        "round": round_number,
        "drawn": drawn,
        "accuracy_mean": sum(tests) / len(tests),
        "accuracy_worst": min(tests),
        "accuracy": tests,
        "validation_mean": sum(validations) / len(validations),
        "validation": validations,
        "loss": sum(losses) / len(losses) if losses else None,
        "evaluations": evaluations,
        "bytes_down": bytes_down,
        "bytes_up": bytes_up,
    }


def _scores(record: dict[str, Any]) -> list[Score]:
    return [Score(test, val) for test, val in zip(record["accuracy"], record["validation"], strict=True)]


def _finish(
    job: Job, algorithm: Algorithm, clients: Sequence[Client], snapshot: Snapshot, directory: Path
) -> RunResult:
    """Let every client finish, write its model, and score the model as read back from its file."""
    started = time.perf_counter()
    models = directory / "models"
    models.mkdir(exist_ok=True)
    for leftover in models.glob(".*"):  # of a process killed while it wrote here
        leftover.unlink()
    rows = []
    for client in clients:
        update = algorithm.finish_client(job, client, snapshot.clients[client.id], snapshot.server)
        _check_finite(update, f"{algorithm.name}: client {client.id} at the end")
        path = models / f"client_{client.id:03d}.safetensors"
        architecture, bits = algorithm.shipped(job, client)
        save_model(algorithm.model(job, client, update.state, snapshot.server), bits, path)
        final = score(load_model(algorithm.factory(job, client), bits, path), client)
        spent = sum(record["evaluations"].get(str(client.id), 0) for record in snapshot.records)
        rows.append(
            ClientRow(
                client=client.id,
                classes=client.data.classes,
                architecture=architecture,
                bits=bits,
                train_samples=len(client.data.train),
                test_samples=len(client.data.test),
                accuracy=final.test,
                validation=final.validation,
                evaluations=spent + update.evaluations,
                model_file=path.relative_to(directory).as_posix(),
                model_bytes=path.stat().st_size,
            )
        )
    seconds = sum(record["seconds"] for record in snapshot.records) + time.perf_counter() - started
    result = RunResult(algorithm.name, directory, snapshot.records, rows, seconds)
    write_atomic(directory / "summary.json", json.dumps(result.summary(), indent=1).encode() + b"\n")
    return result


def _load_result(algorithm: Algorithm, directory: Path) -> RunResult:
    """The result of a run that had finished before."""
    summary = json.loads((directory / "summary.json").read_text())
    lines = (directory / "records.jsonl").read_text().splitlines()
    rows = [row_from_json(row) for row in summary["clients"]]
    return RunResult(algorithm.name, directory, [json.loads(line) for line in lines], rows, summary["seconds"])
