"""Flower itself: its simulation, and a real deployment of processes, against the serial engine. Needs the extra 'flower'."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

Outcome = Callable[[Path], dict[str, Any]]
FLWR = importlib.util.find_spec("flwr")

pytestmark = [
    pytest.mark.skipif(FLWR is None, reason="FLOWER NOT CHECKED: flwr is missing, install qupedkern[flower]"),
    pytest.mark.skipif(not hasattr(os, "killpg"), reason="this system has no process groups"),
]
ROOT = Path(__file__).parents[2]
PATIENCE = 30 * 60.0  # seconds; Flower starts a process a message, each of which imports torch


@pytest.fixture
def config_text(config_text: str) -> str:
    """Two clients of one kind and two of another, three rounds."""
    text = config_text.replace("rounds = 2", "rounds = 3").replace("count = 3", "count = 2")
    return text + '\n[[clients]]\ncount = 2\narchitecture = "cnn"\nbits = "ternary"\n'


class Programs:
    """`python -m fl ...` with all that this process sees; every process of a test ends with it."""

    def __init__(self, directory: Path) -> None:
        assert FLWR is not None
        assert FLWR.origin is not None
        scripts = Path(FLWR.origin).parents[1] / "bin"  # where flwr was installed apart from this environment
        self._directory = directory
        self._environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
            "PATH": os.pathsep.join([str(scripts), os.environ.get("PATH", "")]),
            "FLWR_HOME": str(directory / "flower-home"),
        }
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: object) -> subprocess.Popen[bytes]:
        log = open(self._directory / f"log{len(self._running)}.txt", "wb")  # noqa: SIM115 (the process writes to it)
        command = [sys.executable, "-m", "fl", *map(str, arguments)]
        process = subprocess.Popen(
            command, env=self._environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        log.close()
        self._running.append(process)
        return process

    def run(self, *arguments: object) -> None:
        process = self.start(*arguments)
        assert process.wait(PATIENCE) == 0, self.logs()

    def log(self, process: subprocess.Popen[bytes]) -> str:
        path = self._directory / f"log{self._running.index(process)}.txt"
        return path.read_text(errors="replace")

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(self._directory.glob("log*.txt")))

    def close(self) -> None:
        for process in self._running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    started = Programs(tmp_path)
    yield started
    started.close()


@pytest.fixture
def serial(programs: Programs, config_file: Path, tmp_path: Path) -> Path:
    programs.run("run", config_file, "--out", tmp_path / "serial")
    return tmp_path / "serial" / "quped"


@pytest.mark.filterwarnings("ignore")  # of the packages that flwr imports
def test_tensors_of_every_type_survive_flowers_records() -> None:
    import torch

    from fl.engines.flower import PACKED, RAW, from_record, to_record

    tensors = {
        "float": torch.randn(3, 4),
        "strided": torch.arange(12.0).reshape(3, 4).T,
        "half": torch.randn(2, 3).bfloat16(),
        "count": torch.tensor(7),
        "empty": torch.empty(0, 5),
        "empty half": torch.empty(0, 5, dtype=torch.bfloat16),
        "weight.packed": torch.arange(9, dtype=torch.uint8),
    }
    record = to_record(tensors)
    assert [record[name].stype for name in ("float", "half", "weight.packed")] == ["numpy.ndarray", RAW, PACKED]
    assert record["weight.packed"].data == bytes(range(9))
    for name, tensor in from_record(record).items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name])


def test_the_simulation_gives_the_bits_of_the_serial_engine(
    outcome: Outcome, programs: Programs, config_file: Path, serial: Path, tmp_path: Path
) -> None:
    programs.run("run", config_file, "--out", tmp_path / "sim", "--engine", "flower", "--workers", 2)
    assert outcome(tmp_path / "sim" / "quped") == outcome(serial)


@dataclass
class Deployment:
    """A server and two nodes on this machine, and what they leave."""

    programs: Programs
    directory: Path
    port: int

    def serve(self, config: Path, *options: object) -> subprocess.Popen[bytes]:
        out = self.directory / "served"
        return self.programs.start("serve", config, "--out", out, "--port", self.port, "--patience", 600, *options)

    def join(self, clients: str, *options: object) -> subprocess.Popen[bytes]:
        state, server = self.directory / f"node{clients}", f"127.0.0.1:{self.port}"
        return self.programs.start("join", clients, "--state", state, "--server", server, *options)

    def refused(self, *options: object) -> str:
        """What a node says that cannot join; it must end by itself."""
        process = self.join("0", *options)
        assert process.wait(PATIENCE) != 0, self.programs.logs()
        return self.programs.log(process)

    def trained(self) -> list[Path]:
        return sorted(self.directory.glob("node*/*/state/client_*"))

    def assert_same(self, serial: Path, outcome: Outcome) -> None:
        """The bits of a serial run: records, global model, and what each node has kept and shipped."""
        got, expected = outcome(self.directory / "served" / "quped"), outcome(serial)
        (server,) = [name for name in expected if name.startswith("state/server")]
        for name in ("records", "summary", server):
            assert got[name] == expected[name]
        for path in [*serial.glob("state/client_*"), *serial.glob("models/client_*")]:
            (kept,) = self.directory.glob(f"node*/*/{path.parent.name}/{path.name}")
            assert kept.read_bytes() == path.read_bytes(), path.name


@pytest.fixture
def deployment(programs: Programs, tmp_path: Path) -> Deployment:
    from fl.engines.deployment import free_port

    return Deployment(programs, tmp_path, free_port())


def test_a_deployment_gives_the_bits_of_the_serial_engine_though_a_node_is_killed(
    outcome: Outcome, deployment: Deployment, config_file: Path, serial: Path
) -> None:
    """A server and two nodes; one is killed when it has trained, and started again with the same directory."""
    server = deployment.serve(config_file)
    running = {clients: deployment.join(clients) for clients in ("0,1", "2-3")}
    deadline = time.monotonic() + PATIENCE
    while not (trained := deployment.trained()):
        assert time.monotonic() < deadline, deployment.programs.logs()
        assert server.poll() is None, deployment.programs.logs()
        time.sleep(0.05)
    victim = trained[0].relative_to(deployment.directory).parts[0].removeprefix("node")
    os.killpg(running[victim].pid, signal.SIGKILL)
    running[victim].wait()
    assert server.poll() is None, "the run ended before the node could be killed"
    deployment.join(victim)
    assert server.wait(PATIENCE) == 0, deployment.programs.logs()
    deployment.assert_same(serial, outcome)


@pytest.fixture
def tls(certificates: Path) -> list[object]:
    """Options of a server with a certificate for this machine."""
    names = {"--ssl-certfile": "server.pem", "--ssl-keyfile": "server.key", "--ssl-ca-certfile": "ca.pem"}
    return [text for option, name in names.items() for text in (option, certificates / name)]


@pytest.fixture
def short(config_file: Path, config_text: str) -> Path:
    """One round: what is tested is the connection."""
    config_file.write_text(config_text.replace("rounds = 3", "rounds = 1"))
    return config_file


def test_a_deployment_over_tls_gives_the_serial_engines_bits_and_refuses_nodes_that_do_not_trust_it(
    outcome: Outcome, deployment: Deployment, short: Path, serial: Path, certificates: Path, tls: list[object]
) -> None:
    server = deployment.serve(short, *tls, "--host", "0.0.0.0")
    said = deployment.refused("--root-certificates", certificates / "other.pem")
    assert said.endswith("other.pem: unable to get local issuer certificate\n")
    assert deployment.refused().endswith(
        "does not speak plain HTTP, if it has a certificate give --root-certificates\n"
    )
    for clients in ("0,1", "2-3"):
        deployment.join(clients, "--root-certificates", certificates / "ca.pem")
    assert server.wait(PATIENCE) == 0, deployment.programs.logs()
    assert "serve: round 1 of 1, mean accuracy " in deployment.programs.log(server)
    deployment.assert_same(serial, outcome)


def write_key(path: Path) -> None:
    """A key of the kind that Flower's nodes prove themselves with, as ssh-keygen writes it; the public one in .pub."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.OpenSSH, form.NoEncryption()))
    public = key.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH)
    path.with_suffix(".pub").write_bytes(public)


