"""FedProx: FedAvg whose local steps are pulled back to the model they started from.

Client: w_i = w, then local SGD steps on f_i(w_i) + (mu / 2) |w_i - w|^2, momentum starting from zero each round.
Server: w <- mean of the drawn w_i.
Travels: w down and w_i up, float32, batch-norm buffers as `batch_norm` says.  Evaluations: 1 a local step.
Li et al. 2020, arXiv:1812.06127.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from fl.algorithms._base import check_momentum
from fl.algorithms._global import Batches, Global, sgd_steps


@dataclass(frozen=True, kw_only=True)
class FedProx(Global):
    """FedProx's hyper-parameters beside those of Global. momentum: of local SGD.  mu: the pull, at least 0."""

    momentum: float = 0.9
    mu: float = 0.1

    name: ClassVar[str] = "fedprox"
    stackable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_momentum(self.name, self.momentum)
        if not 0 <= self.mu < float("inf"):
            raise ValueError(f"{self.name}: mu must be at least 0 and finite, got {self.mu}")

    def train(self, model: nn.Module, rate: float, batches: Batches) -> list[Tensor]:
        return sgd_steps(model, rate, self.momentum, batches, pulled=self.mu)
