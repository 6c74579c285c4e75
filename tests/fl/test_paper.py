"""Sets of runs: what the shipped ones say, a small one run, killed and continued, and the arithmetic of its table."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from fl import algorithms, models
from fl.__main__ import app
from fl.compare import mean_and_error, worst_decile
from fl.config import tomllib
from fl.errors import ConfigError
from fl.paper import rows, study, text
from fl.paper.study import Claim

ROOT = Path(__file__).parents[2]
SETS = sorted(path.stem for path in study.SETS.glob("*.toml"))

TINY = """
[experiment]
name = "tiny"
rounds = 3
sample = 0.5
architecture = "mlp"
score_every = 2

[data]
name = "digits"
classes_per_client = [4, 5]

[paper]
title = "A tiny set"
seeds = [0, 1]
reference = "quped"
evaluations = 6

[tuning]
rounds = 2
seed = 9

[[clients]]
count = 3
architecture = "mlp"
bits = 2

[algorithms.fedavg]
local_steps = 2

[[methods]]
name = "quped"
label = "QuPeD 2 bit"
algorithm = "quped"
parameters = { local_steps = 1 }
trials = [{}, { rate = 0.01 }]

[[methods]]
name = "float"
label = "local float"
algorithm = "local"
bits = "float"
parameters = { local_steps = 2 }
trials = [{ rate = 1e30 }]

[[methods]]
name = "fedavg"
label = "FedAvg"
algorithm = "fedavg"
adapt = [0, 2]

[[acceptance]]
first = "quped"
second = "fedavg@2"
at_least = -100

[[acceptance]]
first = "quped"
second = "float"
within = 1e-9

