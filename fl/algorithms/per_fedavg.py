"""Per-FedAvg: a global model that is good after one gradient step on a client's own data (MAML over clients).

Client: w_i = w; each local step draws batches D, D' (and D''): w~ = w_i - alpha grad f_i(w_i; D), and w_i takes an SGD
step along
    "none"         grad f_i(w~; D'), the paper's FO variant, which drops the Hessian;
    "difference"   g - alpha [grad f_i(w_i + delta g; D'') - grad f_i(w_i - delta g; D'')] / (2 delta), g = grad f_i(w~; D'),
                   the HF variant, whose bracket is the Hessian times g.
Momentum starts from zero each round.
Server: w <- mean of the drawn w_i.
Ships: w after `adapt_steps` gradient steps of rate alpha on the client's own images; say how many when you compare.
Travels: w down and w_i up, float32, batch-norm buffers as `batch_norm` says.  Evaluations a local step: 2, or 4.
Fallah et al. 2020, arXiv:2002.07948.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fl.algorithms._base import check_choice, check_momentum, check_positive
from fl.algorithms._global import Batches, Global
from fl.algorithms._sgd import LocalSGD
from fl.losses import cross_entropy, total_loss

HESSIANS = ("none", "difference")


@dataclass(frozen=True, kw_only=True)
class PerFedAvg(Global):
    """Per-FedAvg's hyper-parameters beside those of Global. rate, momentum: of w_i's step, the paper's beta.

    adapt_rate: the paper's alpha; None: `rate`.  hessian: which of the paper's two variants.  delta: of the differences.
    """

    momentum: float = 0.9
    hessian: str = "none"
    delta: float = 1e-3
    adapt_steps: int = 10

    name: ClassVar[str] = "per_fedavg"
    stackable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_momentum(self.name, self.momentum)
        check_choice(self.name, HESSIANS, hessian=self.hessian)
        check_positive(self.name, delta=self.delta)

    @property
    def batches_a_step(self) -> int:
        return 2 if self.hessian == "none" else 3

    @property
    def step_evaluations(self) -> int:
        return 2 if self.hessian == "none" else 4

    def train(self, model: nn.Module, rate: float, batches: Batches) -> list[Tensor]:
        optimizer = LocalSGD(model, rate, self.momentum)
        parameters = optimizer.parameters
        alpha = self.rate if self.adapt_rate is None else self.adapt_rate
        losses = []

        def gradient(at: list[Tensor], x: Tensor, y: Tensor) -> tuple[list[Tensor], Tensor]:
            with torch.no_grad():
                for parameter, value in zip(parameters, at, strict=True):
                    parameter.copy_(value)
            loss = cross_entropy(model(x), y)
            return optimizer.gradients(total_loss(loss)), loss.detach()

        for x, y in batches:
            w = [parameter.detach().clone() for parameter in parameters]
            inner, _ = gradient(w, x, y)
            step, loss = gradient(_moved(w, inner, -alpha), *next(batches))
            if self.hessian == "difference":
                third = next(batches)
                above, _ = gradient(_moved(w, step, self.delta), *third)
                below, _ = gradient(_moved(w, step, -self.delta), *third)
                step = _moved(_moved(step, above, -alpha / (2 * self.delta)), below, alpha / (2 * self.delta))
            with torch.no_grad():
                for parameter, value in zip(parameters, w, strict=True):
                    parameter.copy_(value)
            optimizer.step(step)
            losses.append(loss)
        return losses


def _moved(values: list[Tensor], along: list[Tensor], by: float) -> list[Tensor]:
    return [value + by * direction for value, direction in zip(values, along, strict=True)]
