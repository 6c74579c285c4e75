"""The processes that torchrun starts, on one machine or on several, each with its share of the clients; the serial engine's bits.

    torchrun --nproc-per-node 2 -m fl run CONFIG --engine torchrun --out DIR

Every process, a rank, runs the same program on the same data. Rank 0 runs the rounds: it draws, averages, writes the
checkpoint and speaks. The others do what it orders: of an order's clients rank r of R has numbers r, r + R, r + 2 R, ... in the
order of the draw, however quick it is.

An order and the global model are broadcast, and what the clients send is gathered as bytes: rank 0 makes the one server step, in
the order of clients, as every engine does. An all-reduce of floats would add in an order that changes with the number of
ranks, and turn -0 into 0; an all-gather would carry every message to ranks that need none.

All ranks must see the run's directory: several machines need a file system that they share. A rank that ends takes the run with
it; every engine of these bits goes on from its checkpoint, and `torchrun --max-restarts 3 ... --resume` does so by itself.

With the device "cuda", or "auto" where there is a GPU, rank r of a machine takes its r-th GPU, and NCCL carries the bytes; on
the CPU gloo does. No GPU has run it yet: neither tested there nor measured.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from fl.engines.loop import At, Dispatcher, Engine, OpenEngine, thread_count
from fl.engines.ranks import Ranks
from fl.engines.work import Workplace
from fl.errors import ConfigError, UserError, WorkerError
from fl.storage import Json, Tensors, tensors_from_bytes, tensors_to_bytes

Share = tuple[dict[int, Any], tuple[int, Exception] | None]  # answers by client, and the first whose work has failed


@dataclass(frozen=True)
class Opening:
    """The first word of a run that has work left."""

    directory: Path
    threads: int
    description: Json


@dataclass(frozen=True)
class Order:
    """Work on some clients, each with the round of its state, as loop.Engine has it."""

    verb: str
    clients: dict[int, At]
    server: bytes
    round_index: int


@dataclass(frozen=True)
class Ending:
    """The last word. directory: of the finished run; None: it has failed."""

    directory: Path | None


def follow(ranks: Ranks, place_in: Callable[[Path], Workplace], description: Json) -> Path:
    """On every rank but 0: do its share of each order, until the run has ended. Returns the run's directory.

    Raises WorkerError where the run has failed: rank 0 knows why.
    """
    heard = ranks.tell()
    if isinstance(heard, Opening):
        ranks.collect(_objection(ranks, heard, description))
        place = place_in(heard.directory)
        with thread_count(heard.threads):
            while isinstance(heard := ranks.tell(), Order):
                # clones: memory aligned as torch's own is, which the last bits of a product may depend on
                server = {name: tensor.clone() for name, tensor in tensors_from_bytes(heard.server).items()}
                ranks.collect(_share(place, ranks, heard, server))
    if heard.directory is None:
        raise WorkerError("torchrun: rank 0 has ended the run, and says why")
    return heard.directory


def _objection(ranks: Ranks, opening: Opening, description: Json) -> UserError | None:
    """Why this rank cannot take part."""
    if opening.description != description:
        problem = "has another experiment than rank 0, give every rank the same configuration, options and data"
    elif not (opening.directory / "run.json").is_file():
        problem = f"does not see rank 0's {opening.directory}, choose an --out on a file system that all machines share"
    else:
        return None
    return ConfigError(f"torchrun: rank {ranks.rank} {problem}")


def _share(place: Workplace, ranks: Ranks, order: Order, server: Tensors) -> Share:
    """This rank's part of an order."""
    mine = dict(islice(order.clients.items(), ranks.rank, None, ranks.size))
    answers: dict[int, Any] = {}
    try:
        if order.verb == "score":
            answers.update(place.score_all(mine, server))
        else:
            for number, at in mine.items():
                answers[number] = place.answer(order.verb, number, at, server, order.round_index)
    except Exception as error:
        return {}, (next(number for number in mine if number not in answers), error)
    return answers, None


class Leader(Dispatcher):
    """The engine of rank 0, who does its share as the others do; made by `leading`."""

    def __init__(self, ranks: Ranks, place: Workplace) -> None:
        self._ranks, self._place = ranks, place
        self._under_way = False  # whether the others owe an answer, and would take no other word

    def open(self, opening: Opening) -> None:
        for objection in self._ask(opening, lambda: None):
            if objection is not None:
                raise objection

    def _do(self, verb: str, clients: Mapping[int, At], server: Tensors, round_index: int = 0) -> dict[int, Any]:
        """Every client's answer, in the order given. Raises what the first client's work raised that has failed."""
        order = Order(verb, dict(clients), tensors_to_bytes(server), round_index)
        answers: dict[int, Any] = {}
        failures: dict[int, Exception] = {}
        for done, failure in self._ask(order, lambda: _share(self._place, self._ranks, order, server)):
            answers.update(done)
            failures.update([failure] if failure else [])
        for number in clients:
            if number in failures:
                raise failures[number]
        return {number: answers[number] for number in clients}

    def _ask(self, word: Opening | Order, own: Callable[[], Any]) -> list[Any]:
        self._under_way = True
        self._ranks.tell(word)
        answers = self._ranks.collect(own())
        self._under_way = False
        return answers

    def end(self, directory: Path | None) -> None:
        if not self._under_way:
            with suppress(WorkerError):  # they have ended before
                self._ranks.tell(Ending(directory))


@contextmanager
def leading(ranks: Ranks, place: Workplace, description: Json, directory: Path) -> Iterator[OpenEngine]:
    """On rank 0: opens the engine of a run; however the run ends, the others hear of it."""
    leader = Leader(ranks, place)
    finished = None

    @contextmanager
    def open_engine(threads: int) -> Iterator[Engine]:
        leader.open(Opening(directory.resolve(), threads, description))
        yield leader

    try:
        yield open_engine
        finished = directory.resolve()
    finally:
        leader.end(finished)
