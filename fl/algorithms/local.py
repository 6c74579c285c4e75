"""Local training: each client alone with its data, at its own architecture and bits.

Client: local steps of Algorithm 1 on f_i, x_i then c_i, as QuPeD makes them with lambda_p = 0 and no global model.
Server: nothing.
Travels: nothing.  Evaluations a local step: 2 ("simultaneous", "hard") or 3 ("alternating"); 1 once the weights are
frozen, and for clients in float.
Ozkara et al. 2021, arXiv:2107.13892.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from fl.algorithms._personal import Optimizer, Personal
from fl.core import Client, ClientState, Job, Update
from fl.losses import cross_entropy
from fl.storage import Tensors


@dataclass(frozen=True, kw_only=True)
class Local(Personal):
    """Local training's hyper-parameters; Personal says what each means."""

    name: ClassVar[str] = "local"
    stackable: ClassVar[bool] = True

    def client_step(self, job: Job, client: Client, state: ClientState, broadcast: Tensors, round_index: int) -> Update:
        def take_step(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> Tensor:
            return optimizer.step(lambda: cross_entropy(model(x), y))

        return self.train(job, client, state, round_index, take_step)
