"""Small federations that every test of this folder may run in well under a second."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fl import Client, Federation, data, make_clients
from fl.algorithms import Algorithm


@pytest.fixture(scope="session")
def digits() -> data.Dataset:
    return data.digits()


@pytest.fixture(scope="session")
def few_clients(digits: data.Dataset) -> list[Client]:
    """Four clients that differ in architecture and bits."""
    return make_clients(digits, [("mlp", 1), ("cnn", 2), ("mlp", "float"), ("cnn", "ternary")], (4, 5), seed=3)


@pytest.fixture
def federation(few_clients: list[Client]) -> Callable[..., Federation]:
    """Builds a federation of few_clients; two clients a round, three rounds unless told otherwise."""

    def build(algorithm: Algorithm, **changes: Any) -> Federation:
        return Federation(**{"algorithm": algorithm, "clients": few_clients, "rounds": 3, "sample": 0.5, **changes})

    return build


@pytest.fixture
def config_text() -> str:
    return """
[experiment]
name = "tiny"
rounds = 2
sample = 0.5
evaluations = 6

[data]
name = "digits"
classes_per_client = [4, 5]

[[clients]]
count = 3
architecture = "mlp"
bits = 2

[algorithms.quped]
distill = 0.3
"""


@pytest.fixture
def config_file(tmp_path: Path, config_text: str) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(config_text)
    return path


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two authorities, ca.pem and other.pem, and server certificates that ca.pem has signed.

    server.pem is for localhost and 127.0.0.1, elsewhere.pem for another host; each beside its .key.
    """
    if shutil.which("openssl") is None:
        pytest.skip("TLS NOT CHECKED: this machine has no program openssl")
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    (folder / "openssl.cnf").write_text(
        "[req]\ndistinguished_name = name\n[name]\n[authority]\nbasicConstraints = critical, CA:TRUE\n"
        "keyUsage = critical, keyCertSign\nsubjectKeyIdentifier = hash\n"
    )
    for name in ("ca", "other"):
        own = ["-config", "openssl.cnf", "-extensions", "authority", "-subj", f"/CN=tests {name}", "-days", "2"]
        openssl("req", "-x509", *new_key, *own, "-keyout", f"{name}.key", "-out", f"{name}.pem")
    for name, hosts in (("server", "DNS:localhost,IP:127.0.0.1"), ("elsewhere", "DNS:elsewhere.example")):
        own = ["-config", "openssl.cnf", "-subj", f"/CN=tests {name}"]
        openssl("req", *new_key, *own, "-keyout", f"{name}.key", "-out", f"{name}.csr")
        (folder / f"{name}.cnf").write_text(f"subjectAltName = {hosts}\nauthorityKeyIdentifier = keyid\n")
        signed = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", f"{name}.cnf", "-days", "2"]
        openssl("x509", "-req", "-in", f"{name}.csr", *signed, "-out", f"{name}.pem")
    return folder


Outcome = dict[str, Any]


@pytest.fixture(scope="session")
def outcome() -> Callable[[Path], Outcome]:
    """Reads what a run has left behind."""
    return read_outcome


def read_outcome(directory: Path) -> Outcome:
    """All that a run leaves behind, but for clock times: bytes of models and state, records and summary."""
    files = sorted([*directory.glob("models/*"), *directory.glob("state/*")])
    content: dict[str, Any] = {str(path.relative_to(directory)): path.read_bytes() for path in files}
    summary = json.loads((directory / "summary.json").read_text())
    records = [json.loads(line) for line in (directory / "records.jsonl").read_text().splitlines()]
    for entry in [summary, *records]:
        del entry["seconds"]
    return {**content, "summary": summary, "records": records}
