"""Every key that a configuration may have, each with a value that must change what a run leaves behind, or must not.

A new key without an entry here fails; what the keys do in detail is tested where they are implemented.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest

from fl import config
from fl.algorithms import BY_NAME
from fl.setup import make_config_clients, make_config_federation

Outcome = Callable[[Path], dict[str, Any]]
Table = dict[str, Any]
SMALL: Table = {"local_steps": 2, "batch_size": 8}
BASE: dict[str, Table] = {
    "experiment": {"name": "switches", "rounds": 2, "sample": 0.7},
    "data": {"name": "digits", "classes_per_client": [5, 6]},
    "clients": {"count": 3, "architecture": "cnn", "bits": 2},
    "wire": {},
    "algorithms": dict.fromkeys(BY_NAME, SMALL),
}
# The global model's algorithms need its architecture, with batch norm, wherever batch norm is the question.
CNN: dict[str, Table] = {"experiment": {"architecture": "cnn"}}


@dataclass(frozen=True)
class Switch:
    """A key of a table, given a value beside other keys. same: the outcome must stay what it is, else it must change."""

    table: str
    key: str
    value: Any
    beside: dict[str, Table] = field(default_factory=dict)
    same: bool = False

    def __str__(self) -> str:
        return f"{self.table}.{self.key}={self.value}"


def personal(name: str, **beside: Table) -> list[Switch]:
    """The keys of every algorithm that trains personal models."""
    values = {"local_steps": 3, "rate": 0.01, "momentum": 0.5, "batch_size": 5, "variant": "hard", "freeze_at": 0.5}
    values["layers"] = "inner"
    return [Switch(name, key, value, beside) for key, value in values.items()]


def shared(name: str) -> list[Switch]:
    """The keys of every algorithm that trains one global model."""
    adapting = {**CNN, name: {"adapt_steps": 2}}
    values = {"local_steps": 3, "rate": 0.01, "batch_size": 5, "decay_at": 0.5, "weighted": True, "quantize": True}
    switches = [Switch(name, key, value, CNN) for key, value in values.items()]
    switches += [Switch(name, "batch_norm", kind, CNN) for kind in ("local", "recalibrated")]
    return [*switches, Switch(name, "adapt_steps", 3, CNN), Switch(name, "adapt_rate", 0.01, adapting)]


def of(name: str, values: Table, **beside: Table) -> list[Switch]:
    return [Switch(name, key, value, beside) for key, value in values.items()]


UP: dict[str, Table] = {"wire": {"up_bits": 2}}
SWITCHES = [
    *of("experiment", {"rounds": 3, "sample": 0.4, "seed": 1, "evaluations": 12, "architecture": "cnn2"}),
    *of("experiment", {"algorithm": "local", "dropout": 0.5, "deadline": 0.9, "score_every": 2}),
    Switch("experiment", "quorum", 1.0, {"experiment": {"dropout": 0.5, "rounds": 5, "sample": 1.0}}),
    Switch("experiment", "engine", "pool", {"experiment": {"workers": 2}}, same=True),
    Switch("experiment", "workers", 1, {"experiment": {"engine": "pool"}}, same=True),
    *of("data", {"augment": "flip_crop", "classes_per_client": 4, "fractions": [0.5, 0.2, 0.3], "samples": 20}),
    *(Switch("data", "partition", kind) for kind in ("dirichlet", "shards", "quantity", "features", "iid")),
    Switch("data", "shrink", 2, {"clients": {"architecture": "mlp"}}),
    Switch("data", "alpha", 0.1, {"data": {"partition": "dirichlet"}}),
    Switch("data", "shards_per_client", 3, {"data": {"partition": "shards"}}),
    Switch("data", "sigma", 0.5, {"data": {"partition": "quantity"}}),
    Switch("data", "noise", 0.1, {"data": {"partition": "features"}}),
    *of("clients", {"count": 4, "architecture": "mlp", "groups": "channel"}),
    *(Switch("clients", "bits", bits) for bits in (1, 3, 4, "ternary", "float")),
    Switch("clients", "speed", 0.1, {"experiment": {"deadline": 1.5}}),
    *(Switch("wire", way, bits) for way in ("up_bits", "down_bits") for bits in (2, 4, 8)),
    Switch("wire", "error_feedback", False, UP),
    *personal("quped"),
    *of("quped", {"distill": 0.5, "temperature": 3.0, "tempered": "teacher", "global_rate": 0.01, "weighted": True}),
    *personal("qupel", **CNN),
    *of("qupel", {"coupling": 0.1, "global_rate": 0.01, "weighted": True}, **CNN),
    *personal("local"),
    *personal("fml"),
    *of("fml", {"distill": 0.2, "global_distill": 0.2, "temperature": 2.0, "weighted": True}),
    *personal("ditto", **CNN),
    *of("ditto", {"coupling": 0.1, "weighted": True}, **CNN),
    *shared("fedavg"),
    Switch("fedavg", "momentum", 0.5, CNN),
    *shared("fedprox"),
    *of("fedprox", {"momentum": 0.5, "mu": 1.0}, **CNN),
    *shared("per_fedavg"),
    *of("per_fedavg", {"momentum": 0.5, "hessian": "difference"}, **CNN),
    Switch("per_fedavg", "delta", 0.1, {**CNN, "per_fedavg": {"hessian": "difference"}}),
    *shared("pfedme"),
    *of("pfedme", {"coupling": 0.5, "inner_steps": 2, "global_rate": 0.5, "beta": 0.5}, **CNN),
]
ELSEWHERE = {  # what a run's outcome cannot show, or needs more than the embedded data
    ("experiment", "name"): "test_a_configuration_is_read_whole",
    ("experiment", "compare"): "test_a_run_shows_its_tables_and_keeps_its_results",
    ("experiment", "threads"): "test_a_run_resumes_with_the_threads_it_was_started_with",
    ("experiment", "device"): "test_a_run_on_another_device_is_the_cpus_and_trains_there",
    ("experiment", "stack"): "test_a_run_of_mixed_clients_is_the_serial_engines",
    ("experiment", "out"): "test_results_go_where_the_configuration_says",
    ("data", "name"): "test_a_file_whose_form_only_nodes_know_is_refused_when_they_have_said_it",
    ("data", "writers_per_client"): "test_writers_may_be_counted_out",
    ("data", "official_test"): "test_an_official_test_set_is_the_test_part",
}
KINDS: dict[str, type] = {
    "experiment": config.Experiment,
    "data": config.Data,
    "clients": config.Group,
    "wire": config.Packing,
    **BY_NAME,
}


def content(algorithm: str, *changes: dict[str, Table]) -> dict[str, Any]:
    """BASE with changes; tables of algorithms are named as such."""
    tables = copy.deepcopy(BASE)
    tables["experiment"]["algorithm"] = algorithm
    for change in changes:
        for name, table in change.items():
            place = tables["algorithms"] if name in BY_NAME else tables
            place[name] = {**place[name], **table}
    return {**tables, "clients": [tables["clients"]]}


def play(tables: dict[str, Any], directory: Path) -> None:
    chosen = config.parse(tables)
    make_config_federation(chosen, chosen.experiment.algorithm, make_config_clients(chosen, None)).run(directory)


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory, outcome: Outcome) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The outcome of tables that several switches start from, run once."""
    known: dict[str, dict[str, Any]] = {}

    def run(tables: dict[str, Any]) -> dict[str, Any]:
        key = repr(tables)
        if key not in known:
            directory = tmp_path_factory.mktemp("before") / "run"
            play(tables, directory)
            known[key] = outcome(directory)
        return known[key]

    return run


def test_every_key_has_its_switch() -> None:
    keys = {(table, item.name) for table, kind in KINDS.items() for item in fields(kind)}  # type: ignore[arg-type]
    assert keys == {(switch.table, switch.key) for switch in SWITCHES} | set(ELSEWHERE)
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert all(f"def {name}(" in tests for name in ELSEWHERE.values())


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_a_switch_does_what_it_is_for(
    switch: Switch, before: Callable[[dict[str, Any]], dict[str, Any]], outcome: Outcome, tmp_path: Path
) -> None:
    algorithm = switch.table if switch.table in BY_NAME else "quped"
    started = content(algorithm, switch.beside)
    play(content(algorithm, switch.beside, {switch.table: {switch.key: switch.value}}), tmp_path / "run")
    now, then = outcome(tmp_path / "run"), before(started)
    assert (now == then) == switch.same
