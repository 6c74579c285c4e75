"""FedAvg: one float model for all, the mean of what the drawn clients make of it.

Client: w_i = w, then local SGD steps w_i <- w_i - rate grad f_i(w_i), momentum starting from zero each round.
Server: w <- mean of the drawn w_i.  In the last rounds (from `decay_at` of them) the rate is a tenth, as it is for the
methods that freeze there.
Travels: w down and w_i up, float32, batch-norm buffers included.  Evaluations: 1 a local step.
McMahan et al. 2017, arXiv:1602.05629.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from fl.algorithms._base import (
    FINETUNE_SHARE,
    Algorithm,
    check_training,
    copy_tensors,
    global_model,
    late_round,
    load_model,
)
from fl.core import Bits, Client, ClientState, Job, Message, Update, aggregate, batches
from fl.seeds import torch_generator
from fl.storage import Tensors


@dataclass(frozen=True)
class FedAvg(Algorithm):
    """FedAvg's hyper-parameters.

    local_steps: a round's steps where the run sets no budget of evaluations.  rate, momentum, batch_size: of local SGD.
    decay_at: share of the rounds after which the rate is a tenth.  weighted: mean by training images, else plain.
    """

    local_steps: int = 30
    rate: float = 0.05
    momentum: float = 0.9
    batch_size: int = 25
    decay_at: float = 0.8
    weighted: bool = False

    name: ClassVar[str] = "fedavg"
    personal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_training(self.name, self.local_steps, self.rate, self.momentum, self.batch_size)
        if not 0 <= self.decay_at <= 1:
            raise ValueError(f"{self.name}: decay_at must be between 0 and 1, got {self.decay_at}")

    def start_server(self, job: Job) -> Tensors:
        return copy_tensors(global_model(job))

    def start_client(self, job: Job, client: Client) -> ClientState:
        return ClientState({}, {})

    def client_step(self, job: Job, client: Client, state: ClientState, broadcast: Tensors, round_index: int) -> Update:
        model = load_model(global_model(job), broadcast).train()
        decayed = round_index >= late_round(job, self.decay_at)
        rate = self.rate * (FINETUNE_SHARE if decayed else 1.0)
        optimizer = torch.optim.SGD(model.parameters(), rate, momentum=self.momentum)
        steps = self.local_steps if job.evaluations is None else job.evaluations
        random = torch_generator(job.seed, "batches", round_index, client.id)
        total = 0.0
        for index in batches(len(client.data.train), self.batch_size, steps, random):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(client.data.train.x[index]), client.data.train.y[index])
            loss.backward()
            optimizer.step()
            total += loss.item()
        return Update(state, Message(copy_tensors(model), len(client.data.train)), steps, total / steps)

    def server_step(self, job: Job, server: Tensors, messages: Mapping[int, Message]) -> Tensors:
        return aggregate(messages, self.weighted)

    def model(self, job: Job, client: Client, state: ClientState, server: Tensors) -> nn.Module:
        return load_model(global_model(job), server).eval()

    def shipped(self, job: Job, client: Client) -> tuple[str, Bits]:
        return job.architecture, "float"
