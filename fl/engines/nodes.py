"""The server's side of a deployment: work is sent to whichever nodes have the clients, and asked for again where it is lost.

A client is known by its number, never by the node that has it, which gets a new name with every start. Answers are sorted by
client, so neither the order in which they arrive nor a node that was started again in between changes a bit of the run.
"""

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol

from fl.core import Job, Message
from fl.engines.loop import At, Engine
from fl.engines.node import raised
from fl.engines.work import Receipt
from fl.errors import WorkerError
from fl.evaluation import Score
from fl.result import ClientRow, row_from_json
from fl.storage import Json, Tensors

_POLL = 0.1  # seconds


@dataclass(frozen=True)
class Reply:
    """What came back for a message. answer: from engines/node.py; None where the node, not its work, has failed."""

    identity: str
    answer: Json | None
    messages: dict[int, Tensors] = field(default_factory=dict)


class Carrier(Protocol):
    """What brings messages to nodes and back; engines/flower.py has Flower's."""

    def nodes(self) -> set[int]:
        """The nodes that are there now."""
        ...

    def send(self, node: int, order: Json | None, server: Tensors) -> str:
        """Send an order for Node.answer, or None for Node.introduce; returns the message's identity."""
        ...

    def receive(self, identities: Sequence[str]) -> list[Reply]:
        """The replies to these messages that have arrived since."""
        ...


Answers = dict[int, tuple[Json, Tensors | None]]


class Nodes(Engine):
    """An engine whose clients are on nodes.

    patience: seconds without any answer, or without a node for a client, after which a round fails.  job: to be set before
    the first round; a deployment learns its task's shape from the nodes.
    """

    def __init__(self, carrier: Carrier, patience: float, job: Job | None = None) -> None:
        self._carrier, self._patience, self.job = carrier, patience, job
        self._known: dict[int, dict[int, Json]] = {}  # node -> its clients; a node met later has the last word
        self._asked: dict[str, int] = {}  # query under way -> node
        self._refusal = ""  # what a node said last that cannot take part

    def gather(self, count: int) -> dict[int, Json]:
        """Wait for nodes that together have clients 0 to count - 1; what each says of itself, by client."""
        since = time.monotonic()
        while set(range(count)) - set(homes := self._homes()):
            self._meet()
            self._hear({}, {})
            if time.monotonic() - since > self._patience:
                self._give_up(sorted(set(range(count)) - set(homes)))
            time.sleep(_POLL)
        return {number: self._known[homes[number]][number] for number in range(count)}

    def step(self, drawn: Mapping[int, At], server: Tensors, round_index: int) -> dict[int, Receipt]:
        return {
            number: Receipt(
                Message(tensors, answer["samples"]) if tensors is not None else None,
                answer["evaluations"],
                answer["loss"],
                answer["kept"],
            )
            for number, (answer, tensors) in self._do("step", drawn, server, round_index).items()
        }

    def score(self, clients: Mapping[int, At], server: Tensors) -> dict[int, Score]:
        return {number: Score(**answer) for number, (answer, _) in self._do("score", clients, server, 0).items()}

    def ship(self, clients: Mapping[int, At], server: Tensors) -> dict[int, ClientRow]:
        return {number: row_from_json(answer) for number, (answer, _) in self._do("ship", clients, server, 0).items()}

    def _do(self, verb: str, clients: Mapping[int, At], server: Tensors, round_index: int) -> Answers:
        """Every client's answer, in the order given, whichever node brought it and when."""
        answers: Answers = {}
        waiting: dict[str, tuple[int, list[int]]] = {}  # message under way -> node, clients
        heard = time.monotonic()
        assert self.job is not None
        while len(answers) < len(clients):
            self._meet()
            homes = self._homes()
            asked = {(number, node) for node, numbers in waiting.values() for number in numbers}
            todo: dict[int, list[int]] = {}
            for number in clients:
                if number not in answers and number in homes and (number, homes[number]) not in asked:
                    todo.setdefault(homes[number], []).append(number)
            for node, numbers in todo.items():
                order = {"verb": verb, "round": round_index, "job": asdict(self.job)}
                order["at"] = {number: clients[number] for number in numbers}
                waiting[self._carrier.send(node, order, server)] = (node, numbers)
            if self._hear(waiting, answers):
                heard = time.monotonic()
            elif time.monotonic() - heard > self._patience:
                self._give_up(sorted(set(clients) - set(answers)))
            elif len(answers) < len(clients):
                time.sleep(_POLL)
        return {number: answers[number] for number in clients}

    def _homes(self) -> dict[int, int]:
        return {number: node for node, clients in self._known.items() for number in clients}

    def _meet(self) -> None:
        """Forget nodes that are gone, and ask new ones for their clients."""
        present = set(self._carrier.nodes())
        self._known = {node: clients for node, clients in self._known.items() if node in present}
        self._asked = {query: node for query, node in self._asked.items() if node in present}
        for node in sorted(present - set(self._known) - set(self._asked.values())):
            self._asked[self._carrier.send(node, None, {})] = node

    def _hear(self, waiting: dict[str, tuple[int, list[int]]], answers: Answers) -> bool:
        """Take in what has arrived; whether anything had. Raises what went wrong in a client's work."""
        replies = self._carrier.receive([*self._asked, *waiting])
        for reply in replies:
            queried = reply.identity in self._asked
            node = self._asked.pop(reply.identity) if queried else waiting.pop(reply.identity)[0]
            if reply.answer is None:  # it has gone, or its process died: it is met anew
                self._known.pop(node, None)
            elif "error" in reply.answer and queried:  # its own affair: others may have its clients
                self._known[node], self._refusal = {}, str(raised(reply.answer))
                warnings.warn(f"nodes: a node cannot take part: {self._refusal}", stacklevel=2)
            elif "error" in reply.answer:
                raise raised(reply.answer)
            elif queried:
                self._known[node] = {int(number): said for number, said in reply.answer.items()}
            else:
                for number, answer in reply.answer.items():
                    answers.setdefault(int(number), (answer, reply.messages.get(int(number))))
        return bool(replies)

    def _give_up(self, missing: Sequence[int]) -> None:
        names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        said = f" (one said: {self._refusal})" if self._refusal else ""
        raise WorkerError(
            f"nodes: no node has answered for clients {names} in {self._patience:.0f} s{said}; "
            f"start it again (`python -m fl join`), then continue with --resume"
        )
