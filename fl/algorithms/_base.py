"""What an algorithm is: a client step and a server step, both pure functions of what they are given."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache
from typing import ClassVar

import torch
from torch import nn

from fl import devices, models
from fl.core import Bits, Client, ClientState, Job, Message, Update
from fl.seeds import derive_seed
from fl.stack import form, join_states, make_stack, split_update, spread, widen_
from fl.storage import Tensors

FINETUNE_SHARE = 0.1  # of the rate, in the last rounds, for every algorithm


class Algorithm(ABC):
    """Base of the algorithms. A subclass is a frozen dataclass of hyper-parameters; its fields are its configuration.

    Steps take state and return new state: they keep nothing in self, touch no file and no global generator, so an
    engine may run clients in any order, and again after a crash.
    """

    name: ClassVar[str]
    one_architecture: ClassVar[bool] = False  # whether clients' weights are compared with the global model's
    stackable: ClassVar[bool] = False  # whether client_step also takes a Stack
    batch_size: int  # images of a local step, or all that a client has

    @property
    def personal(self) -> bool:
        """Whether each client ships a model of its own, which its own rounds alone change; else all ship the server's."""
        return True

    def check(self, job: Job, clients: Sequence[Client]) -> None:
        """Raise ValueError, one sentence, where these clients cannot run the algorithm."""
        for client in clients:
            if self.one_architecture and client.architecture != job.architecture:
                raise ValueError(
                    f"{self.name}: clients must have the global model's architecture, {job.architecture}, "
                    f"got {client.architecture} for client {client.id}; choose one, or an algorithm that distills"
                )

    def start_server(self, job: Job) -> Tensors:
        """The server's tensors before the first round; none where there is no global model."""
        return {}

    def broadcast(self, job: Job, server: Tensors) -> Tensors:
        """What travels to a client, who sees nothing else of the server: `broadcast` in its step, `server` elsewhere."""
        return server

    @abstractmethod
    def start_client(self, job: Job, client: Client) -> ClientState:
        """What a client keeps before the first round."""

    @abstractmethod
    def client_step(self, job: Job, client: Client, state: ClientState, broadcast: Tensors, round_index: int) -> Update:
        """One drawn client's round: local steps from its state and the server's broadcast."""

    def stack_step(
        self, job: Job, clients: Sequence[Client], states: Sequence[ClientState], broadcast: Tensors, round_index: int
    ) -> list[Update]:
        """The rounds of two or more clients of one kind, taken together: client_step's, within rounding."""
        stack = make_stack(clients)
        given = join_states(states), spread(broadcast, stack.size), round_index
        update = devices.visit(self.client_step, job, stack, *given)
        return split_update(update, stack, states)

    def kind(self, client: Client, state: ClientState) -> Hashable:
        """What clients of one stack have in common: their device, the length of their batches, the form of their states."""
        return (
            client.architecture,
            client.bits,
            client.groups,
            min(self.batch_size, len(client.data.train)),
            form(state),
        )

    @property
    def stackable_model(self) -> bool:
        """Whether `model` also takes a Stack, whose model is not packed: its weights lie on their centers."""
        return self.stackable

    def server_step(self, job: Job, server: Tensors, messages: Mapping[int, Message]) -> Tensors:
        """The server's new tensors, given the messages by client number. A message holds what `server` holds."""
        return server

    def finish_client(self, job: Job, client: Client, state: ClientState, server: Tensors) -> Update:
        """What every client does once after the last round, without a message."""
        return Update(state, None, 0, None)

    @abstractmethod
    def model(self, job: Job, client: Client, state: ClientState, server: Tensors) -> nn.Module:
        """The model the client would ship now, packed, in evaluation mode."""

    def shared_model(self, job: Job, server: Tensors) -> nn.Module | None:
        """The global model alone, in evaluation mode; None where there is none, or none that is whole without a client."""
        model = global_model(job).eval()
        return load_model(model, server) if set(server) == set(model.state_dict()) else None

    def shipped(self, job: Job, client: Client) -> tuple[str, Bits]:
        """(architecture, bits) of the model that the client ships."""
        return client.architecture, client.bits

    def factory(self, job: Job, client: Client) -> Callable[[], nn.Module]:
        """Builds the float model into which a shipped file loads: qk.load(algorithm.factory(job, client), path)."""
        architecture, _ = self.shipped(job, client)
        return lambda: models.build(architecture, job.input_shape, job.num_classes, seed=0)


def global_model(job: Job, size: int = 1) -> nn.Module:
    """The global model as it is before the first round; of a stack, one for each of its members."""
    model = models.build(job.architecture, job.input_shape, job.num_classes, derive_seed(job.seed, "global"))
    return widen_(model, size)


def received_model(job: Job, client: Client, tensors: Tensors) -> nn.Module:
    """A global model of the client's own, or of a stack's, with these tensors as its state."""
    like = global_form(job.architecture, job.input_shape, job.num_classes, client.size, torch.get_default_dtype())
    return models.filled(like, tensors)


def untrained_buffers(job: Job, client: Client) -> Tensors:
    """Those of a global model before its first batch, on the run's device."""
    like = global_form(job.architecture, job.input_shape, job.num_classes, client.size, torch.get_default_dtype())
    return devices.moved(dict(like.named_buffers()), job.device)


@lru_cache(maxsize=64)
def global_form(architecture: str, shape: models.Shape, num_classes: int, size: int, _: torch.dtype) -> nn.Module:
    """Building a small model takes longer than a training step: it is done once, and no one trains the result."""
    return widen_(models.build(architecture, shape, num_classes, seed=0), size)


def load_model(model: nn.Module, tensors: Tensors) -> nn.Module:
    """Copy tensors into a model of the same names and shapes; returns the model."""
    model.load_state_dict(tensors)
    return model


def copy_tensors(model: nn.Module) -> Tensors:
    """The model's state as tensors of its own: later training does not change them."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def late_round(job: Job, share: float) -> int:
    """The first of the last rounds, in which weights are frozen and rates a tenth; whole rounds, so none is mixed."""
    return round(share * job.rounds)


def check_least(name: str, least: int, **values: int) -> None:
    """Raise ValueError, one sentence, for a count below `least`."""
    for key, value in values.items():
        if value < least:
            raise ValueError(f"{name}: {key} must be at least {least}, got {value}")


def check_positive(name: str, **values: float) -> None:
    """Raise ValueError, one sentence, for a number that is not positive and finite."""
    for key, value in values.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name}: {key} must be positive and finite, got {value}")


def check_share(name: str, **values: float) -> None:
    """Raise ValueError, one sentence, for a number outside 0..1."""
    for key, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: {key} must be between 0 and 1, got {value}")


def check_choice(name: str, choices: Sequence[str], **values: str) -> None:
    """Raise ValueError, one sentence, for a word that is not one of the choices."""
    for key, value in values.items():
        if value not in choices:
            raise ValueError(f"{name}: {key} must be one of {', '.join(choices)}, got {value!r}")


def check_momentum(name: str, momentum: float) -> None:
    """Raise ValueError, one sentence, for a momentum with which SGD cannot run."""
    if not 0 <= momentum < 1:
        raise ValueError(f"{name}: momentum must be at least 0 and below 1, got {momentum}")
