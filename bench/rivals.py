"""What the kernels are compared with: the same results in PyTorch alone, as users write them and as well as we could.

Every rival is checked against our ops before it is timed (soft.py, step.py) and in the tests.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qupedkern.ops import OPS

Result = tuple[Tensor, Tensor, Tensor]  # S, dL/dx, dL/dc


def soft_formula(x: Tensor, centers: Tensor, sharpness: Tensor) -> Tensor:
    """The relaxed quantizer as its formula reads, S = c_1 + sum_j d_j sigmoid(P (x - t_j)), one midpoint after the other.

    Over twice as fast as broadcasting to [n, m - 1]. Half types are computed in float32.
    """
    values = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    midpoints, gaps = 0.5 * (centers[:-1] + centers[1:]), centers.diff()
    soft = centers[0]
    for j in range(len(midpoints)):
        soft = soft + gaps[j] * torch.sigmoid(sharpness * (values - midpoints[j]))
    return soft.to(x.dtype)


def soft_by_autograd(
    grads: list[Tensor],
    xs: list[Tensor],
    centers: list[Tensor],
    sharpness: list[Tensor],
    formula: Callable[..., Tensor],
) -> list[Result]:
    """Forward by `formula`, backward by autograd: what a user writes, and what torch.compile gets to work on."""
    xs, centers = [x.detach().requires_grad_() for x in xs], [c.detach().requires_grad_() for c in centers]
    soft = [formula(*arguments) for arguments in zip(xs, centers, sharpness, strict=True)]
    gradients = torch.autograd.grad(soft, [*xs, *centers], grads)
    return [(s.detach(), gx, gc) for s, gx, gc in zip(soft, gradients[: len(xs)], gradients[len(xs) :], strict=True)]


def soft_by_hand(grad: Tensor, x: Tensor, centers: Tensor, sharpness: Tensor) -> Result:
    """Forward and backward written out for speed: each sigmoid computed once, kept, and worked on in place.

    With s_j = sigmoid(P (x - t_j)), A_j = sum g s_j and B_j = sum g s_j (1 - s_j), the gradient of c_k is
    A_k - A_{k+1} - (P/2) (d_k B_k + d_{k+1} B_{k+1}); A_1 = sum g, A_{m+1} = 0.
    """
    wide = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    values, flat = x.to(wide).reshape(-1), grad.to(wide).reshape(-1)
    midpoints, gaps, zero = 0.5 * (centers[:-1] + centers[1:]), centers.diff(), centers.new_zeros(())
    kept = [torch.sub(values, t).mul_(sharpness).sigmoid_() for t in midpoints]
    soft = torch.mul(kept[0], gaps[0]).add_(centers[0])
    for gap, s in zip(gaps[1:], kept[1:], strict=True):
        soft.add_(s * gap)
    rising, bump, slope = [flat.sum()], [zero], torch.zeros_like(values)
    for gap, s in zip(gaps, kept, strict=True):
        rising.append(torch.dot(flat, s))
        density = torch.addcmul(s, s, s, value=-1)  # s (1 - s)
        bump.append(gap * torch.dot(flat, density))
        slope.add_(density.mul_(gap))
    a, b = torch.stack([*rising, zero]), torch.stack([*bump, zero])
    grad_centers = a[:-1] - a[1:] - sharpness / 2 * (b[:-1] + b[1:])
    return soft.to(x.dtype).view_as(x), slope.mul_(sharpness).mul_(flat).to(x.dtype).view_as(x), grad_centers


Moved = tuple[Tensor, Tensor, Tensor, Tensor]  # x after the prox, codes, counts [3, m]: members, above, below; R(x, c)


def prox_by_ops(x: Tensor, centers: Tensor, strength: Tensor) -> Moved:
    """l1 prox, codes, counts and R as a composition of qupedkern's ops in eager PyTorch, counts by torch.bincount."""
    m, (prox, assign, distance) = len(centers), (OPS[name].reference for name in ("prox_weights", "assign", "distance"))
    moved = prox(x, centers, strength, "l1")
    codes = assign(moved, centers)
    index = codes.flatten().long()
    gap = (moved - centers[codes.long()]).flatten()
    parts = [index, index[gap > 0], index[gap < 0]]
    counts = torch.stack([torch.bincount(part, minlength=m) for part in parts])
    return moved, codes, counts, distance(moved, centers, "l1")


def prox_lean(x: Tensor, centers: Tensor, strength: Tensor) -> Moved:
    """The same with every pass over memory saved that we could: codes in uint8, a weight's cell found once, one bincount.

    A weight stays in its cell, so its code is known before it moves; softshrink is the prox of the gap to the center, in
    another rounding than ours. For m <= 85, whose three counts a center fit the bins of a byte.
    """
    m = len(centers)
    codes = torch.zeros_like(x, dtype=torch.uint8)
    for midpoint in 0.5 * centers[:-1] + 0.5 * centers[1:]:
        codes += x > midpoint
    nearest = torch.index_select(centers, 0, codes.flatten().int()).view_as(x)
    gap = torch.nn.functional.softshrink(x - nearest, float(strength))
    bins = torch.bincount((3 * codes + (gap > 0) + 2 * (gap < 0).byte()).flatten(), minlength=3 * m).view(m, 3)
    counts = torch.stack([bins.sum(1), bins[:, 1], bins[:, 2]])
    return nearest + gap, codes, counts, gap.abs().sum()


def prox_published(x: Tensor, centers: Tensor, strength: Tensor) -> Moved:
    """The procedure of the published code, written from its description: for each center a mask and a masked product over
    all weights repeated m times.

    The weights, repeated to [m, n], are compared with every center and shrunk toward it; then, center by center, a mask over
    [m, n] picks the row of that center where it is the nearest, and the masked product is summed. Counts are sums of masks.
    Work and traffic grow with m^2 n.
    """
    m, column = len(centers), centers.reshape(-1, 1)
    repeated = x.reshape(1, -1).repeat(m, 1)
    gap = repeated - column
    nearest = gap.abs().argmin(dim=0)
    shrunk = torch.where(gap.abs() <= strength, column, repeated - strength * gap.sign())
    moved = torch.zeros_like(repeated[0])
    for j in range(m):
        mask = torch.zeros(repeated.shape, dtype=torch.bool)
        mask[j] = nearest == j
        moved = moved + (mask * shrunk).sum(dim=0)
    masks = [nearest == j for j in range(m)]
    counts = [
        [mask.sum(), (mask & (moved > c)).sum(), (mask & (moved < c)).sum()]
        for mask, c in zip(masks, centers, strict=True)
    ]
    distance = sum((mask * (moved - c).abs()).sum() for mask, c in zip(masks, centers, strict=True))
    return moved.view_as(x), nearest.byte().view_as(x), torch.tensor(counts).T.contiguous(), torch.as_tensor(distance)
