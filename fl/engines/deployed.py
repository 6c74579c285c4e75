"""What the two sides of a deployment do within the processes that a carrier starts for them.

The run's configuration travels as text; a node adds what only it knows: which clients it has, where their data is, where it
keeps what is theirs.
"""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

from fl import config as configuration
from fl import data
from fl.checkpoint import describe
from fl.engines import loop
from fl.engines.node import Node
from fl.engines.nodes import Carrier, Nodes
from fl.errors import ConfigError, UserError
from fl.result import RunResult
from fl.setup import make_absent_clients, make_config_clients, make_config_federation
from fl.storage import write_atomic


def _chosen(options: Mapping[str, str]) -> configuration.Config:
    return configuration.loads(options["config"]).override(**json.loads(options["overrides"]))


def open_node(options: Mapping[str, str], own: Mapping[str, str]) -> Node:
    """A node, from the run's options and its own (clients, data, state)."""
    chosen = _chosen(options)
    clients = make_config_clients(chosen, data.data_directory(own["data"] or None))
    here = [int(number) for number in own["clients"].split(",")]
    absent = [number for number in here if number >= len(clients)]
    if absent:
        raise UserError(f"join: the run has {len(clients)} clients, 0 to {len(clients) - 1}, this node has {absent[0]}")
    algorithm = chosen.algorithm(chosen.experiment.algorithm)
    return Node(algorithm, {number: clients[number] for number in here}, Path(own["state"]), chosen.experiment.threads)


def serve_run(options: Mapping[str, str], carrier: Carrier) -> None:
    """The server's side of a run; how it ended is left in a file, since Flower's exit codes do not tell."""
    problem = None
    try:
        play(
            _chosen(options), Nodes(carrier, float(options["patience"])), Path(options["out"]), options["resume"] == "1"
        )
    except UserError as error:
        problem = str(error)
    except Exception as error:
        problem = f"serve: {type(error).__name__}: {error}"
        raise
    finally:
        write_atomic(Path(options["outcome"]), json.dumps({"problem": problem}).encode())


def play(chosen: configuration.Config, nodes: Nodes, out: Path, resume: bool) -> RunResult:
    """Wait for the nodes, learn from them what the task is, and run the rounds; no data is needed here."""
    experiment, count = chosen.experiment, len(chosen.equipment)
    _tell(f"waiting for nodes that have clients 0 to {count - 1}")
    said = nodes.gather(count)
    _tell("every client has a node")
    shapes = sorted({tuple(one["input_shape"]) for one in said.values()})
    if len(shapes) != 1:
        raise ConfigError(f"serve: clients must have images of one shape, got {', '.join(map(str, shapes))}")
    clients = make_absent_clients(chosen, shapes[0], max(one["num_classes"] for one in said.values()))
    federation = make_config_federation(chosen, experiment.algorithm, clients)
    job, algorithm = federation.job, federation.algorithm
    nodes.job = job
    description = describe(job, algorithm, [said[number]["profile"] for number in range(count)])
    return loop.run(
        job,
        algorithm,
        count,
        description,
        out,
        lambda _: nullcontext(nodes),
        resume=resume,
        threads=experiment.threads,
        on_round=lambda rounds, record: _tell(
            f"round {rounds} of {experiment.rounds}, mean accuracy {100 * record['accuracy_mean']:.1f} %"
        ),
    )


def _tell(what: str) -> None:
    """A line of the server app, which `serve` shows among Flower's."""
    print(f"serve: {what}", flush=True)
