"""Small federations that every test of this folder may run in well under a second."""

import json
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
