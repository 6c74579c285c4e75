"""The algorithms, one a file. To add one: a new file with a subclass of Algorithm, and one import line here."""

from inspect import isabstract

from fl.algorithms._base import Algorithm as Algorithm
from fl.algorithms._global import Global as Global
from fl.algorithms.ditto import Ditto as Ditto
from fl.algorithms.fedavg import FedAvg as FedAvg
from fl.algorithms.fedprox import FedProx as FedProx
from fl.algorithms.fml import FML as FML
from fl.algorithms.local import Local as Local
from fl.algorithms.per_fedavg import PerFedAvg as PerFedAvg
from fl.algorithms.pfedme import PFedMe as PFedMe
from fl.algorithms.quped import QuPeD as QuPeD
from fl.algorithms.qupel import QuPeL as QuPeL

BY_NAME: dict[str, type[Algorithm]] = {
    value.name: value
    for value in list(vars().values())
    if isinstance(value, type) and issubclass(value, Algorithm) and not isabstract(value)
}
