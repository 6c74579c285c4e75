"""One client after the other, in this process."""

from collections.abc import Mapping

from fl.engines.loop import At, Engine
from fl.engines.work import Receipt, Workplace
from fl.evaluation import Score
from fl.result import ClientRow
from fl.storage import Tensors


class Serial(Engine):
    """The engine that all others are compared with."""

    def __init__(self, place: Workplace) -> None:
        self._place = place

    def step(self, drawn: Mapping[int, At], server: Tensors, round_index: int) -> dict[int, Receipt]:
        return {number: self._place.step(number, at, server, round_index) for number, at in drawn.items()}

    def score(self, clients: Mapping[int, At], server: Tensors) -> dict[int, Score]:
        return self._place.score_all(clients, server)

    def ship(self, clients: Mapping[int, At], server: Tensors) -> dict[int, ClientRow]:
        return {number: self._place.ship(number, at, server) for number, at in clients.items()}
