"""What is done to one client, in whichever process: a local step, its accuracy, the model it ships. Its state lies in a file.

A client's state is named by the round that wrote it: `client_007.12.safetensors`; a client that has not been drawn yet has
no file, its state is what the algorithm starts it with. A step writes a new file and touches no other, so it may be done
again, by anyone, after a crash. At most the states of one round's clients are in memory.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from fl import devices
from fl.algorithms import Algorithm
from fl.core import CPU, Client, ClientState, Job, Message, Update, state_file
from fl.errors import DivergedError
from fl.evaluation import Score, accuracy, score, stack_scores
from fl.result import ClientRow
from fl.shipping import load_model, save_model
from fl.stack import join_states, make_stack, spread
from fl.storage import Tensors, tensors_from_bytes, tensors_to_bytes

T = TypeVar("T")


@dataclass(frozen=True)
class Receipt:
    """What a client's step leaves beside its state: its message (None: nothing travels), and what it spent.

    kept: whether the step has written a state; one that gives back the state it was given has not.
    """

    message: Message | None
    evaluations: int
    loss: float | None
    kept: bool = True

    def packed(self) -> tuple[Any, ...]:
        """For another process: plain data and bytes, as tensors would be pickled one by one, or as files that die with it."""
        message = self.message
        sent = None if message is None else (tensors_to_bytes(message.tensors), message.samples)
        return sent, self.evaluations, self.loss, self.kept

    @classmethod
    def unpacked(cls, sent: tuple[bytes, int] | None, evaluations: int, loss: float | None, kept: bool) -> "Receipt":
        """The receipt that `packed` took apart."""
        message = None if sent is None else Message(tensors_from_bytes(sent[0]), sent[1])
        return cls(message, evaluations, loss, kept)


def model_file(number: int) -> str:
    """The name of the file of the model that a client ships."""
    return f"client_{number:03d}.safetensors"


class Workplace:
    """The work on those clients whose data is here, and whose states and models lie under a directory.

    states: where else the states lie.
    """

    def __init__(
        self,
        job: Job,
        algorithm: Algorithm,
        clients: Mapping[int, Client],
        directory: Path,
        states: Path | None = None,
    ) -> None:
        self.job, self.algorithm, self.clients = job, algorithm, clients
        self.states, self.models = states or directory / "state", directory / "models"
        self._recent: dict[int, tuple[int, ClientState]] = {}  # this round's new states: round, state

    def state(self, number: int, at: int | None) -> ClientState:
        """A client's state after round `at`; None: as it starts."""
        if at is None:
            return self.algorithm.start_client(self.job, self.clients[number])
        kept, state = self._recent.get(number, (None, None))
        return state if state is not None and kept == at else ClientState.load(self.states / state_file(number, at))

    def step(self, number: int, at: int | None, server: Tensors, round_index: int) -> Receipt:
        """A drawn client's round, from its state after round `at`; its state after this one goes to its file.

        The file outlasts this process; what makes the round count must first make it durable.
        """
        self._forget(round_index)
        state = self.state(number, at)
        update = devices.visit(self.algorithm.client_step, self.job, self.clients[number], state, server, round_index)
        return self._keep(number, state, update, round_index)

    def step_together(self, states: Mapping[int, ClientState], server: Tensors, round_index: int) -> dict[int, Receipt]:
        """`step` of two or more clients of one kind, as one stack, from these states."""
        self._forget(round_index)
        clients = [self.clients[number] for number in states]
        updates = self.algorithm.stack_step(self.job, clients, list(states.values()), server, round_index)
        return {
            number: self._keep(number, state, update, round_index)
            for (number, state), update in zip(states.items(), updates, strict=True)
        }

    def _forget(self, round_index: int) -> None:
        """Drop the states of earlier rounds."""
        if any(kept != round_index + 1 for kept, _ in self._recent.values()):
            self._recent.clear()

    def _keep(self, number: int, before: ClientState, update: Update, round_index: int) -> Receipt:
        """Write a client's new state to its file, if it is one."""
        _check_finite(update, f"{self.algorithm.name}: client {number} in round {round_index + 1}")
        kept = not _same(update.state, before)
        if kept:
            update.state.save(self.states / state_file(number, round_index + 1))
            self._recent[number] = (round_index + 1, update.state)
        return Receipt(update.message, update.evaluations, update.loss, kept)

    def keep(self, number: int, *rounds: int | None) -> None:
        """Delete a client's states of all other rounds: where no checkpoint does, the last two are kept."""
        kept = {state_file(number, at) for at in rounds if at is not None}
        for path in self.states.glob(f"client_{number:03d}.*"):
            if path.name not in kept:
                path.unlink(missing_ok=True)

    def answer(self, verb: str, number: int, at: int | None, server: Tensors, round_index: int) -> Any:
        """`step`, `score` or `ship` of a client, for another process: a step's receipt is packed."""
        if verb == "step":
            return self.step(number, at, server, round_index).packed()
        return self.score(number, at, server) if verb == "score" else self.ship(number, at, server)

    def score(self, number: int, at: int | None, server: Tensors) -> Score:
        """The accuracies of the model that the client would ship now."""
        client = self.clients[number]
        return self._of_model(lambda model: score(model, client), client, self.state(number, at), server)

    def score_all(self, clients: Mapping[int, int | None], server: Tensors) -> dict[int, Score]:
        """`score` of each client; where all ship the server's model, it is made once."""
        if self.algorithm.personal or not clients:
            return {number: self.score(number, at, server) for number, at in clients.items()}
        number, at = next(iter(clients.items()))
        return self._of_model(
            lambda model: {number: score(model, self.clients[number]) for number in clients},
            self.clients[number], self.state(number, at), server,
        )  # fmt: skip

    def score_together(self, states: Mapping[int, ClientState], server: Tensors) -> dict[int, Score]:
        """`score` of two or more clients of one kind, as one stack, in these states."""
        stack = make_stack([self.clients[number] for number in states])
        given = join_states(list(states.values())), spread(server, stack.size)
        scores = self._of_model(lambda model: stack_scores(model, stack.members), stack, *given)
        return dict(zip(states, scores, strict=True))

    def _of_model(self, ask: Callable[[nn.Module], T], client: Client, state: ClientState, server: Tensors) -> T:
        """ask(the model that a client, or a stack, would ship now), on the run's device."""

        def work(*given: Any) -> T:
            return ask(self.algorithm.model(*given))

        return devices.visit(work, self.job, client, state, server)

    def ship(self, number: int, at: int | None, server: Tensors) -> ClientRow:
        """Let a client finish, write its model, and score the model as read back from its file, on the CPU.

        The row's evaluations are those of the finish alone.
        """
        algorithm, client = self.algorithm, self.clients[number]
        update = devices.visit(algorithm.finish_client, self.job, client, self.state(number, at), server)
        job = replace(self.job, device=CPU)
        _check_finite(update, f"{algorithm.name}: client {number} at the end")
        path = self.models / model_file(number)
        architecture, bits = algorithm.shipped(job, client)
        save_model(algorithm.model(job, client, update.state, server), bits, path)
        final = score(load_model(algorithm.factory(job, client), bits, path), client)
        shared = algorithm.shared_model(job, server)
        return ClientRow(
            client=number,
            classes=client.data.classes,
            architecture=architecture,
            bits=bits,
            train_samples=len(client.data.train),
            test_samples=len(client.data.test),
            accuracy=final.test,
            validation=final.validation,
            evaluations=update.evaluations,
            model_file=f"{self.models.name}/{path.name}",
            model_bytes=path.stat().st_size,
            shared_accuracy=None if shared is None else accuracy(shared, client.data.test),
        )


def _same(one: ClientState, two: ClientState) -> bool:
    """Whether a step has given back the state it got; states with tensors are taken for new ones unless identical."""
    return one is two or (not one.tensors and not two.tensors and one.scalars == two.scalars)


def _check_finite(update: Update, where: str) -> None:
    """Stop a run that has diverged before its numbers reach the server or a checkpoint."""
    tensors = [*update.state.tensors.values(), *(update.message.tensors.values() if update.message else ())]
    floats = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel() > 0]
    largest = torch._foreach_norm(floats, math.inf) if floats else ()  # one call: there are many small tensors
    finite = update.loss is None or math.isfinite(update.loss)
    if not finite or not all(math.isfinite(value) for value in largest):
        raise DivergedError(f"{where}: training has diverged, its loss is {update.loss}, choose a lower rate")
