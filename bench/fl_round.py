"""A federated round: what an engine adds to its clients' own training, and to a plain loop tuned by hand.

The plain loop is FedAvg as one would write it for speed alone: one resident model, its optimizer as foreach ops, no files, no
scores, nothing that a kill would not lose. It must arrive at the engine's global model before it gets a time.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fl import Client, Federation, algorithms, models
from fl.algorithms import Algorithm
from fl.algorithms._base import global_model
from fl.checkpoint import Checkpoint, Snapshot
from fl.core import Bits, training_batches
from fl.data import ClientData, Part
from fl.engines import loop
from fl.engines.pool import cores
from fl.storage import Tensors

from . import machine
from .records import Row
from .tables import Column, Table
from .targets import at_most
from .timing import percentiles

CLIENTS, STEPS, BATCH, SAMPLES = 50, 10, 32, 64
TITLES = {"CNN": ("cnn", (1, 8, 8)), "CNN2": ("cnn2", (1, 14, 14)), "MLP": ("mlp", (1, 8, 8))}
NAMES = tuple(TITLES)
QUICK = ("MLP",)
LEVELS = (4,)  # centers of QuPeD's clients
ROUNDS = 5
VARIANTS = ("simultaneous", "alternating", "hard")


@dataclass
class Clock:
    """Seconds spent in clients' own training and in scores, since the last reset; both of this process."""

    training: float = 0.0
    scores: float = 0.0


def _clients(name: str, bits: Bits, count: int) -> list[Client]:
    architecture, shape = TITLES[name]
    draw = torch.Generator().manual_seed(0)

    def part(samples: int) -> Part:
        return Part(torch.randn(samples, *shape, generator=draw), torch.randint(10, (samples,), generator=draw))

    data = [ClientData(tuple(range(10)), part(SAMPLES), part(8), part(24)) for _ in range(count)]
    return [Client(number, architecture, bits, held) for number, held in enumerate(data)]


def _federation(name: str, algorithm: Algorithm, bits: Bits, count: int, threads: int) -> Federation:
    return Federation(
        algorithm=algorithm,
        clients=_clients(name, bits, count),
        rounds=1000,
        sample=1.0,
        architecture=TITLES[name][0],
        threads=threads,
    )


@contextmanager
def _engine_round(run: Federation, clock: Clock) -> Iterator[tuple[Callable[[], None], list[Snapshot]]]:
    """A function that plays the next round and writes its checkpoint, as a run does; and the snapshots it has made.

    Clients' training and scores add up in the clock where they are taken in this process.
    """
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-fl-")))
        checkpoint = Checkpoint(directory, run._description())
        checkpoint.start(run.threads)
        timed = replace(run, algorithm=_timed(run.algorithm, clock)) if run.engine != "pool" else run
        engine = stack.enter_context(timed._opener(directory)(run.threads))
        if run.engine != "pool":
            engine.score = _adding(engine.score, clock, "scores")  # type: ignore[method-assign]
        count = len(run.clients)
        done = [loop._first_snapshot(run.job, run.algorithm, count, engine)]

        def play() -> None:
            done.append(loop.play_round(run.job, run.algorithm, count, engine, done[-1]))
            checkpoint.save(done[-1])

        yield play, done


def _timed(algorithm: Algorithm, clock: Clock) -> Algorithm:
    copy = replace(algorithm)  # type: ignore[type-var]
    for name in ("client_step", "stack_step"):
        object.__setattr__(copy, name, _adding(getattr(algorithm, name), clock, "training"))
    return copy


def _adding(function: Callable[..., Any], clock: Clock, name: str) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        started = time.perf_counter()
        result = function(*arguments)
        setattr(clock, name, getattr(clock, name) + time.perf_counter() - started)
        return result

    return timed


class PlainLoop:
    """FedAvg on one resident model, with momentum SGD as foreach ops and the mean summed as clients finish."""

    def __init__(self, run: Federation, algorithm: algorithms.FedAvg) -> None:
        self._run, self._algorithm, self._round = run, algorithm, 0
        self._model = global_model(run.job).train()
        self._params: list[torch.Tensor] = list(self._model.parameters())
        self._floats = [t for t in self._model.state_dict().values() if t.is_floating_point()]
        self._server = [tensor.clone() for tensor in self._floats]
        self._velocity = [torch.zeros_like(parameter) for parameter in self._params]

    def __call__(self) -> None:
        total = [torch.zeros_like(tensor) for tensor in self._server]
        for client in self._run.clients:
            self._train(client)
            torch._foreach_add_(total, self._floats, alpha=1 / len(self._run.clients))
        self._server = total
        self._round += 1

    def _train(self, client: Client) -> None:
        algorithm = self._algorithm
        torch._foreach_copy_(self._floats, self._server)
        torch._foreach_zero_(self._velocity)
        for x, y in training_batches(self._run.job, client, BATCH, STEPS, self._round):
            gradients = torch.autograd.grad(F.cross_entropy(self._model(x), y), self._params)
            with torch.no_grad():
                torch._foreach_mul_(self._velocity, algorithm.momentum)
                torch._foreach_add_(self._velocity, gradients)
                torch._foreach_add_(self._params, self._velocity, alpha=-algorithm.rate)

    def check(self, server: Tensors) -> None:
        """RuntimeError unless the engine's global model is the loop's, up to the rounding of a few training steps."""
        floats = [tensor for tensor in server.values() if tensor.is_floating_point()]
        for ours, theirs in zip(floats, self._server, strict=True):
            if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4):
                raise RuntimeError(f"plain loop: its global model is off by {float((ours - theirs).abs().max()):.2g}")


