"""What the personal algorithms share: a client's own quantized model, trained by qk.QuPeD, kept in a ClientState."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import qupedkern as qk
from fl import models
from fl.algorithms._base import (
    FINETUNE_SHARE,
    Algorithm,
    check_choice,
    check_least,
    check_momentum,
    check_positive,
    check_share,
    copy_tensors,
    late_round,
)
from fl.core import Bits, Client, ClientState, Groups, Job, Update, training_batches
from fl.losses import mean_losses, total_loss
from fl.seeds import derive_seed
from fl.stack import widen_
from fl.storage import Tensors, flatten, unflatten
from qupedkern.optim.quped import EVALUATIONS

FROZEN_EVALUATIONS = 1  # of one step once the weights are frozen, and in float


class FloatSGD:
    """A torch optimizer with the face of qk.QuPeD, for clients that hold a float model: one evaluation a step.

    From `freeze_at` of total_steps on the rate is a tenth, as it is where weights freeze.
    """

    def __init__(self, inner: torch.optim.SGD, freeze_at: float, total_steps: int) -> None:
        self._inner = inner
        self._rate = inner.param_groups[0]["lr"]
        self._decay_step = freeze_at * total_steps
        self._step = 0
        self.evaluations = 0

    def seek(self, step: int) -> None:
        self._step = step

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        for group in self._inner.param_groups:
            group["lr"] = self._rate * (FINETUNE_SHARE if self._step >= self._decay_step else 1.0)
        self._inner.zero_grad()
        loss = closure()
        total_loss(loss).backward()
        self._inner.step()
        self._step += 1
        self.evaluations += 1
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        return self._inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._inner.load_state_dict(state)


class StackQuPeD(qk.QuPeD):
    """qk.QuPeD of a stack's model, whose losses are [K]."""

    def step(  # type: ignore[override]  # torch declares two overloads
        self, closure: Callable[[], Tensor] | None = None, grad_scaler: Any = None
    ) -> Tensor:
        """As qk.QuPeD's; returns f(x) of each client, [K], detached."""
        assert closure is not None
        seen: list[Tensor] = []

        def total() -> Tensor:
            seen.append(closure())
            return total_loss(seen[-1])

        super().step(total, grad_scaler)
        return seen[0].detach()


Optimizer = qk.QuPeD | FloatSGD
TakeStep = Callable[[nn.Module, Optimizer, Tensor, Tensor], Tensor]


LAYERS = ("all", "inner")


def quantize_client_(model: nn.Module, client: Client, init: str, layers: str = "all") -> None:
    """Quantize a model's weights to a client's bits, in place; "float" leaves the model as it is.

    layers: "all", or "inner", which leaves the first convolution and the last linear layer in float, as in the paper.
    """
    _quantize_(model, client.bits, client.groups, init, layers)


def _quantize_(model: nn.Module, bits: Bits, groups: Groups, init: str, layers: str) -> None:
    if bits == "float":
        return
    size: dict[str, Any] = {"levels": 3} if bits == "ternary" else {"bits": bits}
    rule = (lambda *_: True) if layers == "all" else None
    qk.quantize_(model, **size, groups=groups, init=init, rule=rule)


@lru_cache(maxsize=64)
def _form(
    task: tuple[models.Shape, int], device: tuple[str, Bits, Groups], layers: str, size: int, _: torch.dtype
) -> nn.Module:
    """A device's model, to be filled with a state: building and quantizing it takes as long as two training steps."""
    architecture, bits, groups = device
    model = models.build(architecture, *task, seed=0)
    _quantize_(model, bits, groups, "linspace", layers)
    return widen_(model, size)


@torch.no_grad()
def put_on_centers_(model: nn.Module) -> None:
    """What packing stores, in float: every quantized weight becomes Q_c(x)."""
    for layer in qk.nn.quantized_layers(model).values():
        layer.weight.copy_(layer.like_weight(qk.hard_quantize(layer.by_rows(layer.weight), layer.centers)))


