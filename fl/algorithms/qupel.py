"""QuPeL: personal quantized models coupled to one float model w by the distance of their weights, QuPeD's predecessor.

    F_i = f_i(x_i) + f_i(S_c(x_i)) + lambda R(x_i, c_i) + (lambda_p / 2) |Q_c(x_i) - w_i|^2

Client: w_i = w; each local step takes x_i, then c_i on F_i as qk.QuPeD does; the coupling's gradient is
lambda_p (Q_c(x) - w_i), straight through, as in the authors' code, and reaches the parameters that are not quantized too.
Then w_i <- w_i - eta_3 lambda_p (w_i - Q_c(x_i)). From the freeze on x_i stays where it is and w_i follows it.
Server: w <- mean of the drawn clients' w_i.
Personal models start from w's first values. All clients must have w's architecture.
Travels: w down and w_i up, float32, parameters alone: w is never evaluated and has no batch-norm statistics.
Evaluations a local step: those of Local (2 or 3; 1 once frozen and in float).
Ozkara et al. 2021, arXiv:2102.11786.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from fl.algorithms._base import check_positive, check_share, global_model
from fl.algorithms._personal import Optimizer, Personal
from fl.algorithms._pull import parameters, pull, quantized_parameters
from fl.core import Client, ClientState, Job, Message, Update, aggregate
from fl.losses import cross_entropy
from fl.storage import Tensors


@dataclass(frozen=True, kw_only=True)
class QuPeL(Personal):
    """QuPeL's hyper-parameters beside those of Personal.

    coupling: lambda_p; on small digits clients (60 rounds, one seed) 0.03 reached 99.4 % of the validation images, 0.1
    98.9 and 0.25 96.6.  global_rate: eta_3, of w's steps; None: twice `rate`; eta_3 lambda_p at most 1.
    weighted: average w by training images, else plainly.
    """

    coupling: float = 0.03
    global_rate: float | None = None
    weighted: bool = False

    name: ClassVar[str] = "qupel"
    stackable: ClassVar[bool] = True
    one_architecture: ClassVar[bool] = True
    from_global: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, global_rate=self._global_rate)
        check_share(self.name, **{"eta_3 times coupling": self._global_rate * self.coupling})

    @property
    def _global_rate(self) -> float:
        return 2 * self.rate if self.global_rate is None else self.global_rate

    def start_server(self, job: Job) -> Tensors:
        return parameters(global_model(job))

    def client_step(self, job: Job, client: Client, state: ClientState, broadcast: Tensors, round_index: int) -> Update:
        w = {name: tensor.clone() for name, tensor in broadcast.items()}

        def take_step(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> Tensor:
            loss = optimizer.step(lambda: cross_entropy(model(x), y) + pull(model, w, self.coupling, client.size))
            for name, value in quantized_parameters(model).items():
                w[name] -= self._global_rate * self.coupling * (w[name] - value)
            return loss

        update = self.train(job, client, state, round_index, take_step)
        return replace(update, message=Message(w, len(client.data.train)))

    def server_step(self, job: Job, server: Tensors, messages: Mapping[int, Message]) -> Tensors:
        return aggregate(messages, self.weighted)
