"""QuPeD: personal quantized models that learn together by distillation through one float model w (Algorithm 2).

    F_i = (1 - lambda_p) (f_i(x_i) + f_i(S_c(x_i))) + lambda R(x_i, c_i) + lambda_p (KD(x_i, w_i) + KD(S_c(x_i), w_i))
    KD(a, w) = T^2 KL(softmax(logits_w / T) || softmax(logits_a / T)), averaged over the batch

Client: w_i = w; each local step takes x_i, then c_i on F_i as qk.QuPeD does, the teacher w_i detached; then
w_i <- w_i - eta_3 grad_w of the lambda_p terms, by SGD whose momentum starts from zero each round. The w step reuses
the student's logits of that very step, so it costs one evaluation; w learns by nothing else and sees no label.
Server: w <- mean of the drawn clients' w_i, batch-norm buffers included; those of x_i stay with the client.
Late rounds: from `freeze_at` of them a client's weights stay on their centers, with fixed codes, and the rest is
fine-tuned. A client that is not drawn in these rounds is fine-tuned once at the end, for the budget of one round.
Travels: w down and w_i up, float32. x_i, c_i and the data never leave the client.
Evaluations a local step: those of Local (2 or 3; 1 once frozen and in float) and 1 of the teacher.
Ozkara et al. 2021, arXiv:2107.13892.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qupedkern as qk
from fl.algorithms._base import copy_tensors, global_model, load_model
from fl.algorithms._personal import Optimizer, Personal
from fl.core import Client, ClientState, Job, Message, Update, aggregate
from fl.storage import Tensors


@dataclass(frozen=True, kw_only=True)
class QuPeD(Personal):
    """QuPeD's hyper-parameters beside those of Personal.

    distill: lambda_p, the share of the distillation terms, 0..1.  temperature: T, of both teacher and student.
    global_rate: eta_3, of w's steps; None: twice `rate`.  weighted: average w by training images, else plainly.
    """

    distill: float = 0.25
    temperature: float = 2.0
    global_rate: float | None = None
    weighted: bool = False

    name: ClassVar[str] = "quped"
    teachers: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.distill <= 1:
            raise ValueError(f"quped: distill must be between 0 and 1, got {self.distill}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"quped: temperature must be positive and finite, got {self.temperature}")
        if self.global_rate is not None and not 0 < self.global_rate < float("inf"):
            raise ValueError(f"quped: global_rate must be positive and finite, got {self.global_rate}")

    def start_server(self, job: Job) -> Tensors:
        return copy_tensors(global_model(job))

    def client_step(self, job: Job, client: Client, state: ClientState, broadcast: Tensors, round_index: int) -> Update:
        teacher = load_model(global_model(job), broadcast).train()
        rate = 2 * self.rate if self.global_rate is None else self.global_rate
        teacher_optimizer = torch.optim.SGD(teacher.parameters(), rate, momentum=self.momentum)

        def take_step(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> Tensor:
            teacher_logits = teacher(x)
            target = teacher_logits.detach()
            students: list[Tensor] = []

            def personal_loss() -> Tensor:
                logits = model(x)
                students.append(logits.detach())
                distance = qk.distillation_loss(logits, target, self.temperature)
                return (1 - self.distill) * F.cross_entropy(logits, y) + self.distill * distance

            loss = optimizer.step(personal_loss)
            teacher_optimizer.zero_grad()
            distances = [qk.distillation_loss(logits, teacher_logits, self.temperature) for logits in students]
            (self.distill * torch.stack(distances).sum()).backward()
            teacher_optimizer.step()
            return loss

        update = self.train(job, client, state, round_index, take_step)
        return replace(update, message=Message(copy_tensors(teacher), len(client.data.train)))

    def server_step(self, job: Job, server: Tensors, messages: Mapping[int, Message]) -> Tensors:
        return aggregate(messages, self.weighted)
