"""squared_gradients: the empirical Fisher's diagonal, and a model that does not know it was asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from layer_cases import bits_of, convolutional
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import qupedkern as qk

Batch = tuple[Tensor, Tensor]


def batches(count: int = 3, size: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(size, 1, 8, 8, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def test_it_is_the_mean_square_of_the_gradients_of_each_batch() -> None:
    torch.manual_seed(0)
    model = convolutional().eval().double()
    data = [(x.double(), y) for x, y in batches()]
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in data:
        model.zero_grad()
        loss(model, batch).backward()
        for name, p in model.named_parameters():
            expected[name] += p.grad.square() / len(data)
    model.zero_grad()
    found = qk.squared_gradients(model, iter(data), loss)
    assert list(found) == list(expected)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-13, atol=0)
        assert not value.requires_grad


def test_of_a_linear_model_it_is_the_formula_of_its_fisher_information() -> None:
    # y ~ N(w x, 1): F = E[(y - w x)^2 x^2], by hand
    model = nn.Linear(3, 1, bias=False).double()
    x, y = torch.randn(20, 3).double(), torch.randn(20, 1).double()
    found = qk.squared_gradients(
        model, list(zip(x, y, strict=True)), lambda m, b: 0.5 * (b[1] - m(b[0])).square().sum()
    )
    expected = ((y - x @ model.weight.detach().T).square() * x.square()).mean(0, keepdim=True)
    torch.testing.assert_close(found["weight"], expected, rtol=1e-12, atol=0)


class Memory(nn.Module):
    """Everything a forward can change: a counter in place, a buffer replaced, dropout's mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.dropout = convolutional(), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.full((2,), float("nan")))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.detach().flatten()[:2]
        return self.dropout(self.body(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("failing", [None, "loss", "batches", "scalar"])
def test_the_model_is_what_it_was_also_after_an_error(training: bool, failing: str | None) -> None:
    torch.manual_seed(0)
    model = Memory().train(training)
    model.body[1].eval()
    model.body[3].weight.requires_grad_(False)
    loss(model, batches(1)[0]).backward()
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    before = bits_of(model.state_dict())
    gradients = {name: p.grad for name, p in model.named_parameters()}
    copies = {name: g.clone() for name, g in gradients.items() if g is not None}
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]

    def broken(model: nn.Module, batch: Batch) -> Tensor:
        value = loss(model, batch)
        if failing == "loss":
            raise KeyError
        return value if failing != "scalar" else model(batch[0])

    def stream() -> Iterator[Batch]:
        yield from batches()
        if failing == "batches":
            raise KeyError

    if failing is None:
        qk.squared_gradients(model, stream(), broken)
    else:
        with pytest.raises((KeyError, ValueError)):
            qk.squared_gradients(model, stream(), broken)
    assert bits_of(model.state_dict()) == before
    assert {name: buffer for name, buffer in model.named_buffers() if buffer is not buffers[name][0]} == {}
    assert all(p.grad is gradients[name] for name, p in model.named_parameters())
    assert all(torch.equal(gradients[name], g) for name, g in copies.items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes


def test_dropout_is_off_and_the_same_call_gives_the_same_bits() -> None:
    torch.manual_seed(0)
    model = Memory().train()
    first, second = (bits_of(qk.squared_gradients(model, batches(), loss)) for _ in range(2))
    assert first == second


def test_frozen_and_tied_and_unused_parameters() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    model.requires_grad_(False)
    found = qk.squared_gradients(model, [torch.ones(1, 2)], lambda m, x: m["b"](m["a"](x)).sum())
    assert set(found) == {"a.weight", "a.bias", "b.bias", "unused.weight", "unused.bias"}
    assert bool((found["a.bias"] > 0).any())
    assert not bool(found["unused.weight"].any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_squares_are_kept_at_least_in_float32(dtype: torch.dtype) -> None:
    model = nn.Linear(1, 1, bias=False, dtype=dtype)
    small = torch.tensor([[2.0**-13]], dtype=dtype)  # its square is below the range of float16
    found = qk.squared_gradients(model, [small], lambda m, x: m(x).sum())["weight"]
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(found) == 2.0**-26


def test_it_works_where_gradients_are_switched_off() -> None:
    model, data = nn.Linear(2, 2), [torch.ones(1, 2)]
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            assert bool(qk.squared_gradients(model, data, lambda m, x: m(x).sum())["weight"].all())


@pytest.mark.parametrize(
    ("data", "function", "error", "sentence"),
    [
        ([], lambda m, x: m(x).sum(), ValueError, "at least one batch is needed, got none"),
        ([1.0], None, TypeError, "loss must be a function of (model, batch), got NoneType"),
        ([1.0], lambda m, x: x, TypeError, "loss must return a tensor, got float for batch 0"),
        ([1.0], lambda m, x: torch.tensor(x), ValueError, "loss must be a scalar computed by the model, got one that"),
        ([1.0], lambda m, x: m.weight * x, ValueError, "loss must be a scalar computed by the model, got shape (2, 2)"),
        ([1.0, float("nan")], lambda m, x: m.weight.sum() * x, ValueError, "loss must be finite, got nan for batch 1"),
    ],
)
def test_what_is_no_loss_is_refused_with_a_sentence(
    data: list[Any], function: Any, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error) as caught:
        qk.squared_gradients(nn.Linear(2, 2), data, function)
    assert str(caught.value).startswith("squared_gradients: " + sentence)


def test_weights_that_the_loss_feels_are_kept_better() -> None:
    # one half of the weights is spread wide and hardly seen: equal weights spend the centers there
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    with torch.no_grad():
        model[0].weight[:, 32:] *= 4
    scale = torch.cat([torch.full((32,), 20.0), torch.ones(32)])
    data = [torch.randn(1, 64) * scale for _ in range(64)]
    importance = qk.squared_gradients(model, data, lambda m, x: m(x).square().sum())
    weight, x = model[0].weight.detach().clone(), torch.cat(data)
    errors = {}
    for name, value in (("with", importance), ("without", None)):
        packed = nn.Sequential(nn.Linear(64, 32, bias=False))
        packed[0].weight.data.copy_(weight)
        qk.quantize_weights_(packed, bits=2, rule=lambda *_: True, importance=value)
        errors[name] = float((packed(x) - x @ weight.T).square().mean().detach())
    assert errors["with"] < 0.5 * errors["without"], errors