def test_nodes_that_prove_their_keys_give_the_serial_engines_bits_and_others_may_not_join(
    outcome: Outcome, deployment: Deployment, short: Path, serial: Path, certificates: Path, tls: list[object]
) -> None:
    keys = {name: deployment.directory / f"key{name}" for name in ("0,1", "2-3", "stranger")}
    for path in keys.values():
        write_key(path)
    allowed = [keys[name].with_suffix(".pub") for name in ("0,1", "2-3")]
    server = deployment.serve(short, *tls, *(text for path in allowed for text in ("--node-key", path)))
    deadline = time.monotonic() + PATIENCE
    while not all(
        f"serve: the node with the key {path} may join" in deployment.programs.log(server) for path in allowed
    ):
        assert time.monotonic() < deadline, deployment.programs.logs()
        assert server.poll() is None, deployment.programs.logs()
        time.sleep(0.05)
    trusting = ["--root-certificates", certificates / "ca.pem"]
    assert "All SuperNodes must be registered" in deployment.refused(*trusting)
    said = deployment.refused(*trusting, "--auth-supernode-private-key", keys["stranger"])
    assert "Failed to activate SuperNode" in said
    for clients in ("0,1", "2-3"):
        deployment.join(clients, *trusting, "--auth-supernode-private-key", keys[clients])
    assert server.wait(PATIENCE) == 0, deployment.programs.logs()
    deployment.assert_same(serial, outcome)