@dataclass(frozen=True, kw_only=True)
class Personal(Algorithm):
    """Each client trains and ships a model of its own architecture and bits.

    local_steps: a round's steps before the freeze, where the run sets no budget of evaluations.
    rate, momentum, batch_size: of local SGD; momentum is kept from round to round.
    variant: qk.QuPeD's; with all layers quantized "hard" was 2.5 points behind on the digits' validation parts (4 seeds),
    most of it at 1 bit.
    freeze_at: share of the rounds after which the weights stay on their centers; the rest is fine-tuning.
    layers: which are quantized, "all" or "inner", see quantize_client_.
    """

    local_steps: int = 10
    rate: float = 0.05
    momentum: float = 0.9
    batch_size: int = 25
    variant: str = "simultaneous"
    freeze_at: float = 0.8
    layers: str = "all"

    teachers: ClassVar[int] = 0  # evaluations that a local step takes beside the personal model's own
    from_global: ClassVar[bool] = False  # personal models start as the global one does, else each from its own draw

    def __post_init__(self) -> None:
        check_least(self.name, 1, local_steps=self.local_steps, batch_size=self.batch_size)
        check_positive(self.name, rate=self.rate)
        check_momentum(self.name, self.momentum)
        check_choice(self.name, tuple(EVALUATIONS), variant=self.variant)
        check_share(self.name, freeze_at=self.freeze_at)
        check_choice(self.name, LAYERS, layers=self.layers)

    def steps(self, job: Job, bits: Bits, frozen: bool) -> int:
        """Local steps of a round: the budget over a step's evaluations, or local_steps where there is no budget."""
        if job.evaluations is None:
            return self.local_steps
        own = FROZEN_EVALUATIONS if frozen or bits == "float" else EVALUATIONS[self.variant]
        return max(1, job.evaluations // (own + self.teachers))

    def check(self, job: Job, clients: Sequence[Client]) -> None:
        """Also raises ValueError for a device whose model cannot be quantized as it says."""
        super().check(job, clients)
        for client in {(client.architecture, client.bits, client.groups): client for client in clients}.values():
            self._new_model(job, client, init="linspace")

    def start_client(self, job: Job, client: Client) -> ClientState:
        model = self._new_model(job, client, init="kmeans")
        return self._capture(model, self._new_optimizer(job, client, model), last_round=-1)

    def model(self, job: Job, client: Client, state: ClientState, server: Tensors) -> nn.Module:
        model = self._restore_model(job, client, state)
        if client.bits != "float":
            put_on_centers_(model) if client.size > 1 else qk.pack_(model)
        return model.eval()

    def train(self, job: Job, client: Client, state: ClientState, round_index: int, take_step: TakeStep) -> Update:
        """A round's local steps. take_step(model, optimizer, x, y) makes one on a batch and returns its loss, detached.

        The update has no message yet.
        """
        model, optimizer = self._restore(job, client, state)
        model.train()
        frozen = round_index >= late_round(job, self.freeze_at)
        steps = self.steps(job, client.bits, frozen)
        optimizer.seek(round_index * self.steps(job, client.bits, False))
        optimizer.evaluations = 0  # of this round: clients of a stack have been drawn unequally often
        chosen = training_batches(job, client, self.batch_size, steps, round_index)
        loss, each = mean_losses([take_step(model, optimizer, x, y) for x, y in chosen])
        evaluations = optimizer.evaluations + self.teachers * steps
        return Update(self._capture(model, optimizer, round_index), None, evaluations, loss, each)

    def finish_client(self, job: Job, client: Client, state: ClientState, server: Tensors) -> Update:
        """Fine-tune for one round the clients that were not drawn since the freeze; what they learn stays with them."""
        freeze_round = late_round(job, self.freeze_at)
        if freeze_round == job.rounds or state.scalars["last_round"] >= freeze_round:
            return Update(state, None, 0, None)
        return replace(self.client_step(job, client, state, server, job.rounds), message=None)

    def _new_model(self, job: Job, client: Client, init: str) -> nn.Module:
        seed = derive_seed(job.seed, "global") if self.from_global else derive_seed(job.seed, "model", client.id)
        model = models.build(client.architecture, job.input_shape, job.num_classes, seed)
        quantize_client_(model, client, init, self.layers)
        return model

    def _new_optimizer(self, job: Job, client: Client, model: nn.Module) -> Optimizer:
        inner = torch.optim.SGD(
            model.parameters(), self.rate, momentum=self.momentum, foreach=True
        )  # the same bits, sooner
        total_steps = job.rounds * self.steps(job, client.bits, False)
        freeze_at = late_round(job, self.freeze_at) / job.rounds
        if client.bits == "float":
            return FloatSGD(inner, freeze_at, total_steps)
        kind = qk.QuPeD if client.size == 1 else StackQuPeD
        return kind(
            model,
            inner,
            variant=self.variant,
            freeze_at=freeze_at,
            total_steps=total_steps,
            finetune_rate=FINETUNE_SHARE,
        )

    def _restore(self, job: Job, client: Client, state: ClientState) -> tuple[nn.Module, Optimizer]:
        model = self._restore_model(job, client, state)
        optimizer = self._new_optimizer(job, client, model)
        moments = {name: tensor.clone() for name, tensor in state.tensors.items() if name.startswith("optimizer.")}
        optimizer.load_state_dict(unflatten(moments, state.scalars["optimizer"]))  # which keeps what it is given
        return model, optimizer

    def _restore_model(self, job: Job, client: Client, state: ClientState) -> nn.Module:
        task, device = (job.input_shape, job.num_classes), (client.architecture, client.bits, client.groups)
        like = _form(task, device, self.layers, client.size, torch.get_default_dtype())
        return models.filled(like, {name[len("model.") :]: state.tensors[name] for name in state.scalars["model"]})

    def _capture(self, model: nn.Module, optimizer: Optimizer, last_round: int) -> ClientState:
        weights = {f"model.{name}": tensor for name, tensor in copy_tensors(model).items()}
        moments, rest = flatten(optimizer.state_dict(), "optimizer")
        tensors = {**weights, **{name: tensor.detach().clone() for name, tensor in moments.items()}}
        return ClientState(tensors, {"model": list(weights), "optimizer": rest, "last_round": last_round})
