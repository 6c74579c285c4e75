"""A set of runs as TOML: a run's own tables, see fl/config.py, and which methods share one table.

[experiment], [data], [[clients]], [wire], [algorithms.<name>]   what all methods share
[paper]          title, seeds, reference, evaluations: Paper
[[methods]]      name, label, algorithm, bits, rounds, adapt: Method; and clients, parameters, trials: tables that take the
                 place of [[clients]], of single hyper-parameters, and of these once more, one tuning trial each
[[acceptance]]   what the table must show: Claim
[tuning]         rounds, seed, finalists: Tuning
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl import config as configuration
from fl.algorithms import BY_NAME
from fl.core import Bits
from fl.errors import ConfigError
from fl.tables import check_keys, read, table

if sys.version_info >= (3, 11):
    import tomllib
else:  # TODO: drop once Python 3.11 is the oldest supported: tomllib is in the standard library from there on
    import tomli as tomllib

SETS = Path(__file__).parents[1] / "configs" / "paper"
COLUMNS = (
    "rounds",
    "evaluations",
)  # what methods have an equal number of: local steps a round, or gradient evaluations
OWN = ("paper", "methods", "acceptance", "tuning")  # tables that a single run's configuration does not have
SINGLE = ("experiment", "data", "clients", "wire", "algorithms")


@dataclass(frozen=True)
class Paper:
    """[paper]. reference: the method that others are compared with, client by client.

    evaluations: gradient evaluations that a drawn client may spend in a round of the second column; None: it has none.
    """

    title: str
    seeds: tuple[int, ...]
    reference: str
    evaluations: int | None = None


@dataclass(frozen=True)
class Method:
    """[[methods]]: one line of the table, or one for each number of `adapt`, all from one training.

    bits: of all clients, in place of what [[clients]] says.  rounds: in place of the set's.
    adapt: the numbers of steps that clients make from w before they use it; the first is the run's own.
    """

    name: str
    label: str
    algorithm: str
    bits: Bits | None = None
    rounds: int | None = None
    adapt: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.name or Path(self.name).name != self.name or "@" in self.name:
            raise ValueError(f"name must be a plain file name without @, got {self.name!r}")
        if self.algorithm not in BY_NAME:
            raise ValueError(f"algorithm must be one of {', '.join(sorted(BY_NAME))}, got {self.algorithm!r}")
        if len(set(self.adapt)) != len(self.adapt):
            raise ValueError(f"adapt must name each number of steps once, got {list(self.adapt)}")

    @property
    def lines(self) -> list[tuple[str, int | None]]:
        """(name, adaptation steps) of its lines of the table."""
        return [(f"{self.name}@{steps}", steps) for steps in self.adapt] or [(self.name, None)]

    def label_of(self, steps: int | None) -> str:
        """What prose calls the line of so many adaptation steps."""
        return self.label if steps is None else f"{self.label} with {steps} test step{'' if steps == 1 else 's'}"


@dataclass(frozen=True)
class Claim:
    """[[acceptance]]: the mean paired difference of two lines in points, or what the global model of one reaches, in percent."""

    first: str
    second: str | None = None
    at_least: float | None = None
    within: float | None = None
    shared_at_least: float | None = None

    def __post_init__(self) -> None:
        bounds = [self.at_least, self.within, self.shared_at_least]
        if sum(bound is not None for bound in bounds) != 1 or (self.second is None) == (self.shared_at_least is None):
            raise ValueError("needs second with at_least or within, or shared_at_least alone")


@dataclass(frozen=True)
class Tuning:
    """[tuning]: trials of every method, each judged by the clients' validation images. seed: none of the table's.

    finalists: each method's best so many trials run again for as many rounds as the table's runs, and these decide: what is
    best after a few rounds need not be at the end.  None: `rounds` decide.
    """

    rounds: int
    seed: int
    finalists: int | None = None

    def __post_init__(self) -> None:
        if self.finalists is not None and self.finalists < 2:
            raise ValueError(f"finalists must be at least 2, got {self.finalists}")


@dataclass(frozen=True)
class Cell:
    """One run of a set. path: of its directory, below the set's.  trial: of tuning; such cells are in no table."""

    method: Method
    seed: int
    column: str
    path: Path
    config: configuration.Config
    trial: Mapping[str, Any] | None = None

    @property
    def rounds(self) -> int:
        return self.config.experiment.rounds


