"""A federation as one object: the algorithm, the clients, how long, and which share of them a round."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from fl import cohort, data, devices, models
from fl.algorithms import Algorithm, Global
from fl.checkpoint import Checkpoint, describe, profile
from fl.core import CPU, Client, Job
from fl.engines import ENGINES, loop, ranks, stacked, torchrun
from fl.engines.pool import cores, open_pool
from fl.engines.serial import Serial
from fl.engines.work import Workplace
from fl.errors import CheckpointError, UserError
from fl.result import RunResult
from fl.storage import Json

# The dearest step: three evaluations of the "alternating" variant, and one of the teacher.
LEAST_EVALUATIONS = 4
ON_DEVICES = ("serial", "stacked", "torchrun")  # engines whose processes have a GPU each


@dataclass(frozen=True)
class Federation:
    """A federated run, described; `run` runs it.

    algorithm: QuPeD(), Local(), FedAvg(), ...  clients: from make_clients.  rounds, sample, seed: how many rounds, the
    share of the clients drawn in each, and the number that fixes every draw.
    architecture: the global model's, a key of models.ARCHITECTURES.  evaluations: gradient evaluations a drawn client
    may spend in a round, the same for every algorithm that is to be compared; None: the algorithm's local_steps.
    threads: torch's thread count during the run, which the last bits depend on; one is fastest for small models.
    device: where models train: "cpu", "cuda", "cuda:1", or "auto", the GPU if there is one; the engines "serial", "stacked" and
    "torchrun" take it. A run on another device has the same batches and differs by rounding.
    engine: who does the clients' work, to the same bits: "serial", one client after the other; "pool", worker processes;
    "flower", Flower's simulation; "torchrun", the processes that torchrun has started, all of which make this call; or to
    these bits within rounding: "stacked", clients that are alike side by side.
    workers: of the pool, or nodes of the simulation; None: one for each processor.  stack: clients of a stack at most; None:
    all that are alike.
    augment: what training images go through, of data.AUGMENTATIONS.
    dropout: chance that a drawn client fails in a round.  deadline: in median rounds of a client of speed 1, None: the
    server waits; who takes longer keeps what it learned, and its message is not counted.  quorum: share of the drawn
    clients that must be on time for the server to step.
    score_every: rounds from one scoring of the clients to the next: 1 shows every round, more saves time, no draw changes.
    """

    algorithm: Algorithm
    clients: Sequence[Client]
    rounds: int
    sample: float
    seed: int = 0
    architecture: str = "mlp"
    evaluations: int | None = None
    threads: int = 1
    device: str = CPU
    engine: str = "serial"
    workers: int | None = None
    stack: int | None = None
    augment: str = "none"
    dropout: float = 0.0
    deadline: float | None = None
    quorum: float = 0.0
    score_every: int = 1

    def __post_init__(self) -> None:
        if [client.id for client in self.clients] != list(range(len(self.clients))) or not self.clients:
            raise ValueError("Federation: clients must be a non-empty list with ids 0, 1, ..., use make_clients")
        if self.rounds < 1:
            raise ValueError(f"Federation: rounds must be at least 1, got {self.rounds}")
        if not 0 < self.sample <= 1:
            raise ValueError(f"Federation: sample must be above 0 and at most 1, got {self.sample}")
        if self.architecture not in models.ARCHITECTURES:
            names = ", ".join(sorted(models.ARCHITECTURES))
            raise ValueError(f"Federation: architecture must be one of {names}, got {self.architecture!r}")
        if self.evaluations is not None and self.evaluations < LEAST_EVALUATIONS:
            raise ValueError(
                f"Federation: evaluations must be at least {LEAST_EVALUATIONS}, which one step may take, "
                f"got {self.evaluations}"
            )
        if self.threads < 1:
            raise ValueError(f"Federation: threads must be at least 1, got {self.threads}")
        if self.engine not in ENGINES:
            raise ValueError(f"Federation: engine must be one of {', '.join(ENGINES)}, got {self.engine!r}")
        if self.engine == "torchrun":
            ranks.settle(self.device)
        device = devices.find(self.device)
        if device != CPU and self.engine not in ON_DEVICES:
            raise ValueError(
                f"Federation: the engine {self.engine!r} trains on the CPU, got device {self.device!r}; "
                f"leave it out, or use the engine {' or '.join(map(repr, ON_DEVICES))}"
            )
        if self.score_every < 1:
            raise ValueError(f"Federation: score_every must be at least 1, got {self.score_every}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"Federation: workers must be at least 1, got {self.workers}")
        if self.augment not in data.AUGMENTATIONS:
            names = ", ".join(data.AUGMENTATIONS)
            raise ValueError(f"Federation: augment must be one of {names}, got {self.augment!r}")
        cohort.check(self.job, len(self.clients))
        self.algorithm.check(self.job, self.clients)
        if self.engine == "stacked":
            stacked.check(self.algorithm, self.job, self.clients, self.stack)

    @property
    def job(self) -> Job:
        """The run's sizes and the task's shape, as every step reads them."""
        shape = self.clients[0].data.train.x.shape
        return Job(
            rounds=self.rounds,
            sample=self.sample,
            seed=self.seed,
            architecture=self.architecture,
            input_shape=(shape[1], shape[2], shape[3]),
            num_classes=1 + max(max(client.data.classes) for client in self.clients),
            evaluations=self.evaluations,
            augment=self.augment,
            dropout=self.dropout,
            deadline=self.deadline,
            quorum=self.quorum,
            speeds=cohort.speeds_of([client.speed for client in self.clients]),
            score_every=self.score_every,
            device=devices.find(self.device),
        )

    def check(self, out: Path, *, resume: bool = False) -> bool:
        """Whether `out` holds a checkpoint of this run; raises CheckpointError where `run` would refuse it."""
        return Checkpoint(out, self._description()).check(resume)

    def run(
        self, out: str | Path | None = None, *, resume: bool = False, on_round: loop.OnRound | None = None
    ) -> RunResult:
        """Run it, with a checkpoint after every round.

        out: a directory that is absent or empty, or, with resume, one that holds this very run; without one, a new
        temporary directory, which stays (result.directory).  on_round: called with (rounds done, record).
        With the engine "torchrun" these are rank 0's, and every rank returns its result.
        """
        if self.engine == "torchrun":
            return self._lead_or_follow(out, resume, on_round)
        directory = _directory(out)
        if self.engine == "flower":
            return self._simulate(directory, resume, on_round)
        return self._play(directory, self._opener(directory), resume, on_round)

    def adapted(self, steps: int, directory: Path, out: Path) -> RunResult:
        """What clients ship where they adapt the finished run of `directory` by so many steps: one training, many ends.

        Their models and a summary are written to `out`. Raises ValueError for an algorithm without adapt_steps.
        """
        if not isinstance(self.algorithm, Global):
            raise ValueError(f"adapted: {self.algorithm.name} has no adapt_steps")
        checkpoint = Checkpoint(directory, self._description())
        if not checkpoint.check(resume=True) or not checkpoint.finished:
            raise CheckpointError(f"adapted: {directory} must hold a finished run")
        algorithm = replace(self.algorithm, adapt_steps=steps)
        place = Workplace(self.job, algorithm, dict(enumerate(self.clients)), out, states=directory / "state")
        out.mkdir(parents=True, exist_ok=True)
        with loop.thread_count(checkpoint.threads):
            snapshot = checkpoint.load()
            return loop.finish(self.job, algorithm, len(self.clients), Serial(place), snapshot, out)

    def _play(
        self, directory: Path, open_engine: loop.OpenEngine, resume: bool, on_round: loop.OnRound | None
    ) -> RunResult:
        return loop.run(
            self.job,
            self.algorithm,
            len(self.clients),
            self._description(),
            directory,
            open_engine,
            resume=resume,
            threads=self.threads,
            on_round=on_round,
        )

    def _simulate(self, directory: Path, resume: bool, on_round: loop.OnRound | None) -> RunResult:
        from fl.engines.deployment import flower_environment

        flower_environment()
        try:
            from fl.engines import flower
        except ImportError as error:
            raise UserError(f"run: the engine 'flower' needs qupedkern's extra 'flower' ({error})") from error
        checkpoint = Checkpoint(directory, self._description())
        threads = checkpoint.threads if checkpoint.check(resume) else self.threads
        if checkpoint.finished:  # nothing to simulate
            return self._play(directory, self._opener(directory), resume, on_round)
        nodes = cores() if self.workers is None else self.workers
        return flower.simulate(
            self.job,
            self.algorithm,
            self.clients,
            directory,
            threads,
            min(nodes, len(self.clients)),
            lambda open_engine: self._play(directory, open_engine, resume, on_round),
        )

    def _lead_or_follow(self, out: str | Path | None, resume: bool, on_round: loop.OnRound | None) -> RunResult:
        """On torchrun's rank 0 the run, on another its share of what rank 0 orders."""
        together, description = ranks.join(self.job.device), self._description()
        if together.rank > 0:
            return loop.load_result(self.algorithm, torchrun.follow(together, self._place, description))
        directory = _directory(out)
        with torchrun.leading(together, self._place(directory), description, directory) as open_engine:
            return self._play(directory, open_engine, resume, on_round)

    def _description(self) -> Json:
        description = describe(self.job, self.algorithm, [profile(client) for client in self.clients])
        if self.engine != "stacked":
            return description
        return {**description, "stack": self.stack or "all alike"}  # the last bits depend on it

    def _place(self, directory: Path) -> Workplace:
        return Workplace(self.job, self.algorithm, dict(enumerate(self.clients)), directory)

    def _opener(self, directory: Path) -> loop.OpenEngine:
        @contextmanager
        def open_engine(threads: int) -> Iterator[loop.Engine]:
            if self.engine == "pool":
                with open_pool(self.job, self.algorithm, self.clients, directory, threads, self.workers) as pool:
                    yield pool
                return
            place = self._place(directory)
            yield stacked.Stacked(place, self.stack) if self.engine == "stacked" else Serial(place)

        return open_engine


def _directory(out: str | Path | None) -> Path:
    """Where a run goes: as told, else to a new temporary directory."""
    return Path(tempfile.mkdtemp(prefix="fl-") if out is None else out)
