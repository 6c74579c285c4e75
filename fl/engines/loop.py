"""The round loop, whoever does the clients' work: draw, step, average, score, and a checkpoint after every round."""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

from fl.algorithms import Algorithm
from fl.checkpoint import Checkpoint, Snapshot
from fl.cohort import Cohort, draw_cohort
from fl.core import Job, float32_bytes, payload_bytes
from fl.engines.work import Receipt
from fl.errors import CheckpointError
from fl.evaluation import Score
from fl.result import ClientRow, RunResult, row_from_json
from fl.storage import Json, Tensors, write_atomic

OnRound = Callable[[int, dict[str, Any]], None]
At: TypeAlias = int | None  # the round whose file holds a client's state; None: it has not been drawn yet


class Engine(ABC):
    """Does the work of many clients, each as engines/work.py says. Results are by client, in the order that was given."""

    @abstractmethod
    def step(self, drawn: Mapping[int, At], server: Tensors, round_index: int) -> dict[int, Receipt]:
        """One round of the drawn clients; their new states are in their files when it returns."""

    @abstractmethod
    def score(self, clients: Mapping[int, At], server: Tensors) -> dict[int, Score]:
        """The accuracies of the models that these clients would ship now."""

    @abstractmethod
    def ship(self, clients: Mapping[int, At], server: Tensors) -> dict[int, ClientRow]:
        """What clients do once at the end, their models written and scored; evaluations: those of the end alone."""

    def note(self) -> dict[str, Any]:
        """What the last step adds to the round's record."""
        return {}


class Dispatcher(Engine):
    """An engine whose work is done in other processes, one verb for all clients of an order at a time (Workplace.answer)."""

    def step(self, drawn: Mapping[int, At], server: Tensors, round_index: int) -> dict[int, Receipt]:
        answers = self._do("step", drawn, server, round_index)
        return {number: Receipt.unpacked(*answer) for number, answer in answers.items()}

    def score(self, clients: Mapping[int, At], server: Tensors) -> dict[int, Score]:
        return self._do("score", clients, server)

    def ship(self, clients: Mapping[int, At], server: Tensors) -> dict[int, ClientRow]:
        return self._do("ship", clients, server)

    @abstractmethod
    def _do(self, verb: str, clients: Mapping[int, At], server: Tensors, round_index: int = 0) -> dict[int, Any]:
        """Every client's answer, in the order given."""


OpenEngine = Callable[[int], AbstractContextManager[Engine]]  # given torch's thread count


def run(
    job: Job,
    algorithm: Algorithm,
    count: int,
    description: Json,
    directory: Path,
    open_engine: OpenEngine,
    *,
    resume: bool = False,
    threads: int = 1,
    on_round: OnRound | None = None,
) -> RunResult:
    """Run a federation of `count` clients to its end, or from where its checkpoint stands.

    description: of the experiment, from checkpoint.describe.  directory: absent or empty; with resume also one that holds
    this experiment.  threads: torch's thread count for the run, restored afterwards; a resumed run takes the count it was
    started with, which its bits depend on.  on_round: called with (rounds done, record) once for the state found or made,
    then after each round.  Raises CheckpointError before anything is written.
    """
    checkpoint = Checkpoint(directory, description)
    continued = checkpoint.check(resume)
    if continued and checkpoint.finished:
        return load_result(algorithm, directory)
    threads = checkpoint.threads if continued else threads
    with checkpoint.held(), thread_count(threads):
        snapshot = checkpoint.load() if continued else None
        if snapshot is None:
            checkpoint.start(threads)
        with open_engine(threads) as engine:
            if snapshot is None:
                snapshot = _first_snapshot(job, algorithm, count, engine)
                checkpoint.save(snapshot)
            notify = on_round or (lambda *_: None)
            notify(snapshot.round, snapshot.records[-1])
            while snapshot.round < job.rounds:
                snapshot = play_round(job, algorithm, count, engine, snapshot)
                checkpoint.save(snapshot)
                notify(snapshot.round, snapshot.records[-1])
            result = finish(job, algorithm, count, engine, snapshot, directory)
            checkpoint.finish()
    return result


@contextmanager
def thread_count(threads: int) -> Iterator[None]:
    """torch with that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _first_snapshot(job: Job, algorithm: Algorithm, count: int, engine: Engine) -> Snapshot:
    started = time.perf_counter()
    server = algorithm.start_server(job)
    scores = engine.score(dict.fromkeys(range(count)), algorithm.broadcast(job, server))
    record = _record(algorithm.name, 0, Cohort([], [], []), list(scores.values()), {}, Traffic(0, {}, 0))
    return Snapshot(0, server, {}, [{**record, "seconds": time.perf_counter() - started}])


def play_round(job: Job, algorithm: Algorithm, count: int, engine: Engine, before: Snapshot) -> Snapshot:
    """One round as a function of the snapshot before it; only the record's seconds depend on the clock."""
    started = time.perf_counter()
    cohort, sent = draw_cohort(job, before.round, count), algorithm.broadcast(job, before.server)
    receipts = engine.step({number: before.clients.get(number) for number in cohort.working}, sent, before.round)
    messages = {number: receipt.message for number, receipt in receipts.items() if receipt.message is not None}
    server = before.server
    if cohort.enough(job.quorum):
        counted = {number: messages[number] for number in cohort.punctual if number in messages}
        server = algorithm.server_step(job, before.server, counted)
    written = [number for number, receipt in receipts.items() if receipt.kept]
    states = {**before.clients, **dict.fromkeys(written, before.round + 1)}
    scores = _scores(before.records[-1])
    changed = _to_score(job, algorithm, count, before, cohort)
    if changed:
        now = {number: states.get(number) for number in changed}
        for number, score in engine.score(now, algorithm.broadcast(job, server)).items():
            scores[number] = score
    up = {number: payload_bytes(message.tensors) for number, message in messages.items()}
    traffic = Traffic(payload_bytes(sent), up, float32_bytes(before.server))
    record = _record(algorithm.name, before.round + 1, cohort, scores, receipts, traffic)
    scored = _is_scored(job, before.round + 1)
    record |= {"aggregated": cohort.enough(job.quorum), "scored": scored, **engine.note()}
    record["seconds"] = time.perf_counter() - started
    return Snapshot(before.round + 1, server, states, [*before.records, record])