@dataclass(frozen=True)
class Study:
    """A set. content: its TOML, from which each cell's configuration is made."""

    name: str
    paper: Paper
    methods: tuple[Method, ...]
    claims: tuple[Claim, ...]
    tuning: Tuning | None
    content: Mapping[str, Any]

    @property
    def columns(self) -> tuple[str, ...]:
        return COLUMNS if self.paper.evaluations is not None else COLUMNS[:1]

    def cells(
        self, seeds: Sequence[int] | None = None, only: Sequence[str] = (), column: str | None = None
    ) -> list[Cell]:
        """The table's runs, the first column of all seeds first, seed by seed, in the methods' order."""
        self._check_names(only)
        return [
            self._cell(place, method, seed, here)
            for here in self.columns
            for seed in (self.paper.seeds if seeds is None else seeds)
            for place, method in enumerate(self.methods)
            if column in (None, here) and (not only or method.name in only)
        ]

    def trials(self, only: Sequence[str] = ()) -> list[Cell]:
        """The runs of the tuning, method by method."""
        self._check_names(only)
        return [
            self._cell(place, method, self.tuning.seed, COLUMNS[0], number)
            for place, method in enumerate(self.methods)
            for number in range(len(self._table(place).get("trials", [])))
            if self.tuning is not None and (not only or method.name in only)
        ]

    def finals(self, finalists: Mapping[str, Sequence[int]]) -> list[Cell]:
        """The runs of the tuning's finalists. finalists: trial numbers by method."""
        assert self.tuning is not None
        return [
            self._cell(place, method, self.tuning.seed, COLUMNS[0], number, final=True)
            for place, method in enumerate(self.methods)
            for number in finalists.get(method.name, [])
        ]

    def _check_names(self, only: Sequence[str]) -> None:
        known = [method.name for method in self.methods]
        for name in only:
            if name not in known:
                raise ConfigError(f"paper: {self.name} has no method {name!r}, it has {', '.join(known)}")

    def _table(self, place: int) -> Mapping[str, Any]:
        return self.content["methods"][place]

    def _cell(
        self, place: int, method: Method, seed: int, column: str, trial: int | None = None, *, final: bool = False
    ) -> Cell:
        given = self._table(place)
        values = {**given.get("parameters", {}), **({} if trial is None else given["trials"][trial])}
        if method.adapt:
            values["adapt_steps"] = method.adapt[0]
        experiment = {**self.content["experiment"], "algorithm": method.algorithm, "seed": seed, "name": self.name}
        if method.rounds is not None:
            experiment["rounds"] = method.rounds
        if column == "evaluations":
            experiment["evaluations"] = self.paper.evaluations
        path = Path(f"seed{seed}") / column / method.name
        if trial is not None and self.tuning is not None:
            path = Path("tuning") / method.name / (f"{trial}-final" if final else str(trial))
            experiment["rounds"] = experiment["rounds"] if final else self.tuning.rounds
        groups = given.get("clients", self.content["clients"])
        groups = groups if isinstance(groups, list) else [groups]
        if method.bits is not None:
            groups = [{**group, "bits": method.bits} for group in groups]
        shared = self.content.get("algorithms", {}).get(method.algorithm, {})
        single = {key: self.content[key] for key in SINGLE if key in self.content}
        single |= {
            "experiment": experiment,
            "clients": groups,
            "algorithms": {method.algorithm: {**shared, **values}},
        }
        where = f"{self.name}.toml, method {method.name}"
        chosen = None if trial is None else given["trials"][trial]
        return Cell(method, seed, column, path, configuration.parse(single, where), chosen)


def load(name: str) -> Study:
    """A set by its name, of fl/configs/paper, or by the path of its file. Raises ConfigError, one sentence."""
    path = SETS / f"{name}.toml" if Path(name).name == name and not name.endswith(".toml") else Path(name)
    try:
        with open(path, "rb") as file:
            content = tomllib.load(file)
    except FileNotFoundError as error:
        known = ", ".join(sorted(one.stem for one in SETS.glob("*.toml")))
        raise ConfigError(f"paper: there is no set {name}, known are {known}, or a file's path") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"paper: {path} must be a readable TOML file, got: {error}") from error
    return parse(content, path.stem)


def parse(content: Mapping[str, Any], name: str) -> Study:
    """A set from TOML's tables; every cell's configuration is read once, so that a mistake shows before the first run."""
    where = f"paper: {name}.toml"
    check_keys(content, [*SINGLE, *OWN], ["experiment", "clients", "paper", "methods"], where)
    methods = []
    for given in content["methods"]:
        plain = {
            k: v
            for k, v in table(given, f"{where} [[methods]]").items()
            if k not in ("clients", "parameters", "trials")
        }
        methods.append(read(Method, plain, f"{where} [[methods]]"))
    study = Study(
        name,
        read(Paper, content["paper"], f"{where} [paper]"),
        tuple(methods),
        tuple(read(Claim, given, f"{where} [[acceptance]]") for given in content.get("acceptance", [])),
        read(Tuning, content["tuning"], f"{where} [tuning]") if "tuning" in content else None,
        content,
    )
    _check(study, where)
    return study


def _check(study: Study, where: str) -> None:
    names = [method.name for method in study.methods]
    lines = [line for method in study.methods for line, _ in method.lines]
    if len(set(names)) != len(names):
        raise ConfigError(f"{where}: methods must have different names, got {', '.join(names)}")
    if study.tuning is not None and study.tuning.seed in study.paper.seeds:
        raise ConfigError(f"{where} [tuning]: seed must be none of the table's, got {study.tuning.seed}")
    mentioned = [study.paper.reference, *(name for c in study.claims for name in (c.first, c.second) if name)]
    for name in mentioned:
        if name not in lines:
            raise ConfigError(f"{where}: {name!r} is no line of the table, lines are {', '.join(lines)}")
    study.cells()
    study.trials()
