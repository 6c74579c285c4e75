"""From a configuration to its clients and to their federation, also where the data is elsewhere."""

from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path

import torch

import qupedkern as qk
from fl import config as configuration
from fl import data
from fl.checkpoint import is_untouched
from fl.core import CPU, Client, make_clients
from fl.errors import CheckpointError, ConfigError, UserError
from fl.federation import Federation


def check_backend() -> None:
    """A backend or instruction set asked for in the environment that cannot be had: said before anything is written."""
    try:
        qk.explain("soft_quantize", torch.zeros(1), torch.tensor([0.0, 1.0]), 1.0)
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(str(error)) from error


def check_directory(directory: Path, names: Collection[str], resume: bool) -> None:
    """Refuse a directory that holds anything but runs of these names, before one byte is written."""
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"run: {directory} must be a directory, it is a file, choose another --out")
    entries = list(directory.iterdir()) if directory.is_dir() else []
    if entries and not resume:
        raise CheckpointError(f"run: {directory} is not empty, continue with --resume or choose another --out")
    killed_early = any(entry.name in names and is_untouched(entry) for entry in entries)
    if entries and not killed_early and not any((entry / "run.json").is_file() for entry in entries):
        raise CheckpointError(f"run: {directory} holds no run to resume, choose another --out")


def make_config_clients(chosen: configuration.Config, directory: Path | None) -> list[Client]:
    """The clients of a configuration over its data set. directory: of data files."""
    dataset = data.load(chosen.data.name, directory)
    return make_clients(dataset, chosen.equipment, seed=chosen.experiment.seed, plan=chosen.data)


def make_config_federation(chosen: configuration.Config, name: str, clients: Sequence[Client]) -> Federation:
    """The run of the algorithm of that name over these clients. Raises ConfigError where they cannot run it."""
    known = {field.name for field in fields(Federation)}
    given = {key: value for key, value in vars(chosen.experiment).items() if key in known and key != "algorithm"}
    try:
        return Federation(**given, algorithm=chosen.algorithm(name), clients=clients, augment=chosen.data.augment)
    except ValueError as error:
        raise ConfigError(f"config: {error}") from error


def make_absent_clients(
    chosen: configuration.Config, input_shape: tuple[int, int, int], num_classes: int
) -> list[Client]:
    """The clients of a configuration whose data is elsewhere: devices, with nothing of their images but the form."""
    empty = data.Part(torch.empty(0, *input_shape), torch.empty(0, dtype=torch.int64))
    held = data.ClientData((num_classes - 1,), empty, empty, empty)
    return [Client(number, device[0], device[1], held, *device[2:]) for number, device in enumerate(chosen.equipment)]


def check_served(chosen: configuration.Config) -> None:
    """Refuse, as a run on this machine would, what can be told without the nodes' data; a file's form they alone know."""
    check_backend()
    if chosen.experiment.device != CPU:
        raise ConfigError(f"serve: nodes train on the CPU, got device {chosen.experiment.device!r}; leave it out")
    form = data.form(chosen.data.name)
    if chosen.data.name in data.EMBEDDED:
        clients = make_config_clients(chosen, None)
    elif form is not None:
        (channels, height, width), num_classes = form
        shrunk = (channels, *data.shrunk(height, width, chosen.data.shrink))
        clients = make_absent_clients(chosen, shrunk, num_classes)
    else:
        return
    make_config_federation(chosen, chosen.experiment.algorithm, clients)
