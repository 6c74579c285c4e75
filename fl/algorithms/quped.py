"""QuPeD: personal quantized models that learn together by distillation through one float model w (Algorithm 2).

    F_i = (1 - lambda_p) (f_i(x_i) + f_i(S_c(x_i))) + lambda R(x_i, c_i) + lambda_p (KD(x_i, w_i) + KD(S_c(x_i), w_i))
    KD(a, w) = T^2 KL(softmax(logits_w / T) || softmax(logits_a / T)), averaged over the batch

Client: w_i = w; each local step takes x_i, then c_i on F_i as qk.QuPeD does, the teacher w_i detached; then
w_i <- w_i - eta_3 grad_w of the lambda_p terms, by SGD whose momentum starts from zero each round. The w step reuses
the student's logits of that very step, so it costs one evaluation; w learns by nothing else and sees no label.
Server: w <- mean of the drawn clients' w_i, batch-norm buffers included; those of x_i stay with the client.
Late rounds: from `freeze_at` of them a client's weights stay on their centers, with fixed codes, the rest is fine-tuned,
and w's rate is a tenth, as everyone's. A client that is not drawn in these rounds is fine-tuned once at the end, for the
budget of one round.
Travels: w down and w_i up, float32. x_i, c_i and the data never leave the client.
Evaluations a local step: those of Local (2 or 3; 1 once frozen and in float) and 1 of the teacher.
Ozkara et al. 2021, arXiv:2107.13892.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from fl.algorithms._base import (
    FINETUNE_SHARE,
    check_choice,
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
from fl.losses import cross_entropy, distillation
from fl.storage import Tensors

TEMPERED = ("both", "teacher")


@dataclass(frozen=True, kw_only=True)
class QuPeD(Personal):
    """QuPeD's hyper-parameters beside those of Personal.

    distill: lambda_p, the share of the distillation terms, 0..1.  temperature: T.  tempered: whose logits it divides,
    "both" or "teacher", as in the authors' code; T^2 stays before KL.
    global_rate: eta_3, of w's steps; None: twice `rate`.  weighted: average w by training images, else plainly.
    """

    distill: float = 0.25
    temperature: float = 2.0
    tempered: str = "both"
    global_rate: float | None = None
    weighted: bool = False

    name: ClassVar[str] = "quped"
    stackable: ClassVar[bool] = True
    teachers: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.name, distill=self.distill)
        check_positive(self.name, temperature=self.temperature)
        check_positive(self.name, global_rate=1.0 if self.global_rate is None else self.global_rate)
        check_choice(self.name, TEMPERED, tempered=self.tempered)

    def start_server(self, job: Job) -> Tensors:
        return copy_tensors(global_model(job))

    def client_step(self, job: Job, client: Client, state: ClientState, broadcast: Tensors, round_index: int) -> Update:
        teacher = received_model(job, client, broadcast).train()
        rate = 2 * self.rate if self.global_rate is None else self.global_rate
        rate *= FINETUNE_SHARE if round_index >= late_round(job, self.freeze_at) else 1.0
        teacher_optimizer = LocalSGD(teacher, rate, self.momentum)

        def take_step(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> Tensor:
            teacher_logits = teacher(x)
            # The personal model's evaluations leave here the gradients of their lambda_p terms: what w learns from.
            target = teacher_logits.detach().requires_grad_()

            def personal_loss() -> Tensor:
                logits = model(x)
                distance = self._distance(logits, target)
                return (1 - self.distill) * cross_entropy(logits, y) + self.distill * distance

            loss = optimizer.step(personal_loss)
            teacher_optimizer.step(teacher_optimizer.gradients(teacher_logits, target.grad))
            return loss

        update = self.train(job, client, state, round_index, take_step)
        return replace(update, message=Message(copy_tensors(teacher), len(client.data.train)))

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """KD; with the teacher alone tempered, T^2 KL(softmax(teacher / T) || softmax(student))."""
        if self.tempered == "teacher":
            student = self.temperature * student
        return distillation(student, teacher, self.temperature)

    def server_step(self, job: Job, server: Tensors, messages: Mapping[int, Message]) -> Tensors:
        return aggregate(messages, self.weighted)