[[acceptance]]
first = "fedavg@0"
shared_at_least = 0
"""


def tiny(text: str = TINY) -> study.Study:
    return study.parse(tomllib.loads(text), "tiny")


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["paper", *map(str, arguments)])


@pytest.fixture
def tiny_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


# -- the shipped sets -------------------------------------------------------------------------------------------------


def test_the_sets_are_those_of_the_experiment() -> None:
    assert SETS == ["a", "a0", "b", "b-small", "c", "d"]


@pytest.mark.parametrize("name", SETS)
def test_a_shipped_set_is_whole(name: str) -> None:
    shown = study.load(name)
    used = {method.algorithm for method in shown.methods}
    needed = {"quped", "local", "fedavg", "fedprox", "per_fedavg", "pfedme", "fml"}
    assert used >= (needed if name == "d" else needed | {"qupel", "ditto"})
    assert shown.columns == ("rounds", "evaluations")
    assert len(shown.paper.seeds) == (1 if name == "b-small" else 3)
    trials = {len(method.get("trials", [])) for method in shown.content["methods"]} - {0}
    assert len(trials) == 1  # the same number for every method that is tuned at all
    for cell in shown.cells(column="rounds"):
        algorithm = cell.config.algorithm(cell.method.algorithm)
        assert algorithm.local_steps == 10  # type: ignore[attr-defined]
        assert algorithm.batch_size == 25  # type: ignore[attr-defined]


def test_a0_is_the_set_up_of_its_acceptance() -> None:
    shown = study.load("a0")
    cells = {cell.method.name: cell.config for cell in shown.cells(seeds=[0], column="rounds")}
    one = cells["quped-2"]
    assert (one.data.name, one.data.shrink, one.data.classes_per_client, one.data.samples) == (
        "fashion-mnist",
        2,
        4,
        150,
    )
    assert [device[:2] for device in one.equipment] == [("cnn1", 2)] * 20
    assert (one.experiment.rounds, one.experiment.sample, shown.paper.seeds) == (240, 0.2, (0, 1, 2))
    assert sum(p.numel() for p in models.build("cnn1", (1, 14, 14), 10, seed=0).parameters()) == 9930
    assert one.algorithms["quped"] == algorithms.QuPeD(
        variant="hard",
        layers="inner",
        rate=0.05,
        momentum=0.9,
        distill=0.25,
        temperature=2.0,
        tempered="both",
        freeze_at=0.8,
    )
    assert [device[:2] for device in cells["quped-mixed-float-2"].equipment] == [("cnn1", "float")] * 10 + [
        ("cnn2", 2)
    ] * 10
    assert len(shown.claims) == 14


def test_d_mixes_architectures_and_bits() -> None:
    cell = study.load("d").cells(seeds=[0], only=["quped"])[0]
    devices = [device[:2] for device in cell.config.equipment]
    assert {devices.count((net, bits)) for net in ("cnn1", "cnn2") for bits in (1, 2, 4)} == {4}
    assert len(devices) == 24


MISTAKES = [
    (
        'reference = "quped"',
        'reference = "quped-2"',
        "'quped-2' is no line of the table, lines are quped, float, fedavg@0, fedavg@2",
    ),
    ('second = "fedavg@2"', 'second = "fedavg@3"', "'fedavg@3' is no line of the table"),
    ('name = "float"', 'name = "quped"', "methods must have different names"),
    ('name = "float"', 'name = "a/b"', "name must be a plain file name without @, got 'a/b'"),
    ('algorithm = "local"', 'algorithm = "locale"', "algorithm must be one of ditto, fedavg"),
    ("adapt = [0, 2]", "adapt = [2, 2]", "adapt must name each number of steps once"),
    ("local_steps = 1 }", "local_stops = 1 }", "method quped .*unknown key 'local_stops'"),
    (
        "at_least = -100",
        "at_least = -100\nwithin = 1",
        "needs second with at_least or within, or shared_at_least alone",
    ),
    ("seed = 9", "seed = 1", "seed must be none of the table's, got 1"),
    ("rounds = 3", "", "needs the key 'rounds'"),
    ("rate = 1e30", "rats = 1", "unknown key 'rats'"),
]


@pytest.mark.parametrize(("old", "new", "sentence"), MISTAKES, ids=[mistake[1] or "nothing" for mistake in MISTAKES])
def test_a_mistake_in_a_set_is_one_sentence_before_anything_runs(old: str, new: str, sentence: str) -> None:
    assert old in TINY
    with pytest.raises(ConfigError, match=sentence):
        tiny(TINY.replace(old, new, 1))


def test_a_mistake_of_the_command_is_one_sentence_and_exit_code_2(tiny_file: Path, tmp_path: Path) -> None:
    for arguments, sentence in [
        (["absent"], "there is no set absent, known are a, a0"),
        ([tiny_file, "--only", "fedsgd"], "has no method 'fedsgd', it has quped, float, fedavg"),
        ([tiny_file, "--seeds", "0,x"], "seeds must be numbers with commas"),
        ([tiny_file, "--column", "bytes"], "column must be one of rounds, evaluations"),
        ([tiny_file, "--rows", tiny_file], "must hold rows that --record has written"),
    ]:
        result = command(*arguments, "--out", tmp_path / "out")
        assert result.exit_code == 2
        assert sentence in result.stderr
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


# -- a small set, run -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny set's directory, all of it run."""
    directory = tmp_path_factory.mktemp("paper")
    (directory / "tiny.toml").write_text(TINY)
    result = command(directory / "tiny.toml", "--out", directory, "--record", directory / "rows.jsonl")
    assert result.exit_code == 0, result.output
    drawn = command(
        directory / "tiny.toml",
        "--out",
        directory,
        "--table",
        "--picture",
        directory / "tiny.png",
        "--page",
        directory / "tiny.html",
    )
    assert drawn.exit_code == 0, drawn.output
    (directory / "shown.md").write_text(result.output)
    return directory


