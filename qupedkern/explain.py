"""What runs where on this machine, and why: explain() for one call, backends() for every op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qupedkern.backends import EAGER, Choice, forced, module, names, select, why_not
from qupedkern.ops import OPS


def explain(op: str, *args: Any) -> Choice:
    """Which backend would run `op` on these arguments, and why each other would not. Nothing is computed.

    op: the name of a public op, for example "soft_quantize"; args: what the public function takes.
    Returns a Choice with .backend, .forced and .reasons {backend: sentence}. Raises ValueError for an unknown op, and what
    the op itself raises for wrong arguments.
    """
    if op not in OPS:
        raise ValueError(f"explain: op must be one of {', '.join(sorted(OPS))}, got {op!r}")
    prepared = OPS[op].prepare(*args)
    wanted = forced()
    chosen = select(op, prepared)
    reasons = {}
    for name in names():
        if name != chosen:
            if wanted is not None:
                fallback = f"{wanted!r} was forced" + ("" if chosen == wanted else " but has no kernel for this op")
            else:
                fallback = f"{chosen!r} comes first"
            reasons[name] = why_not(name, op, prepared) or fallback
    return Choice(op, chosen, wanted is not None, reasons)


@dataclass(frozen=True)
class BackendTable:
    """Each backend on this machine: available, or why not, and the ops it has a kernel for. str() is a printable table."""

    descriptions: dict[str, str]  # backend -> what it is here
    unavailable: dict[str, str]  # backend -> why it cannot run here
    kernels: dict[str, tuple[str, ...]]  # backend -> ops with a kernel of its own
    ops: tuple[str, ...]
    forced: str | None = None  # by use_backend or QUPEDKERN_BACKEND

    def __str__(self) -> str:
        lines = [] if self.forced is None else [f"{self.forced!r} is forced (use_backend or QUPEDKERN_BACKEND)"]
        for name, description in self.descriptions.items():
            reason = self.unavailable.get(name)
            lines.append(f"{name:<8} {'not available: ' + reason if reason else description}")
        columns = list(self.descriptions)
        width = max(len(op) for op in self.ops)
        lines += ["", "op".ljust(width) + "".join(f"  {name:<8}" for name in columns).rstrip()]
        for op in self.ops:
            marks = [("kernel" if op in self.kernels[name] else "-> eager") for name in columns]
            lines.append((op.ljust(width) + "".join(f"  {mark:<8}" for mark in marks)).rstrip())
        return "\n".join(lines)


def backends() -> BackendTable:
    """Every backend and op on this machine, with the reason where a backend cannot run."""
    descriptions, unavailable, kernels = {}, {}, {}
    ops = tuple(OPS)
    for name in names():
        if name == EAGER:
            descriptions[name] = "the reference formulas in PyTorch, on every device"
            kernels[name] = ops
            continue
        reason = module(name).unavailable()
        descriptions[name] = module(name).describe()
        kernels[name] = () if reason else tuple(op for op in ops if op in module(name).ops())
        if reason:
            unavailable[name] = reason
    return BackendTable(descriptions, unavailable, kernels, ops, forced())
