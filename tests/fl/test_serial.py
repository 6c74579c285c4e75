"""Whole runs: the same bits from the same seed, and from a run that was cut anywhere."""

import dataclasses
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import qupedkern as qk
from fl import Client, Federation, algorithms, storage
from fl.algorithms import Algorithm
from fl.core import ClientState, Job, Message, Update, state_file
from fl.engines.work import _check_finite
from fl.errors import CheckpointError, DivergedError
from fl.evaluation import score
from fl.shipping import load_model

Build = Callable[..., Federation]
Outcome = Callable[[Path], dict[str, Any]]
ALL = [algorithms.QuPeD(), algorithms.Local(), algorithms.FedAvg()]


@pytest.mark.parametrize("algorithm", ALL, ids=lambda algorithm: algorithm.name)
def test_a_seed_fixes_every_bit(outcome: Outcome, federation: Build, algorithm: Algorithm, tmp_path: Path) -> None:
    run = federation(algorithm, evaluations=6)
    torch.manual_seed(1)
    run.run(tmp_path / "one")
    torch.manual_seed(2)
    run.run(tmp_path / "two")
    assert outcome(tmp_path / "one") == outcome(tmp_path / "two")
    dataclasses.replace(run, seed=1).run(tmp_path / "other")
    assert outcome(tmp_path / "one") != outcome(tmp_path / "other")


@pytest.mark.parametrize("algorithm", ALL, ids=lambda algorithm: algorithm.name)
def test_the_reported_accuracy_is_the_shipped_files(federation: Build, algorithm: Algorithm, tmp_path: Path) -> None:
    run = federation(algorithm, evaluations=12)
    result = run.run(tmp_path / "run")
    assert [row.client for row in result.clients] == [0, 1, 2, 3]
    for row, client in zip(result.clients, run.clients, strict=True):
        path = tmp_path / "run" / row.model_file
        factory = algorithm.factory(run.job, client)
        model = load_model(factory, row.bits, path) if row.bits == "float" else qk.load(factory, path).eval()
        measured = score(model, client)
        assert (row.accuracy, row.validation) == (measured.test, measured.validation)
        assert row.model_bytes == path.stat().st_size
        assert row.train_samples == len(client.data.train)


@pytest.mark.parametrize("algorithm", ALL, ids=lambda algorithm: algorithm.name)
def test_scoring_seldom_changes_nothing_but_the_records(
    outcome: Outcome, federation: Build, algorithm: Algorithm, tmp_path: Path
) -> None:
    every = federation(algorithm, evaluations=6, rounds=5).run(tmp_path / "every")
    seldom = federation(algorithm, evaluations=6, rounds=5, score_every=2).run(tmp_path / "seldom")
    one, two = outcome(tmp_path / "every"), outcome(tmp_path / "seldom")
    assert {name: content for name, content in one.items() if name != "records"} == {
        name: content for name, content in two.items() if name != "records"
    }
    assert [record.get("scored", True) for record in seldom.records] == [True, False, True, False, True, True]
    for number, (record, full) in enumerate(zip(seldom.records, every.records, strict=True)):
        expected = full if number in (0, 2, 4, 5) else seldom.records[number - 1]
        assert record["accuracy"] == expected["accuracy"]
        assert record["validation"] == expected["validation"]


def test_packed_files_are_small_and_float_ones_are_not(federation: Build, tmp_path: Path) -> None:
    result = federation(algorithms.Local(local_steps=1), rounds=1).run(tmp_path / "run")
    one_bit, whole = result.clients[0], result.clients[2]  # both MLPs
    assert (one_bit.bits, whole.bits) == (1, "float")
    assert one_bit.model_bytes < whole.model_bytes / 10


