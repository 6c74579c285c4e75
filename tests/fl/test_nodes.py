"""Nodes that come, go and answer in any order: the bits of the serial engine. The carrier here is a Python object."""

import dataclasses
import json
import random
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fl import Federation, algorithms
from fl import config as configuration
from fl.engines import deployed, loop, nodes
from fl.engines.node import Node, failure, raised
from fl.engines.nodes import Nodes, Reply
from fl.errors import DataError, DivergedError, UserError, WorkerError
from fl.setup import check_served, make_config_clients
from fl.storage import Json, Tensors

Build = Callable[..., Federation]
Outcome = Callable[[Path], dict[str, Any]]
Same = Callable[[Path, Path, Path], bool]


class Post:
    """Brings messages as a network would: late, out of order, and not at all where a node has been killed."""

    def __init__(self, homes: dict[int, Node], seed: int = 0) -> None:
        self.homes, self._random = homes, random.Random(seed)
        self._under_way: dict[str, tuple[int, Json | None, Tensors]] = {}
        self.orders: list[tuple[int, Json]] = []
        self.before_work: Callable[[int, Json], None] = lambda node, order: None

    def nodes(self) -> set[int]:
        return set(self.homes)

    def send(self, node: int, order: Json | None, server: Tensors) -> str:
        identity = str(len(self._under_way) + self._random.random())
        self._under_way[identity] = (node, json.loads(json.dumps(order)), server)
        return identity

    def receive(self, identities: Sequence[str]) -> list[Reply]:
        arrived = [identity for identity in identities if self._random.random() < 0.6]
        self._random.shuffle(arrived)
        return [reply for identity in arrived for reply in self._answer(identity)]

    def _answer(self, identity: str) -> list[Reply]:
        node, order, server = self._under_way.pop(identity)
        if order is not None:
            self.before_work(node, order)
        if node not in self.homes:
            return [Reply(identity, None)]
        if order is None:
            return [Reply(identity, json.loads(json.dumps(self.homes[node].introduce())))]
        self.orders.append((node, order))
        answer, messages = self.homes[node].answer(order, server)
        return [Reply(identity, json.loads(json.dumps(answer)), messages)]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "_POLL", 0.001)


def spread(run: Federation, directory: Path, *numbers: Sequence[int]) -> dict[int, Node]:
    """Nodes of these clients each, with directories of their own."""
    return {
        100 + k: Node(run.algorithm, {number: run.clients[number] for number in own}, directory / str(k), 1)
        for k, own in enumerate(numbers)
    }


def play(run: Federation, post: Post, out: Path, patience: float = 20.0, resume: bool = False) -> loop.RunResult:
    engine = Nodes(post, patience, run.job)
    engine.gather(len(run.clients))
    return run._play(out, lambda _: nullcontext(engine), resume, None)


def personal(directory: Path) -> dict[str, bytes]:
    """The newest state of each client, and its model, in whichever folder they lie."""
    newest: dict[str, tuple[int, bytes]] = {}
    for path in directory.rglob("client_*.safetensors"):
        name, *number = path.name.removesuffix(".safetensors").split(".")
        at, key = int(number[0]) if number else 0, f"{path.parent.name}/{name}"
        newest[key] = max(newest.get(key, (-1, b"")), (at, path.read_bytes()))
    return {key: content for key, (_, content) in newest.items()}


@pytest.fixture
def same(outcome: Outcome) -> Same:
    """Whether a served run, with its nodes' files, is a serial run's outcome, clock times excepted."""

    def compare(served: Path, nodes_of: Path, serial: Path) -> bool:
        one, two = outcome(served), outcome(serial)
        server = [name for name in two if name.startswith("state/server")]
        equal = all(one[name] == two[name] for name in ("records", "summary", *server))
        return equal and personal(nodes_of) == personal(serial)

    return compare


def test_nodes_that_answer_in_any_order_give_the_bits_of_the_serial_engine(
    federation: Build, same: Same, tmp_path: Path
) -> None:
    run = federation(algorithms.QuPeD(local_steps=2), sample=1.0)
    run.run(tmp_path / "serial")
    for seed in range(3):
        post = Post(spread(run, tmp_path / f"nodes{seed}", [2], [3, 0], [1]), seed)
        play(run, post, tmp_path / f"served{seed}")
        assert same(tmp_path / f"served{seed}", tmp_path / f"nodes{seed}", tmp_path / "serial")
        steps = [(node, sorted(order["at"])) for node, order in post.orders if order["verb"] == "step"]
        assert sorted(steps) == sorted([(100, ["2"]), (101, ["0", "3"]), (102, ["1"])] * 3)  # one message a node


