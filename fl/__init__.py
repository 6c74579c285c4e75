"""Federated learning with personal quantized models: clients, a server, and what passes between them.

from fl import Federation, algorithms, data, make_clients
clients = make_clients(data.digits(), [("mlp", 1), ("cnn", 2), ("mlp", 4)] * 4, classes_per_client=[3, 4], seed=0)
run = Federation(algorithm=algorithms.QuPeD(distill=0.25), clients=clients, rounds=60, sample=0.25, seed=0).run()
run.table(); run.plot("run.png")
"""

from fl import algorithms as algorithms
from fl import data as data
from fl.core import Client as Client
from fl.core import ClientState as ClientState
from fl.core import make_clients as make_clients
from fl.errors import UserError as UserError
from fl.federation import Federation as Federation
from fl.result import RunResult as RunResult
from fl.wire import Wire as Wire
