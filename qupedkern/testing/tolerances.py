"""How far a correct kernel may be from the float64 reference. Every bound is derived where it stands; none was fitted.

BOUNDS[op](*op arguments in float64, u=, eta=) gives one bound per output. u is the unit roundoff of the compute type and eta
its smallest positive number: each operation is off by at most u times its result, or by eta where it underflows. Bounds are
of first order in u; `compare` multiplies by SECOND_ORDER for the terms in u^2. An infinite bound marks an element about
which nothing is claimed, and says why beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qupedkern.ops import OPS
from qupedkern.ops._rows import column, midpoints, split_rows
from qupedkern.ops.assign import cell_codes
from qupedkern.ops.dequantize import reference as dequantize
from qupedkern.ops.unpack_codes import reference as unpack_codes

ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float64: 2.0**-1074, torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
FLUSHED_BELOW = 2.0**-126  # processors multiply pairs of bfloat16 with smaller factors and sums taken for zero
SECOND_ORDER = 1.01  # (1 + u)^k - 1 <= 1.01 k u for k u <= 0.01: thousands of operations in float32

# sigmoid(z) = 1 / (1 + e), e = exp(-|z|) within 1 ulp = 2u relative: e/(1 + e) 2u <= u, the sum u, the quotient u; times e
# again (another 2u and a product) where z < 0. s (1 - s) is a product of two such.
SIGMOID_ULPS = 6.0
DENSITY_ULPS = 12.0
# exp may give 0 from where it leaves the normal numbers: exp(-87) < 2^-125.
EXP_FLOOR = {ROUNDOFF[torch.float32]: 2.0**-125, ROUNDOFF[torch.float64]: 2.0**-1020}
# One exponential an element serves many midpoints and covers half of float32's exponents for each: s and h may stop
# changing within 2^-64 of their limits, |z| > 44.
SIGMOID_FLOOR = {ROUNDOFF[torch.float32]: 2.0**-64, ROUNDOFF[torch.float64]: 2.0**-1020}


def _argument_error(values: Tensor, t: Tensor, steepness: Tensor, u: float, eta: float) -> tuple[Tensor, Tensor]:
    """z = P (x - t_j) [G, n, m - 1] and how far a kernel's z may be from it.

    t_j is rounded once, u |t|, and its halves underflow by eta; the difference and the product round once each, 2u |x - t|:
    |dz| <= P (u (2 |x - t| + |t|) + 2 eta) + eta. An infinite x has no error: its sigmoids are 0 and 1.
    """
    p, x, mid = steepness[:, :, None], values[:, :, None], t[:, None, :]
    z = p * (x - mid)
    error = p * (u * (2 * (x - mid).abs() + mid.abs()) + 2 * eta) + eta
    return z, torch.where(torch.isfinite(x), error, 0.0)


def _sigmoids(values: Tensor, c: Tensor, steepness: Tensor, u: float, eta: float) -> tuple[Tensor, ...]:
    """s and h = s (1 - s) [G, n, m - 1], and the bounds of their errors.

    Mean value theorem over |z'| >= |z| - |dz|: |s'| = h <= min(1/4, exp(-|z'|)), |h'| <= min(1/(6 sqrt 3), exp(-|z'|)).
    Neither is off by more than its range, 1 and 1/4.
    """
    z, error = _argument_error(values, midpoints(c), steepness, u, eta)
    decay = torch.where(error > 0, torch.exp((error - z.abs()).clamp(max=0.0)), 0.0)
    s = torch.sigmoid(z)
    h = s * torch.sigmoid(-z)
    s_error = (error * decay.clamp(max=0.25)).clamp(max=1.0) + SIGMOID_ULPS * u * s + SIGMOID_FLOOR[u]
    h_error = (
        (error * decay.clamp(max=1 / (6 * math.sqrt(3)))).clamp(max=0.25) + DENSITY_ULPS * u * h + SIGMOID_FLOOR[u]
    )
    return s, h, s_error, h_error


def soft_quantize(x: Tensor, centers: Tensor, sharpness: Tensor, *, u: float, eta: float) -> tuple[Tensor]:
    """c_1 + sum_j d_j s_j: each s_j off by its error, d_j and the product by u each, the m - 1 additions by u max|c| each.

    u (m max|c| + 2 sum d s) + sum_j d_j |ds_j|; without the conditioning of z inside |ds_j| the formula itself would fail.
    """
    values, c = split_rows(x, centers)
    s, _, s_error, _ = _sigmoids(values, c, column(sharpness, like=c), u, eta)
    d = c.diff(dim=1)[:, None, :]
    m = c.shape[1]
    bound = u * m * c.abs().amax(1, keepdim=True) + (d * (s_error + 2 * u * s)).sum(-1) + m * eta
    return (bound.reshape(x.shape),)


def soft_quantize_backward(
    grad: Tensor, x: Tensor, centers: Tensor, sharpness: Tensor, *, u: float, eta: float
) -> tuple[Tensor, Tensor]:
    """grad_x = g P sum_j d_j h_j;  grad_c_k = sum_i g (s_k - s_{k+1} - (P/2) (d_k h_k + d_{k+1} h_{k+1})).

    grad_x: |g| P (sum_j d_j |dh_j| + u (m + 4) sum_j d_j h_j), for m - 1 additions, d_j and three products.
    grad_c: the terms' own errors, 6u for their products and differences, and n u sum|terms| for any order of adding n of
    them; the parts s_k and s_{k+1} count apart, as they may be summed apart.
    A product that underflows is off by eta, times whatever it is multiplied by later: of g, P and the slope (at most the
    range of the centers), or P d_j by eta each before g h_j, and each of the m - 1 terms g P d_j h_j by eta; of g, P/2,
    d_j and h_j, in any order.
    Nothing is claimed where |g| P (c_m - c_1) overflows.
    """
    values, c = split_rows(x, centers)
    p = column(sharpness, like=c)
    g = grad.reshape(values.shape).abs()
    s, h, s_error, h_error = _sigmoids(values, c, p, u, eta)
    d = c.diff(dim=1)[:, None, :]
    n, m = values.shape[1], c.shape[1]
    slope_error = (d * h_error).sum(-1) + u * (m + 4) * (d * h).sum(-1) + m * eta
    width = c[:, -1:] - c[:, :1]
    steep = p * width
    overflow = (g * steep > _largest(u)) | (steep > _largest(u)) | (g * p > _largest(u))
    bound_x = torch.where(overflow, math.inf, g * p * slope_error + eta * (m * (1 + g) + p + width))

    terms = _sides(s, ends=(1.0, 0.0)) + 0.5 * p[..., None] * _sides(d * h, ends=(0.0, 0.0))
    errors = _sides(s_error, ends=(0.0, 0.0)) + 0.5 * p[..., None] * _sides(d * h_error + 2 * eta, ends=(0.0, 0.0))
    weighted = g[..., None] * (errors + (6 + n) * u * terms) + eta * (
        2 + g[..., None] + p[..., None] * (1 + d.amax(-1, keepdim=True))
    )
    bound_c = torch.where(overflow.any(1, keepdim=True), math.inf, weighted.sum(1))
    return bound_x.reshape(x.shape), bound_c.reshape(centers.shape)


def foreach_soft_quantize(
    x: list[Tensor], centers: list[Tensor], sharpness: list[Tensor], *, u: float, eta: float
) -> tuple[Tensor, ...]:
    """That of soft_quantize for each."""
    return tuple(soft_quantize(*args, u=u, eta=eta)[0] for args in zip(x, centers, sharpness, strict=True))


def foreach_soft_quantize_backward(
    grad: list[Tensor], x: list[Tensor], centers: list[Tensor], sharpness: list[Tensor], *, u: float, eta: float
) -> tuple[Tensor, ...]:
    """That of soft_quantize_backward for each: grad_x of all, then grad_centers of all."""
    pairs = [soft_quantize_backward(*args, u=u, eta=eta) for args in zip(grad, x, centers, sharpness, strict=True)]
    return (*(bound for bound, _ in pairs), *(bound for _, bound in pairs))


def _sides(between: Tensor, ends: tuple[float, float]) -> Tensor:
    """[G, n, m - 1] of midpoints -> [G, n, m] of centers: what lies below plus what lies above each center."""
    low, high = (torch.full_like(between[..., :1], end) for end in ends)
    return torch.cat([low, between], -1) + torch.cat([between, high], -1)


def _largest(u: float) -> float:
    return torch.finfo(torch.float64 if u == ROUNDOFF[torch.float64] else torch.float32).max


def undecided(x: Tensor, centers: Tensor, *, u: float, eta: float) -> Tensor:
    """Elements within 2 ulp (4u) of a midpoint, where float64 midpoints and rounded ones may disagree about the cell."""
    values, c = split_rows(x, centers)
    t = midpoints(c)[:, None, :]
    return ((values[..., None] - t).abs() <= 4 * u * t.abs() + 2 * eta).any(-1).reshape(x.shape)


def _exact_where_decided(x: Tensor, centers: Tensor, *rest: Any, u: float, eta: float) -> tuple[Tensor]:
    """A decision is right or wrong: no error, and nothing claimed next to a midpoint (backends must agree there all the same)."""
    return (torch.where(undecided(x, centers, u=u, eta=eta), math.inf, 0.0),)


def exact(*args: Any, u: float, eta: float) -> tuple[float]:
    """Moves of bits: no error."""
    return (0.0,)


def _cells(x: Tensor, centers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values, c = split_rows(x, centers)
    codes = cell_codes(values, c)
    return values, codes, values - c.gather(1, codes)


def prox_weights(x: Tensor, centers: Tensor, strength: Tensor, norm: str, *, u: float, eta: float) -> tuple[Tensor]:
    """gap = y - q is off by u |gap|.

    l1: y - t rounds once; whether |gap| <= t may be decided wrongly within u |gap| of equality: u (|gap| + |result|).
    l2: share = t / (0.5 + t) is off by 2u, the product by u: u (4 |gap| share + |result|).
    Both results lie between y and q. Nothing is claimed where y - q overflows.
    """
    values, _, gap = _cells(x, centers)
    size = gap.abs()
    moved = torch.maximum(values.abs(), (values - gap).abs())
    t = column(strength, like=values)
    share = t / (0.5 + t)
    bound = u * ((size if norm == "l1" else 4 * size * share) + moved) + 2 * eta
    bound = torch.where(size * (1 + u) > _largest(u), math.inf, bound).reshape(x.shape)
    bound = torch.where(torch.isfinite(x), bound, math.inf if norm == "l2" else 0.0)  # inf - inf is not a number
    return (torch.where(undecided(x, centers, u=u, eta=eta), math.inf, bound),)


def hard_quantize_backward(
    grad: Tensor, x: Tensor, centers: Tensor, straight_through: bool, *, u: float, eta: float
) -> tuple[float, Tensor]:
    """grad_x is a copy; grad_c_k sums n_k terms in any order: n_k u sum |g| over the cell."""
    values, c = split_rows(x, centers)
    return 0.0, _cell_sum_bound(grad.reshape(values.shape), cell_codes(values, c), centers, u)


def dequantize_backward(grad: Tensor, codes: Tensor, centers: Tensor, *, u: float, eta: float) -> tuple[Tensor]:
    """Sums over each code, as in hard_quantize_backward."""
    rows = centers.reshape(-1, centers.shape[-1]).shape[0]
    index = codes.reshape(rows, codes.numel() // rows).long()
    return (_cell_sum_bound(grad.reshape(index.shape), index, centers, u),)


def dequantize_packed_backward(
    grad: Tensor, packed: Tensor, centers: Tensor, bits: int, shape: list[int], *, u: float, eta: float
) -> tuple[Tensor]:
    """Sums over each code, as in dequantize_backward."""
    codes = OPS["unpack_codes"].reference(packed, bits, shape)
    return dequantize_backward(grad, codes, centers, u=u, eta=eta)


def packed_embedding_backward(
    grad: Tensor, indices: Tensor, packed: Tensor, centers: Tensor, bits: int, shape: list[int], *, u: float, eta: float
) -> tuple[Tensor]:
    """(n_k + 1) u sum|terms| over the values looked up of each code: n_k counts a row as often as it is named."""
    reference = OPS["packed_embedding_backward"].reference
    total, count = (reference(g, indices, packed, centers, bits, shape) for g in (grad.abs(), torch.ones_like(grad)))
    return (torch.where(total > _largest(u), math.inf, (count + 1) * u * total),)


def _cell_total(values: Tensor, codes: Tensor, m: int) -> Tensor:
    return values.new_zeros((values.shape[0], m)).scatter_add_(1, codes, values)


def _cell_sum_bound(terms: Tensor, codes: Tensor, centers: Tensor, u: float, per_term: float = 0.0) -> Tensor:
    """(n_k + per_term) u sum|terms| over each cell; nothing claimed where that sum overflows."""
    m = centers.shape[-1]
    total = _cell_total(terms.abs(), codes, m)
    count = _cell_total(torch.ones_like(terms), codes, m)
    bound = torch.where(total > _largest(u), math.inf, (count + per_term) * u * total)
    return bound.reshape(centers.shape)


def distance(x: Tensor, centers: Tensor, norm: str, *, u: float, eta: float) -> tuple[Tensor]:
    """N terms |gap| off by u, or gap^2 off by 3u, and N u sum|terms| for adding them in any order.

    Next to a midpoint the other center may be taken, whose gap differs by 2 |x - t| <= 8u |t|, |t| about |x|.
    """
    values, _, gap = _cells(x, centers)
    near = undecided(x, centers, u=u, eta=eta).reshape(values.shape)
    size, other = gap.abs(), torch.where(near, 9 * u * values.abs() + 4 * eta, 0.0)
    if norm == "l1":
        terms, flipped = size, other
    else:
        terms, flipped = size * size, other * (2 * size + other)
    total = terms.sum()
    bound = (values.numel() + 3) * u * total + flipped.sum() + values.numel() * eta
    return (torch.where(total > _largest(u), math.inf, bound),)


def distance_backward(
    grad: Tensor, x: Tensor, centers: Tensor, norm: str, *, u: float, eta: float
) -> tuple[Tensor | float, Tensor]:
    """grad sign(gap) rounds nowhere; 2 grad gap rounds twice (2u). grad_c sums them over each cell.

    The sign of a gap is exact: floats a and b differ in float arithmetic where they differ at all. Nothing is claimed
    where 2 gap or a sum overflows.
    """
    values, codes, gap = _cells(x, centers)
    pull = grad * (gap.sign() if norm == "l1" else 2 * gap)
    if norm == "l2":
        pull = torch.where(2 * gap.abs() * (1 + u) > _largest(u), math.inf, pull)
    bound_x = torch.where(pull.abs() > _largest(u), math.inf, (3 * u * pull.abs() if norm == "l2" else 0.0) + eta)
    return bound_x.reshape(x.shape), _cell_sum_bound(pull, codes, centers, u, per_term=3) + values.shape[1] * eta


def prox_centers(
    centers: Tensor, x: Tensor, strength: Tensor, norm: str, method: str, at: Tensor | None, *, u: float, eta: float
) -> tuple[Tensor]:
    """Per center, then the largest of the row, because sorting moves no value further than that.

    l1: results are mu + t k for an integer k, |k| <= n_k, or a member: the candidates are off by 2u (|mu| + t n_k), and the
    proximal map of a convex function moves by no more than its argument does. The largest candidate bounds them all.
    l2: mu + sum (x - mu) / (1/(2t) + n): n_k u sum|x - mu| for the sum, u each for its terms, 3u for the quotient, u for the
    final addition. Nothing is claimed where t n_k or the sum overflows: strength times a count has left the domain.
    """
    values, mu = split_rows(x, centers)
    codes = cell_codes(values, split_rows(x, centers if at is None else at)[1])
    t = column(strength, like=mu)
    m = mu.shape[1]
    count = _cell_total(torch.ones_like(values), codes, m)
    if norm == "l1":
        bound = 2 * u * (mu.abs() + t * count)
        reach = t * count + mu.abs()
    else:
        gaps = _cell_total((values - mu.gather(1, codes)).abs(), codes, m)
        moved = gaps / (0.5 / t + count.clamp(min=1))
        bound = u * ((count + 5) * moved + mu.abs())
        reach = gaps
    bound = torch.where((reach > _largest(u)).any(1, keepdim=True), math.inf, bound.amax(1, keepdim=True) + 2 * eta)
    return (bound.expand_as(mu).reshape(centers.shape),)


def init_centers(
    x: Tensor, levels: int, num_groups: int, method: str, weights: Tensor | None, *, u: float, eta: float
) -> tuple[Tensor]:
    """linspace and quantile: (a (1 - w) + b w), w off by u: 5u max|x|.

    signed_mean: n additions and a quotient, (n + 1) u max|x|; nothing is claimed where its sum overflows.
    kmeans: of the squared error, which is what `objective` gives, since optima may tie. Either side is a partition chosen by
    float64 sums about the mean, off by n u64 of W, W A and W A^2 for A = max|x - mean| and W the sum of weights; so is a
    run's error second - first^2 / weight by 8n u64 W A^2, in each of `levels` runs, and by as much at each of 2 log n
    choices on the way. A center rounded by u |c| adds W (u max|x|)^2.
    """
    values = x.reshape(num_groups, -1)
    most, n = values.abs().amax(1, keepdim=True), values.shape[1]
    if method == "kmeans":
        w = torch.ones_like(values) if weights is None else weights.reshape(values.shape)
        mass, mean = w.sum(1), (w * values).sum(1, keepdim=True) / w.sum(1, keepdim=True)
        wide = ROUNDOFF[torch.float64]
        reach = (values - mean).abs().amax(1) + wide * most[:, 0]
        chain = 2 * levels * (8 * n) * (2 * math.log2(n + 1) + 2)
        return (chain * wide * mass * reach.square() + mass * (2 * u * most[:, 0] + 2 * eta).square(),)
    bound = {"linspace": 5, "quantile": 5, "signed_mean": n + 1}[method] * u * most + 2 * eta
    if method == "signed_mean":
        bound = torch.where(values.abs().sum(1, keepdim=True) > _largest(u), math.inf, bound)
    bound = bound.expand(num_groups, levels)
    return (bound[0] if num_groups == 1 else bound,)


def _softened(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return tuple(z.reshape(-1, z.shape[-1]) / temperature for z in (student, teacher))  # type: ignore[return-value]


def _finite_size(*values: Tensor) -> Tensor:
    """The largest finite magnitude of each row, [N, 1]; 0 without one. Infinite logits are exact."""
    rows = torch.cat(values, dim=1)
    return torch.where(torch.isfinite(rows), rows.abs(), 0.0).amax(-1, keepdim=True)


def _no_class(p: Tensor, factor: Tensor) -> Tensor:
    return torch.where(p == 0, 0.0, p * factor)


def _most_likely(log_p: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """Where e, the error of log p, is no longer small, and the largest p it leaves possible: first order holds elsewhere only."""
    rough = (e > 0.01).expand_as(log_p)
    return rough, torch.where(rough, torch.maximum(log_p.exp(), (log_p + e).clamp(max=0.0).exp()), log_p.exp())


def distillation_loss(
    student: Tensor, teacher: Tensor, temperature: float, *, u: float, eta: float
) -> tuple[Tensor, Tensor]:
    """z = logits (1 / T) is off by 2u|z| (so is max z), z - max by u 2a more, a = max|z| of the example.

    log p moves by no more than twice the largest error of z - max, the part that max itself adds cancelling: 8ua; exp adds
    3u, the sum of K of them K u (what falls below the normal numbers is less), log sum and the last difference
    u (2a + 2 log K): e = u (10a + K + 3 + 2 log K). log sum exp(z - max) is off by less than e, max by 2u|max|.
    KL = sum p_w (log p_w - log p) = sum p_w ((z_w - max_w) - (z - max)) - (log sum_w - log sum), whichever is summed: p_w is
    off by e + 2u relative, the bracket by 2e + u; (K + 4) u of the sum of |terms| and of |log sum_w - log sum|. A p_w below
    the normal numbers may be 0: FLOOR times the bracket. Loss: T^2 / N times their sum, (N + 5) u more.
    Nothing is claimed where 2a, the reach of z - max, overflows, nor of the loss where the sum of the divergences does.
    """
    z, z_w = _softened(student, teacher, temperature)
    log_p, log_pw = (torch.log_softmax(v, -1) for v in (z, z_w))
    top, top_w = z.amax(-1, keepdim=True), z_w.amax(-1, keepdim=True)
    log_sum, log_sum_w = (torch.logsumexp(v - t, -1, keepdim=True) for v, t in ((z, top), (z_w, top_w)))
    examples, classes = z.shape
    reach = _finite_size(z, z_w)
    e = u * (10 * reach + classes + 3 + 2 * math.log(classes))
    p_w, ratio = log_pw.exp(), (log_pw - log_p).abs()
    rough, most = _most_likely(log_pw, e)
    vanishing = rough | (p_w <= 2 * EXP_FLOOR[u])
    gone = torch.isinf(ratio) & (most > 0) & vanishing  # the term is infinite, or 0 where p_w is
    size = torch.where(torch.isinf(ratio), 0.0, _no_class(p_w, ratio))  # an infinite term is infinite exactly
    floors = torch.where((p_w == 0) | torch.isinf(ratio), 0.0, EXP_FLOOR[u] * ratio)
    far = _no_class(most, torch.where(torch.isinf(ratio), 0.0, ratio) + 2 * e)
    errors = torch.where(rough, far, size * (e + 4 * u) + p_w * (2 * e)) + floors
    total = size.sum(-1, keepdim=True) + torch.where(log_sum_w == log_sum, 0.0, (log_sum_w - log_sum).abs())
    off = errors.sum(-1, keepdim=True) + (classes + 4) * u * total + (classes + 1) * eta
    unclaimed = gone.any(-1, keepdim=True) | (2 * reach > _largest(u))
    off = torch.where(unclaimed, math.inf, off)
    loss = (off.sum() + (examples + 5) * u * total.sum()) * temperature**2 / max(examples, 1) + 2 * eta
    loss = torch.where(size.sum() > _largest(u), math.inf, loss)
    tops = [2 * u * torch.where(torch.isinf(t), 0.0, t.abs()) + 2 * eta for t in (top, top_w)]
    logs = torch.where(2 * reach > _largest(u), math.inf, e.expand_as(top))
    return loss, torch.cat([tops[0], logs, tops[1], logs, off], dim=1)


def distillation_loss_backward(
    grad: Tensor, student: Tensor, teacher: Tensor, temperature: float, statistics: Tensor, *, u: float, eta: float
) -> tuple[Tensor, Tensor]:
    """Student: g T / N (p - p_w).  Teacher: g T / N p_w (log p_w - log p - KL). The statistics are what was given.

    log p = (z - max) - log sum: 2u|z|, then u of each difference, of which the first is at most |log p| + log sum:
    e = u (2|z| + 2|log p| + log sum), for each class its own. exp: e + 3u relative, and FLOOR where it may give 0; 4u for g T / N
    and its product, u for each difference. Nothing is claimed where a difference or g T overflows, where p does because huge
    statistics were rounded, nor where p_w may be 0 beside an infinite or undefined bracket.
    """
    z, z_w = _softened(student, teacher, temperature)
    top, log_sum, top_w, log_sum_w, divergence = statistics.split(1, dim=1)
    log_p, log_pw = (z - top) - log_sum, (z_w - top_w) - log_sum_w
    e, e_w = (
        torch.where(torch.isinf(v), 0.0, u * (2 * v.abs() + 2 * logs.abs() + total.abs()))
        for v, logs, total in ((z, log_p, log_sum), (z_w, log_pw, log_sum_w))
    )
    p, p_w = log_p.exp(), log_pw.exp()
    scale = grad.abs() * temperature / max(z.shape[0], 1)
    floor = EXP_FLOOR[u]
    (rough, most), (rough_w, most_w) = _most_likely(log_p, e), _most_likely(log_pw, e_w)
    p_off, pw_off = (
        torch.where(far, top, _no_class(q, error + 3 * u))
        for far, top, q, error in ((rough, most, p, e), (rough_w, most_w, p_w, e_w))
    )
    to_student = p_off + pw_off + 2 * floor + 5 * u * (p - p_w).abs()
    pull = log_pw - log_p - divergence
    bracket = e + e_w + 2 * u * (log_pw - log_p).abs() + u * pull.abs()
    to_teacher = torch.where(
        rough_w, _no_class(most_w, bracket + pull.abs()), _no_class(p_w, bracket + (e_w + 8 * u) * pull.abs())
    ) + torch.where(p_w == 0, 0.0, floor * pull.abs())
    largest = _largest(u)
    steep = (2 * _finite_size(z, z_w, statistics) > largest) | torch.isinf(p) | torch.isinf(p_w)
    gone = ~torch.isfinite(pull) & (most_w > 0) & (rough_w | (p_w <= 2 * floor))
    unclaimed = (steep, steep | gone | (pull.abs() > largest) & torch.isfinite(pull))
    results = []
    for part, without in zip((to_student, to_teacher), unclaimed, strict=True):
        bound = torch.where(
            without | (grad.abs() * max(temperature, 1.0) > largest), math.inf, scale * part + 4 * eta * (1 + scale)
        )
        results.append(bound.reshape(student.shape))
    return results[0], results[1]


def lut_linear(
    x: Tensor,
    packed: Tensor,
    centers: Tensor,
    bias: Tensor | None,
    bits: int,
    shape: list[int],
    *,
    u: float,
    eta: float,
) -> tuple[Tensor]:
    """A dot product of K terms and the bias in any order of addition: (K + 1) u (sum |w| |x| + |b|), eta for each underflow.

    Where numbers below eta = 2^-126 count as zero (smallest_of), a term loses eta |x| or eta |w| by its factors besides.
    Where an x is infinite or NaN so is the result; nothing is claimed where a partial sum may overflow.
    """
    weight = _lut_weight(packed, centers, bits, shape).abs()
    rows = x.reshape(math.prod(x.shape[:-1]), shape[1]).abs()
    size = _finite_product(rows, weight.t()) + (0.0 if bias is None else bias.abs())
    bound = (shape[1] + 1) * (u * size + eta)
    if eta == FLUSHED_BELOW:
        bound = bound + eta * (rows.nan_to_num(posinf=0.0).sum(1, keepdim=True) + weight.sum(1))
    return (torch.where(size > _largest(u), math.inf, bound).reshape(*x.shape[:-1], shape[0]),)


def lut_linear_backward(
    grad: Tensor,
    x: Tensor,
    packed: Tensor,
    centers: Tensor,
    bias: Tensor | None,
    bits: int,
    shape: list[int],
    *,
    u: float,
    eta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_x: dot products over the outputs.  grad_bias: sums over the batch.  grad_centers: each weight's gradient is a dot
    product over the batch, (B + 1) u of its terms, and adding n_k of them gives n_k u more. Any order of addition.
    """
    batch = math.prod(x.shape[:-1])
    codes = unpack_codes(packed, bits, shape)
    weight, rows = dequantize(codes, centers).abs(), x.reshape(batch, shape[1]).abs()
    slopes = grad.reshape(batch, shape[0]).abs()
    to_x = _finite_product(slopes, weight)
    to_weight = _finite_product(slopes.t(), rows)
    groups, levels = centers.reshape(-1, centers.shape[-1]).shape
    by_group = (groups, codes.numel() // groups)
    index, terms = codes.reshape(by_group).long(), to_weight.reshape(by_group)
    total, count = _cell_total(terms, index, levels), _cell_total(torch.ones_like(terms), index, levels)
    to_centers = (batch + 1 + count) * (u * total + eta * count)
    to_bias = slopes.sum(0) if bias is not None else slopes.new_zeros(0)
    sizes = (to_x, total, to_bias)
    bounds = ((shape[0] + 1) * (u * to_x + eta), to_centers, (batch + 1) * (u * to_bias + eta))
    shapes = (x.shape, centers.shape, to_bias.shape)
    return tuple(  # type: ignore[return-value]
        torch.where(size > _largest(u), math.inf, bound).reshape(like)
        for size, bound, like in zip(sizes, bounds, shapes, strict=True)
    )


def _lut_weight(packed: Tensor, centers: Tensor, bits: int, shape: list[int]) -> Tensor:
    return dequantize(unpack_codes(packed, bits, shape), centers)


def _finite_product(a: Tensor, b: Tensor) -> Tensor:
    """|a| |b| summed, infinities and NaN left out: they are exact."""
    return a.nan_to_num(nan=0.0, posinf=0.0) @ b.nan_to_num(nan=0.0, posinf=0.0)


BOUNDS: dict[str, Callable[..., tuple[Tensor | float, ...]]] = {
    "assign": _exact_where_decided,
    "dequantize": exact,
    "dequantize_backward": dequantize_backward,
    "dequantize_packed": exact,
    "dequantize_packed_backward": dequantize_packed_backward,
    "distance": distance,
    "distance_backward": distance_backward,
    "distillation_loss": distillation_loss,
    "distillation_loss_backward": distillation_loss_backward,
    "foreach_soft_quantize": foreach_soft_quantize,
    "foreach_soft_quantize_backward": foreach_soft_quantize_backward,
    "hard_quantize": _exact_where_decided,
    "hard_quantize_backward": hard_quantize_backward,
    "init_centers": init_centers,
    "lut_linear": lut_linear,
    "lut_linear_backward": lut_linear_backward,
    "pack_codes": exact,
    "packed_embedding": exact,
    "packed_embedding_backward": packed_embedding_backward,
    "prox_centers": prox_centers,
    "prox_weights": prox_weights,
    "soft_quantize": soft_quantize,
    "soft_quantize_backward": soft_quantize_backward,
    "unpack_codes": exact,
}


def smallest_of(op: str, args: tuple[Any, ...], dtype: torch.dtype) -> float:
    """eta of an op that computes in dtype, given its arguments."""
    return FLUSHED_BELOW if op == "lut_linear" and args[0].dtype == torch.bfloat16 else SMALLEST[dtype]


def with_output_rounding(bound: Tensor | float, expected: Tensor, dtype: torch.dtype, u: float) -> Tensor:
    """Adds the rounding of the result to its own type: half an ulp of it, or half its smallest number."""
    bound = torch.as_tensor(bound, dtype=torch.float64).expand(expected.shape) * SECOND_ORDER
    if dtype not in ROUNDOFF or ROUNDOFF[dtype] == u:
        return bound
    return bound + ROUNDOFF[dtype] * (expected.abs().nan_to_num(posinf=0.0) + bound) + SMALLEST[dtype] / 2


def assert_close(got: Tensor, expected: Tensor, bound: Tensor, what: str) -> None:
    """|got - expected| <= bound; NaN where NaN is expected; past the largest number of got's type an infinity of that sign."""
    value, claimed = got.detach().double(), ~torch.isinf(bound)
    largest = torch.finfo(got.dtype).max if got.dtype.is_floating_point else math.inf
    may_overflow = (expected.abs() + bound > largest) & torch.isinf(value) & (value.sign() == expected.sign())
    same = (value == expected) | (value.isnan() & expected.isnan()) | may_overflow
    wrong = claimed & ~same & ~((value - expected).abs() <= bound)
    if bool(wrong.any()):
        first = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements are off, first at {first}: "
            f"got {float(value[first])!r}, expected {float(expected[first])!r} within {float(bound[first]):.3g}"
        )