def measure(name: str, levels: int, *, rounds: int, threads: int, count: int) -> Row:
    """One row: every candidate plays its next round in turns."""
    torch.set_num_threads(threads)
    bits = (levels - 1).bit_length()
    fedavg = algorithms.FedAvg(local_steps=STEPS, batch_size=BATCH, decay_at=1.0)
    runs = {"FedAvg": _federation(name, fedavg, "float", count, threads)}
    for variant in VARIANTS:
        quped = algorithms.QuPeD(local_steps=STEPS, batch_size=BATCH, freeze_at=1.0, variant=variant)
        runs[f"QuPeD {variant}"] = _federation(name, quped, bits, count, threads)
    plain = PlainLoop(runs["FedAvg"], fedavg)
    for key in ("FedAvg", "QuPeD simultaneous"):
        runs[f"stacked {key}"] = replace(runs[key], engine="stacked")
    if cores() > 1:
        runs[f"pool {cores()}"] = replace(runs["FedAvg"], engine="pool", workers=cores())
    samples: dict[str, list[float]] = {}
    with ExitStack() as stack:
        clocks = {key: Clock() for key in runs}
        plays = {key: stack.enter_context(_engine_round(run, clocks[key])) for key, run in runs.items()}
        for turn in range(rounds + 1):
            started = time.perf_counter()
            plain()
            _note(samples, "plain loop", time.perf_counter() - started, turn)
            for key, (play, done) in plays.items():
                clock = clocks[key]
                clock.training = clock.scores = 0.0
                started = time.perf_counter()
                play()
                total = time.perf_counter() - started
                _note(samples, key, total, turn)
                if clock.training:
                    _note(samples, f"{key}: less scores", total - clock.scores, turn)
                    _note(samples, f"{key}: scores", clock.scores, turn)
                    _note(samples, f"{key}: engine", total - clock.training - clock.scores, turn)
                if key in ("FedAvg", "stacked FedAvg") and turn == 0:
                    plain.check(done[-1].server)
    parameters = sum(p.numel() for p in models.build(*TITLES[name], 10, 0).parameters())
    return Row(
        bench="fl",
        name=name,
        title=f"{name} of {parameters / 1000:.1f}k, K = {count}, {STEPS} x {BATCH}, {threads} thread{'s'[: threads > 1]}",
        m=levels,
        dtype="float32",
        variant="",
        bytes=sum(tensor.nbytes for tensor in plain._server) * count,
        time_us_p20_p50_p80={key: percentiles(values).rounded() for key, values in samples.items()},
        machine=machine.description(),
    )


def _note(samples: dict[str, list[float]], key: str, seconds: float, turn: int) -> None:
    if turn:  # the first round allocates and loads
        samples.setdefault(key, []).append(1e6 * seconds)


def rows(
    names: Sequence[str], levels: Sequence[int], *, rounds: int, threads: int | None, compiled: bool
) -> Iterator[Row]:
    count = CLIENTS if rounds > 2 else 4
    for name in names:
        for m in levels:
            yield measure(name, m, rounds=rounds, threads=threads or 1, count=count)


class _Every(dict[Any, Any]):
    """The same target for every case, or for those of one network."""

    def __init__(self, target: Any, name: str = "") -> None:
        super().__init__()
        self._target, self._name = target, name

    def get(self, key: Any, default: Any = None) -> Any:
        return self._target if key[0].startswith(self._name) else default


TABLES = [
    Table(
        "A federated round",
        "plain loop: FedAvg on one resident model with foreach ops, no files, no scores. FedAvg, QuPeD: the serial engine's "
        "round, with scores and checkpoint; simultaneous, alternating, hard: QuPeD's. stacked: all clients as one stack. engine: "
        "a round less its clients' training and less scores; scores: every client's test and validation accuracy under the new "
        "global model, which the plain loop does not take and both ratios to it leave out. In brackets the targets.",
        [
            Column("plain loop", "plain loop"),
            Column("FedAvg", "FedAvg"),
            Column("FedAvg / plain", "FedAvg: less scores", "plain loop", _Every(at_most(1.0)[0])),
            Column("FedAvg engine", "FedAvg: engine", "FedAvg", _Every(at_most(0.03)[0]), percent=True),
            Column("FedAvg scores", "FedAvg: scores", "FedAvg", percent=True),
            Column(
                "QuPeD engine",
                "QuPeD simultaneous: engine",
                "QuPeD simultaneous",
                _Every(at_most(0.03)[0]),
                percent=True,
            ),
            Column("QuPeD scores", "QuPeD simultaneous: scores", "QuPeD simultaneous", percent=True),
            Column("pool 2 / FedAvg", "pool 2", "FedAvg"),
            Column("stacked / plain", "stacked FedAvg: less scores", "plain loop", _Every(at_most(0.33)[0], "MLP")),
            Column("stacked QuPeD / QuPeD", "stacked QuPeD simultaneous", "QuPeD simultaneous"),
            Column("simultaneous / FedAvg", "QuPeD simultaneous", "FedAvg"),
            Column("alternating / FedAvg", "QuPeD alternating", "FedAvg", _Every(at_most(4.3)[0])),
            Column("hard / FedAvg", "QuPeD hard", "FedAvg", _Every(at_most(3.2)[0])),
            Column("stacked simultaneous / stacked FedAvg", "stacked QuPeD simultaneous", "stacked FedAvg"),
        ],
    )
]
