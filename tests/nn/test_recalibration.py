"""recalibrate_: the statistics of the weights that ship, and nothing else changed."""

from __future__ import annotations

import pytest
import torch
from layer_cases import bits_of, convolutional, quantized
from torch import Tensor, nn

import qupedkern as qk


def batches(count: int = 3, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(size, 1, 8, 8, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def test_statistics_are_the_mean_over_the_batches_of_each_batch_s_own() -> None:
    torch.manual_seed(0)
    model = qk.pack_(quantized(convolutional(), bits=2)).double()
    data = [(x.double(), y) for x, y in batches()]
    report = qk.recalibrate_(model, data)
    first = [model[0](x) for x, _ in data]  # the input of the first batch norm
    mean = torch.stack([a.mean((0, 2, 3)) for a in first]).mean(0)
    variance = torch.stack([a.var((0, 2, 3)) for a in first]).mean(0)
    torch.testing.assert_close(model[1].running_mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model[1].running_var, variance, rtol=1e-12, atol=1e-12)

    def normalised(a: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        shape = (1, -1, 1, 1)
        spread = (a.var((0, 2, 3), unbiased=False) + norm.eps).sqrt()
        scaled = (a - a.mean((0, 2, 3)).reshape(shape)) / spread.reshape(shape)
        return scaled * norm.weight.reshape(shape) + norm.bias.reshape(shape)

    # the second one sees what the first gives while it normalises by the batch: statistics are gathered together
    second = [model[3](normalised(a, model[1]).relu()) for a in first]
    mean = torch.stack([a.mean((0, 2, 3)) for a in second]).mean(0)
    torch.testing.assert_close(model[4].running_mean, mean, rtol=1e-10, atol=1e-12)
    assert int(model[1].num_batches_tracked) == 3
    assert (report.layers, report.batches) == (2, 3)


def test_the_report_says_accuracy_before_and_after_and_the_largest_shift() -> None:
    torch.manual_seed(0)
    model = qk.pack_(quantized(convolutional(), bits=1)).eval()
    with torch.no_grad():
        model[1].running_mean.fill_(40.0)  # statistics of other weights
    data = batches()

    def accuracy() -> float:
        return sum(int((model(x).argmax(-1) == y).sum()) for x, y in data) / 24

    before, old_mean, old_var = accuracy(), model[1].running_mean.clone(), model[1].running_var.clone()
    report = qk.recalibrate_(model, data)
    assert (report.accuracy_before, report.accuracy_after) == (before, accuracy())
    shift = float(((model[1].running_mean - old_mean).abs() / (old_var + model[1].eps).sqrt()).max())
    assert report.shift == pytest.approx(shift)
    assert f"accuracy on these batches {before:.4f} -> {accuracy():.4f}" in str(report)
    unlabelled = qk.recalibrate_(model, (x for x, _ in data))
    assert (unlabelled.accuracy_before, unlabelled.accuracy_after) == (None, None)
    assert "accuracy" not in str(unlabelled)


def test_training_flags_momenta_and_modes_are_what_they_were() -> None:
    model = quantized(convolutional(), bits=2)
    model[1].eval()
    model[1].momentum, model[4].momentum = 0.03, None
    flags = [module.training for module in model.modules()]
    with qk.mode(model, "hard"):
        qk.recalibrate_(model, batches())
        assert all(layer.weight_mode.name == "hard" for layer in model if hasattr(layer, "weight_mode"))
    assert [module.training for module in model.modules()] == flags
    assert (model[1].momentum, model[4].momentum) == (0.03, None)


def test_it_gathers_under_the_mode_it_is_called_in() -> None:
    torch.manual_seed(0)
    model = quantized(convolutional(), bits=1)
    with qk.mode(model, "hard"):
        qk.recalibrate_(model, batches())
    hard = model[4].running_mean.clone()
    qk.recalibrate_(model, batches())
    assert not torch.allclose(model[4].running_mean, hard)
    qk.recalibrate_(qk.pack_(model), batches())
    assert torch.equal(model[4].running_mean, hard)


@pytest.mark.parametrize("bad", [torch.randn(2, 3, 8, 8), torch.randn(1, 1, 1, 1), "text"])
def test_after_an_error_of_the_model_everything_is_what_it_was(bad: object) -> None:
    model = qk.pack_(quantized(convolutional(), bits=2))
    before, flags = bits_of(model.state_dict()), [module.training for module in model.modules()]
    with pytest.raises((RuntimeError, TypeError, ValueError, AttributeError)):
        qk.recalibrate_(model, [*(x for x, _ in batches()), bad])
    assert bits_of(model.state_dict()) == before
    assert [module.training for module in model.modules()] == flags
    assert model[1].momentum == 0.1


def test_a_batch_norm_that_no_batch_reaches_keeps_its_statistics() -> None:
    model = qk.pack_(quantized(convolutional(), bits=2))
    model.unused = nn.BatchNorm1d(3)
    model.forward = lambda x: nn.Sequential.forward(model[:-1], x)
    with torch.no_grad():
        model.unused.running_mean.fill_(7.0)
    report = qk.recalibrate_(model, [x for x, _ in batches()])
    assert bool((model.unused.running_mean == 7).all())
    assert report.shift < 7


def test_nothing_to_recalibrate_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^recalibrate_: the model has no batch norm with running statistics$"):
        qk.recalibrate_(nn.Sequential(nn.Linear(2, 2)), [torch.randn(1, 2)])
    with pytest.raises(ValueError, match=r"^recalibrate_: the model needs at least one batch, got none$"):
        qk.recalibrate_(convolutional(), [])
    with pytest.raises(TypeError, match=r"^recalibrate_: model must be a torch.nn.Module, got str$"):
        qk.recalibrate_("model", [])
