"""Clients side by side: the models of the serial engine within rounding, and the same bits again."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fl import Federation, algorithms, data, make_clients, models
from fl.algorithms import Algorithm
from fl.core import Client, ClientState, Update, training_batches
from fl.engines import stacked
from fl.engines.serial import Serial
from fl.engines.stacked import Stacked
from fl.engines.work import Workplace
from fl.errors import CheckpointError, DivergedError
from fl.losses import cross_entropy, distillation, total_loss
from fl.stack import join_states, make_stack, split_update, spread, widen_
from fl.storage import Tensors, load_state
from fl.wire import Wire

Outcome = Callable[[Path], dict[str, Any]]
STEPS = [
    algorithms.QuPeD(local_steps=3, freeze_at=0.6),
    algorithms.QuPeD(local_steps=3, freeze_at=0.6, variant="alternating", tempered="teacher"),
    algorithms.QuPeD(local_steps=3, freeze_at=0.6, variant="hard"),
    algorithms.Local(local_steps=3, freeze_at=0.6),
    algorithms.QuPeL(local_steps=3, freeze_at=0.6),
    algorithms.Ditto(local_steps=3, freeze_at=0.6),
    algorithms.FML(local_steps=3, freeze_at=0.6),
    algorithms.FedAvg(local_steps=3),
    algorithms.FedAvg(local_steps=3, batch_norm="local", adapt_steps=3),
    algorithms.FedProx(local_steps=3, weighted=True),
    algorithms.PFedMe(local_steps=1, adapt_steps=2),
    algorithms.PerFedAvg(local_steps=1, adapt_steps=2),
    algorithms.PerFedAvg(local_steps=1, adapt_steps=2, hessian="difference", delta=0.1),
]
BIT_WIDTHS = ["float", 1, 2, "ternary"]


def clients_of(digits: data.Dataset, *equipment: tuple[Any, ...]) -> list[Client]:
    return make_clients(digits, list(equipment), (4, 5), seed=3)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def mixed(digits: data.Dataset) -> list[Client]:
    """Two architectures, float and bits, in pairs and more, and one that has nobody to go with."""
    pairs = [("mlp", 2), ("mlp", 2), ("cnn", 2), ("mlp", "float"), ("cnn", 2), ("mlp", 2), ("mlp", "float")]
    return clients_of(digits, *pairs, ("mlp", 1))


def run(algorithm: Algorithm, clients: list[Client], **changes: Any) -> Federation:
    given = {"rounds": 2, "sample": 1.0, "engine": "stacked", **changes}
    return Federation(algorithm=algorithm, clients=clients, **given)


# -- models and losses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", sorted(models.ARCHITECTURES))
@pytest.mark.parametrize("training", [True, False])
def test_models_side_by_side_give_each_ones_logits_and_gradients(architecture: str, training: bool) -> None:
    """In float64, where an error of layout is far above rounding: 1e-9 is some 1e6 units in the last place."""
    shape, classes, size = (2, 9, 8), 5, 3
    draw = torch.Generator().manual_seed(1)
    alone = [models.build(architecture, shape, classes, seed).double().train(training) for seed in range(size)]
    for model in alone:
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():  # running statistics too
                tensor.add_(torch.rand(tensor.shape, generator=draw, dtype=torch.float64), alpha=0.1)
    wide = widen_(models.build(architecture, shape, classes, 0).double(), size).train(training)
    states = [ClientState(dict(model.state_dict()), {}) for model in alone]
    wide.load_state_dict(join_states(states).tensors)
    x = torch.randn(7, size * shape[0], *shape[1:], generator=draw, dtype=torch.float64)
    y = torch.randint(classes, (size, 7), generator=draw)
    logits = wide(x)
    assert logits.shape == (size, 7, classes)
    total_loss(cross_entropy(logits, y)).backward()
    for k, model in enumerate(alone):
        own = model(x[:, k * shape[0] : (k + 1) * shape[0]])
        torch.testing.assert_close(logits[k], own, rtol=1e-9, atol=1e-9)
        cross_entropy(own, y[k]).backward()
        for (name, parameter), joined in zip(model.named_parameters(), wide.parameters(), strict=True):
            part = joined.grad.chunk(size)[k]
            torch.testing.assert_close(
                part, parameter.grad, rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}"
            )
        for (name, buffer), joined in zip(model.named_buffers(), wide.buffers(), strict=True):
            part = joined.chunk(size)[k] if joined.dim() else joined
            torch.testing.assert_close(part, buffer, rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")


def test_a_layer_of_another_kind_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GroupNorm(2, 4))
    with pytest.raises(ValueError, match="stack: 1 is a GroupNorm, which cannot be stacked; use the engine 'serial'"):
        widen_(model, 2)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.7])
def test_losses_of_a_stack_are_its_clients(temperature: float) -> None:
    draw = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(3, 5, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    y = torch.randint(4, (3, 5), generator=draw)
    share = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
    for loss in (
        lambda s, t, k: cross_entropy(s, y if k is None else y[k]),
        lambda s, t, k: distillation(s, t, temperature),
    ):
        both = [student.clone().requires_grad_(), teacher.clone().requires_grad_()]
        got = loss(*both, None)
        assert got.shape == (3,)
        (share * got).sum().backward()
        for k in range(3):
            own = [student[k].clone().requires_grad_(), teacher[k].clone().requires_grad_()]
            expected = loss(*own, k)
            (share[k] * expected).backward()
            torch.testing.assert_close(got[k], expected, rtol=1e-12, atol=1e-12)
            for one, joined in zip(own, both, strict=True):
                if one.grad is not None:
                    torch.testing.assert_close(joined.grad[k], one.grad, rtol=1e-12, atol=1e-12)


def test_a_counter_goes_on_from_each_clients_own(mixed: list[Client]) -> None:
    states = [ClientState({"count": torch.tensor(n), "w": torch.full((2, 3), float(n))}, {}) for n in (4, 9)]
    joined = join_states(states)
    after = Update(
        ClientState({"count": joined.tensors["count"] + 3, "w": joined.tensors["w"] + 1}, {}),
        None,
        1,
        0.5,
        (0.25, 0.75),
    )
    first, second = split_update(after, make_stack(mixed[:2]), states)
    assert (int(first.state.tensors["count"]), int(second.state.tensors["count"])) == (7, 12)
    assert torch.equal(second.state.tensors["w"], torch.full((2, 3), 10.0))
    assert (first.loss, second.loss) == (0.25, 0.75)


# -- a client's round -------------------------------------------------------------------------------------------------


@pytest.fixture
def float64() -> Iterator[None]:
    """Training in float64, for whatever builds a model meanwhile."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def doubled(client: Client) -> Client:
    """The client with images in float64."""
    parts = {name: getattr(client.data, name) for name in ("train", "val", "test")}
    wide = {name: dataclasses.replace(part, x=part.x.double()) for name, part in parts.items()}
    return dataclasses.replace(client, data=dataclasses.replace(client.data, **wide))