def test_the_table_holds_what_the_runs_have_left(finished: Path) -> None:
    found = {(row["column"], row["method"]): row for row in rows.read_rows(tiny(), finished / "tiny")}
    for seed in (0, 1):
        for column in study.COLUMNS:
            for path, name in (
                ("quped", "quped"),
                ("float", "float"),
                ("fedavg", "fedavg@0"),
                ("fedavg@2", "fedavg@2"),
            ):
                summary = json.loads((finished / "tiny" / f"seed{seed}" / column / path / "summary.json").read_text())
                row = found[column, name]
                assert row["accuracies"][seed] == pytest.approx(
                    [100 * c["accuracy"] for c in summary["clients"]], abs=1e-4
                )
                assert row["seeds"] == [0, 1]
    evaluations = {key: row["evaluations"] for key, row in found.items()}
    drawn = 3 * 2  # rounds, of two clients each
    assert evaluations["rounds", "fedavg@0"] == 2 * drawn
    assert evaluations["rounds", "fedavg@2"] == 2 * drawn + 2 * 3
    assert evaluations["evaluations", "fedavg@0"] == 6 * drawn
    assert evaluations["evaluations", "float"] >= 6 * drawn  # and what clients do once at the end
    row = found["rounds", "quped"]
    assert row["accuracy"] == pytest.approx(np.mean(row["accuracies"]), abs=1e-3)
    assert row["ahead"] is None
    assert len(row["built_with"]) == 1
    gaps = np.subtract(found["rounds", "float"]["accuracies"], row["accuracies"])
    assert found["rounds", "float"]["ahead"] == pytest.approx(gaps.mean())


def test_the_text_can_be_made_from_the_rows_alone(finished: Path) -> None:
    shown = command(finished / "tiny.toml", "--out", finished, "--table").output
    again = command(finished / "tiny.toml", "--rows", finished / "rows.jsonl").output
    assert shown == again
    assert shown.strip() in (finished / "shown.md").read_text()
    assert "Not finished" not in shown
    table = [line for line in shown.splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in table[:6]}) == 1
    assert [line.split("|")[1].strip() for line in table[2:6]] == ["QuPeD 2 bit", "local float", "FedAvg", "FedAvg"]
    assert [line.split("|")[2].strip() for line in table[2:6]] == ["", "", "0", "2"]
    assert re.search(r"FedAvg with 2 test steps +\| +≥ -100 \| +[+-]\d+\.\d\d \(\d+\.\d\d\) \| +yes \|", shown)
    assert re.search(r"local float, either way +\| +≤ 1e-09 \| .* \| \*\*no\*\* \|", shown)


def test_there_is_a_picture_and_a_page(finished: Path) -> None:
    assert (finished / "tiny.png").read_bytes().startswith(b"\x89PNG")
    page = (finished / "tiny.html").read_text()
    assert page.count("<svg") == 4
    shown = re.findall(r'class="dot"[^>]*></span>([^<]*?)\s*</td>', page)
    assert shown == ["QuPeD 2 bit", "local float", "FedAvg with 0 test steps", "FedAvg with 2 test steps"]


def test_a_second_end_equals_a_run_of_its_own(finished: Path, tmp_path: Path) -> None:
    """One training, adapted by 2 steps, is what a run with adapt_steps = 2 ships, to the bit."""
    (tmp_path / "own.toml").write_text(TINY.replace("adapt = [0, 2]", "adapt = [2, 0]"))
    command(tmp_path / "own.toml", "--out", tmp_path, "--only", "fedavg", "--seeds", "0", "--column", "rounds")
    place = Path("seed0") / "rounds"
    for one, two in (("fedavg@2", "fedavg"), ("fedavg", "fedavg@0")):
        models_one = sorted((finished / "tiny" / place / one / "models").iterdir())
        models_two = sorted((tmp_path / "own" / place / two / "models").iterdir())
        assert len(models_one) == len(models_two) == 3
        assert [path.read_bytes() for path in models_one] == [path.read_bytes() for path in models_two]


