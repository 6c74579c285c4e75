"""torchrun's processes: the bits of the serial engine whatever their number, and an end in one sentence whoever fails.

Every test with ranks starts them as a user does; two seconds of each start are imports, so a start plays many runs.
"""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_cases import HOSTILE, cases, failures, images
from typer.testing import CliRunner

from fl import Federation, algorithms
from fl.__main__ import app
from fl.engines import loop, ranks, torchrun
from fl.engines.ranks import ENVIRONMENT, Ranks
from fl.engines.torchrun import Opening
from fl.errors import INTERRUPTED, UserError
from fl.storage import load_state

Outcome = Callable[[Path], dict[str, Any]]
ROOT = Path(__file__).parents[2]
PATIENCE = 300.0  # seconds, for a machine that has much else to do
ROUNDS = 100

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed"),
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL"),
]


def start(count: int, *program: object, **options: Any) -> subprocess.Popen[str]:
    """`torchrun --standalone --nproc-per-node COUNT PROGRAM`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    environment = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **options.pop("environment", {})}
    return subprocess.Popen(
        [*launcher, *map(str, program)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        **options,
    )


@contextmanager
def whole(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """A launcher that ends, with what it has started, whatever the test does."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # which it hands on to the ranks
        process.communicate(timeout=PATIENCE)


# -- the same bits ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The serial engine's runs."""
    out = tmp_path_factory.mktemp("serial")
    for name, run in cases().items():
        run.run(out / name)
    return out


