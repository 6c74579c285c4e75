"""A federation on several machines: Flower's server and nodes as processes, and what the two sides do within them.

`serve` starts the server and one run, `join` starts a node; what they then do is in engines/deployed.py.
"""

import ctypes
import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from fl import config as configuration
from fl.engines import contact, loop
from fl.errors import UserError, WorkerError
from fl.result import RunResult

_SOURCES = Path(__file__).resolve().parents[2]
LINUX = sys.platform == "linux"
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_START = 60.0  # seconds in which Flower's server must open its port
_BIND_ALL = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # under which Flower's own processes reach such a server
_ENDS_WAITING = ("--max-retries", "--max-wait-time")  # of flower-supernode
_APP = """[project]
name = "qupedkern-federation"
version = "1.0.0"
description = "A run of python -m fl serve"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "qupedkern"

[tool.flwr.app.components]
serverapp = "fl.engines.flower:deployed_server"
clientapp = "fl.engines.flower:deployed_client"

[tool.flwr.app.config]
"""


def flower_environment() -> None:
    """Set, where the user has not, what Flower and Ray read when they are imported: nothing is sent, nothing installed."""
    for name in ("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "FLWR_DISABLE_UPDATE_CHECK"):
        os.environ.setdefault(name, "1")
    for name in ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED"):
        os.environ.setdefault(name, "0")


def serve(
    config: Path,
    overrides: Mapping[str, object],
    out: Path,
    *,
    host: str,
    port: int,
    resume: bool,
    patience: float,
    node_keys: Sequence[Path] = (),
    options: Sequence[str] = (),
) -> RunResult:
    """Start Flower's server, run CONFIG's algorithm on the nodes that join, stop the server.

    node_keys: public keys; where there are any, only nodes that have the private key of one may join.
    options: handed to flower-superlink as they are (TLS, say).  Raises WorkerError where Flower fails.
    """
    chosen = configuration.loads(config.read_text(), str(config)).override(**overrides)
    authority = _option(options, "--ssl-ca-certfile")
    if node_keys and authority is None:
        raise UserError(
            "serve: --node-key needs --ssl-certfile, --ssl-keyfile and --ssl-ca-certfile, nodes prove their keys over TLS"
        )
    for key in node_keys:
        if not key.is_file():
            raise UserError(f"serve: there is no key file {key}, make one with ssh-keygen -t ecdsa -b 384")
    _check_port(host, port)
    with tempfile.TemporaryDirectory(prefix="qupedkern-flower-") as text:
        home = Path(text)
        environment = _environment(home / "home")
        outcome = home / "outcome.json"
        (home / "app").mkdir()
        run_options = {
            "config": config.read_text(),
            "overrides": json.dumps(dict(overrides)),
            "out": str(out.resolve()),
            "outcome": str(outcome),
            "resume": "1" if resume else "0",
            "patience": str(patience),
        }
        lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in run_options.items())
        (home / "app" / "pyproject.toml").write_text(_APP + lines)
        here = _BIND_ALL.get(host, host)
        trusted = f"root-certificates = {json.dumps(str(Path(authority).resolve()))}\n" if authority else None
        address = f"[{here}]:{port}" if ":" in here else f"{here}:{port}"
        connection = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{address}"\n'
        (home / "home" / "config.toml").write_text(connection + (trusted or "insecure = true\n"))
        security = list(options) if authority else [*insecure(host, options), *options]
        security += ["--enable-supernode-auth"] if node_keys and "--enable-supernode-auth" not in options else []
        command = [_program("flower-superlink"), "--host", host, "--port", str(port), *security]
        with _process(command, environment) as server:
            _wait_for(here, port, authority, server)
            flwr = _program("flwr")
            for key in node_keys:
                _admit(flwr, key, environment)
                print(f"serve: the node with the key {key} may join", flush=True)
            subprocess.run([flwr, "run", str(home / "app"), "here", "--stream"], env=environment, check=False)
        if not outcome.exists():
            raise WorkerError("serve: Flower's server app ended without an outcome; its log above tells why")
        problem = json.loads(outcome.read_text())["problem"]
        if problem is not None:
            raise WorkerError(problem)
    return loop.load_result(chosen.algorithm(chosen.experiment.algorithm), out)


