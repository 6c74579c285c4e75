"""define_op: one schema, one allocator and one reference become a torch op; the backend is chosen inside it, at run time.

To autograd, fake tensors, torch.compile and torch.export the op is one opaque node `torch.ops.qupedkern.<name>`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qupedkern.backends import EAGER, module, select

_LIBRARY = torch.library.Library("qupedkern", "DEF")


@dataclass(frozen=True)
class Op:
    """All that is known of one op. `reference` is the formula, written once, and the eager backend.

    prepare: public arguments -> op arguments, with every check; allocate: op arguments -> empty outputs (also the fake kernel).
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    allocate: Callable[..., Any]
    prepare: Callable[..., tuple[Any, ...]]


OPS: dict[str, Op] = {}


class output_hook:
    """Tests poison outputs here: `output_hook.fill` sees each freshly allocated output before a kernel writes it."""

    fill: Callable[[Tensor], None] | None = None


def tensors_of(values: Any) -> Iterator[Tensor]:
    """The tensors among values, those in lists too, in order."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_of(value)


def _contiguous(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value if value.is_contiguous() else value.contiguous()
    if _is_list(value) and not all(map(Tensor.is_contiguous, value)):
        return [v.contiguous() for v in value]
    return value


@cache
def mutated(name: str) -> tuple[int, ...]:
    """Positions of the arguments an op writes in place, `Tensor(a!)` or `Tensor(a!)[]` in its schema."""
    arguments = getattr(torch.ops.qupedkern, name).default._schema.arguments
    return tuple(i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)


def run(op: Op, given: tuple[Any, ...]) -> Any:
    args = tuple([_contiguous(a) for a in given])
    name = select(op.name, args)
    if name == EAGER:
        outputs = op.reference(*args)
    else:
        outputs = op.allocate(*args)
        written = outputs if isinstance(outputs, tuple) else () if outputs is None else (outputs,)
        if output_hook.fill is not None:
            for output in tensors_of(written):
                output_hook.fill(output)
        module(name).launch(op.name, args, written)
    for position in mutated(op.name):  # an argument of other strides was written in a contiguous copy
        for before, after in zip(tensors_of([given[position]]), tensors_of([args[position]]), strict=True):
            if after is not before:
                before.copy_(after)
    return outputs


def define_op(
    schema: str, *, allocate: Callable[..., Any], prepare: Callable[..., tuple[Any, ...]] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: register `torch.ops.qupedkern.<name>` with the decorated function as its reference.

    allocate gets the op's arguments and returns its outputs, empty and contiguous, for real and fake tensors alike: a tensor
    or a list of them for each return of the schema, None where it has none. Schemas have no keyword-only arguments. What an
    op writes in place is marked in the schema, `Tensor(a!)`; reference and kernels get it contiguous.
    """
    name = schema.split("(", 1)[0]

    def register(reference: Callable[..., Any]) -> Callable[..., Any]:
        op = Op(name, schema, reference, allocate, prepare or (lambda *args: args))
        OPS[name] = op
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, lambda *args: run(op, args), "CompositeExplicitAutograd")
        torch.library.register_fake(f"qupedkern::{name}", allocate, lib=_LIBRARY)
        return reference

    return register


def _is_list(value: Any) -> bool:
    """A list of tensors; a list of integers, a shape, is not."""
    return isinstance(value, list) and (not value or isinstance(value[0], Tensor))


@dataclass(frozen=True)
class Gradient:
    """What ties <name> to <name>_backward. positions: of the arguments that get a gradient; statistics: see differentiable."""

    name: str
    positions: tuple[int, ...]
    statistics: int
    returns_list: bool

    def of(self, backward: Callable[..., Any], grad: Any, inputs: Sequence[Any], extra: Iterable[Tensor]) -> list[Any]:
        """For each input its gradient, a list of them for a list of tensors; None, or a list of None, where it has none.

        backward: the op <name>_backward.
        """
        found = backward(grad, *inputs, *extra)
        gradients: list[Any] = [[None] * len(v) if _is_list(v) else None for v in inputs]
        for position, gradient in zip(self.positions, found if isinstance(found, tuple) else (found,), strict=True):
            gradients[position] = gradient
        return gradients


