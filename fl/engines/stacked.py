"""Clients of one kind trained together in this process: their models side by side, batches of all in one call.

Stacked are a round's clients that are alike in architecture, bits, groups, batch length and the form of their states; how many
data they have does not matter. What has nobody to go with is done alone, as the serial engine does it, and the round's record
says so. The results are those of the serial engine within rounding, for sums of a product are taken in another order; the same
run gives the same bits again, and a resumed one too. Models are shipped one after the other.
"""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from fl import models
from fl.algorithms import Algorithm
from fl.core import Client, ClientState, Job
from fl.engines.loop import At
from fl.engines.serial import Serial
from fl.engines.work import Receipt, Workplace
from fl.evaluation import Score
from fl.stack import widen_
from fl.storage import Tensors

ALONE = "no other client of the round is of its kind"
SCORED = 64  # clients whose states are in memory at a time while all are scored
LEFT_OVER = "the others of its kind fill their stacks"


def check(algorithm: Algorithm, job: Job, clients: Sequence[Client], size: int | None) -> None:
    """Raise ValueError, one sentence, where a run cannot be stacked."""
    if size is not None and size < 2:
        raise ValueError(f"stacked: a stack must hold at least 2 clients, got stack = {size}")
    if not algorithm.stackable:
        raise ValueError(f"stacked: {algorithm.name} takes one client at a time, use the engine 'serial'")
    for architecture in sorted({job.architecture, *(client.architecture for client in clients)}):
        widen_(models.build(architecture, job.input_shape, job.num_classes, seed=0), 2)


def plan(kinds: Mapping[int, Hashable], size: int | None) -> tuple[list[list[int]], dict[int, str]]:
    """(stacks of at most `size` clients of one kind, each ascending; why each other client is alone)."""
    alike: dict[Hashable, list[int]] = defaultdict(list)
    for number in sorted(kinds):
        alike[kinds[number]].append(number)
    stacks: list[list[int]] = []
    alone: dict[int, str] = {}
    for numbers in alike.values():
        step = size or len(numbers)
        for members in (numbers[start : start + step] for start in range(0, len(numbers), step)):
            if len(members) > 1:
                stacks.append(members)
            else:
                alone[members[0]] = ALONE if len(numbers) == 1 else LEFT_OVER
    return stacks, alone


class Stacked(Serial):
    """Steps and scores in stacks of at most `size` clients; None: of all that are alike."""

    def __init__(self, place: Workplace, size: int | None) -> None:
        super().__init__(place)
        self._size = size
        self._note: dict[str, Any] = {}

    def step(self, drawn: Mapping[int, At], server: Tensors, round_index: int) -> dict[int, Receipt]:
        place = self._place
        states = {number: place.state(number, at) for number, at in drawn.items()}
        stacks, alone = self._plan(states, self._size)
        receipts: dict[int, Receipt] = {}
        for members in stacks:
            receipts.update(place.step_together({n: states[n] for n in members}, server, round_index))
        for number in alone:
            receipts[number] = place.step(number, drawn[number], server, round_index)
        self._note = {"stacks": stacks, "alone": {str(number): reason for number, reason in alone.items()}}
        return {number: receipts[number] for number in drawn}

    def score(self, clients: Mapping[int, At], server: Tensors) -> dict[int, Score]:
        algorithm = self._place.algorithm
        if not (algorithm.personal and algorithm.stackable_model):
            return super().score(clients, server)
        scores: dict[int, Score] = {}
        size = min(self._size or SCORED, SCORED)
        waiting = list(clients)
        while waiting:
            window, waiting = waiting[:size], waiting[size:]
            states = {number: self._place.state(number, clients[number]) for number in window}
            stacks, alone = self._plan(states, size)
            for members in stacks:
                scores.update(self._place.score_together({n: states[n] for n in members}, server))
            scores.update(super().score({number: clients[number] for number in alone}, server))
        return {number: scores[number] for number in clients}

    def note(self) -> dict[str, Any]:
        return self._note

    def _plan(self, states: Mapping[int, ClientState], size: int | None) -> tuple[list[list[int]], dict[int, str]]:
        place = self._place
        return plan({n: place.algorithm.kind(place.clients[n], state) for n, state in states.items()}, size)
