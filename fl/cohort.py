"""Who takes part in a round: drawn by seed, some failing, some late. Pure functions of the run's seed and the round."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fl.core import Job, sample_clients
from fl.seeds import torch_generator

JITTER = 0.25  # spread of the logarithm of a client's time from round to round


@dataclass(frozen=True)
class Cohort:
    """A round's clients, ascending. failed: lose this round's work.  late: do it, but after the server's deadline."""

    drawn: list[int]
    failed: list[int]
    late: list[int]

    @property
    def working(self) -> list[int]:
        """Those that make their local steps and keep what they learned."""
        return [number for number in self.drawn if number not in self.failed]

    @property
    def punctual(self) -> list[int]:
        """Those whose messages count."""
        return [number for number in self.working if number not in self.late]

    def enough(self, quorum: float) -> bool:
        """Whether at least one client, and the share `quorum` of the drawn ones, is on time: else the round is void."""
        return len(self.punctual) >= max(1, quorum * len(self.drawn))


def draw_cohort(job: Job, round_index: int, count: int) -> Cohort:
    """The clients of a round and what becomes of them.

    A drawn client fails with probability job.dropout. It takes lognormal(0, 0.25) / speed of the median time of a client
    of speed 1, and is late beyond job.deadline; None: the server waits. The draws of one client depend on nothing that others do.
    """
    drawn = sample_clients(job.seed, round_index, count, job.sample)
    failed = [n for n in drawn if job.dropout > 0 and _uniform(job, "dropout", round_index, n) < job.dropout]
    late = [n for n in drawn if n not in failed and _is_late(job, round_index, n)]
    return Cohort(drawn, failed, late)


def check(job: Job, count: int) -> None:
    """Raise ValueError, one sentence, for chances and speeds that are none."""
    if not 0 <= job.dropout < 1:
        raise ValueError(f"Federation: dropout must be at least 0 and below 1, got {job.dropout}")
    if not 0 <= job.quorum <= 1:
        raise ValueError(f"Federation: quorum must be between 0 and 1, got {job.quorum}")
    if job.deadline is not None and not job.deadline > 0:
        raise ValueError(f"Federation: deadline must be positive, got {job.deadline}")
    if len(job.speeds) not in (0, count) or not all(0 < speed < float("inf") for speed in job.speeds):
        raise ValueError(f"Federation: speeds must be positive and finite, one for each of {count} clients")


def speeds_of(speeds: Sequence[float]) -> tuple[float, ...]:
    """What a Job says of the clients' speeds: nothing where all are 1."""
    return () if all(speed == 1 for speed in speeds) else tuple(map(float, speeds))


def _uniform(job: Job, purpose: str, round_index: int, number: int) -> float:
    return float(torch.rand((), generator=torch_generator(job.seed, purpose, round_index, number), dtype=torch.float64))


def _is_late(job: Job, round_index: int, number: int) -> bool:
    if job.deadline is None:
        return False
    random = torch_generator(job.seed, "speed", round_index, number)
    jitter = float(torch.randn((), generator=random, dtype=torch.float64).mul(JITTER).exp())
    return jitter / (job.speeds[number] if job.speeds else 1.0) > job.deadline