@pytest.fixture(scope="module", params=[2, 3], ids="{} ranks".format)
def played(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which that many ranks have played all runs of rank_cases.py."""
    out = tmp_path_factory.mktemp(f"ranks{request.param}")
    (out / "full").mkdir()
    (out / "full" / "mine.txt").write_text("")
    program = Path(__file__).with_name("rank_cases.py"), out
    with whole(start(request.param, *program, environment={"TMPDIR": str(out)})) as process:
        _, problems = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, problems
    assert "Warning" not in problems
    return out


def told(played: Path) -> list[dict[str, Any]]:
    """What each rank has seen of its runs."""
    return [json.loads(path.read_text()) for path in sorted(played.glob("rank*.json"))]


@pytest.mark.parametrize("name", cases())
def test_the_ranks_give_the_bits_of_the_serial_engine(name: str, played: Path, serial: Path, outcome: Outcome) -> None:
    assert outcome(played / name) == outcome(serial / name)
    results = [one[name] for one in told(played)]
    assert results[0][0] == str(played / name)
    assert all(result == results[0] for result in results)


def test_one_rank_is_enough(serial: Path, outcome: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**given, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    ended: list[Callable[[], None]] = []
    monkeypatch.setattr("atexit.register", ended.append)
    dataclasses.replace(cases()["fedavg"], engine="torchrun").run(tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(serial / "fedavg")
    (end,) = ended
    end()
    assert not torch.distributed.is_initialized()


def test_messages_arrive_to_the_bit(played: Path, serial: Path) -> None:
    """Also those that no sum, not even one with zero, keeps; the test above compares the files."""
    server, _ = load_state(next((serial / "exact" / "state").glob("server.1.*")))
    first = next(tensor for tensor in server.values() if tensor.is_floating_point() and tensor.numel() > len(HOSTILE))
    assert torch.equal(first.view(-1)[: len(HOSTILE)].view(torch.int32), HOSTILE.view(torch.int32))
    assert torch.signbit(first.view(-1)[0])
    assert not torch.equal((HOSTILE + 0).view(torch.int32), HOSTILE.view(torch.int32))


def test_a_run_that_was_stopped_is_resumed_by_the_ranks(played: Path, serial: Path, outcome: Outcome) -> None:
    assert outcome(played / "resumed") == outcome(serial / "quped")
    one, *others = [seen["stopped"] for seen in told(played)]
    assert one == ["enough", [0, 1]]
    assert all(seen == ["torchrun: rank 0 has ended the run, and says why", []] for seen in others)


def test_ranks_share_a_temporary_directory(played: Path, serial: Path, outcome: Outcome) -> None:
    (directory,) = {seen["temporary"] for seen in told(played)}
    assert outcome(Path(directory)) == outcome(serial / "quped")
    assert len(list(played.glob("fl-*"))) == 1


# -- one sentence -----------------------------------------------------------------------------------------------------


def test_a_failure_ends_the_run_on_every_rank(played: Path, tmp_path: Path) -> None:
    """With the words of the serial engine where a client fails: of several, those of the first."""
    one, *others = told(played)
    with pytest.raises(UserError) as diverged:
        failures(0)["diverged"].run(tmp_path / "diverged")
    assert "client 1 in round 1: training has diverged" in str(diverged.value)
    assert one["diverged"] == ["DivergedError", str(diverged.value)]
    assert one["bug"] == ["ZeroDivisionError", "client 1, 2 threads"]
    assert one["another"][0] == "ConfigError"
    assert one["another"][1].startswith("torchrun: rank 1 has another experiment than rank 0, give every rank the same")
    assert one["full"][0] == "CheckpointError"
    assert "is not empty, continue with --resume or choose another --out" in one["full"][1]
    for seen in others:
        for name in failures(0):
            assert seen[name] == ["WorkerError", "torchrun: rank 0 has ended the run, and says why"]
    assert [path.name for path in (played / "full").iterdir()] == ["mine.txt"]


def test_a_rank_that_does_not_see_the_directory_objects(tmp_path: Path) -> None:
    opening = Opening(tmp_path / "elsewhere", 1, {"seed": 0})
    objection = torchrun._objection(Ranks(1, 2, "cpu"), opening, {"seed": 0})
    assert str(objection) == (
        f"torchrun: rank 1 does not see rank 0's {tmp_path / 'elsewhere'}, "
        f"choose an --out on a file system that all machines share"
    )


def test_without_torchrun_the_command_is_said(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, federation: Callable[..., Federation]
) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    out = tmp_path / "run"
    result = CliRunner().invoke(app, ["run", str(config_file), "--engine", "torchrun", "--out", str(out)])
    sentence = (
        "run: the engine 'torchrun' needs processes that torchrun starts, this one is not; "
        "the command is `torchrun --nproc-per-node 2 -m fl run CONFIG --engine torchrun`"
    )
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", sentence + "\n")
    with pytest.raises(UserError, match=re.escape(sentence)):
        federation(algorithms.Local(), engine="torchrun").run(out)
    assert not out.exists()


def test_ranks_of_another_engine_are_refused(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would run the same run, over each other."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = ["run", str(config_file), "--engine", "pool", "--out", str(tmp_path / "run")]
    sentence = "run: torchrun has started 2 processes, the engine 'pool' runs in one; add --engine torchrun\n"
    for rank, said in (("0", sentence), ("1", "")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        result = CliRunner().invoke(app, arguments)
        assert (result.exit_code, result.stdout, result.stderr) == (2, "", said)
    assert not (tmp_path / "run").exists()


# -- devices: what can be told without a GPU --------------------------------------------------------------------------


def test_each_rank_takes_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ranks.settle("auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ranks.settle("cpu")
    assert taken == []
    ranks.settle("auto")
    ranks.settle("cuda")
    assert taken == [1, 1]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="needs a GPU of its own, got 3 ranks and 2 GPUs; use --nproc-per-node 2"):
        ranks.settle("cuda")
    with pytest.raises(ValueError, match=r"device must be 'cpu', 'cuda' or 'auto', .* got 'cuda:1'"):
        ranks.settle("cuda:1")


def test_a_federation_settles_before_it_looks_at_the_device(
    federation: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first look allocates on the current GPU, which must not be the first one for all."""
    order: list[str] = []
    monkeypatch.setattr(ranks, "settle", lambda device: order.append(f"settle {device}"))

    def find(name: str) -> str:
        order.append("find")
        return "cpu"

    monkeypatch.setattr("fl.devices.find", find)
    federation(algorithms.Local(), engine="torchrun", device="auto")
    assert order[:2] == ["settle auto", "find"]
    order.clear()
    federation(algorithms.Local(), engine="serial", device="auto")
    assert order[0] == "find"


# -- ranks that are killed --------------------------------------------------------------------------------------------


def rank_pids(launcher: int) -> dict[int, int]:
    """The processes of a launcher's ranks, by rank."""
    found = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        variables = dict(item.split("=", 1) for item in Path(f"/proc/{child}/environ").read_text().split("\0") if item)
        if "RANK" in variables:
            found[int(variables["RANK"])] = int(child)
    return found


def written(records: Path) -> int:
    return records.read_bytes().count(b"\n") if records.exists() else 0


def wait_for_rounds(process: subprocess.Popen[str], records: Path, rounds: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while written(records) <= rounds:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def interrupted_in(play: Callable[..., Any], round_index: int) -> Callable[..., Any]:
    """play_round, with Ctrl-C in a round."""

    def interrupted(*arguments: Any) -> Any:
        if arguments[-1].round == round_index:
            raise KeyboardInterrupt
        return play(*arguments)

    return interrupted


@pytest.fixture
def config(tmp_path: Path, config_text: str) -> Path:
    """A configuration of many short rounds."""
    whole = images()
    np.savez(tmp_path / "blobs.npz", x=whole.x, y=whole.y)
    text = config_text.replace("rounds = 2", f"rounds = {ROUNDS}").replace("count = 3", "count = 4")
    path = tmp_path / "many.toml"
    path.write_text(text.replace('"digits"', '"blobs.npz"'))
    return path


def sentence_in(said: str) -> str:
    """What the run says beside torchrun's own report, which must be one sentence with what to do."""
    sentences = [line for line in said.splitlines() if re.match(r"(\w+): |Aborted|\w*Error", line)]
    sentences = [line for line in sentences if not line.startswith("torch.distributed.")]
    assert len(sentences) == 1, said
    assert said.count("--resume") == 1, said
    return sentences[0]


def gone(pids: dict[int, int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids.values())


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="this system does not tell a process's children")
def test_a_run_goes_on_to_the_same_bits_whoever_is_killed(outcome: Outcome, config: Path, tmp_path: Path) -> None:
    """Begun and ended by the serial engine; between, rank 0 is killed and restarted by torchrun, rank 1 is killed, and Ctrl-C."""
    arguments = ["run", str(config), "--data", str(config.parent), "--out"]
    assert CliRunner().invoke(app, [*arguments, str(tmp_path / "whole")]).exit_code == 0
    out, records = tmp_path / "cut", tmp_path / "cut" / "quped" / "records.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "play_round", interrupted_in(loop.play_round, 2))
        assert CliRunner().invoke(app, [*arguments, str(out)]).exit_code == INTERRUPTED
    command = ["-m", "fl", *arguments, out, "--engine", "torchrun", "--resume"]

    with whole(start(2, "--max-restarts", 1, *command)) as process:
        wait_for_rounds(process, records, 5)
        first = rank_pids(process.pid)
        os.kill(first[0], signal.SIGKILL)
        wait_for_rounds(process, records, written(records) + 5)
        second = rank_pids(process.pid)
        assert second.keys() == {0, 1}
        assert not set(first.values()) & set(second.values())
        os.kill(second[1], signal.SIGKILL)
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert sentence_in(said).startswith(
        ("run: interrupted, quped has ", "torchrun: another rank has ended or cannot be ")
    )
    assert gone(first | second)
    assert written(records) < ROUNDS

    with whole(start(2, *command)) as process:
        wait_for_rounds(process, records, written(records) + 5)
        pids = rank_pids(process.pid)
        process.send_signal(signal.SIGINT)
        printed, said = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert re.match(
        rf"run: interrupted, quped has \d+ of {ROUNDS} rounds in .* --resume continues it$", sentence_in(said)
    )
    assert printed.count("Training images by client") == 1
    assert gone(pids)
    assert written(records) < ROUNDS

    assert CliRunner().invoke(app, [*arguments, str(out), "--resume"]).exit_code == 0
    assert outcome(out / "quped") == outcome(tmp_path / "whole" / "quped")
