"""FML: a personal model and a shared one that teach each other (federated mutual learning).

    personal a_i: (1 - distill) f_i(a_i) + distill KD(a_i, w_i)
    shared w_i:   (1 - global_distill) f_i(w_i) + global_distill KD(w_i, a_i)
    KD(a, b) = T^2 KL(softmax(logits_b / T) || softmax(logits_a / T)), averaged over the batch

Client: w_i = w; each local step draws a batch and steps both models on it, each with the other's logits detached: w_i's
are those before its step, a_i's those of its own step. Unlike QuPeD's w, the shared model sees labels. A client with bits
trains a_i by Algorithm 1, and w_i learns from the mean of the KD terms of that step's evaluations.
Server: w <- mean of the drawn w_i, batch-norm buffers included; those of a_i stay with the client.
From the freeze on a_i's weights stay on their centers, and w_i's rate is a tenth.
Travels: w down and w_i up, float32.  Evaluations a local step: 1 of w_i and those of Local.
Shen et al. 2020, arXiv:2006.16765, with T = 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from fl.algorithms._base import (
    FINETUNE_SHARE,
    check_positive,
    check_share,
    copy_tensors,
    global_model,
    late_round,
    received_model,
)
from fl.algorithms._personal import Optimizer, Personal
from fl.algorithms._sgd import LocalSGD
from fl.core import Client, ClientState, Job, Message, Update, aggregate
from fl.losses import cross_entropy, distillation, total_loss
from fl.storage import Tensors


@dataclass(frozen=True, kw_only=True)
class FML(Personal):
    """FML's hyper-parameters beside those of Personal.

    distill, global_distill: shares of the KD terms in the personal and the shared model's loss, 0..1; the paper's 1 - alpha
    and 1 - beta.  temperature: T.  weighted: average w by training images, else plainly.
    """

    distill: float = 0.5
    global_distill: float = 0.5
    temperature: float = 1.0
    weighted: bool = False

    name: ClassVar[str] = "fml"
    stackable: ClassVar[bool] = True
    teachers: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.name, distill=self.distill, global_distill=self.global_distill)
        check_positive(self.name, temperature=self.temperature)

    def start_server(self, job: Job) -> Tensors:
        return copy_tensors(global_model(job))

    def client_step(self, job: Job, client: Client, state: ClientState, broadcast: Tensors, round_index: int) -> Update:
        shared = received_model(job, client, broadcast).train()
        rate = self.rate * (FINETUNE_SHARE if round_index >= late_round(job, self.freeze_at) else 1.0)
        shared_optimizer = LocalSGD(shared, rate, self.momentum)

        def take_step(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> Tensor:
            shared_logits = shared(x)
            target = shared_logits.detach()
            own: list[Tensor] = []

            def personal_loss() -> Tensor:
                logits = model(x)
                own.append(logits.detach())
                return self._mixed(logits, y, [target], self.distill)

            loss = optimizer.step(personal_loss)
            shared_loss = total_loss(self._mixed(shared_logits, y, own, self.global_distill))
            shared_optimizer.step(shared_optimizer.gradients(shared_loss))
            return loss

        update = self.train(job, client, state, round_index, take_step)
        return replace(update, message=Message(copy_tensors(shared), len(client.data.train)))

    def _mixed(self, logits: Tensor, y: Tensor, teachers: list[Tensor], share: float) -> Tensor:
        """(1 - share) f + share times the mean KD towards the teachers."""
        distances = [distillation(logits, teacher, self.temperature) for teacher in teachers]
        return (1 - share) * cross_entropy(logits, y) + share * torch.stack(distances).mean(0)

    def server_step(self, job: Job, server: Tensors, messages: Mapping[int, Message]) -> Tensors:
        return aggregate(messages, self.weighted)
