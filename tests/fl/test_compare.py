"""Runs side by side: who is grouped with whom, what the numbers are, and a page that needs nothing but itself."""

import dataclasses
import html.parser
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner

from fl import Federation, algorithms, page
from fl.__main__ import app
from fl.compare import find_runs, group_runs
from fl.errors import CheckpointError
from fl.page import write_page
from fl.trace import Trace, read_trace

Build = Callable[..., Federation]
VOID = {"meta", "br", "link", "img", "input", "hr"}


@pytest.fixture
def experiment(federation: Build, tmp_path: Path) -> Path:
    """Two seeds of local training and of QuPeD, and QuPeD with another setting."""
    for seed in (0, 1):
        for algorithm in (algorithms.QuPeD(local_steps=1), algorithms.Local(local_steps=1)):
            federation(algorithm, rounds=1, seed=seed).run(tmp_path / f"seed{seed}" / algorithm.name)
    federation(algorithms.QuPeD(local_steps=2), rounds=1).run(tmp_path / "other")
    return tmp_path


def test_runs_that_differ_in_their_seed_alone_share_a_line(experiment: Path) -> None:
    groups = group_runs(
        find_runs([experiment / "seed0", experiment / "seed1", experiment / "other", experiment / "other"])
    )
    assert [(group.label, [run.seed for run in group.runs]) for group in groups] == [
        ("QuPeD (local_steps 1)", [0, 1]),
        ("local", [0, 1]),
        ("QuPeD (local_steps 2)", [0]),
    ]


def test_the_numbers_are_those_of_the_summaries(experiment: Path) -> None:
    groups = {g.label: g for g in group_runs(find_runs([experiment / "seed0", experiment / "seed1"]))}
    found = {}
    for name, label in (("quped", "QuPeD"), ("local", "local")):
        summaries = [json.loads((experiment / f"seed{seed}" / name / "summary.json").read_text()) for seed in (0, 1)]
        found[label] = 100 * np.array([[client["accuracy"] for client in s["clients"]] for s in summaries])
        row = groups[label].row()
        assert row["mean"] == pytest.approx(found[label].mean())
        assert row["sd_seeds"] == pytest.approx(found[label].mean(1).std(ddof=1))
        assert row["sd_clients"] == pytest.approx(found[label].std(1, ddof=1).mean())
        assert row["worst_decile"] == pytest.approx(found[label].min(1).mean())  # of four clients a tenth is one
        assert row["evaluations"] == np.mean([s["evaluations"] for s in summaries])
        assert row["up"] == np.mean([s["bytes_up"] for s in summaries]) / 2**20
        assert row["down"] == np.mean([s["bytes_down"] for s in summaries]) / 2**20
        assert row["seconds"] == np.mean([s["seconds"] for s in summaries])
        assert row["model"] == np.mean([c["model_bytes"] for s in summaries for c in s["clients"]]) / 1024
    gaps = (found["QuPeD"] - found["local"]).mean(0)
    ahead = groups["QuPeD"].ahead_of(groups["local"])
    assert ahead == (pytest.approx(gaps.mean()), pytest.approx(gaps.std(ddof=1) / 2))


def test_an_unfinished_run_says_how_far_it_came(experiment: Path) -> None:
    manifest = experiment / "other" / "run.json"
    content = json.loads(manifest.read_text())
    del content["finished"]
    content["description"]["job"]["rounds"] = 9
    manifest.write_text(json.dumps(content))
    groups = write_page([experiment / "other", experiment / "seed0"], experiment / "page.html")
    assert [group.finished for group in groups] == [False, True, True]
    assert "unfinished: round 1 of 9" in (experiment / "page.html").read_text()