def test_a_node_that_dies_and_comes_back_goes_on_with_its_personal_models(
    federation: Build, same: Same, tmp_path: Path
) -> None:
    """It dies before its work, and after it with the answer lost; each time it returns under another name."""
    run = federation(algorithms.QuPeD(local_steps=2), sample=1.0, rounds=4)
    run.run(tmp_path / "serial")
    post = Post(spread(run, tmp_path / "nodes", [0, 1], [2, 3]), 1)
    names = iter(range(200, 300))
    deaths = []

    def dying(node: int, order: Json) -> None:
        if order["verb"] == "step" and order["round"] in (1, 2) and order["round"] not in deaths and "2" in order["at"]:
            deaths.append(order["round"])
            body = post.homes.pop(node)
            if order["round"] == 2:
                body.answer(
                    order, run.algorithm.start_server(run.job)
                )  # done, on another broadcast even; never heard of
            post.homes[next(names)] = body

    post.before_work = dying
    play(run, post, tmp_path / "served")
    assert deaths == [1, 2]
    assert same(tmp_path / "served", tmp_path / "nodes", tmp_path / "serial")


def test_a_served_run_that_was_stopped_continues_to_the_same_bits(
    federation: Build, same: Same, tmp_path: Path
) -> None:
    run = federation(algorithms.QuPeD(local_steps=2), sample=1.0)
    run.run(tmp_path / "serial")
    post = Post(spread(run, tmp_path / "nodes", [0, 1, 2, 3]))

    def stop(node: int, order: Json) -> None:
        if order["verb"] == "score" and order["at"]["0"] == 2:
            raise KeyboardInterrupt

    post.before_work = stop
    with pytest.raises(KeyboardInterrupt):
        play(run, post, tmp_path / "served")
    again = Post(spread(run, tmp_path / "nodes", [0, 1, 2, 3]))
    play(run, again, tmp_path / "served", resume=True)
    assert [order["round"] for _, order in again.orders if order["verb"] == "step"] == [1, 2]
    assert same(tmp_path / "served", tmp_path / "nodes", tmp_path / "serial")


def test_what_a_node_keeps_of_one_experiment_is_not_anothers(
    federation: Build, outcome: Outcome, tmp_path: Path
) -> None:
    """Two runs one after the other on the same nodes, then the first again: states lie apart by experiment and client."""
    runs = [federation(algorithms.QuPeD(local_steps=2), sample=1.0, seed=seed) for seed in (0, 1)]
    for seed in (0, 1, 0):
        run, played = runs[seed], tmp_path / f"served{len(list(tmp_path.glob('served*')))}"
        play(run, Post(spread(run, tmp_path / "nodes", [0, 1], [2, 3])), played)
        if not (tmp_path / f"serial{seed}").exists():
            run.run(tmp_path / f"serial{seed}")
        got, expected = outcome(played), outcome(tmp_path / f"serial{seed}")
        assert all(got[name] == expected[name] for name in ("records", "summary", "state/server.3.safetensors"))
        kept = [path.read_bytes() for path in (tmp_path / "nodes").rglob("client_*.safetensors")]
        assert all(expected[name] in kept for name in expected if "/client_" in name)
    folders = [path for node in (tmp_path / "nodes").iterdir() for path in node.iterdir()]
    assert len(folders) == len(runs) * len(runs[0].clients)


def test_clients_without_a_node_are_named(federation: Build, tmp_path: Path) -> None:
    run = federation(algorithms.Local(local_steps=1))
    with pytest.raises(WorkerError, match=r"no node has answered for clients 1, 3 in 0 s; start it again"):
        play(run, Post(spread(run, tmp_path, [0, 2])), tmp_path / "served", patience=0.05)
    post = Post(spread(run, tmp_path, [0, 1, 2, 3]))
    post.before_work = lambda node, order: post.homes.clear() if order["verb"] == "step" else None
    with pytest.raises(WorkerError, match="no node has answered for clients"):
        play(run, post, tmp_path / "served", patience=0.3)


def test_what_a_clients_work_raises_is_raised_on_the_server(federation: Build, tmp_path: Path) -> None:
    run = federation(algorithms.FedAvg(rate=1e6, local_steps=20))
    with pytest.raises(DivergedError, match=r"client \d in round 1: training has diverged"):
        play(run, Post(spread(run, tmp_path / "nodes", [0, 1, 2, 3])), tmp_path / "served")
    node = spread(run, tmp_path / "other", [0])[100]
    job = {**json.loads(json.dumps(dataclasses.asdict(run.job)))}
    lost, _ = node.answer(
        {"verb": "score", "round": 0, "job": job, "at": {"0": 7}}, run.algorithm.start_server(run.job)
    )
    assert lost["error"] == "CheckpointError"
    assert "client_000.7.safetensors must be a state file" in lost["text"]
    stranger, _ = node.answer({"verb": "score", "round": 0, "job": job, "at": {"9": None}}, {})
    assert isinstance(raised(stranger), WorkerError)


