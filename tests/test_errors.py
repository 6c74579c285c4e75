"""Wrong arguments of every public op: the type of the error, its whole sentence, and nothing changed by the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import qupedkern as qk
from qupedkern.ops import OPS

X = torch.linspace(-1, 1, 12)
C = torch.tensor([-1.0, 0.0, 1.0])
CODES = torch.tensor([0, 1, 2, 1], dtype=torch.uint8)
PACKED = qk.pack_codes(CODES, 2)
LOGITS = torch.zeros(4, 3)
M = "meta"

FLOAT = "must be float32, float64, bfloat16 or float16"
SHAPE = "must be [m] or [G, m] with m from 2 to 256"

# What is wrong with x and centers, for every op that takes the pair: x, centers, error, sentence after the op's name.
PAIRS: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "x is a list": ([1.0], C, TypeError, "x must be a torch.Tensor, got list"),
    "x is an integer tensor": (X.long(), C, TypeError, f"x {FLOAT}, got torch.int64"),
    "x is complex": (X.to(torch.complex64), C, TypeError, f"x {FLOAT}, got torch.complex64"),
    "x is sparse": (X.to_sparse(), C, TypeError, "x must be a dense tensor, got layout torch.sparse_coo"),
    "centers is None": (X, None, TypeError, "centers must be a torch.Tensor, got NoneType"),
    "centers are integers": (X, C.int(), TypeError, f"centers {FLOAT}, got torch.int32"),
    "centers are wider": (X, C.double(), TypeError, "centers must be torch.float32, the type of x, got torch.float64"),
    "centers are narrower": (X, C.half(), TypeError, "centers must be torch.float32, the type of x, got torch.float16"),
    "half of another kind": (
        X.bfloat16(),
        C.half(),
        TypeError,
        "centers must be torch.bfloat16 or torch.float32, got torch.float16",
    ),
    "one center": (X, C[:1], ValueError, f"centers {SHAPE}, got shape (1,)"),
    "257 centers": (X, torch.zeros(257), ValueError, f"centers {SHAPE}, got shape (257,)"),
    "0-d centers": (X, C[0], ValueError, f"centers {SHAPE}, got shape ()"),
    "3-d centers": (X, C.expand(1, 1, 3), ValueError, f"centers {SHAPE}, got shape (1, 1, 3)"),
    "no rows": (X, torch.zeros(0, 3), ValueError, f"centers {SHAPE}, got shape (0, 3)"),
    "rows that do not divide": (
        X,
        C.expand(5, 3),
        ValueError,
        "centers has 5 rows, which must divide the 12 elements of x evenly",
    ),
    "another device": (
        X,
        C.to(M),
        ValueError,
        "centers must be on the device of x, cpu, got meta; move one of them",
    ),
}
TAKES_PAIR: dict[str, Callable[[Any, Any], Any]] = {
    "soft_quantize": lambda x, c: qk.soft_quantize(x, c, 1.0),
    "hard_quantize": lambda x, c: qk.hard_quantize(x, c),
    "assign": lambda x, c: qk.assign(x, c),
    "distance": lambda x, c: qk.distance(x, c),
    "prox_weights": lambda x, c: qk.prox_weights(x, c, 0.1),
    "prox_centers": lambda x, c: qk.prox_centers(c, x, 0.1),
}

# A number or one per row: sharpness of soft_quantize, strength of the two prox maps.
PER_ROW: dict[str, tuple[Any, type[Exception], str]] = {
    "a string": ("10", TypeError, "{name} must be a number or a tensor, got str"),
    "a bool": (True, TypeError, "{name} must be a number or a tensor, got bool"),
    "None": (None, TypeError, "{name} must be a number or a tensor, got NoneType"),
    "a complex number": (1j, TypeError, "{name} must be a number or a tensor, got complex"),
    "integers": (torch.ones(1, dtype=torch.long), TypeError, f"{{name}} {FLOAT}, got torch.int64"),
    "too many": (torch.ones(3), ValueError, "{name} must be a number or have shape [1] or [2], got (3,)"),
    "two dimensions": (torch.ones(2, 1), ValueError, "{name} must be a number or have shape [1] or [2], got (2, 1)"),
    "another device": (
        torch.ones(2, device=M),
        ValueError,
        "{name} must be on the device of x, cpu, got meta; move one of them",
    ),
    "a gradient": (
        torch.ones(2, requires_grad=True),
        ValueError,
        "there is no gradient with respect to {name}; pass {name}.detach()",
    ),
}
ROWS = C.expand(2, 3)
TAKES_PER_ROW: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "soft_quantize": ("sharpness", lambda value: qk.soft_quantize(X, ROWS, value)),
    "prox_weights": ("strength", lambda value: qk.prox_weights(X, ROWS, value)),
    "prox_centers": ("strength", lambda value: qk.prox_centers(ROWS, X, value)),
}

# Everything else: call, error, whole sentence.
OTHERS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: qk.quped_step([X], [X, X], [], [], [], [C], [], [0.1], lr=0.1),
        ValueError,
        "quped_step: grad must hold 1 tensors for chain 'none', got 2",
    ),
    (
        lambda: qk.quped_step([X], [X], [], [], [], [C], [], [0.1], lr=0.1, optimizer="rprop"),
        ValueError,
        "quped_step: optimizer must be 'sgd' or 'adam' or 'adamw', got 'rprop'",
    ),
    (
        lambda: qk.quped_step([X, X], [X, X], [], [], [], [C, C[:1]], [], [0.1, 0.1], lr=0.1),
        ValueError,
        "quped_step: tensor 1: centers must be [m] or [G, m] with m from 2 to 256, got shape (1,)",
    ),
    (
        lambda: qk.center_step([C], [C], [C], [], [0.1], rate=0.1, clip=0.0),
        ValueError,
        "center_step: clip must be a positive number, got 0.0",
    ),
    (
        lambda: qk.foreach_soft_quantize(X, [C], 1.0),
        TypeError,
        "foreach_soft_quantize: xs must be a list, one entry a tensor, got Tensor",
    ),
    (
        lambda: qk.foreach_soft_quantize([X, X], [C], 1.0),
        ValueError,
        "foreach_soft_quantize: centers must have one entry for each of the 2 xs, got 1",
    ),
    (
        lambda: qk.foreach_soft_quantize([X, X], [C, C], [1.0]),
        ValueError,
        "foreach_soft_quantize: sharpness must have one entry for each of the 2 xs, got 1",
    ),
    (
        lambda: qk.foreach_soft_quantize([X, X], [C, C[:1]], 1.0),
        ValueError,
        "foreach_soft_quantize: tensor 1: centers must be [m] or [G, m] with m from 2 to 256, got shape (1,)",
    ),
    (
        lambda: qk.foreach_soft_quantize([X, X.to(M)], [C, C.to(M)], 1.0),
        ValueError,
        "foreach_soft_quantize: tensor 1 must be on the device of tensor 0, cpu, got meta; move one of them",
    ),
    (
        lambda: qk.hard_quantize(X, C, 1),  # type: ignore[arg-type]
        TypeError,
        "hard_quantize: straight_through must be a bool, got int",
    ),
    (lambda: qk.distance(X, C, "l3"), ValueError, "distance: norm must be 'l1' or 'l2', got 'l3'"),
    (lambda: qk.prox_weights(X, C, 0.1, "L1"), ValueError, "prox_weights: norm must be 'l1' or 'l2', got 'L1'"),
    (lambda: qk.prox_centers(C, X, 0.1, "l0"), ValueError, "prox_centers: norm must be 'l1' or 'l2', got 'l0'"),
    (
        lambda: qk.prox_centers(C, X, 0.1, "l1", "fast"),
        ValueError,
        "prox_centers: method must be 'exact' or 'counted' or 'authors', got 'fast'",
    ),
    (
        lambda: qk.prox_centers(C, X, 0.1, at=C[:2]),
        ValueError,
        "prox_centers: at must have the shape of centers, (3,), got (2,)",
    ),
    (
        lambda: qk.prox_centers(C, X, 0.1, at=[0.0, 1.0]),  # type: ignore[arg-type]
        TypeError,
        "prox_centers: at must be a torch.Tensor, got list",
    ),
    (
        lambda: qk.prox_centers(C, X, 0.1, at=C.to(M)),
        ValueError,
        "prox_centers: at must be on the device of x, cpu, got meta; move one of them",
    ),
    (lambda: qk.dequantize(CODES.long(), C), TypeError, "dequantize: codes must be uint8, got torch.int64"),
    (lambda: qk.dequantize(CODES, C.long()), TypeError, f"dequantize: centers {FLOAT}, got torch.int64"),
    (lambda: qk.dequantize(CODES, C[:1]), ValueError, f"dequantize: centers {SHAPE}, got shape (1,)"),
    (
        lambda: qk.dequantize(CODES, C.expand(3, 3)),
        ValueError,
        "dequantize: centers has 3 rows, which must divide the 4 elements of codes evenly",
    ),
    (
        lambda: qk.dequantize(CODES, C.to(M)),
        ValueError,
        "dequantize: centers must be on the device of codes, cpu, got meta; move one of them",
    ),
    (lambda: qk.dequantize(CODES, C[:2]), ValueError, "dequantize: codes must be below m = 2, got 2"),
    (
        lambda: qk.dequantize_packed(PACKED, C, 2, (5,)),
        ValueError,
        "dequantize_packed: packed must have shape (2,) to hold (5,) codes of 2 bits, got (1,)",
    ),
    (
        lambda: qk.dequantize_packed(PACKED, C, 1, (4,)),
        ValueError,
        "dequantize_packed: 1 bits tell 2 centers apart, got rows of 3",
    ),
    (
        lambda: qk.dequantize_packed(PACKED, C, 9, (4,)),
        ValueError,
        "dequantize_packed: bits must be between 1 and 8, got 9",
    ),
    (
        lambda: qk.dequantize_packed(PACKED, C, 2, 4),
        TypeError,
        "dequantize_packed: shape must be a sequence of integers, got int",
    ),
    (
        lambda: qk.dequantize_packed(PACKED | 3, C, 2, (4,)),
        ValueError,
        "dequantize_packed: codes must be below m = 3, got 3",
    ),
    (
        lambda: qk.packed_embedding(torch.zeros(2), PACKED, C, 2, (2, 2)),
        TypeError,
        "packed_embedding: indices must be int64 or int32, got torch.float32",
    ),
    (
        lambda: qk.packed_embedding(torch.zeros(2).int(), PACKED, C, 2, (4,)),
        ValueError,
        "packed_embedding: shape must be [V, D], the table's, got [4]",
    ),
    (
        lambda: qk.packed_embedding(torch.tensor([0, 2]), PACKED, C, 2, (2, 2)),
        ValueError,
        "packed_embedding: indices must be from 0 to 1, got 2",
    ),
    (lambda: qk.pack_codes([0, 1], 1), TypeError, "pack_codes: codes must be a torch.Tensor, got list"),  # type: ignore[arg-type]
    (lambda: qk.pack_codes(CODES.int(), 2), TypeError, "pack_codes: codes must be uint8, got torch.int32"),
    (lambda: qk.pack_codes(CODES, 0), ValueError, "pack_codes: bits must be between 1 and 8, got 0"),
    (lambda: qk.pack_codes(CODES, 9), ValueError, "pack_codes: bits must be between 1 and 8, got 9"),
    (lambda: qk.pack_codes(CODES, 2.0), TypeError, "pack_codes: bits must be an integer, got float"),  # type: ignore[arg-type]
    (lambda: qk.pack_codes(CODES, True), TypeError, "pack_codes: bits must be an integer, got bool"),
    (lambda: qk.pack_codes(CODES, 1), ValueError, "pack_codes: codes must be below 2**1 = 2, got 2"),
    (lambda: qk.unpack_codes(CODES, 0, (4,)), ValueError, "unpack_codes: bits must be between 1 and 8, got 0"),
    (lambda: qk.unpack_codes(CODES, 9, (4,)), ValueError, "unpack_codes: bits must be between 1 and 8, got 9"),
    (
        lambda: qk.lut_linear(X, PACKED, C, None, 2, (4,)),
        ValueError,
        "lut_linear: shape must be the weight's two sizes (out, in), got (4,)",
    ),
    (
        lambda: qk.lut_linear(X, PACKED, C, None, 2, (1, 4)),
        ValueError,
        "lut_linear: the last size of x must be in = 4, got x of shape (12,)",
    ),
    (
        lambda: qk.lut_linear(X, PACKED, C, None, 3, (2, X.shape[-1])),
        ValueError,
        "lut_linear: packed must have shape (9,) to hold (2, 12) codes of 3 bits, got (1,)",
    ),
    (
        lambda: qk.lut_linear(torch.ones(4), PACKED, torch.arange(5.0), None, 2, (1, 4)),
        ValueError,
        "lut_linear: 2 bits tell 4 centers apart, got rows of 5",
    ),
    (
        lambda: qk.lut_linear(torch.ones(4), PACKED, torch.arange(4.0), torch.ones(2), 2, (1, 4)),
        ValueError,
        "lut_linear: bias must be torch.float32 of shape (1,), got torch.float32 (2,)",
    ),
    (lambda: qk.unpack_codes(X, 2, (4,)), TypeError, "unpack_codes: packed must be uint8, got torch.float32"),
    (
        lambda: qk.unpack_codes(CODES, 2, (4,)),
        ValueError,
        "unpack_codes: packed must have shape (1,) to hold (4,) codes of 2 bits, got (4,)",
    ),
    (
        lambda: qk.unpack_codes(CODES.reshape(2, 2), 8, (4,)),
        ValueError,
        "unpack_codes: packed must have shape (4,) to hold (4,) codes of 8 bits, got (2, 2)",
    ),
    (
        lambda: qk.unpack_codes(CODES, 8, 4),  # type: ignore[arg-type]
        TypeError,
        "unpack_codes: shape must be a sequence of integers, got int",
    ),
    (
        lambda: qk.unpack_codes(CODES, 8, (-4,)),
        ValueError,
        f"unpack_codes: each size in shape must be between 0 and {2**62}, got -4",
    ),
    (
        lambda: qk.unpack_codes(CODES, 8, (4.0,)),  # type: ignore[arg-type]
        TypeError,
        "unpack_codes: each size in shape must be an integer, got float",
    ),
    (lambda: qk.init_centers(X.int(), 2), TypeError, f"init_centers: x {FLOAT}, got torch.int32"),
    (lambda: qk.init_centers(X, 1), ValueError, "init_centers: levels must be between 2 and 256, got 1"),
    (lambda: qk.init_centers(X, 257), ValueError, "init_centers: levels must be between 2 and 256, got 257"),
    (lambda: qk.init_centers(X, 2.5), TypeError, "init_centers: levels must be an integer, got float"),  # type: ignore[arg-type]
    (
        lambda: qk.init_centers(X, 2, 5),
        ValueError,
        "init_centers: num_groups = 5 must divide the 12 elements of x evenly",
    ),
    (lambda: qk.init_centers(X, 2, 0), ValueError, "init_centers: num_groups must be between 1 and 12, got 0"),
    (lambda: qk.init_centers(X, 2, 13), ValueError, "init_centers: num_groups must be between 1 and 12, got 13"),
    (
        lambda: qk.init_centers(torch.zeros(0), 2),
        ValueError,
        "init_centers: num_groups = 1 must divide the 0 elements of x evenly",
    ),
    (
        lambda: qk.init_centers(X, 3, method="signed_mean"),
        ValueError,
        "init_centers: method 'signed_mean' gives 2 levels, got levels = 3",
    ),
    (
        lambda: qk.init_centers(X, 3, weights=C),
        ValueError,
        f"init_centers: weights must have the shape of x, {tuple(X.shape)}, got (3,)",
    ),
    (lambda: qk.init_centers(X, 3, weights=[1.0]), TypeError, "init_centers: weights must be a torch.Tensor, got list"),  # type: ignore[arg-type]
    (
        lambda: qk.init_centers(X, 3, method="quantile", weights=X),
        ValueError,
        "init_centers: weights are for method 'kmeans', got method 'quantile'; leave them out",
    ),
    (
        lambda: qk.init_centers(X, 3, weights=X.to(M)),
        ValueError,
        "init_centers: weights must be on the device of x, cpu, got meta; move one of them",
    ),
    (
        lambda: qk.init_centers(X, 3, method="k-means"),
        ValueError,
        "init_centers: method must be 'kmeans' or 'linspace' or 'quantile' or 'signed_mean', got 'k-means'",
    ),
    (
        lambda: qk.distillation_loss([0.0], LOGITS),  # type: ignore[arg-type]
        TypeError,
        "distillation_loss: student_logits must be a torch.Tensor, got list",
    ),
    (
        lambda: qk.distillation_loss(LOGITS, LOGITS.long()),
        TypeError,
        f"distillation_loss: teacher_logits {FLOAT}, got torch.int64",
    ),
    (
        lambda: qk.distillation_loss(LOGITS, LOGITS.double()),
        TypeError,
        "distillation_loss: both logits must have one type, got torch.float32 and torch.float64",
    ),
    (
        lambda: qk.distillation_loss(LOGITS, LOGITS[:2]),
        ValueError,
        "distillation_loss: student_logits and teacher_logits must both be [..., classes], got (4, 3) and (2, 3)",
    ),
    (
        lambda: qk.distillation_loss(LOGITS[0, 0], LOGITS[0, 0]),
        ValueError,
        "distillation_loss: student_logits and teacher_logits must both be [..., classes], got () and ()",
    ),
    (
        lambda: qk.distillation_loss(LOGITS[:, :0], LOGITS[:, :0]),
        ValueError,
        "distillation_loss: student_logits and teacher_logits must both be [..., classes], got (4, 0) and (4, 0)",
    ),
    (
        lambda: qk.distillation_loss(LOGITS, LOGITS.to(M)),
        ValueError,
        "distillation_loss: teacher_logits must be on the device of student_logits, cpu, got meta; move one of them",
    ),
    *(
        (
            lambda t=t: qk.distillation_loss(LOGITS, LOGITS, t),
            ValueError,
            f"distillation_loss: temperature must be positive and finite, got {t}",
        )
        for t in (0.0, -1.0, float("nan"), float("inf"))
    ),
    (
        lambda: qk.distillation_loss(LOGITS, LOGITS, "2"),  # type: ignore[arg-type]
        TypeError,
        "distillation_loss: temperature must be a number, got str",
    ),
]


def raised(call: Callable[[], Any], error: type[Exception]) -> str:
    """The sentence of exactly this error; the tensors of this module are left as they were."""
    before = [t.clone() for t in (X, C, CODES, LOGITS)]
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert all(torch.equal(was, now) for was, now in zip(before, (X, C, CODES, LOGITS), strict=True))
    return str(caught.value)


@pytest.mark.parametrize("case", PAIRS)
@pytest.mark.parametrize("op", TAKES_PAIR)
def test_wrong_weights_and_centers(op: str, case: str) -> None:
    x, centers, error, sentence = PAIRS[case]
    assert raised(lambda: TAKES_PAIR[op](x, centers), error) == f"{op}: {sentence}"


@pytest.mark.parametrize("case", PER_ROW)
@pytest.mark.parametrize("op", TAKES_PER_ROW)
def test_wrong_sharpness_and_strength(op: str, case: str) -> None:
    value, error, sentence = PER_ROW[case]
    name, call = TAKES_PER_ROW[op]
    assert raised(lambda: call(value), error) == f"{op}: {sentence.format(name=name)}"


@pytest.mark.parametrize(("call", "error", "sentence"), OTHERS, ids=[case[2][:60] for case in OTHERS])
def test_wrong_everything_else(call: Callable[[], Any], error: type[Exception], sentence: str) -> None:
    assert raised(call, error) == sentence


def test_every_public_op_is_tried() -> None:
    public = {op for op in OPS if not op.endswith("_backward")}
    tried = {*TAKES_PAIR, *TAKES_PER_ROW, *(sentence.split(":")[0] for _, _, sentence in OTHERS)}
    assert tried == public
    assert public <= set(dir(qk))


@pytest.mark.parametrize("op", TAKES_PAIR)
def test_a_failing_call_leaves_no_gradient_and_no_trace(op: str) -> None:
    x = X.clone().requires_grad_()
    with pytest.raises(ValueError, match=f"^{op}: "):
        TAKES_PAIR[op](x, C[:1])
    assert x.grad is None
    assert x.grad_fn is None


def test_arguments_on_the_meta_device_give_shapes_without_values() -> None:
    """Checks read no values: shape, type and device decide."""
    out: Tensor = qk.soft_quantize(X.to(M), C.to(M), 2.0)
    assert out.device.type == "meta"
    assert out.shape == X.shape
