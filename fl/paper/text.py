"""The rows of a set as Markdown: the table, the claims with what was measured, and what has not run."""

from collections.abc import Mapping, Sequence
from typing import Any

from fl.paper.rows import Json, Verdict, judge
from fl.paper.study import Study
from fl.report import MIB

MISSING = "not run"


def markdown(study: Study, rows: Sequence[Json]) -> str:
    """The whole set: title, table, acceptance, unfinished cells."""
    parts = [f"**{study.paper.title}**", _table(study, rows)]
    if study.claims:
        parts.append(_claims(study, judge(study.claims, rows)))
    parts += [_origin(rows), "\n".join(unfinished(study, rows))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(study: Study, rows: Sequence[Json]) -> str:
    """One line a method; the second column's accuracy and difference stand beside the first's."""
    second = {row["method"]: row for row in rows if row["column"] == "evaluations"}
    if not any(row["seeds"] for row in second.values()):  # named below as not run
        second = {}
    reference = next(method.label for method in study.methods if study.paper.reference in dict(method.lines))
    titles = ["method", "test steps", "test % ± sd", "worst decile %", f"to {reference} (se)"]
    if second:
        titles += ["equal evaluations: test %", f"to {reference} (se)"]
    titles += ["evaluations, thousands", "up / down MiB", "model KiB", "seconds", "seeds"]
    lines = []
    for row in (row for row in rows if row["column"] == "rounds"):
        steps = "" if row["adapt_steps"] is None else str(row["adapt_steps"])
        cells = [row["label"], steps, *_accuracy(row)]
        if second:
            again = second[row["method"]]
            accuracy, _, gap = _accuracy(again)
            cells += [accuracy, gap]
        lines.append([*cells, *_costs(row), _seeds(row)])
    return _grid(titles, lines, left=1)


def _accuracy(row: Json) -> list[str]:
    """(mean with its sd over the seeds, worst decile, difference)."""
    if row["accuracy"] is None:
        return ["diverged" if row["diverged"] else MISSING, "", ""]
    sd = "" if row["sd_seeds"] is None else f" ± {row['sd_seeds']:.2f}"
    gap = "" if row["ahead"] is None else f"{row['ahead']:+.2f} ({row['ahead_se']:.2f})"
    return [f"{row['accuracy']:.2f}{sd}", f"{row['worst_decile']:.1f}", gap]


def _costs(row: Json) -> list[str]:
    if row["accuracy"] is None:
        return [""] * 4
    return [
        f"{row['evaluations'] / 1000:.1f}",
        f"{row['bytes_up'] / MIB:.1f} / {row['bytes_down'] / MIB:.1f}",
        f"{row['model_bytes'] / 1024:.1f}",
        f"{row['seconds']:.0f}",
    ]


def _seeds(row: Json) -> str:
    return f"{len(row['seeds'])} of {len(row['planned'])}"


def _claims(study: Study, verdicts: Sequence[Verdict]) -> str:
    labels = {line: method.label_of(steps) for method in study.methods for line, steps in method.lines}
    lines = []
    for verdict in verdicts:
        claim = verdict.claim
        if claim.shared_at_least is not None:
            what, needed = f"the global model of {labels[claim.first]}, test %", f"≥ {claim.shared_at_least:g}"
        elif claim.at_least is not None:
            what, needed = f"{labels[claim.first]} − {labels[claim.second or '']}", f"≥ {claim.at_least:g}"
        else:
            what, needed = f"{labels[claim.first]} − {labels[claim.second or '']}, either way", f"≤ {claim.within:g}"
        error = "" if verdict.error is None else f" ({verdict.error:.2f})"
        sign = "" if claim.shared_at_least is not None else "+"
        measured = MISSING if verdict.value is None else f"{verdict.value:{sign}.2f}{error}"
        lines.append([what, needed, measured, {True: "yes", False: "**no**", None: ""}[verdict.holds]])
        lines[-1].append(str(len(verdict.seeds)))
    return _grid(["acceptance", "needed", "measured (se)", "holds", "seeds"], lines, left=1)


def _origin(rows: Sequence[Json]) -> str:
    """Where the numbers come from, in one sentence."""
    ran = [row for row in rows if row["seeds"]]
    if not ran:
        return ""
    commits = sorted({commit for row in ran for commit in row["commits"]})
    machines = sorted(
        {f"{row['machine']}, threads {row['threads']}, {one}" for row in ran for one in row["built_with"]}
    )
    return (
        f"Test accuracy of the shipped files, mean over clients, ± sd over seeds; worst decile: mean of the lowest tenth of "
        f"the clients; differences client by client, standard error over all clients and seeds; test steps: gradient steps "
        f"from the global model before it is used. {'; '.join(machines)}; commit {', '.join(commits)}."
    )


def unfinished(study: Study, rows: Sequence[Json]) -> list[str]:
    """What has not all its seeds: how far each run came, and what has not been started."""
    lines = []
    for column in study.columns:
        waiting: dict[str, list[str]] = {}
        for method in study.methods:
            line, _ = method.lines[-1]
            row = next(row for row in rows if (row["column"], row["method"]) == (column, line))
            missing = [seed for seed in row["planned"] if seed not in row["seeds"]]
            started = [seed for seed in missing if seed in row["diverged"] or str(seed) in row["unfinished"]]
            lines += [f"- {method.name}, equal {column}: {_state(row, seed)}" for seed in started]
            left = [seed for seed in missing if seed not in started]
            if left:
                seeds = f"seed{'s' if len(left) > 1 else ''} {', '.join(map(str, left))}"
                waiting.setdefault(seeds, []).append(method.name)
        lines += [f"- equal {column}, {seeds} not run: {_names(study, names)}" for seeds, names in waiting.items()]
    return lines and ["Not finished:", "", *lines]


def _names(study: Study, names: Sequence[str]) -> str:
    return "every method" if len(names) == len(study.methods) else ", ".join(names)


def _state(row: Json, seed: int) -> str:
    if seed in row["diverged"]:
        return f"seed {seed} diverged"
    return f"seed {seed} round {row['unfinished'][str(seed)]} of {row['rounds']}"


def trials(rows: Sequence[Mapping[str, Any]]) -> str:
    """The tuning's trials as Markdown: what was tried, the clients' mean validation accuracy, and the best of each method:
    of its longest trials."""
    best: dict[str, tuple[int, float]] = {}
    for row in rows:
        if row["validation"] is not None:
            mine = row["rounds"], row["validation"]
            best[row["method"]] = max(best.get(row["method"], mine), mine)
    lines = []
    for row in rows:
        given = ", ".join(f"{key} {value}" for key, value in row["trial"].items()) or "as configured"
        value = row["validation"]
        shown = row["state"] if value is None else f"{value:.2f}"
        if value is not None and best[row["method"]] == (row["rounds"], value):
            shown = f"**{shown}**"
        lines.append([row["method"], given, str(row["rounds"]), shown])
    return _grid(["method", "trial", "rounds", "validation %"], lines, left=2) + "\n"


def _grid(titles: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> str:
    """A Markdown table, columns padded so that it reads as text too; the first `left` columns are text, the others numbers."""
    widths = [max(len(line[k]) for line in [titles, *lines]) for k in range(len(titles))]

    def pad(line: Sequence[str]) -> str:
        padded = [cell.ljust(widths[k]) if k < left else cell.rjust(widths[k]) for k, cell in enumerate(line)]
        return "| " + " | ".join(padded) + " |"

    rule = (
        "| "
        + " | ".join(
            "-" * (width if k < left else width - 1) + ("" if k < left else ":") for k, width in enumerate(widths)
        )
        + " |"
    )
    return "\n".join([pad(titles), rule, *map(pad, lines)])