def test_records_and_rows_agree(federation: Build, tmp_path: Path) -> None:
    run = federation(algorithms.QuPeD(freeze_at=1.0), evaluations=6, sample=0.5)
    result = run.run(tmp_path / "run")
    assert [record["round"] for record in result.records] == [0, 1, 2, 3]
    assert [record["bytes_up"] for record in result.records] == [0, *[2 * 4 * 17226] * 3]  # two MLPs of float32
    assert result.total("bytes_down") == result.total("bytes_up")
    assert all(len(record["drawn"]) == len(record["evaluations"]) == 2 for record in result.records[1:])
    assert result.evaluations == sum(sum(record["evaluations"].values()) for record in result.records)
    last = result.records[-1]  # without a fine-tuning at the end, the last round's accuracies are the final ones
    assert last["accuracy"] == [row.accuracy for row in result.clients]
    assert last["accuracy_mean"] == pytest.approx(result.mean_accuracy)
    assert last["accuracy_worst"] == result.worst_accuracy
    written = [json.loads(line) for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    assert written == result.records
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == json.loads(json.dumps(result.summary()))


def test_a_result_prints_its_table_and_draws_its_picture(
    federation: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = federation(algorithms.QuPeD(distill=0.25, temperature=2.0, local_steps=1), rounds=1).run(tmp_path / "run")
    capsys.readouterr()
    result.table()
    printed = capsys.readouterr().out
    for row in result.clients:
        device = f"{row.architecture} {row.bits}"
        line = next(line for line in printed.splitlines() if line.split()[:1] == [str(row.client)])
        assert device in line
        assert line.split()[-1] == f"{100 * row.accuracy:.1f}"
    for name in ("run.png", "run.svg"):
        result.plot(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000


def test_training_raises_accuracy(federation: Build, tmp_path: Path) -> None:
    result = federation(algorithms.QuPeD(), rounds=8, sample=0.75).run(tmp_path / "run")
    assert result.records[0]["accuracy_mean"] < 0.4
    assert result.mean_accuracy > 0.8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dying(algorithms.QuPeD):
    """QuPeD that raises in the second client of a round."""

    dies_in: ClassVar[int | None] = None

    def client_step(
        self, job: Job, client: Client, state: ClientState, broadcast: storage.Tensors, round_index: int
    ) -> Update:
        if round_index == self.dies_in and client.id == 3:
            raise InterruptedError("killed")
        return super().client_step(job, client, state, broadcast, round_index)


def test_a_run_cut_within_a_round_ends_in_the_same_bits(
    outcome: Outcome, federation: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = federation(Dying(local_steps=2), sample=1.0)
    run.run(tmp_path / "whole")
    for round_index in range(3):
        monkeypatch.setattr(Dying, "dies_in", round_index)
        with pytest.raises(InterruptedError):
            run.run(tmp_path / "cut", resume=True)
    monkeypatch.setattr(Dying, "dies_in", None)
    run.run(tmp_path / "cut", resume=True)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_a_run_cut_at_any_write_ends_in_the_same_bits(
    outcome: Outcome, federation: Build, few_clients: list[Client], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fl.checkpoint as checkpoint
    import fl.engines.loop as loop

    few = [dataclasses.replace(run_client, id=i) for i, run_client in enumerate([few_clients[0], few_clients[2]] * 2)][
        :3
    ]
    run = federation(algorithms.QuPeD(local_steps=1), rounds=2, clients=few, sample=0.3)
    run.run(tmp_path / "whole")
    write = storage.write_atomic
    left = 0

    def failing(path: Path, content: bytes, **options: bool) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            # what a process that dies while it writes leaves behind
            path.with_name(f".{path.name}.0.tmp").write_bytes(content[: len(content) // 2])
            raise OSError("killed")
        write(path, content, **options)

    for module in (storage, checkpoint, loop):
        monkeypatch.setattr(module, "write_atomic", failing)
    cuts = 0
    while True:
        directory = tmp_path / f"cut{cuts}"
        left = cuts + 1
        try:
            run.run(directory)
            break
        except OSError:
            cuts += 1
        left = 0
        run.run(directory, resume=True)
        assert outcome(directory) == outcome(tmp_path / "whole"), f"cut at write {cuts}"
        assert not list(directory.rglob(".*.tmp"))
    # manifest; server, manifest of round 0; two rounds of a client, server, manifest; a float model, summary, manifest
    assert cuts == 12


def test_a_round_is_on_the_disk_before_the_manifest_names_it(
    federation: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fl.checkpoint as checkpoint

    durable: list[Path] = []
    named: list[set[str]] = []
    make_durable, write = storage.make_durable, storage.write_atomic

    def waiting(paths: list[Path]) -> None:
        make_durable(paths)
        durable.extend(paths)

    def writing(path: Path, content: bytes, **options: bool) -> None:
        manifest = json.loads(content)
        if "round" in manifest:
            states = [state_file(int(number), at) for number, at in manifest["clients"].items()]
            assert {manifest["server"], *states} <= {path.name for path in durable}
            named.append(set(states))
        write(path, content, **options)

    monkeypatch.setattr(checkpoint, "make_durable", waiting)
    monkeypatch.setattr(checkpoint, "write_atomic", writing)
    federation(algorithms.QuPeD(local_steps=1)).run(tmp_path / "run")
    assert [len(states) for states in named[:2]] == [0, 2]
    assert len(named) == 5  # four rounds, and the end
    assert len(durable) == len(set(durable)) == 4 + 3 * 2


def test_a_step_that_keeps_nothing_writes_no_state(federation: Build, tmp_path: Path) -> None:
    federation(algorithms.FedAvg(local_steps=1)).run(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "state").iterdir()] == ["server.3.safetensors"]


def test_a_finished_run_is_not_run_again(federation: Build, tmp_path: Path) -> None:
    run = federation(algorithms.Local(local_steps=1))
    first = run.run(tmp_path / "run")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    again = run.run(tmp_path / "run", resume=True)
    assert again == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == times


def snapshot(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_directory_that_is_not_empty_is_refused_and_left_alone(federation: Build, tmp_path: Path) -> None:
    run = federation(algorithms.Local(local_steps=1))
    run.run(tmp_path / "run")
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match="is not empty, continue with --resume or choose another --out"):
        run.run(tmp_path / "run")
    for changes, difference in [
        ({"seed": 9}, "job.seed is 0 there and 9 here"),
        ({"rounds": 4}, "job.rounds is 3 there and 4 here"),
        ({"algorithm": algorithms.Local(local_steps=2)}, "parameters.local_steps is 1 there and 2 here"),
        ({"algorithm": algorithms.FedAvg()}, "algorithm is .local. there and .fedavg. here"),
        ({"clients": run.clients[:3]}, "clients is"),
        (
            {"clients": [dataclasses.replace(run.clients[0], bits=2), *run.clients[1:]]},
            "clients.0.bits is 1 there and 2",
        ),
        (
            {"clients": [dataclasses.replace(run.clients[0], data=run.clients[1].data), *run.clients[1:]]},
            "clients.0.data",
        ),
    ]:
        with pytest.raises(CheckpointError, match=f"holds another experiment .*{difference}"):
            dataclasses.replace(run, **changes).run(tmp_path / "run", resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds no run to resume, there is no run\.json"):
        run.run(tmp_path / "other", resume=True)
    (tmp_path / "other" / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"holds no run to resume, run\.json cannot be read"):
        run.run(tmp_path / "other", resume=True)
    with pytest.raises(CheckpointError, match="must be a directory, it is a file"):
        run.run(tmp_path / "other" / "notes.txt")
    assert {path: content for path, content in snapshot(tmp_path).items() if path in before} == before


def test_a_run_resumes_with_the_threads_it_was_started_with(
    federation: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    run = federation(Dying(local_steps=1), sample=1.0, threads=3)
    monkeypatch.setattr(Dying, "dies_in", 1)
    with pytest.raises(InterruptedError):
        run.run(tmp_path / "run")
    monkeypatch.setattr(Dying, "dies_in", None)
    dataclasses.replace(run, threads=5).run(tmp_path / "run", resume=True)
    now = torch.get_num_threads()
    assert set_to == [3, now, 3, now]


def test_another_build_is_named_when_a_run_resumes(
    federation: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = federation(Dying(local_steps=1), sample=1.0)
    monkeypatch.setattr(Dying, "dies_in", 1)
    with pytest.raises(InterruptedError):
        run.run(tmp_path / "run")
    monkeypatch.setattr(Dying, "dies_in", None)
    manifest: dict[str, Any] = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**manifest, "built_with": "torch 1.0, cpp avx9"}))
    with pytest.warns(UserWarning, match=r"started with torch 1\.0, cpp avx9 and resumed with torch"):
        run.run(tmp_path / "run", resume=True)


@pytest.mark.parametrize("kind", [algorithms.QuPeD, algorithms.Local, algorithms.FedAvg])
def test_a_run_that_diverges_stops_with_a_sentence(federation: Build, kind: type, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"client \d in round \d: training has diverged, .* choose a lower rate"):
        federation(kind(rate=1e6, local_steps=20)).run(tmp_path / "run")


def test_a_run_without_a_directory_says_where_it_is(
    federation: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = federation(algorithms.Local(local_steps=1), rounds=1).run()
    assert result.directory.parent == tmp_path
    assert (result.directory / "summary.json").is_file()


def test_at_most_a_rounds_states_are_in_memory(few_clients: list[Client], tmp_path: Path) -> None:
    clients = [dataclasses.replace(few_clients[2], id=number) for number in range(60)]
    run = Federation(algorithm=algorithms.QuPeD(local_steps=1), clients=clients, rounds=4, sample=0.05)
    alive: list[int] = []

    def count(rounds: int, record: dict[str, Any]) -> None:
        alive.append(sum(type(thing) is ClientState for thing in gc.get_objects()))

    run.run(tmp_path / "run", on_round=count)
    assert max(alive) <= 3
    assert len(alive) == 5
    assert 3 < len(list((tmp_path / "run" / "state").glob("client_*"))) <= 12  # those that were ever drawn


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["state", "message"])
def test_a_single_number_that_is_not_finite_is_found(value: float, where: str) -> None:
    sound = {
        "w": torch.full((3, 5), 3e38),
        "empty": torch.empty(0),
        "count": torch.tensor(2),
        "half": torch.ones(4).half(),
    }
    bad = {**sound, "x": torch.zeros(7).index_fill(0, torch.tensor([4]), value)}
    _check_finite(Update(ClientState(sound, None), Message(sound, 1), 1, 0.5), "here")
    state, message = (bad, sound) if where == "state" else (sound, bad)
    with pytest.raises(DivergedError, match="here: training has diverged"):
        _check_finite(Update(ClientState(state, None), Message(message, 1), 1, 0.5), "here")