def assert_close(got: Tensors, expected: Tensors) -> None:
    """Equal but for the order of sums.

    A sum of n products errs by at most n u sum|terms|; here n < 1,200 and u = 1.1e-16, so a step's relative error is below 2e-13.
    A step carries an earlier error on by at most 1 + rate |Hessian|, below 10 for these models and rates: after three steps
    2e-13 * (1 + 10 + 100) = 2e-11, of values of at most 5. A decision (a weight's cell, a ReLU, a maximum) that fell the other
    way would show as 1e-3 and more.
    """
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")
        else:
            assert torch.equal(got[name], tensor), name


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("bits", BIT_WIDTHS)
@pytest.mark.parametrize("algorithm", STEPS, ids=str)
def test_clients_in_a_stack_learn_what_each_learns_alone(algorithm: Algorithm, bits: Any, digits: data.Dataset) -> None:
    """Three rounds from the same states: the first, one with momentum, and one with frozen weights or a tenth of the rate."""
    groups = "channel" if bits == 1 else "tensor"
    architecture = "cnn" if bits == 2 else "mlp"
    clients = [doubled(c) for c in clients_of(digits, *[(architecture, bits, groups, 1.0)] * 3)]
    federation = run(algorithm, clients, rounds=3, architecture=architecture)
    job = federation.job
    server, states = algorithm.start_server(job), [algorithm.start_client(job, client) for client in clients]
    for round_index in range(3):
        sent = algorithm.broadcast(job, server)
        assert len({algorithm.kind(c, s) for c, s in zip(clients, states, strict=True)}) == 1
        together = algorithm.stack_step(job, clients, states, sent, round_index)
        alone = [algorithm.client_step(job, c, s, sent, round_index) for c, s in zip(clients, states, strict=True)]
        for got, expected in zip(together, alone, strict=True):
            assert_close(got.state.tensors, expected.state.tensors)
            assert got.state.scalars == expected.state.scalars
            assert got.evaluations == expected.evaluations
            assert got.loss == pytest.approx(expected.loss, abs=1e-10)
            assert (got.message is None) == (expected.message is None)
            if got.message is not None and expected.message is not None:
                assert_close(got.message.tensors, expected.message.tensors)
                assert got.message.samples == expected.message.samples
        states = [update.state for update in alone]
        messages = {n: update.message for n, update in enumerate(alone) if update.message is not None}
        server = algorithm.server_step(job, server, messages)
    if algorithm.stackable_model:
        model = algorithm.model(job, make_stack(clients), join_states(states), spread(server, len(clients)))
        x = torch.cat([client.data.test.x[:9] for client in clients], dim=1)
        logits = model(x)
        for k, client in enumerate(clients):
            own = algorithm.model(job, client, states[k], server)(client.data.test.x[:9])
            torch.testing.assert_close(logits[k], own, rtol=0, atol=1e-9)