def _is_scored(job: Job, round_number: int) -> bool:
    return round_number % job.score_every == 0 or round_number == job.rounds


def _to_score(job: Job, algorithm: Algorithm, count: int, before: Snapshot, cohort: Cohort) -> Sequence[int]:
    """Whose accuracies a round's record needs anew: none between scorings, else all who trained since the last one."""
    if not _is_scored(job, before.round + 1):
        return []
    if not algorithm.personal:
        return range(count)
    since = before.records[len(before.records) - before.round % job.score_every :]
    trained = {number for record in since for number in record["drawn"] if number not in record["failed"]}
    return sorted(trained.union(cohort.working))


@dataclass(frozen=True)
class Traffic:
    """Bytes of a round: to each drawn client, from each that sent, and what either would be with floats in 32 bits."""

    down: int
    up: dict[int, int]
    float32: int


def _record(
    algorithm: str,
    round_number: int,
    cohort: Cohort,
    scores: Sequence[Score],
    receipts: Mapping[int, Receipt],
    traffic: Traffic,
) -> dict[str, Any]:
    """A round's record, its seconds excepted; report.py says what each key means."""
    tests = [one.test for one in scores]
    validations = [one.validation for one in scores]
    losses = [receipt.loss for receipt in receipts.values() if receipt.loss is not None]
    return {
        "algorithm": algorithm,
        "round": round_number,
        "drawn": cohort.drawn,
        "failed": cohort.failed,
        "late": cohort.late,
        "accuracy_mean": sum(tests) / len(tests),
        "accuracy_worst": min(tests),
        "accuracy": tests,
        "validation_mean": sum(validations) / len(validations),
        "validation": validations,
        "loss": sum(losses) / len(losses) if losses else None,
        "evaluations": {str(number): receipt.evaluations for number, receipt in receipts.items()},
        "bytes_down": traffic.down * len(cohort.drawn),
        "bytes_up": sum(traffic.up.values()),
        "bytes_down_float32": traffic.float32 * len(cohort.drawn),
        "bytes_up_float32": traffic.float32 * len(traffic.up),
        "bytes_by_client": {str(number): [traffic.down, traffic.up.get(number, 0)] for number in cohort.drawn},
    }


def _scores(record: dict[str, Any]) -> list[Score]:
    return [Score(test, val) for test, val in zip(record["accuracy"], record["validation"], strict=True)]


def finish(
    job: Job, algorithm: Algorithm, count: int, engine: Engine, snapshot: Snapshot, directory: Path
) -> RunResult:
    """Let every client finish and write its model; the summary is written last."""
    started = time.perf_counter()
    models = directory / "models"
    models.mkdir(exist_ok=True)
    for leftover in models.glob(".*"):  # of a process killed while it wrote here
        leftover.unlink(missing_ok=True)  # its last worker may be renaming it
    sent = algorithm.broadcast(job, snapshot.server)
    rows = engine.ship({number: snapshot.clients.get(number) for number in range(count)}, sent)
    spent = dict.fromkeys(rows, 0)
    for record in snapshot.records:
        for number, evaluations in record["evaluations"].items():
            spent[int(number)] += evaluations
    totals = [replace(row, evaluations=row.evaluations + spent[number]) for number, row in rows.items()]
    seconds = sum(record["seconds"] for record in snapshot.records) + time.perf_counter() - started
    result = RunResult(algorithm.name, directory, snapshot.records, totals, seconds)
    write_atomic(directory / "summary.json", json.dumps(result.summary(), indent=1).encode() + b"\n")
    return result


def load_result(algorithm: Algorithm, directory: Path) -> RunResult:
    """The result of a run that had finished before. Raises CheckpointError where its summary or records are damaged."""
    try:
        summary = json.loads((directory / "summary.json").read_text())
        lines = (directory / "records.jsonl").read_text().splitlines()
        rows = [row_from_json(row) for row in summary["clients"]]
        return RunResult(algorithm.name, directory, [json.loads(line) for line in lines], rows, summary["seconds"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"run: {directory} has finished, and its results cannot be read ({type(error).__name__}: {error}), "
            f"start again with another --out"
        ) from error
