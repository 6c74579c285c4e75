"""Bound ops: the same bits as unbound ones whatever has changed between two calls."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import qupedkern as qk
from qupedkern.ops._bound import Bound
from qupedkern.testing.harness import poisoned_outputs, running_backends

SHAPE = [5, 7]
CODES = torch.arange(35, dtype=torch.uint8).reshape(5, 7) % 4


def parts() -> tuple[Tensor, Tensor]:
    return qk.pack_codes(CODES, 2), torch.tensor([-1.0, 0.25, 0.5, 2.0])


def test_values_types_places_and_shapes_may_change_between_calls() -> None:
    bound, (packed, centers) = Bound("dequantize_packed"), parts()

    def check() -> None:
        expected = qk.dequantize(qk.unpack_codes(packed, 2, SHAPE), centers)
        with poisoned_outputs():
            first, again = (bound(packed, centers, 2, SHAPE) for _ in range(2))
        assert torch.equal(first, expected)
        assert torch.equal(again, expected)
        assert first.data_ptr() != again.data_ptr()

    check()
    centers.mul_(3)
    packed.bitwise_xor_(0b11011000)
    check()
    centers = centers.clone()
    check()
    centers = centers.bfloat16()
    check()
    centers = centers.double()  # eager
    check()
    centers = torch.stack([centers.float()] * 5)[:, :3]  # not contiguous, other levels
    packed = qk.pack_codes(CODES % 3, 2)
    check()
    centers.data = torch.rand(7, 3)[:5].sort(-1).values
    check()


@pytest.mark.parametrize("backend", running_backends())
def test_a_forced_backend_is_heard_after_another_has_run(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bound, (packed, centers) = Bound("dequantize_packed"), parts()
    expected = bound(packed, centers, 2, SHAPE)
    reference = qk.ops.OPS["dequantize_packed"].reference
    ran = []
    monkeypatch.setitem(
        qk.ops.OPS,
        "dequantize_packed",
        type(qk.ops.OPS["dequantize_packed"])(
            **{**vars(qk.ops.OPS["dequantize_packed"]), "reference": lambda *a: ran.append(1) or reference(*a)}
        ),
    )
    with qk.use_backend(backend):
        assert torch.equal(bound(packed, centers, 2, SHAPE), expected)
    assert bool(ran) == (backend == "eager")


def test_gradients_transforms_and_wrong_codes_are_as_unbound() -> None:
    bound, (packed, centers) = Bound("dequantize_packed"), parts()
    bound(packed, centers, 2, SHAPE)
    leaf = centers.requires_grad_()
    bound(packed, leaf, 2, SHAPE).sum().backward()
    assert leaf.grad.tolist() == torch.bincount(CODES.flatten().int()).tolist()
    with torch.no_grad():
        assert not bound(packed, leaf, 2, SHAPE).requires_grad
        with pytest.raises(ValueError, match=r"^dequantize_packed: codes must be below m = 3, got 3$"):
            bound(packed, leaf[:3], 2, SHAPE)
    doubled = torch.func.functional_call(qk.pack_(layer()), {"0.centers": torch.zeros(4)}, (torch.ones(1, 2, 3, 3),))
    assert not doubled.any()


def layer() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False))
    qk.quantize_(model, bits=2, rule=lambda *_: True)
    return model


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_layer_never_reads_the_tensors_of_the_first(way: object) -> None:
    model, x = qk.pack_(layer()), torch.randn(1, 2, 3, 3)
    with torch.no_grad():
        expected = model(x)
        other = way(model)  # type: ignore[operator]
        model[0].centers.zero_()
        assert torch.equal(other(x), expected)
        assert not model(x).any()