def test_clients_of_unequal_amounts_of_data_share_a_stack_and_few_images_make_another_kind(mixed: list[Client]) -> None:
    algorithm = algorithms.Local()
    many, more = mixed[0], mixed[1]
    assert len(many.data.train) != len(more.data.train)
    few = dataclasses.replace(many, data=dataclasses.replace(many.data, train=first_images(many, 10)))
    job = run(algorithm, mixed).job
    kinds = [algorithm.kind(client, algorithm.start_client(job, client)) for client in (many, more, few)]
    assert kinds[0] == kinds[1] != kinds[2]


def first_images(client: Client, count: int) -> data.Part:
    return data.Part(client.data.train.x[:count], client.data.train.y[:count])


@pytest.mark.parametrize(("augment", "gathered"), [("none", 1 << 26), ("none", 30_000), ("none", 0), ("flip_crop", 0)])
def test_batches_of_a_stack_are_those_of_its_members(
    augment: str, gathered: int, mixed: list[Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gathered for all steps, for two of the four at a time, and for each."""
    monkeypatch.setattr("fl.core.GATHERED", gathered)
    job = dataclasses.replace(run(algorithms.Local(), mixed).job, augment=augment)
    members = mixed[:2]
    together = list(training_batches(job, make_stack(members), 25, 4, 1))
    assert len(together) == 4
    for k, client in enumerate(members):
        for (x, y), (own_x, own_y) in zip(together, training_batches(job, client, 25, 4, 1), strict=True):
            assert torch.equal(x[:, k : k + 1], own_x)
            assert torch.equal(y[k], own_y)


# -- who goes with whom -----------------------------------------------------------------------------------------------


@given(st.dictionaries(st.integers(0, 40), st.sampled_from("abc")), st.none() | st.integers(2, 5))
def test_everyone_is_in_one_stack_of_his_kind_or_alone(kinds: dict[int, str], size: int | None) -> None:
    stacks, alone = stacked.plan(kinds, size)
    assert sorted([*(n for members in stacks for n in members), *alone]) == sorted(kinds)
    for members in stacks:
        assert 2 <= len(members) <= (size or len(kinds))
        assert len({kinds[number] for number in members}) == 1
    for number, reason in alone.items():
        others = [n for n in kinds if kinds[n] == kinds[number]]
        assert reason == (stacked.ALONE if others == [number] else stacked.LEFT_OVER)


def test_a_stack_of_one_is_the_serial_engine_to_the_bit(outcome: Outcome, digits: data.Dataset, tmp_path: Path) -> None:
    clients = clients_of(digits, ("mlp", 1), ("cnn", 2), ("mlp", "float"), ("cnn", "ternary"))  # nobody alike
    federation = run(algorithms.QuPeD(local_steps=2), clients)
    federation.run(tmp_path / "stacked")
    dataclasses.replace(federation, engine="serial").run(tmp_path / "serial")
    got, expected = outcome(tmp_path / "stacked"), outcome(tmp_path / "serial")
    for record in got["records"][1:]:
        assert record.pop("stacks") == []
        assert record.pop("alone") == dict.fromkeys("0123", stacked.ALONE)
    assert got == expected


# -- whole runs -------------------------------------------------------------------------------------------------------


def kept(directory: Path) -> dict[str, Tensors]:
    return {path.name: load_state(path)[0] for path in sorted((directory / "state").iterdir())}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize(
    "algorithm", [algorithms.QuPeD(local_steps=2), algorithms.FedAvg(local_steps=2)], ids=lambda a: a.name
)
def test_a_run_of_mixed_clients_is_the_serial_engines(
    algorithm: Algorithm, size: int | None, mixed: list[Client], tmp_path: Path
) -> None:
    """With failing clients, who lose their own work alone."""
    federation = run(algorithm, [doubled(client) for client in mixed], stack=size, dropout=0.3, seed=1)
    stacks = [record["stacks"] for record in federation.run(tmp_path / "stacked").records[1:]]
    dataclasses.replace(federation, engine="serial", stack=None).run(tmp_path / "serial")
    got, expected = kept(tmp_path / "stacked"), kept(tmp_path / "serial")
    assert got.keys() == expected.keys()
    for name in expected:
        assert_close(got[name], expected[name])
    records = [
        [json.loads(line) for line in (tmp_path / name / "records.jsonl").read_text().splitlines()]
        for name in ("stacked", "serial")
    ]
    assert any(record["failed"] for record in records[0])
    for one, two in zip(*records, strict=True):
        for key in ("drawn", "failed", "accuracy", "validation", "evaluations", "bytes_by_client"):
            assert one[key] == two[key]
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-10)
    for found, record in zip(stacks, records[0][1:], strict=True):
        assert found
        together = [number for members in found for number in members]
        assert sorted([*together, *map(int, record["alone"])]) == sorted(set(record["drawn"]) - set(record["failed"]))
        assert all(len(members) <= (size or 9) for members in found)
    shipped = [json.loads((tmp_path / name / "summary.json").read_text())["clients"] for name in ("stacked", "serial")]
    assert shipped[0] == shipped[1]


@pytest.mark.parametrize(
    "algorithm", [algorithms.QuPeD(local_steps=2), algorithms.FedProx(local_steps=2)], ids=lambda a: a.name
)
def test_a_run_cut_between_rounds_ends_in_the_same_bits(
    outcome: Outcome, algorithm: Algorithm, mixed: list[Client], tmp_path: Path
) -> None:
    federation = run(algorithm, mixed[:4], rounds=3, sample=0.75)
    federation.run(tmp_path / "whole")
    for cut in range(3):

        def die(rounds: int, record: dict[str, Any], cut: int = cut) -> None:
            if rounds == cut + 1:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            federation.run(tmp_path / "cut", resume=True, on_round=die)
    federation.run(tmp_path / "cut", resume=True)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    with pytest.raises(CheckpointError, match='stack is "all alike" there and null here'):
        dataclasses.replace(federation, engine="serial").run(tmp_path / "cut", resume=True)


def test_packed_messages_are_made_client_by_client(mixed: list[Client]) -> None:
    wire = Wire(algorithms.FedAvg(local_steps=1), up_bits=8, down_bits=8)
    federation = run(wire, mixed[:3])
    job = federation.job
    states = [wire.start_client(job, client) for client in mixed[:3]]
    sent = wire.broadcast(job, wire.start_server(job))
    together = wire.stack_step(job, mixed[:3], states, sent, 0)
    for client, state, update in zip(mixed, states, together, strict=False):
        alone = wire.client_step(job, client, state, sent, 0)
        assert alone.message is not None
        assert update.message is not None
        assert {n: t.shape for n, t in update.message.tensors.items()} == {
            n: t.shape for n, t in alone.message.tensors.items()
        }
        for name, centers in alone.message.tensors.items():
            if name.endswith(".centers"):  # of 8 bits: an even grid over the differences of a step
                torch.testing.assert_close(update.message.tensors[name], centers, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("rows", [7, 128])
def test_scores_of_a_stack_are_each_clients(
    rows: int, mixed: list[Client], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test parts of unequal sizes, in one piece and in several."""
    monkeypatch.setattr("fl.evaluation.ROWS", rows)
    algorithm = algorithms.QuPeD()
    federation = run(algorithm, mixed)
    place = Workplace(federation.job, algorithm, dict(enumerate(mixed)), tmp_path)
    server = algorithm.start_server(federation.job)
    at = dict.fromkeys(range(len(mixed)))
    assert len({len(client.data.test) for client in mixed}) > 1
    assert Stacked(place, None).score(at, server) == Serial(place).score(at, server)


# -- refusals ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneByOne(algorithms.Local):
    """An algorithm that knows nothing of stacks."""

    name: ClassVar[str] = "one_by_one"
    stackable: ClassVar[bool] = False


def test_what_cannot_be_stacked_is_refused_before_the_run(mixed: list[Client]) -> None:
    with pytest.raises(ValueError, match="stacked: one_by_one takes one client at a time, use the engine 'serial'"):
        run(OneByOne(), mixed)
    with pytest.raises(ValueError, match="stacked: a stack must hold at least 2 clients, got stack = 1"):
        run(algorithms.Local(), mixed, stack=1)


def test_a_run_that_diverges_names_its_client(mixed: list[Client], tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"client \d in round 1: training has diverged, .* choose a lower rate"):
        run(algorithms.FedAvg(rate=1e6, local_steps=20), mixed[:3]).run(tmp_path / "run")
