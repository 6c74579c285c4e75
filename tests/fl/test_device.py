"""Training on another device: the CPU's bits on one that is not there, nothing left behind, and no half-started run."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from elsewhere import NAME, Elsewhere, Machine
from typer.testing import CliRunner

from fl import Client, Federation, algorithms, core, data, devices, make_clients
from fl.__main__ import app
from fl.algorithms import Algorithm, _global
from fl.checkpoint import describe
from fl.core import Job
from fl.errors import CheckpointError
from fl.wire import Wire

Outcome = Callable[[Path], dict[str, Any]]
STEPS: list[Algorithm] = [
    algorithms.QuPeD(local_steps=2),
    algorithms.QuPeD(local_steps=2, variant="alternating", tempered="teacher", layers="inner"),
    algorithms.QuPeD(local_steps=2, variant="hard", freeze_at=0.3),
    algorithms.Local(local_steps=2),
    algorithms.QuPeL(local_steps=2),
    algorithms.Ditto(local_steps=2),
    algorithms.FML(local_steps=2),
    algorithms.FedAvg(local_steps=2),
    algorithms.FedAvg(local_steps=2, quantize=True, adapt_steps=2),
    algorithms.FedAvg(local_steps=2, batch_norm="local", adapt_steps=2),
    algorithms.FedProx(local_steps=2, batch_norm="recalibrated"),
    algorithms.PFedMe(local_steps=1, adapt_steps=2),
    algorithms.PerFedAvg(local_steps=1, adapt_steps=2, hessian="difference", delta=0.1),
    Wire(algorithms.QuPeD(local_steps=2), up_bits=2, down_bits=4),
]
# What only training does: none of it may happen on the CPU.
TRAINING = {"nll_loss_backward", "convolution_backward", "threshold_backward", "bmm", "quped_step", "center_step"}


@pytest.fixture
def machine() -> Machine:
    """The device, not entered yet."""
    return Machine()


@pytest.fixture(scope="module")
def alike(digits: data.Dataset) -> list[Client]:
    """Four clients, of whom stacks can be made, with batch norm."""
    kinds: list[tuple[str, core.Bits]] = [("cnn", 2), ("cnn", "float"), ("cnn", 2), ("cnn", "float")]
    return make_clients(digits, kinds, seed=3, plan=data.Plan(classes_per_client=(4, 5), samples=40))


def run(algorithm: Algorithm, clients: list[Client], out: Path, **changes: Any) -> None:
    given: dict[str, Any] = {"rounds": 2, "sample": 1.0, "architecture": "cnn", **changes}
    Federation(algorithm=algorithm, clients=clients, **given).run(out)


@pytest.mark.parametrize("engine", ["serial", "stacked"])
@pytest.mark.parametrize("algorithm", STEPS, ids=str)
def test_a_run_on_another_device_is_the_cpus_and_trains_there(
    algorithm: Algorithm, engine: str, alike: list[Client], machine: Machine, outcome: Outcome, tmp_path: Path
) -> None:
    clients = alike[:2] if engine == "serial" else alike
    run(algorithm, clients, tmp_path / "cpu", engine=engine)
    with machine:
        run(algorithm, clients, tmp_path / "there", engine=engine, device=NAME)
    assert outcome(tmp_path / "there") == outcome(tmp_path / "cpu")
    assert not TRAINING & machine.here.keys()
    assert machine.ran["nll_loss_backward"] > 0


@pytest.mark.parametrize("left", ["batch", "state", "server", "buffers"])
def test_what_is_left_behind_is_seen(
    left: str, alike: list[Client], machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm: Algorithm = algorithms.FedAvg(local_steps=1, batch_norm="local")
    untrained = _global.untrained_buffers
    if left == "batch":
        monkeypatch.setattr(_global, "training_batches", core._batches)
    elif left == "buffers":
        monkeypatch.setattr(
            _global, "untrained_buffers", lambda job, client: untrained(replace(job, device="cpu"), client)
        )
    elif left == "state":
        algorithm = algorithms.Local(local_steps=1)
        monkeypatch.setattr(devices, "moved", lambda tensors, _: tensors)
    else:
        algorithm = algorithms.Ditto(local_steps=1)
        monkeypatch.setattr(algorithms.Ditto, "broadcast", lambda self, job, server: StaysHere(server))
        monkeypatch.setattr(devices, "moved", _but_the_server(devices.moved))
    with machine, pytest.raises(RuntimeError, match="needs all tensors on"):
        run(algorithm, alike, tmp_path / "run", device=NAME)


class StaysHere(dict[str, torch.Tensor]):
    """Tensors that the next function does not move."""


def _but_the_server(moved: Callable[..., Any]) -> Callable[..., Any]:
    return lambda tensors, device: tensors if isinstance(tensors, StaysHere) else moved(tensors, device)


def test_a_visit_gives_back_what_is_the_cpus(alike: list[Client], machine: Machine) -> None:
    algorithm = algorithms.QuPeD(local_steps=1)
    job = Federation(algorithm=algorithm, clients=alike, rounds=2, sample=1.0, architecture="cnn").job
    state, server = algorithm.start_client(job, alike[0]), algorithm.start_server(job)
    with machine:
        there = replace(job, device=NAME)
        update = devices.visit(algorithm.client_step, there, alike[0], state, server, 0)
        assert update.message is not None
        tensors = [*update.state.tensors.values(), *update.message.tensors.values()]
        assert not any(isinstance(tensor, Elsewhere) for tensor in tensors)
        same = devices.visit(algorithm.finish_client, replace(there, rounds=0), alike[0], state, server)
    assert same.state is state


# -- which device ----------------------------------------------------------------------------------------------------


def test_auto_is_the_gpu_if_there_is_one_else_the_cpu(
    federation: Callable[..., Federation], outcome: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.find("auto") == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.find("auto") == "cpu"
    for name in ("cpu", "auto"):
        federation(algorithms.QuPeD(local_steps=2), device=name).run(tmp_path / name)
    federation(algorithms.QuPeD(local_steps=2)).run(tmp_path / "unsaid")
    assert outcome(tmp_path / "cpu") == outcome(tmp_path / "auto") == outcome(tmp_path / "unsaid")
    manifests = [
        json.loads((tmp_path / name / "run.json").read_text())["description"] for name in ("cpu", "auto", "unsaid")
    ]
    assert manifests[0] == manifests[1] == manifests[2]
    assert "device" not in manifests[0]  # as in runs from before there was a choice


@pytest.mark.parametrize("name", ["cuda:99", "meta", "gpu", ""])
def test_a_device_that_is_not_there_is_refused_before_anything_is_written(
    name: str, config_file: Path, tmp_path: Path
) -> None:
    result = CliRunner().invoke(app, ["run", str(config_file), "--out", str(tmp_path / "run"), "--device", name])
    assert result.exit_code == 2
    wanted = "config: Federation: device must be 'cpu', 'auto' or a device that torch has here, got "
    assert result.stderr.startswith(f"{wanted}{name!r}: ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_device_is_said_first(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = ["run", str(config_file), "--rounds", "1"]
    chosen = CliRunner().invoke(app, [*given, "--out", str(tmp_path / "auto"), "--device", "auto"])
    assert chosen.stdout.splitlines()[0] == "device   cpu, which is what 'auto' has found"
    unsaid = CliRunner().invoke(app, [*given, "--out", str(tmp_path / "cpu")])
    assert not unsaid.stdout.startswith("device")


@pytest.mark.parametrize("engine", ["pool", "flower"])
def test_engines_of_other_processes_train_on_the_cpu(
    engine: str, federation: Callable[..., Federation], machine: Machine
) -> None:
    expected = (
        f"the engine '{engine}' trains on the CPU, got device '{NAME}'; leave it out, or use the engine 'serial' or"
    )
    with machine, pytest.raises(ValueError, match=expected):
        federation(algorithms.Local(), device=NAME, engine=engine)


def test_nodes_train_on_the_cpu(config_text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(config_text.replace("rounds = 2", 'rounds = 2\ndevice = "auto"'))
    result = CliRunner().invoke(app, ["serve", str(path), "--out", str(tmp_path / "run")])
    assert (result.exit_code, result.stderr) == (2, "serve: nodes train on the CPU, got device 'auto'; leave it out\n")
    assert not (tmp_path / "run").exists()


# -- going on --------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def test_a_run_goes_on_where_it_was_started_and_nowhere_else(
    federation: Callable[..., Federation], machine: Machine, outcome: Outcome, tmp_path: Path
) -> None:
    def killed(rounds: int, record: dict[str, Any]) -> None:
        if rounds == 2:
            raise Killed

    with machine:
        there, here = (federation(algorithms.QuPeD(local_steps=2), device=name) for name in (NAME, "cpu"))
        there.run(tmp_path / "whole")
        with pytest.raises(Killed):
            there.run(tmp_path / "run", on_round=killed)
        before = (tmp_path / "run" / "run.json").read_bytes()
        with pytest.raises(CheckpointError, match='device is "lazy" there and "cpu" here'):
            here.run(tmp_path / "run", resume=True)
        assert (tmp_path / "run" / "run.json").read_bytes() == before
        there.run(tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_which_of_several_gpus_it_is_does_not_decide() -> None:
    job = Job(rounds=1, sample=1.0, seed=0, architecture="mlp", input_shape=(1, 2, 2), num_classes=2)
    one, two = (describe(replace(job, device=name), algorithms.Local(), []) for name in ("cuda", "cuda:1"))
    assert one == two
    assert one["device"] == "cuda"
    assert one["job"] == describe(job, algorithms.Local(), [])["job"]
