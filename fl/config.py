"""A run described in TOML: read into frozen dataclasses, every mistake named in one sentence.

[experiment]            name, rounds, sample, seed, evaluations, architecture, algorithm, compare, dropout, deadline,
                        quorum, score_every, threads, device, engine, workers, stack, out
[data]                  name, augment, and how it is cut: the fields of data.Plan
[[clients]]             count, architecture, bits, groups, speed: one group of equal devices each
[wire]                  up_bits, down_bits, error_feedback: packed messages, see wire.py
[algorithms.<name>]     hyper-parameters of an algorithm, where they are not its defaults
"""

import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fl import data, models
from fl.algorithms import BY_NAME, Algorithm
from fl.core import CPU, Bits, Groups
from fl.engines import ENGINES
from fl.errors import ConfigError
from fl.tables import check_keys, read, table
from fl.wire import Wire

if sys.version_info >= (3, 11):
    import tomllib
else:  # TODO: drop once Python 3.11 is the oldest supported: tomllib is in the standard library from there on
    import tomli as tomllib

BITS: tuple[Bits, ...] = (1, 2, 3, 4, 5, 6, 7, 8, "ternary", "float")


def _one_of(key: str, value: Any, allowed: typing.Iterable[Any]) -> None:
    choices = list(allowed)
    if value not in choices:
        raise ValueError(f"{key} must be one of {', '.join(map(str, choices))}, got {value!r}")


@dataclass(frozen=True)
class Experiment:
    """[experiment]: what is run, how long, and what beside it under the same budget; see Federation for the numbers.

    algorithm: the one the run is about.  compare: others to run beside it.  out: where results go, else runs/<name>.
    """

    name: str
    rounds: int
    sample: float
    seed: int = 0
    evaluations: int | None = None
    architecture: str = "mlp"
    algorithm: str = "quped"
    compare: tuple[str, ...] = ()
    dropout: float = 0.0
    deadline: float | None = None
    quorum: float = 0.0
    score_every: int = 1
    threads: int = 1
    device: str = CPU
    engine: str = "serial"
    workers: int | None = None
    stack: int | None = None
    out: str | None = None

    def __post_init__(self) -> None:
        if not self.name or Path(self.name).name != self.name:
            raise ValueError(f"name must be a plain file name, got {self.name!r}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be between 0 and 2**63 - 1, got {self.seed}")
        _one_of("architecture", self.architecture, sorted(models.ARCHITECTURES))
        _one_of("algorithm", self.algorithm, sorted(BY_NAME))
        _one_of("engine", self.engine, ENGINES)
        for name in self.compare:
            _one_of("compare", name, sorted(BY_NAME))
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"compare must name each algorithm once and not {self.algorithm!r} again")

    @property
    def names(self) -> tuple[str, ...]:
        """The algorithms to run, in order."""
        return (self.algorithm, *self.compare)


@dataclass(frozen=True, kw_only=True)
class Data(data.Plan):
    """[data]: the data set, how it is cut into clients, and what training images go through."""

    name: str = "digits"
    augment: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("augment", self.augment, data.AUGMENTATIONS)


@dataclass(frozen=True)
class Group:
    """[[clients]]: a number of clients with equal devices."""

    count: int
    architecture: str = "mlp"
    bits: Bits = 2
    groups: Groups = "tensor"
    speed: float = 1.0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")
        _one_of("architecture", self.architecture, sorted(models.ARCHITECTURES))
        _one_of("bits", self.bits, BITS)
        if not 0 < self.speed < float("inf"):
            raise ValueError(f"speed must be positive and finite, got {self.speed}")
        if self.groups not in ("tensor", "channel") and (isinstance(self.groups, str) or self.groups < 1):
            raise ValueError(f"groups must be 'tensor', 'channel' or a block length, got {self.groups!r}")


@dataclass(frozen=True)
class Packing:
    """[wire]: bits of uploads and downloads, as wire.Wire takes them."""

    up_bits: int | None = None
    down_bits: int | None = None
    error_feedback: bool = True

    def around(self, algorithm: Algorithm) -> Algorithm:
        """The algorithm, with packed messages where there are bits."""
        if self.up_bits is None and self.down_bits is None:
            return algorithm
        return Wire(algorithm, self.up_bits, self.down_bits, self.error_feedback)

    def __post_init__(self) -> None:
        for key, bits in (("up_bits", self.up_bits), ("down_bits", self.down_bits)):
            if bits is not None:
                _one_of(key, bits, range(1, 9))


@dataclass(frozen=True)
class Config:
    """A whole configuration. algorithms: by name, with the hyper-parameters given."""

    experiment: Experiment
    data: Data
    clients: tuple[Group, ...]
    algorithms: Mapping[str, Algorithm] = field(default_factory=dict)
    wire: Packing = Packing()

    @property
    def equipment(self) -> list[tuple[str, Bits, Groups, float]]:
        """(architecture, bits, groups, speed) of each client."""
        return [
            (group.architecture, group.bits, group.groups, group.speed)
            for group in self.clients
            for _ in range(group.count)
        ]

    def algorithm(self, name: str) -> Algorithm:
        """The algorithm of that name, with its defaults where the file says nothing."""
        return self.wire.around(self.algorithms[name] if name in self.algorithms else BY_NAME[name]())

    def override(self, **given: Any) -> "Config":
        """The configuration with what the command line gave of [experiment]; an algorithm given there runs alone."""
        changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        if given.get("algorithm") is not None:
            changes["compare"] = ()
        try:
            return replace(self, experiment=replace(self.experiment, **changes))
        except ValueError as error:
            raise ConfigError(f"run: {error}") from error


def load(path: Path) -> Config:
    """Read a configuration file. Raises ConfigError, one sentence, for anything that cannot be run."""
    try:
        with open(path, "rb") as file:
            content = tomllib.load(file)
    except FileNotFoundError as error:
        raise ConfigError(f"config: there is no file {path}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"config: {path} must be a readable TOML file, got: {error}") from error
    return parse(content, str(path))


def as_given(path: Path, changes: Mapping[str, object]) -> str:
    """The text of a configuration file for a run's directory, headed by what the command line changed."""
    said = [f"{key} = {value!r}" for key, value in changes.items() if value is not None]
    head = f"# given on the command line: {', '.join(said)}\n" if said else ""
    return head + path.read_text()


def loads(text: str, source: str = "config") -> Config:
    """A configuration from a file's text, as load reads it."""
    try:
        return parse(tomllib.loads(text), source)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"config: {source} must be TOML, got: {error}") from error


def parse(content: Mapping[str, Any], source: str = "config") -> Config:
    """A configuration from TOML's tables. source: named in errors."""
    where = f"config: {source}"
    check_keys(content, ["experiment", "data", "clients", "wire", "algorithms"], ["experiment", "clients"], where)
    groups = content["clients"] if isinstance(content["clients"], list) else [content["clients"]]
    if not groups:
        raise ConfigError(f"{where}: clients must have at least one group, got none")
    tables = table(content.get("algorithms", {}), f"{where} [algorithms]")
    check_keys(tables, sorted(BY_NAME), [], f"{where} [algorithms]")
    return Config(
        experiment=read(Experiment, content["experiment"], f"{where} [experiment]"),
        data=read(Data, content.get("data", {}), f"{where} [data]"),
        clients=tuple(read(Group, group, f"{where} [clients]") for group in groups),
        wire=read(Packing, content.get("wire", {}), f"{where} [wire]"),
        algorithms={name: read(BY_NAME[name], given, f"{where} [algorithms.{name}]") for name, given in tables.items()},
    )
