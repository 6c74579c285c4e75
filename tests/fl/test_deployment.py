"""`python -m fl serve` and `join`: what they refuse, what they hand to Flower's programs, and that none of these is left behind.

Scripts stand in for Flower's programs; test_flower.py has the programs themselves.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fl import config as configuration
from fl import data
from fl.__main__ import app
from fl.engines import contact, deployment
from fl.engines.deployment import insecure, parse_clients
from fl.errors import ConfigError, UserError
from fl.setup import check_served

PYTHON = sys.executable


def test_clients_of_a_node_are_written_as_numbers_and_ranges() -> None:
    assert parse_clients("4") == [4]
    assert parse_clients("7,0-3,2") == [0, 1, 2, 3, 7]
    for text in ("", "a", "3-1", "1-", "-1", "1,,2"):
        with pytest.raises(UserError, match="clients must be numbers like 0,2,5 or 0-9"):
            parse_clients(text)


def test_only_the_loopback_interface_is_used_without_certificates() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.8.9.10"):
        assert insecure(host, []) == ["--insecure"]
    assert insecure("10.0.0.7", ["--insecure"]) == []
    for host in ("0.0.0.0", "10.0.0.7", "server.example"):
        with pytest.raises(UserError, match="is another machine, give certificates"):
            insecure(host, [])


class Programs:
    """Flower's programs as scripts that write down how they were called, and do what a test says."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setattr(sys, "executable", str(directory / "python"))  # programs are looked for beside it first

    def write(self, name: str, then: str) -> None:
        path = self.directory / name
        path.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{self.directory}/{name}.called"\n{then}\n')
        path.chmod(0o755)

    def called(self, name: str) -> list[str]:
        return (self.directory / f"{name}.called").read_text().splitlines()


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    (tmp_path / "bin").mkdir()
    return Programs(tmp_path / "bin", monkeypatch)


REFUSED: list[tuple[str, Callable[[str], str], list[str]]] = [
    ("no rounds", lambda text: text, ["--rounds", "0"]),
    ("unknown algorithm", lambda text: text, ["--algorithm", "fedsgd"]),
    ("an architecture beside", lambda text: text.replace('"mlp"', '"cnn"'), ["--algorithm", "qupel"]),
    ("a granularity", lambda text: text.replace("bits = 2", "bits = 2\ngroups = 7"), []),
    ("a budget", lambda text: text + "[algorithms.pfedme]\ninner_steps = 7\n", ["--algorithm", "pfedme"]),
    ("a smaller budget", lambda text: text.replace("evaluations = 6", "evaluations = 3"), []),
    ("no sample", lambda text: text.replace("sample = 0.5", "sample = 0.0"), []),
    ("a chance", lambda text: text.replace("sample = 0.5", "sample = 0.5\ndropout = 1.0"), []),
    ("classes", lambda text: text.replace("[4, 5]", "[2, 3]"), []),
    ("a data set", lambda text: text.replace('"digits"', '"numerals"'), []),
    ("blocks", lambda text: text.replace('"digits"', '"digits"\nshrink = 3'), []),
    ("a resnet", lambda text: text.replace('"digits"', '"digits"\nshrink = 8').replace('"mlp"', '"resnet8"'), []),
    ("a full directory", lambda text: text, ["--out", "."]),
    ("nothing to resume", lambda text: text, ["--out", ".", "--resume"]),
    ("a file as directory", lambda text: text, ["--out", "tiny.toml"]),
]


