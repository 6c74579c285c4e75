"""Targets set before the work: bounds on ratios of times, met or missed by the median of separate runs."""

from __future__ import annotations

from dataclasses import dataclass

SLACK = 0.10  # a median within 10 % of its target meets it: runs on a shared machine differ by that much


@dataclass(frozen=True)
class Target:
    """A ratio should be at most (`upper`) or at least `bound`, give or take the share `slack`."""

    bound: float
    upper: bool
    slack: float = SLACK

    def met(self, value: float) -> bool:
        return value <= self.bound * (1 + self.slack) if self.upper else value >= self.bound * (1 - self.slack)


def at_most(*bounds: float) -> list[Target]:
    return [Target(bound, upper=True) for bound in bounds]


def at_least(*bounds: float) -> list[Target]:
    return [Target(bound, upper=False) for bound in bounds]