class Balance(html.parser.HTMLParser):
    """Tags as they open and close, and everything that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        links = [value or "" for name, value in attributes if name in ("src", "href", "xlink:href", "data")]
        self.fetched += [link for link in links if not link.startswith("#")]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(experiment)
    result = CliRunner().invoke(app, ["compare", "seed0", "seed1", "other", "--out", "pages/report.html"])
    assert result.exit_code == 0, result.output
    assert re.search(
        r"^QuPeD \(local_steps 1\): \d+\.\d ± \d+\.\d %, worst decile \d+\.\d %, seeds 2$", result.output, re.M
    )
    text = (experiment / "pages" / "report.html").read_text()
    tags = Balance()
    tags.feed(text)
    assert tags.open == []
    assert tags.fetched == []
    assert "<script" not in text
    assert text.count("<svg") == 4
    again = CliRunner().invoke(app, ["compare", "seed0", "seed1", "other", "--out", "pages/again.html"])
    assert again.exit_code == 0
    assert (experiment / "pages" / "again.html").read_text() == text


def test_weights_on_centers_are_shown_where_runs_have_written_them_down(
    federation: Build, experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = federation(algorithms.QuPeD(local_steps=1))
    run.run(experiment / "traced", on_round=Trace(experiment / "traced", run.clients))
    drawn: list[Any] = []
    monkeypatch.setattr(
        page, "_svg", lambda draw: [draw(axes := Figure().subplots()), drawn.append(axes), "<svg/>"][-1]
    )
    write_page([experiment / "traced", experiment / "seed0"], experiment / "page.html")
    assert (experiment / "page.html").read_text().count("<svg/>") == len(drawn) == 5
    lines: dict[int, list[float]] = {}
    for line in read_trace(experiment / "traced"):
        lines.setdefault(line["round"], []).append(100 * line["share"])
    (shown,) = drawn[-1].get_lines()
    assert shown.get_xdata().tolist() == sorted(lines)
    assert shown.get_ydata().tolist() == [pytest.approx(np.mean(lines[at])) for at in sorted(lines)]
    text = (experiment / "page.html").read_text()
    assert text.index("Weights on centers") > text.index("Accuracy over model size")


def test_the_table_has_every_column_with_the_groups_numbers(experiment: Path) -> None:
    groups = write_page([experiment / "seed0", experiment / "seed1"], experiment / "page.html")
    table = (experiment / "page.html").read_text().split("<table>")[1].split("</table>")[0]
    heads = [" ".join(re.sub(r"<[^>]*>", " ", head).split()) for head in re.findall(r"<th.*?</th>", table, re.S)]
    assert heads == [
        *("algorithm", "seeds", "accuracy, % ± sd over seeds", "sd over clients", "worst decile, %"),
        *("QuPeD ahead points ± se", "down MiB", "up MiB", "gradient evaluations", "model file KiB", "seconds"),
    ]
    lines = re.findall(r"<tr>(.*?)</tr>", table, re.S)[1:]
    assert len(lines) == len(groups) == 2
    for group, line in zip(groups, lines, strict=True):
        cells = [" ".join(re.sub(r"<[^>]*>", " ", cell).split()) for cell in re.findall(r"<td.*?</td>", line, re.S)]
        row, ahead = group.row(), groups[0].ahead_of(group)
        assert ahead is not None
        paired = "" if group is groups[0] else f"{ahead[0]:+.1f} ± {ahead[1]:.1f}"
        assert cells == [
            *(group.label, "2", f"{row['mean']:.1f} ± {row['sd_seeds']:.1f}", f"{row['sd_clients']:.1f}"),
            *(f"{row['worst_decile']:.1f}", paired, f"{row['down']:.1f}", f"{row['up']:.1f}"),
            *(f"{row['evaluations']:,.0f}", f"{row['model']:.1f}", f"{row['seconds']:,.0f}"),
        ]


def test_names_from_a_run_cannot_become_markup(experiment: Path) -> None:
    manifest = experiment / "other" / "run.json"
    content = json.loads(manifest.read_text())
    content["built_with"] = "<script>alert(1)</script>"
    manifest.write_text(json.dumps(content))
    write_page([experiment / "other"], experiment / "page.html")
    assert "<script" not in (experiment / "page.html").read_text()


def test_what_is_no_run_is_one_sentence(experiment: Path) -> None:
    for break_it, sentence in [
        (lambda: [experiment / "absent"], "holds no run, give directories"),
        (
            lambda: [(experiment / "other" / "run.json").write_text("{"), experiment / "other"][1:],
            "cannot be read as a run",
        ),
    ]:
        with pytest.raises(CheckpointError, match=sentence):
            find_runs(break_it())
    result = CliRunner().invoke(app, ["compare", str(experiment / "absent")])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1


def test_clients_with_other_data_are_not_paired(federation: Build, tmp_path: Path) -> None:
    run = federation(algorithms.Local(local_steps=1), rounds=1)
    run.run(tmp_path / "a")
    turned = [dataclasses.replace(client, data=run.clients[k - 1].data) for k, client in enumerate(run.clients)]
    dataclasses.replace(run, clients=turned, algorithm=algorithms.Local(local_steps=2)).run(tmp_path / "b")
    one, two = group_runs(find_runs([tmp_path / "a", tmp_path / "b"]))
    assert one.ahead_of(two) is None