@pytest.mark.parametrize(("edit", "arguments"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_run_refuses_serve_refuses_with_the_same_sentence_before_anything_starts(
    config_file: Path,
    config_text: str,
    monkeypatch: pytest.MonkeyPatch,
    edit: Callable[[str], str],
    arguments: list[str],
) -> None:
    config_file.write_text(edit(config_text))
    monkeypatch.chdir(config_file.parent)
    monkeypatch.setattr(deployment, "_program", lambda name: pytest.fail(f"{name} is looked for"))
    run, serve = (CliRunner().invoke(app, [verb, "tiny.toml", *arguments]) for verb in ("run", "serve"))
    assert (serve.exit_code, serve.stderr) == (run.exit_code, run.stderr)
    assert serve.exit_code == 2
    assert serve.stderr.count("\n") == 1
    assert list(config_file.parent.iterdir()) == [config_file]


def test_serve_refuses_a_backend_that_is_not_there(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUPEDKERN_BACKEND", "bogus")
    monkeypatch.setattr(deployment, "_program", lambda name: pytest.fail(f"{name} is looked for"))
    result = CliRunner().invoke(app, ["serve", str(config_file)])
    assert result.exit_code == 2
    assert result.stderr.startswith("QUPEDKERN_BACKEND: the backend must be one of")


@pytest.mark.parametrize("name", sorted(set(data.NAMES) - set(data.EMBEDDED)))
def test_what_does_not_fit_a_data_sets_form_is_refused_without_its_files(
    config_text: str, config_file: Path, name: str
) -> None:
    text = config_text.replace('"digits"', f'"{name}"').replace("bits = 2", "bits = 2\ngroups = 7")
    config_file.write_text(text)
    with pytest.raises(ConfigError, match=r"^config: quantize_: a block of 7 weights must divide"):
        check_served(configuration.load(config_file))
    config_file.write_text(text.replace("groups = 7", "groups = 2"))
    check_served(configuration.load(config_file))


def test_the_forms_of_data_sets_are_those_of_their_loaders(digits: data.Dataset) -> None:
    assert data.form("digits") == (digits.input_shape, digits.num_classes)
    assert data.form("mine.npz") is None


SERVER = """exec {python} -c "import socket, time; s = socket.create_server(('127.0.0.1', {port})); time.sleep(60)" """
RUN = """cp "$FLWR_HOME/config.toml" {directory}/connection.toml
{python} - "$2/pyproject.toml" <<'END'
import json, pathlib, sys
lines = dict(line.split(" = ", 1) for line in open(sys.argv[1]).read().splitlines() if " = " in line)
pathlib.Path(json.loads(lines["outcome"])).write_text(json.dumps({{"problem": "stopped by the test"}}))
END"""
QUIET = {  # what Flower and Ray read when they are imported
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
TLS = ["--ssl-certfile", "a.pem", "--ssl-keyfile", "a.key", "--ssl-ca-certfile", "ca.pem"]
AUTHORITY = 'root-certificates = "{here}/ca.pem"'


@pytest.mark.skipif(os.name != "posix", reason="shell scripts stand in for Flower's programs")
@pytest.mark.parametrize(
    ("host", "options", "passed", "connection"),
    [
        ("127.0.0.1", [], ["--insecure"], "insecure = true"),
        ("127.0.0.1", ["--enable-supernode-auth"], ["--insecure", "--enable-supernode-auth"], "insecure = true"),
        ("127.0.0.1", TLS, TLS, AUTHORITY),
        ("127.0.0.1", [*TLS, "--enable-supernode-auth"], [*TLS, "--enable-supernode-auth"], AUTHORITY),
        ("localhost", ["--ssl-ca-certfile=ca.pem"], ["--ssl-ca-certfile=ca.pem"], AUTHORITY),
        ("0.0.0.0", TLS, TLS, AUTHORITY),
    ],
)
def test_what_serve_does_not_know_goes_to_flowers_server(
    programs: Programs,
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    options: list[str],
    passed: list[str],
    connection: str,
) -> None:
    port = deployment.free_port()
    programs.write("flower-superlink", SERVER.format(python=PYTHON, port=port))
    programs.write("flwr", RUN.format(python=PYTHON, directory=tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(contact, "refusal", lambda *_: None)  # test_contact.py has what it says
    arguments = ["serve", str(config_file), "--out", str(tmp_path / "out"), "--host", host, "--port", str(port)]
    result = CliRunner().invoke(app, [*arguments, *options])
    assert (result.exit_code, result.stderr) == (2, "stopped by the test\n")
    assert programs.called("flower-superlink") == ["--host", host, "--port", str(port), *passed]
    assert programs.called("flwr")[0::2] == ["run", "here"]
    written = (tmp_path / "connection.toml").read_text()
    assert f'address = "{host.replace("0.0.0.0", "127.0.0.1")}:{port}"' in written
    assert connection.format(here=tmp_path) in written
    assert ("insecure" in written) == (connection == "insecure = true")


def test_a_port_that_another_server_has_is_refused_before_anything_starts(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run would be handed to that server, which may be another federation's."""
    monkeypatch.setattr(deployment, "_program", lambda name: pytest.fail(f"{name} is looked for"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for host in ("127.0.0.1", "localhost"):
            arguments = ["serve", str(config_file), "--out", str(tmp_path / "out"), "--host", host, "--port", str(port)]
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 2
            assert result.stderr.startswith(f"serve: {host}:{port} cannot be listened on (")
            assert result.stderr.endswith("), choose another --port\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name != "posix", reason="shell scripts stand in for Flower's programs")
def test_flower_sends_nothing_installs_nothing_and_has_a_home_of_its_own(
    programs: Programs, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*QUIET, "FLWR_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", "of the user")
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")  # what the user says stands
    port = deployment.free_port()
    programs.write("flower-superlink", f'env > "{tmp_path}/superlink.env"; ' + SERVER.format(python=PYTHON, port=port))
    keep = f'env > "{tmp_path}/flwr.env"; cp "$2/pyproject.toml" "{tmp_path}/app.toml"\n'
    programs.write("flwr", keep + RUN.format(python=PYTHON, directory=tmp_path))
    monkeypatch.setattr(contact, "refusal", lambda *_: None)
    arguments = ["serve", str(config_file), "--out", str(tmp_path / "out"), "--port", str(port)]
    assert CliRunner().invoke(app, arguments).stderr == "stopped by the test\n"
    for program in ("superlink", "flwr"):
        lines = (tmp_path / f"{program}.env").read_text().splitlines()
        seen = dict(line.split("=", 1) for line in lines if "=" in line)
        assert {name: seen[name] for name in QUIET} == QUIET | {"FLWR_TELEMETRY_ENABLED": "1"}
        assert "qupedkern-flower-" in seen["FLWR_HOME"]
        assert (
            seen["PYTHONPATH"] == f"{Path(configuration.__file__).parents[1]}{os.pathsep}of the user"
        )  # the same code
        assert not Path(seen["FLWR_HOME"]).exists()  # it went with the run
    described = configuration.tomllib.loads((tmp_path / "app.toml").read_text())
    assert described["project"]["dependencies"] == []  # Flower would install torch anew for every run


@pytest.mark.skipif(os.name != "posix", reason="shell scripts stand in for Flower's programs")
def test_nodes_whose_keys_are_given_are_registered_before_the_run_and_no_others_may_join(
    programs: Programs, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = deployment.free_port()
    programs.write("flower-superlink", SERVER.format(python=PYTHON, port=port))
    registered = f"""if [ "$1" = supernode ]; then echo "$@" >> "{tmp_path}/registered"; exit 0; fi\n"""
    programs.write("flwr", registered + RUN.format(python=PYTHON, directory=tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(contact, "refusal", lambda *_: None)
    arguments = ["serve", str(config_file), "--out", str(tmp_path / "out"), "--port", str(port)]
    arguments += ["--node-key", "a.pub", "--node-key", "b.pub"]
    assert "serve: --node-key needs --ssl-certfile, " in CliRunner().invoke(app, arguments).stderr
    assert "serve: there is no key file a.pub, make one with" in CliRunner().invoke(app, [*arguments, *TLS]).stderr
    assert not (programs.directory / "flower-superlink.called").exists()
    for name in ("a.pub", "b.pub"):
        (tmp_path / name).write_text("a key")
    result = CliRunner().invoke(app, [*arguments, *TLS])
    assert (result.exit_code, result.stderr) == (2, "stopped by the test\n")
    assert result.stdout == "".join(f"serve: the node with the key {key} may join\n" for key in ("a.pub", "b.pub"))
    assert programs.called("flower-superlink")[4:] == [*TLS, "--enable-supernode-auth"]
    assert programs.called("flwr")[0::2] == ["run", "here"]
    lines = (tmp_path / "registered").read_text().splitlines()
    assert lines == [f"supernode register {tmp_path}/{key} here" for key in ("a.pub", "b.pub")]
    programs.write("flwr", "echo 'no such curve'; exit 1")
    result = CliRunner().invoke(app, [*arguments, *TLS])
    assert result.stderr == "serve: Flower's server does not take the key a.pub: no such curve\n"


@pytest.mark.skipif(os.name != "posix", reason="shell scripts stand in for Flower's programs")
def test_a_server_that_its_own_processes_cannot_reach_is_one_sentence(
    programs: Programs, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the look at its certificate, the run would wait for ever for Flower's processes."""
    port = deployment.free_port()
    programs.write("flower-superlink", SERVER.format(python=PYTHON, port=port))
    monkeypatch.setattr(contact, "refusal", lambda host, _, trusted: f"is {host}, and {trusted} says no")
    arguments = ["serve", str(config_file), "--out", str(tmp_path / "out"), "--host", "0.0.0.0", "--port", str(port)]
    result = CliRunner().invoke(app, [*arguments, *TLS])
    assert result.exit_code == 2
    expected = "serve: Flower's own processes reach the server as 127.0.0.1, which is 127.0.0.1, and ca.pem says no\n"
    assert result.stderr == expected


@pytest.mark.skipif(os.name != "posix", reason="elsewhere the node is a child, not this process")
@pytest.mark.parametrize(
    ("server", "options", "passed"),
    [
        ("127.0.0.1:9092", [], ["--insecure"]),
        ("far.example:9092", ["--root-certificates", "ca.pem"], ["--root-certificates", "ca.pem"]),
        ("far.example:9092", ["--root-certificates=ca.pem"], ["--root-certificates=ca.pem"]),
        ("far.example:9092", ["--insecure"], ["--insecure"]),
        ("[::1]:9092", ["--auth-supernode-private-key", "key"], ["--insecure", "--auth-supernode-private-key", "key"]),
    ],
)
def test_what_join_does_not_know_goes_to_flowers_node(
    programs: Programs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    server: str,
    options: list[str],
    passed: list[str],
) -> None:
    programs.write("flower-supernode", "")
    called: list[list[str]] = []

    def become(program: str, command: list[str], environment: dict[str, str]) -> None:
        called.append(command)
        raise SystemExit(7)

    monkeypatch.setattr(os, "execve", become)
    monkeypatch.setattr(contact, "meet", lambda *_, **__: None)  # test_contact.py has what it says
    arguments = ["join", "0,2-3", "--state", str(tmp_path / "node"), "--server", server, *options]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 7, result.output
    (command,) = called
    assert Path(command[0]) == programs.directory / "flower-supernode"
    assert command[1:4:2] == ["--superlink", "--port"]
    assert command[2] == server
    assert command[5:-2] == passed
    assert command[-2] == "--node-config"
    assert command[-1] == f'clients="0,2,3" data="" state={json.dumps(str(tmp_path / "node"))}'


@contextmanager
def server_with_a_process() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that has started one as `serve` does; its pid."""
    program = (
        "import os, sys, time; from fl.engines.deployment import _process\n"
        "with _process([sys.executable, '-c', 'import time; time.sleep(60)'], os.environ) as child:\n"
        "    print(child.pid, flush=True); time.sleep(60)"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=root) as parent:
        assert parent.stdout is not None
        yield parent, int(parent.stdout.readline())


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_a_server_that_is_terminated_takes_its_processes_along() -> None:
    with server_with_a_process() as (parent, child):
        parent.terminate()
        assert parent.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems end no process with its parent")
def test_a_server_that_is_killed_takes_its_processes_along() -> None:
    with server_with_a_process() as (parent, child):
        parent.kill()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.02)
