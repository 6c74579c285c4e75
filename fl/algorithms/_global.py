"""What the algorithms of one global model share: w down, local steps, w up; and what a client makes of w for itself."""

from abc import abstractmethod
from collections.abc import Hashable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

import qupedkern as qk
from fl import devices
from fl.algorithms._base import (
    FINETUNE_SHARE,
    Algorithm,
    check_choice,
    check_least,
    check_positive,
    check_share,
    copy_tensors,
    global_model,
    late_round,
    load_model,
    received_model,
    untrained_buffers,
)
from fl.algorithms._personal import FloatSGD, Optimizer, quantize_client_
from fl.algorithms._sgd import LocalSGD
from fl.core import Bits, Client, ClientState, Job, Message, Update, aggregate, training_batches
from fl.losses import cross_entropy, mean_losses, total_loss
from fl.stack import form
from fl.storage import Tensors

Batches = Iterator[tuple[Tensor, Tensor]]
BATCH_NORM = ("averaged", "local", "recalibrated")


@dataclass(frozen=True, kw_only=True)
class Global(Algorithm):
    """One float model w of the run's architecture for all clients, whatever their own; each may adapt it to itself.

    local_steps: a round's steps where the run sets no budget of evaluations.  rate, batch_size: of the local steps.
    decay_at: share of the rounds after which the rate is a tenth.  weighted: mean by training images, else plain.
    batch_norm: "averaged": buffers travel with w and are averaged; "local": each client keeps its own; "recalibrated":
    re-estimated on the client's training images wherever w is used.  With the last two w alone travels.
    adapt_steps: steps a client makes from w on its own images before it uses the model; 0: it uses w.  adapt_rate: of
    these steps, without momentum; None: `rate`.  They are counted once, at the end; the records show adapted models too.
    quantize: the client ships w at its own bits, centers from k-means, adapted by Algorithm 1 ("hard", frozen at 0.8).
    """

    local_steps: int = 30
    rate: float = 0.05
    batch_size: int = 25
    decay_at: float = 0.8
    weighted: bool = False
    batch_norm: str = "averaged"
    adapt_steps: int = 0
    adapt_rate: float | None = None
    quantize: bool = False

    def __post_init__(self) -> None:
        check_least(self.name, 1, local_steps=self.local_steps, batch_size=self.batch_size)
        check_least(self.name, 0, adapt_steps=self.adapt_steps)
        check_positive(self.name, rate=self.rate, adapt_rate=self.rate if self.adapt_rate is None else self.adapt_rate)
        check_share(self.name, decay_at=self.decay_at)
        check_choice(self.name, BATCH_NORM, batch_norm=self.batch_norm)

    @property
    def personal(self) -> bool:
        return self.adapt_steps > 0 or self.quantize or self.batch_norm != "averaged"

    @property
    def step_evaluations(self) -> int:
        """Gradient evaluations of a local step."""
        return 1

    @property
    def batches_a_step(self) -> int:
        """Batches that a local step draws."""
        return 1

    def kind(self, client: Client, state: ClientState) -> Hashable:
        """All train the same architecture in float, whatever their own."""
        return min(self.batch_size, len(client.data.train)), form(state)

    @property
    def stackable_model(self) -> bool:
        """Not where a client's own images recalibrate it, or k-means draws its centers."""
        return self.stackable and not self.quantize and self.batch_norm != "recalibrated"

    @abstractmethod
    def train(self, model: nn.Module, rate: float, batches: Batches) -> list[Tensor]:
        """A round's local steps on w_i, in place, `batches_a_step` batches each; their losses, detached.

        The model may be a stack's, whose losses are [K].
        """

    def adapted_loss(self, model: nn.Module, start: Tensors, x: Tensor, y: Tensor) -> Tensor:
        """What a step of the adaptation descends. start: w."""
        return cross_entropy(model(x), y)

    def start_server(self, job: Job) -> Tensors:
        return self._travels(global_model(job))

    def start_client(self, job: Job, client: Client) -> ClientState:
        return ClientState({}, {"adapted": False})

    def client_step(self, job: Job, client: Client, state: ClientState, broadcast: Tensors, round_index: int) -> Update:
        model = self._receive(job, client, state, broadcast).train()
        rate = self.rate * (FINETUNE_SHARE if round_index >= late_round(job, self.decay_at) else 1.0)
        steps = self.local_steps if job.evaluations is None else max(1, job.evaluations // self.step_evaluations)
        count = steps * self.batches_a_step
        batches = training_batches(job, client, self.batch_size, count, round_index)
        loss, each = mean_losses(self.train(model, rate, batches))
        kept = {name: buffer.clone() for name, buffer in model.named_buffers()} if self.batch_norm == "local" else {}
        message = Message(self._travels(model), len(client.data.train))
        return Update(replace(state, tensors=kept), message, steps * self.step_evaluations, loss, each)

    def server_step(self, job: Job, server: Tensors, messages: Mapping[int, Message]) -> Tensors:
        return aggregate(messages, self.weighted)

    def finish_client(self, job: Job, client: Client, state: ClientState, server: Tensors) -> Update:
        """Make the client's model of the last w, and keep it."""
        if not self.personal:
            return Update(state, None, 0, None)
        model, evaluations = self._adapt(job, client, state, server)
        return Update(ClientState(copy_tensors(model), {"adapted": True}), None, evaluations, None)

    def model(self, job: Job, client: Client, state: ClientState, server: Tensors) -> nn.Module:
        if state.scalars["adapted"]:
            model = self._quantized(global_model(job, client.size), client, init="linspace")
            load_model(model, state.tensors)
        else:
            model, _ = self._adapt(job, client, state, server)
        if qk.nn.quantized_layers(model):
            qk.pack_(model)
        return model.eval()

    def shipped(self, job: Job, client: Client) -> tuple[str, Bits]:
        return job.architecture, client.bits if self.quantize else "float"

    def _travels(self, model: nn.Module) -> Tensors:
        tensors = copy_tensors(model)
        if self.batch_norm == "averaged":
            return tensors
        return {name: tensors[name] for name, _ in model.named_parameters()}

    def _receive(self, job: Job, client: Client, state: ClientState, broadcast: Tensors) -> nn.Module:
        buffers = untrained_buffers(job, client)  # where they do not travel, and the client has none yet
        return received_model(job, client, {**buffers, **state.tensors, **broadcast})

    def _quantized(self, model: nn.Module, client: Client, init: str) -> nn.Module:
        if self.quantize:
            quantize_client_(model, client, init)
        return model

    def _adapt(self, job: Job, client: Client, state: ClientState, server: Tensors) -> tuple[nn.Module, int]:
        """(the model a client makes of w, the gradient evaluations it took). The draws do not depend on the round."""
        model = self._quantized(self._receive(job, client, state, server), client, init="kmeans").train()
        evaluations = 0
        if self.adapt_steps:
            optimizer = self._adapter(model)
            for x, y in training_batches(job, client, self.batch_size, self.adapt_steps, round_index=job.rounds):
                optimizer.step(partial(self.adapted_loss, model, server, x, y))
            evaluations = optimizer.evaluations
        if self.batch_norm == "recalibrated":
            quantized = bool(qk.nn.quantized_layers(model))
            with qk.mode(model, "hard") if quantized else nullcontext():
                recalibrate_batch_norms_(model, client, self.batch_size)
        return model, evaluations

    def _adapter(self, model: nn.Module) -> Optimizer:
        inner = torch.optim.SGD(model.parameters(), self.rate if self.adapt_rate is None else self.adapt_rate)
        if not qk.nn.quantized_layers(model):
            return FloatSGD(inner, freeze_at=1.0, total_steps=self.adapt_steps)
        return qk.QuPeD(model, inner, variant="hard", total_steps=self.adapt_steps)


def recalibrate_batch_norms_(model: nn.Module, client: Client, batch_size: int) -> None:
    """Batch-norm statistics from all of a client's training images; a model without batch norm stays as it is."""
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        qk.recalibrate_(model, list(client.data.train.x.to(devices.of(model)).split(batch_size)))


def sgd_steps(model: nn.Module, rate: float, momentum: float, batches: Batches, pulled: float = 0.0) -> list[Tensor]:
    """Local SGD on f(w) + (pulled / 2) |w - w at the start|^2, momentum from zero; the losses f(w), detached."""
    optimizer = LocalSGD(model, rate, momentum)
    start = [parameter.detach().clone() for parameter in optimizer.parameters] if pulled else []
    losses = []
    for x, y in batches:
        loss = cross_entropy(model(x), y)
        gradients = optimizer.gradients(total_loss(loss))
        if pulled:
            with torch.no_grad():
                torch._foreach_add_(gradients, torch._foreach_sub(optimizer.parameters, start), alpha=pulled)
        optimizer.step(gradients)
        losses.append(loss.detach())
    return losses
