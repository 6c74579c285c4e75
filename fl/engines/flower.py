"""Flower as the way to the nodes: a ServerApp and a ClientApp around engines/nodes.py; the only file that imports flwr (1.41).

Flower's node ids, its sampler and its strategies are not used: clients are drawn by our own seed and averaged in order of
their numbers. What a node keeps lies in files of its own, as Context.state ends with the process.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fl.algorithms import Algorithm
from fl.core import Client, Job
from fl.engines import deployed
from fl.engines.loop import OpenEngine
from fl.engines.node import Node, failure
from fl.engines.nodes import Carrier, Nodes, Reply
from fl.engines.shared import Layout, join, part, remove, share, shared_directory
from fl.result import RunResult
from fl.storage import Json, Tensors

RAW = "qupedkern.tensor.v1"  # how an Array holds a type that NumPy has not: row-major, little-endian
PACKED = "qupedkern.packed.v1"  # the codes of a packed weight: their bytes, as pack_codes writes them
SIMULATED_PATIENCE = 600.0  # seconds: a client's step may be long, and a simulated node does not go away


# -- tensors in Flower's records --------------------------------------------------------------------------------------


def to_record(tensors: Tensors) -> ArrayRecord:
    """Tensors by name as Flower's arrays: PACKED for codes, NumPy's form where NumPy has the type, else RAW."""
    return ArrayRecord({name: _to_array(name, tensor.detach().cpu().contiguous()) for name, tensor in tensors.items()})


def _to_array(name: str, tensor: torch.Tensor) -> Array:
    form = PACKED if name.endswith(".packed") else RAW
    if form == RAW and tensor.dtype is not torch.bfloat16:
        return Array(tensor.numpy())
    data = tensor.flatten().view(torch.uint8).numpy().tobytes()
    return Array(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), form, data)


def from_record(record: ArrayRecord) -> Tensors:
    """What to_record was given."""
    return {str(name): _from_array(array) for name, array in record.items()}


def _from_array(array: Array) -> torch.Tensor:
    if array.stype not in (RAW, PACKED):
        return torch.from_numpy(array.numpy().copy())
    if not array.data:
        return torch.empty(array.shape, dtype=getattr(torch, array.dtype))
    flat = torch.frombuffer(bytearray(array.data), dtype=getattr(torch, array.dtype))
    return flat.view(array.shape)


# -- on a node --------------------------------------------------------------------------------------------------------


def client_app(open_node: Callable[[Context], Node]) -> ClientApp:
    """The app that nodes run: a query asks which clients a node has, everything else is work."""
    app = ClientApp()

    @app.query()
    def query(message: FlowerMessage, context: Context) -> FlowerMessage:
        try:
            said = open_node(context).introduce()
        except Exception as error:  # data that is not there, say: the server must hear why
            said = failure(error)
        return _reply(message, said, {})

    @app.train()
    def train(message: FlowerMessage, context: Context) -> FlowerMessage:
        server = from_record(message.content.array_records["server"])
        return _reply(message, *open_node(context).answer(_read(message, "order"), server))

    return app


def _reply(to: FlowerMessage, answer: Json, messages: Mapping[int, Tensors]) -> FlowerMessage:
    records = {f"message.{number}": to_record(tensors) for number, tensors in messages.items()}
    return FlowerMessage(RecordDict({**_json("answer", answer), **records}), reply_to=to)


def _json(name: str, content: Json) -> dict[str, ConfigRecord]:
    return {name: ConfigRecord({"json": json.dumps(content)})}


def _read(message: FlowerMessage, name: str) -> Json:
    return json.loads(str(message.content.config_records[name]["json"]))


# -- on the server ----------------------------------------------------------------------------------------------------


class Post(Carrier):
    """Flower's grid as a carrier."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def nodes(self) -> set[int]:
        return set(self._grid.get_node_ids())

    def send(self, node: int, order: Json | None, server: Tensors) -> str:
        content, kind = (RecordDict(), "query") if order is None else (RecordDict(_json("order", order)), "train")
        if order is not None:
            content["server"] = to_record(server)
        (identity,) = self._grid.push_messages([FlowerMessage(content, node, kind)])
        return identity

    def receive(self, identities: Sequence[str]) -> list[Reply]:
        return [_heard(reply) for reply in self._grid.pull_messages(identities)]


def _heard(reply: FlowerMessage) -> Reply:
    identity = reply.metadata.reply_to_message_id
    if reply.has_error():
        return Reply(identity, None)
    records = {name: record for name, record in reply.content.array_records.items() if name.startswith("message.")}
    messages = {int(name.removeprefix("message.")): from_record(record) for name, record in records.items()}
    return Reply(identity, _read(reply, "answer"), messages)


# -- simulation: the nodes are Ray's workers --------------------------------------------------------------------------


@dataclass(frozen=True)
class SimulatedNode:
    """Opens node k of `count`: the clients whose number is k modulo count, on data in memory that all nodes map."""

    algorithm: Algorithm
    devices: list[Client]
    data: Layout
    directory: Path
    threads: int
    count: int

    def __call__(self, context: Context) -> Node:
        own = self.devices[int(context.node_config["partition-id"]) :: self.count]
        return Node(self.algorithm, join(own, _opened(self.data.path, self.data)), self.directory, self.threads, False)


_OPENED: dict[Path, Tensors] = {}


def _opened(path: Path, data: Layout) -> Tensors:
    if path not in _OPENED:
        _OPENED[path] = data.open()
    return _OPENED[path]


def simulate(
    job: Job,
    algorithm: Algorithm,
    clients: Sequence[Client],
    directory: Path,
    threads: int,
    nodes: int,
    play: Callable[[OpenEngine], RunResult],
) -> RunResult:
    """Run a federation under Flower's simulation with that many nodes, each a process of one CPU.

    play: runs the round loop on an engine; it is called in the server app.
    """
    shared = shared_directory()
    results: list[RunResult] = []
    failures: list[BaseException] = []
    try:
        devices, tensors = part(clients)
        data = share(shared / "data", tensors)
        node = SimulatedNode(algorithm, devices, data, directory.resolve(), threads, nodes)
        server = ServerApp()

        @server.main()
        def main(grid: Grid, context: Context) -> None:
            @contextmanager
            def open_engine(_: int) -> Iterator[Nodes]:
                engine = Nodes(Post(grid), SIMULATED_PATIENCE, job)
                engine.gather(len(clients))
                yield engine

            try:
                results.append(play(open_engine))
            except BaseException as error:  # Ctrl-C too: Flower would swallow it, so it is raised once Flower has ended
                failures.append(error)

        resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": nodes}}
        run_simulation(server, client_app(node), nodes, backend_config=resources)
    finally:
        remove(shared)
    if failures:
        raise failures[0]
    return results[0]


# -- deployment: the apps that Flower's processes load, named in engines/deployment.py -------------

deployed_server = ServerApp()


@deployed_server.main()
def _serve(grid: Grid, context: Context) -> None:
    deployed.serve_run({name: str(value) for name, value in context.run_config.items()}, Post(grid))


def _deployed_node(context: Context) -> Node:
    return deployed.open_node(
        {name: str(value) for name, value in context.run_config.items()},
        {name: str(value) for name, value in context.node_config.items()},
    )


deployed_client = client_app(_deployed_node)
