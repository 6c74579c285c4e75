"""FedAvg: one float model for all, the mean of what the drawn clients make of it.

Client: w_i = w, then local SGD steps w_i <- w_i - rate grad f_i(w_i), momentum starting from zero each round.
Server: w <- mean of the drawn w_i.  In the last rounds (from `decay_at` of them) the rate is a tenth, as it is for the
methods that freeze there.
Travels: w down and w_i up, float32, batch-norm buffers as `batch_norm` says.  Evaluations: 1 a local step.
Ships: w, or what `adapt_steps` of SGD on the client's own images make of it ("FedAvg with fine-tuning").
McMahan et al. 2017, arXiv:1602.05629.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from fl.algorithms._base import check_momentum
from fl.algorithms._global import Batches, Global, sgd_steps


@dataclass(frozen=True, kw_only=True)
class FedAvg(Global):
    """FedAvg's hyper-parameters beside those of Global. momentum: of local SGD."""

    momentum: float = 0.9

    name: ClassVar[str] = "fedavg"
    stackable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_momentum(self.name, self.momentum)

    def train(self, model: nn.Module, rate: float, batches: Batches) -> list[Tensor]:
        return sgd_steps(model, rate, self.momentum, batches)
