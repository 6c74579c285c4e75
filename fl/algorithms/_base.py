"""What an algorithm is: a client step and a server step, both pure functions of what they are given."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

from torch import nn

from fl import models
from fl.core import Bits, Client, ClientState, Job, Message, Update
from fl.seeds import derive_seed
from fl.storage import Tensors

FINETUNE_SHARE = 0.1  # of the rate, in the last rounds, for every algorithm


class Algorithm(ABC):
    """Base of the algorithms. A subclass is a frozen dataclass of hyper-parameters; its fields are its configuration.

    Steps take state and return new state: they keep nothing in self, touch no file and no global generator, so an
    engine may run clients in any order, and again after a crash.
    """

    name: ClassVar[str]
    personal: ClassVar[bool] = True  # each client ships a model of its own; False: all ship the server's

    def start_server(self, job: Job) -> Tensors:
        """The server's tensors before the first round; none where there is no global model."""
        return {}

    @abstractmethod
    def start_client(self, job: Job, client: Client) -> ClientState:
        """What a client keeps before the first round."""

    @abstractmethod
    def client_step(self, job: Job, client: Client, state: ClientState, broadcast: Tensors, round_index: int) -> Update:
        """One drawn client's round: local steps from its state and the server's broadcast."""

    def server_step(self, job: Job, server: Tensors, messages: Mapping[int, Message]) -> Tensors:
        """The server's new tensors, given the messages by client number."""
        return server

    def finish_client(self, job: Job, client: Client, state: ClientState, server: Tensors) -> Update:
        """What every client does once after the last round, without a message."""
        return Update(state, None, 0, None)

    @abstractmethod
    def model(self, job: Job, client: Client, state: ClientState, server: Tensors) -> nn.Module:
        """The model the client would ship now, packed, in evaluation mode."""

    def shipped(self, job: Job, client: Client) -> tuple[str, Bits]:
        """(architecture, bits) of the model that the client ships."""
        return client.architecture, client.bits

    def factory(self, job: Job, client: Client) -> Callable[[], nn.Module]:
        """Builds the float model into which a shipped file loads: qk.load(algorithm.factory(job, client), path)."""
        architecture, _ = self.shipped(job, client)
        return lambda: models.build(architecture, job.input_shape, job.num_classes, seed=0)


def global_model(job: Job) -> nn.Module:
    """The global model as it is before the first round."""
    return models.build(job.architecture, job.input_shape, job.num_classes, derive_seed(job.seed, "global"))


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


def check_training(name: str, local_steps: int, rate: float, momentum: float, batch_size: int) -> None:
    """Raise ValueError, one sentence, for hyper-parameters with which no local SGD can run."""
    for key, value in (("local_steps", local_steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: {key} must be at least 1, got {value}")
    if not 0 < rate < float("inf"):
        raise ValueError(f"{name}: rate must be positive and finite, got {rate}")
    if not 0 <= momentum < 1:
        raise ValueError(f"{name}: momentum must be at least 0 and below 1, got {momentum}")