GRADIENTS: dict[str, Gradient] = {}


def layout_of(values: Sequence[Any]) -> list[Any]:
    """Of each argument: -1 for a tensor, the length of a list of them, or in a tuple the argument itself."""
    return [-1 if isinstance(v, Tensor) else len(v) if _is_list(v) else (v,) for v in values]


def laid_out(layout: list[Any], tensors: Iterator[Tensor]) -> list[Any]:
    """The arguments that have this layout and these tensors."""
    return [
        kept[0] if isinstance(kept, tuple) else next(tensors) if kept < 0 else [next(tensors) for _ in range(kept)]
        for kept in layout
    ]


def differentiable(name: str, wrt: tuple[str, ...], *, statistics: int = 0) -> None:
    """Tie <name> to <name>_backward(grad, *arguments of <name>) -> one gradient (or list of them) per argument in wrt.

    statistics: how many of the op's last outputs are there for its backward op alone, which gets them after the arguments.
    """
    schema = getattr(torch.ops.qupedkern, name).default._schema
    names = [a.name for a in schema.arguments]
    gradient = Gradient(
        name, tuple(map(names.index, wrt)), statistics, isinstance(schema.returns[0].type, torch.ListType)
    )
    GRADIENTS[name] = gradient

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        extra = output[-statistics:] if statistics else ()
        ctx.mark_non_differentiable(*extra)
        ctx.save_for_backward(*tensors_of(inputs), *extra)
        ctx.layout = layout_of(inputs)

    def backward(ctx: Any, grad: Any, *_: Any) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        op = getattr(torch.ops.qupedkern, f"{name}_backward")
        found = gradient.of(op, grad, laid_out(ctx.layout, saved), saved)
        return tuple(map(_needed, found, ctx.needs_input_grad))

    torch.library.register_autograd(f"qupedkern::{name}", backward, setup_context=setup_context, lib=_LIBRARY)


def _needed(gradient: Any, needs: Any) -> Any:
    if isinstance(gradient, list):
        return [g if n else None for g, n in zip(gradient, needs, strict=True)]
    return gradient if needs else None


def not_differentiable(name: str, reason: str) -> None:
    """Asking for a gradient of this op raises a sentence instead of giving none in silence."""

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"{name}: {reason}")

    torch.library.register_autograd(f"qupedkern::{name}", backward, lib=_LIBRARY)


def vmap_over_rows(
    name: str, *, elementwise: tuple[str, ...], per_row: tuple[str, ...], outputs: tuple[str, ...]
) -> None:
    """Let torch.vmap fold its dimension into the rows: K models' weights become K (or K * G) runs with a row of centers each.

    elementwise: arguments shaped like x.  per_row: "centers" ([m] or [G, m]) and strengths ([1] or [G]).
    outputs: "x" or "centers" for each, whose shape it has.
    """
    names = [a.name for a in getattr(torch.ops.qupedkern, name).default._schema.arguments]

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size

        def batched(position: int) -> Tensor:  # [size, ...]
            value, dim = args[position], in_dims[position]
            return value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)

        centers = batched(names.index("centers"))
        groups = 1 if centers.dim() == 2 else centers.shape[1]
        folded = list(args)
        for position, argument in enumerate(names):
            if argument in elementwise:
                folded[position] = batched(position)
            elif argument == "centers":
                folded[position] = centers.reshape(size * groups, centers.shape[-1])
            elif argument in per_row:
                folded[position] = batched(position).expand(size, groups).reshape(size * groups)
        result = getattr(torch.ops.qupedkern, name)(*folded)
        single = isinstance(result, Tensor)
        shaped = tuple(
            value if kind == "x" else value.reshape(centers.shape)
            for value, kind in zip((result,) if single else result, outputs, strict=True)
        )
        return (shaped[0], 0) if single else (shaped, (0,) * len(shaped))

    torch.library.register_vmap(f"qupedkern::{name}", rule, lib=_LIBRARY)