def join(
    clients: Sequence[int],
    state: Path,
    *,
    server: str,
    data_directory: Path | None,
    options: Sequence[str] = (),
) -> int:
    """Run a node that has these clients, until it is stopped; returns Flower's exit code, or on POSIX not at all.

    options: for flower-supernode.
    """
    trusted = None if "--insecure" in options else _option(options, "--root-certificates")
    security = [] if trusted else insecure(contact.split_address(server)[0], options)
    program = _program("flower-supernode")
    contact.meet(server, trusted, patient=not any(_option(options, name) for name in _ENDS_WAITING))
    state.mkdir(parents=True, exist_ok=True)
    own = {
        "clients": ",".join(map(str, clients)),
        "data": "" if data_directory is None else str(data_directory.resolve()),
        "state": str(state.resolve()),
    }
    command = [program, "--superlink", server, "--port", str(free_port()), *security, *options]
    command += ["--node-config", " ".join(f"{name}={json.dumps(value)}" for name, value in own.items())]
    environment = _environment(state / "flower")
    if os.name == "posix":  # become the node, so that what stops this process stops it
        sys.stdout.flush()
        os.execve(command[0], command, environment)
    with _process(command, environment) as node:
        return node.wait()


def parse_clients(text: str) -> list[int]:
    """Client numbers from "0", "0,2,5", "0-9" or a mixture."""
    numbers: list[int] = []
    for piece in text.split(","):
        first, dash, last = piece.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise UserError(f"join: clients must be numbers like 0,2,5 or 0-9, got {text!r}")
        numbers.extend(range(int(first), int(last if dash else first) + 1))
    return sorted(set(numbers))


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _option(options: Sequence[str], name: str) -> str | None:
    """The value of an option that is passed on, written `name value` or `name=value`."""
    joined = [option.removeprefix(name + "=") for option in options if option.startswith(name + "=")]
    return joined[-1] if joined else dict(pairwise(options)).get(name)


def insecure(host: str, options: Sequence[str]) -> list[str]:
    """--insecure where nothing leaves this machine; elsewhere it must have been asked for."""
    if "--insecure" in options:
        return []
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback:
        raise UserError(
            f"flower: {host} is another machine, give certificates, as the README shows, or ask for --insecure"
        )
    return ["--insecure"]


def _environment(home: Path) -> dict[str, str]:
    """Flower's home is the run's own; its programs, which start each other by name, are found beside this Python.

    They import the code that runs here, also where that is a source tree beside an installed package of another version.
    """
    flower_environment()
    home.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "FLWR_HOME": str(home.resolve()), "PATH": _search_path()}
    if _SOURCES.name not in ("site-packages", "dist-packages"):  # there it would come before the standard library
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_SOURCES), os.environ.get("PYTHONPATH")]))
    return environment


def _program(name: str) -> str:
    path = shutil.which(name, path=_search_path())
    if path is None:
        raise UserError(f"flower: there is no program {name}, install qupedkern's extra 'flower'")
    return path


def _search_path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


@contextmanager
def _process(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, env=dict(environment), preexec_fn=_die_with_parent if LINUX else None)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # else the child would stay
    try:
        yield process
    finally:
        signal.signal(signal.SIGTERM, before)
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _die_with_parent() -> None:
    """Between fork and exec: have the kernel end this process when its parent dies, of SIGKILL say, and cannot do it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _check_port(host: str, port: int) -> None:
    """Refuse a port that is taken: the run would be handed to whatever server listens there."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"serve: {host}:{port} cannot be listened on ({reason}), choose another --port") from error


def _admit(flwr: str, key: Path, environment: Mapping[str, str]) -> None:
    """Register a node's public key with the server."""
    command = [flwr, "supernode", "register", str(key.resolve()), "here"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        said = " ".join(done.stdout.decode(errors="replace").split())
        raise WorkerError(f"serve: Flower's server does not take the key {key}: {said}")


def _wait_for(host: str, port: int, trusted: str | None, server: subprocess.Popen[bytes]) -> None:
    """Until Flower's server listens; what is wrong with its certificate where Flower's own processes could not talk to it."""
    deadline = time.monotonic() + _START
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise WorkerError(
                f"serve: Flower's server ended with exit code {server.returncode}; its log above tells why"
            )
        try:
            problem = contact.refusal(host, port, trusted)
        except OSError:
            time.sleep(0.2)
            continue
        if problem is not None:
            raise WorkerError(f"serve: Flower's own processes reach the server as {host}, which {problem}")
        return
    raise WorkerError(f"serve: Flower's server did not open {host}:{port} in {_START:.0f} s")