def test_a_killed_set_says_how_far_it_came_and_goes_on_to_the_same_rows(finished: Path, tmp_path: Path) -> None:
    long = TINY.replace("rounds = 3", "rounds = 40", 1).replace("seeds = [0, 1]", "seeds = [0]")
    (tmp_path / "tiny.toml").write_text(long)
    arguments = [tmp_path / "tiny.toml", "--only", "quped", "--only", "float", "--column", "rounds"]
    line = [sys.executable, "-m", "fl", "paper", *map(str, arguments), "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    manifest = tmp_path / "killed" / "tiny" / "seed0" / "rounds" / "quped" / "run.json"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (
        manifest.exists() and json.loads(manifest.read_text()).get("round", 0) >= 3
    ):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    shown = command(tmp_path / "tiny.toml", "--out", tmp_path / "killed", "--table").output
    came = re.search(r"- quped, equal rounds: seed 0 round (\d+) of 40\n", shown)
    assert came
    assert 3 <= int(came[1]) < 40
    assert "- equal rounds, seed 0 not run: float, fedavg\n" in shown
    assert "- equal evaluations, seed 0 not run: every method\n" in shown
    assert "equal evaluations: test %" not in shown
    assert command(*arguments, "--out", tmp_path / "killed").exit_code == 0
    assert command(*arguments, "--out", tmp_path / "whole").exit_code == 0
    parsed = tiny(long)
    killed, whole = (
        [{**row, "seconds": None} for row in rows.read_rows(parsed, tmp_path / out / "tiny")]
        for out in ("killed", "whole")
    )
    assert killed == whole
    assert killed[0]["seeds"] == [0]