def test_a_server_without_data_makes_the_run_that_its_configuration_describes(
    config_file: Path, config_text: str, same: Same, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = configuration.load(config_file)
    clients = make_config_clients(chosen, None)
    e = chosen.experiment
    Federation(
        algorithm=chosen.algorithm(e.algorithm),
        clients=clients,
        rounds=e.rounds,
        sample=e.sample,
        evaluations=e.evaluations,
    ).run(tmp_path / "serial")
    options = {"config": config_text, "overrides": "{}"}
    homes = {}
    for number in range(3):
        own = {"clients": str(number), "data": "", "state": str(tmp_path / "nodes" / str(number))}
        homes[number] = deployed.open_node(options, own)
    options |= {"out": str(tmp_path / "served"), "outcome": str(tmp_path / "outcome"), "resume": "0", "patience": "20"}
    deployed.serve_run(options, Post(homes))
    told = capsys.readouterr().out.splitlines()
    assert told[:2] == ["serve: waiting for nodes that have clients 0 to 2", "serve: every client has a node"]
    assert [line[: len("serve: round 0 of 2, mean accuracy ")] for line in told[2:]] == [
        f"serve: round {rounds} of 2, mean accuracy " for rounds in range(3)
    ]
    assert json.loads((tmp_path / "outcome").read_text()) == {"problem": None}
    assert same(tmp_path / "served", tmp_path / "nodes", tmp_path / "serial")
    one, two = (json.loads((tmp_path / run / "run.json").read_text()) for run in ("served", "serial"))
    assert one["description"] == two["description"]
    deployed.serve_run(options, Post(homes))
    assert "is not empty, continue with --resume" in json.loads((tmp_path / "outcome").read_text())["problem"]
    with pytest.raises(UserError, match="the run has 3 clients, 0 to 2, this node has 3"):
        deployed.open_node(options, {"clients": "1,3", "data": "", "state": str(tmp_path)})


def test_a_file_whose_form_only_nodes_know_is_refused_when_they_have_said_it(config_text: str, tmp_path: Path) -> None:
    x, y = torch.rand(400, 1, 6, 6).numpy(), (torch.arange(400) % 10).numpy()
    np.savez(tmp_path / "mine.npz", x=x, y=y)
    text = config_text.replace('"digits"', '"mine.npz"').replace("bits = 2", "bits = 2\ngroups = 7")
    check_served(configuration.loads(text))
    options = {"config": text, "overrides": "{}", "out": str(tmp_path / "served"), "outcome": str(tmp_path / "outcome")}
    options |= {"resume": "0", "patience": "20"}
    own = {"clients": "0,1,2", "data": str(tmp_path), "state": str(tmp_path / "node")}
    deployed.serve_run(options, Post({0: deployed.open_node(options, own)}))
    assert (
        "config: quantize_: a block of 7 weights must divide the 36"
        in json.loads((tmp_path / "outcome").read_text())["problem"]
    )
    assert not (tmp_path / "served").exists()


def test_a_node_that_cannot_open_its_data_is_named_and_another_may_take_its_place(
    federation: Build, same: Same, tmp_path: Path
) -> None:
    run = federation(algorithms.QuPeD(local_steps=1))
    run.run(tmp_path / "serial")
    post = Post(spread(run, tmp_path / "nodes", [0, 1], [2, 3]))
    broken = _Broken(run.algorithm, {}, tmp_path / "broken", 1)
    with pytest.warns(UserWarning, match="a node cannot take part: data: no such file"):
        play(run, Post({**post.homes, 300: broken}), tmp_path / "served")
    assert same(tmp_path / "served", tmp_path / "nodes", tmp_path / "serial")
    with (
        pytest.warns(UserWarning, match="a node cannot take part"),
        pytest.raises(WorkerError, match=r"for clients 2, 3 in 0 s \(one said: data: no such file\); start it again"),
    ):
        play(run, Post({100: post.homes[100], 300: broken}), tmp_path / "alone", patience=0.3)


class _Broken(Node):
    def introduce(self) -> Json:
        return failure(DataError("data: no such file"))


def test_flower_is_imported_by_one_file_alone() -> None:
    root = Path(__file__).parents[2] / "fl"
    files = {
        p.relative_to(root).as_posix()
        for p in root.rglob("*.py")
        if re.search(r"^\s*(from|import) flwr", p.read_text(), re.M)
    }
    assert files == {"engines/flower.py"}
