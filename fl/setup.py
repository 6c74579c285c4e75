"""From a configuration to its clients, to their federation, and to what a run's steps read of it."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from fl import config as configuration
from fl import data
from fl.cohort import speeds_of
from fl.core import Client, Job, make_clients
from fl.errors import ConfigError
from fl.federation import Federation


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


def make_config_job(chosen: configuration.Config, input_shape: tuple[int, int, int], num_classes: int) -> Job:
    """The Job of a configuration's run, given the shape of a task whose data is elsewhere."""
    known = {field.name for field in fields(Job)}
    given = {name: value for name, value in vars(chosen.experiment).items() if name in known}
    speeds = speeds_of([device[3] for device in chosen.equipment])
    return Job(**given, input_shape=input_shape, num_classes=num_classes, augment=chosen.data.augment, speeds=speeds)