def test_a_cell_that_another_process_runs_is_left_alone(tiny_file: Path, tmp_path: Path) -> None:
    place = tmp_path / "out" / "tiny" / "seed0" / "rounds"
    place.mkdir(parents=True)
    with open(place / ".quped.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = command(tiny_file, "--out", tmp_path / "out", "--only", "quped", "--seeds", "0", "--column", "rounds")
    assert result.exit_code == 0
    assert "quped seed 0 equal rounds: another process is running it" in result.output
    assert [path.name for path in place.iterdir()] == [".quped.lock"]


def test_trials_are_judged_by_validation_images_and_may_diverge(tiny_file: Path, tmp_path: Path) -> None:
    for _ in range(2):  # the second time nothing is left to run
        result = command(tiny_file, "--tune", "--out", tmp_path / "out", "--record", tmp_path / "trials.jsonl")
        assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert [(row["method"], row["trial"], row["state"]) for row in found] == [
        ("quped", {}, "finished"),
        ("quped", {"rate": 0.01}, "finished"),
        ("float", {"rate": 1e30}, "diverged"),
    ]
    summary = json.loads((tmp_path / "out" / "tiny" / "tuning" / "quped" / "1" / "summary.json").read_text())
    assert found[1]["validation"] == pytest.approx(100 * np.mean([c["validation"] for c in summary["clients"]]))
    assert result.output.count("**") == 2  # the best of the one method that has one


def test_the_best_trials_run_once_more_for_all_rounds(tiny_file: Path, tmp_path: Path) -> None:
    content = tiny_file.read_text().replace("seed = 9\n", "seed = 9\nfinalists = 2\n", 1)
    content = content.replace("trials = [{}, { rate = 0.01 }]", "trials = [{}, { rate = 1e-9 }, { rate = 0.01 }]")
    tiny_file.write_text(content)
    line = (tiny_file, "--tune", "--out", tmp_path / "out", "--record", tmp_path / "trials.jsonl")
    early = command(*line, "--table")
    assert early.output.count("| quped ") == 3  # no finalist before the trials have run
    assert command(*line).exit_code == 0
    found = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    trials, finals = found[:4], found[4:]  # a method whose trials diverge has no finalist
    ranked = sorted(trials[:3], key=lambda row: -row["validation"])
    assert [(row["method"], row["trial"]) for row in finals] == [("quped", row["trial"]) for row in ranked[:2]]
    whole = study.load(str(tiny_file)).cells(only=["quped"])[0].rounds
    assert {row["rounds"] for row in trials} == {2}
    assert {row["rounds"] for row in finals} == {whole}
    best = max(finals, key=lambda row: row["validation"])
    shown = command(*line, "--table").output
    assert re.findall(r"(\d+) \| +\*\*(.*)\*\*", shown) == [(str(whole), f"{best['validation']:.2f}")]


def test_one_finalist_is_refused(tiny_file: Path) -> None:
    tiny_file.write_text(tiny_file.read_text().replace("seed = 9\n", "seed = 9\nfinalists = 1\n", 1))
    result = command(tiny_file, "--table")
    assert result.exit_code == 2
    assert "finalists must be at least 2, got 1" in result.output


def test_detached_it_runs_on_by_itself(tiny_file: Path, tmp_path: Path) -> None:
    line = [
        sys.executable,
        "-m",
        "fl",
        "paper",
        str(tiny_file),
        "--only",
        "float",
        "--seeds",
        "0",
        "--column",
        "rounds",
    ]
    said = subprocess.run(
        [*line, "--detach", "--out", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert re.match(r"process \d+ runs, its words go to .*log\.txt", said)
    log = tmp_path / "out" / "tiny" / "log.txt"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and "Not finished" not in log.read_text():
        time.sleep(0.05)
    assert re.search(r"float seed 0 equal rounds: \d+\.\d\d %", log.read_text())


# -- arithmetic -------------------------------------------------------------------------------------------------------


def test_the_standard_error_is_over_all_pairs() -> None:
    mean, error = mean_and_error(np.array([[1.0, 3.0], [2.0, 6.0]]))
    assert mean == 3
    assert error == pytest.approx((14 / 3) ** 0.5 / 2)  # squares of -2, 0, -1, 3 over n - 1 = 3, by sqrt(n) = 2
    assert mean_and_error(np.array([[5.0]])) == (5, 0)


def test_the_worst_decile_is_the_mean_of_the_lowest_tenth_of_each_seed() -> None:
    one = np.arange(20.0)
    assert worst_decile(np.stack([one, one[::-1] + 10])) == (0.5 + 10.5) / 2
    assert worst_decile(np.array([[9.0, 4.0, 7.0]])) == 4


def row(method: str, seeds: list[int], accuracies: list[list[float]], **more: Any) -> rows.Json:
    return {"column": "rounds", "method": method, "seeds": seeds, "accuracies": accuracies, **more}


def test_differences_pair_clients_of_the_seeds_that_both_have() -> None:
    one = row("one", [0, 2], [[90.0, 80.0], [70.0, 60.0]])
    other = row("other", [1, 2], [[0.0, 0.0], [69.0, 57.0]])
    assert rows.difference(one, other) == (2.0, pytest.approx(1.0))  # 1 and 3: sd sqrt(2), by sqrt(2)
    assert rows.difference(one, row("none", [], [])) is None
    full = rows.with_differences([one, other], "other")
    assert [(r["ahead"], r["ahead_se"]) for r in full] == [(2.0, pytest.approx(1.0)), (None, None)]


@pytest.mark.parametrize(
    ("claim", "holds"),
    [
        (Claim("one", "other", at_least=2), True),
        (Claim("one", "other", at_least=2.01), False),
        (Claim("other", "one", within=2), True),
        (Claim("other", "one", within=1.99), False),
        (Claim("one", shared_at_least=76), True),
        (Claim("one", shared_at_least=76.1), False),
        (Claim("one", "none", at_least=0), None),
        (Claim("none", shared_at_least=0), None),
    ],
)
def test_a_claim_holds_on_the_right_side_of_its_bound(claim: Claim, holds: bool | None) -> None:
    found = [
        row("one", [0, 1], [[90.0, 80.0], [70.0, 60.0]], shared=[75.0, 77.0]),
        row("other", [0, 1], [[88.0, 78.0], [68.0, 58.0]], shared=[None, None]),
        row("none", [], [], shared=[]),
    ]
    verdict = rows.judge([claim], found)[0]
    assert verdict.holds is holds
    assert verdict.seeds == (() if holds is None else (0, 1))


def test_trials_show_the_best_of_each_method() -> None:
    base = {"state": "finished", "rounds": 9}
    shown = text.trials(
        [
            {**base, "method": "a", "trial": {"rate": 0.1}, "validation": 70.0},
            {**base, "method": "a", "trial": {}, "validation": 71.5},
            {**base, "method": "a", "trial": {}, "validation": 71.9, "rounds": 3},
            {"method": "b", "trial": {"rate": 1.0}, "validation": None, "state": "round 3 of 9", "rounds": 9},
        ]
    )
    assert "| a      | as configured |      9 |    **71.50** |" in shown
    assert "|        70.00 |" in shown
    assert "|        71.90 |" in shown  # of fewer rounds
    assert "| round 3 of 9 |" in shown
