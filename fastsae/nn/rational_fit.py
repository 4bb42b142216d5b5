"""Coefficients that make a rational function follow ReLU or JumpReLU (RSAE, arXiv:2606.14990).

    r(t) = P(t) / (1 + |S(t)|),   P = sum_i a[i] t^i, i = 0..p,   S = sum_j b[j - 1] t^j, j = 1..q

Stage 1a of the paper is the r whose largest error on a grid is least; stage 1c is least squares on
a teacher's pre-activations. Both are damped Newton steps on a function of the errors
e = r - target. For the largest error it is the soft maximum (1 / beta) log sum_i 2 cosh(beta e_i),
where beta doubles until it is all but the maximum: a relaxed Remez exchange, whose weights gather
at the extremal points by themselves. The best r equioscillates: its error reaches one size
p + q + 2 times, with alternating signs. Where that fails, differential correction finds another
start: linear programs that lead to about the best S >= 0 from anywhere. The best fit is taken.

Letters: G grid points or samples; p and q the degrees; x the coefficients a, b in a row. Float64.
"""

import json
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

Function = Literal["relu", "jumprelu"]
Degree = tuple[int, int]
Vector = Float64[Tensor, " G"]
Samples = Float[Tensor, " G"]
Objective = tuple[Tensor, Vector, Vector, float]
"""Value, gradient w, d and rho of a function of errors; its Hessian is diag(d) - rho w w^T."""

GRID, GAP, JUMP = 4001, 0.01, 0.1
"""Of `targets`: points on [-1, 1], what is left out around a jump, the jump's height."""
SHARPNESS = 1e6
"""In the end the soft maximum exceeds the maximum by at most log(2 G) / SHARPNESS of it."""
DEFAULT_DEGREE: dict[str, Degree] = {"relu": (3, 2), "jumprelu": (9, 8)}
TABLE = Path(__file__).with_name("rational_table.json")


class RationalFit(NamedTuple):
    """Coefficients a [p + 1] and b [q] in float64 and the scales, as `rational` takes them."""

    a: Tensor
    b: Tensor
    c_in: float
    c_out: float
    error: float
    """The largest on the grid; of `calibrate`, the mean squared one on the samples."""


# --- relaxed Remez, and the steps that it shares with least squares -------------------------


def _powers(t: Vector, degree: Degree) -> Float64[Tensor, "G powers"]:
    return t[:, None] ** torch.arange(max(degree) + 1, device=t.device)


def _evaluate(x: Tensor, powers: Tensor, degree: Degree) -> tuple[Vector, Tensor]:
    """r [G] and its derivatives [G, p + q + 1] in x"""
    p, q = degree
    numerator, denominator = powers[:, : p + 1], powers[:, 1 : q + 1]
    S = denominator @ x[p + 1 :]
    Q = 1 + S.abs()
    r = numerator @ x[: p + 1] / Q
    return r, torch.cat([numerator, -(r * S.sign())[:, None] * denominator], 1) / Q[:, None]


def _largest_error(x: Tensor, target: Vector, powers: Tensor, degree: Degree) -> float:
    return (_evaluate(x, powers, degree)[0] - target).abs().max().item()


def _orthonormal(columns: Float64[Tensor, "G n"]) -> tuple[Tensor, Tensor]:
    """Orthogonal columns of mean square 1, and what the given ones are multiplied by for them."""
    scale = columns.norm(dim=0).clamp_min(1e-300)
    Q, R = torch.linalg.qr(columns / scale)
    size = math.sqrt(len(columns))
    return size * Q, size * torch.linalg.pinv(R, rtol=1e-14) / scale[:, None]


def _descend(
    x: Tensor, target: Vector, powers: Tensor, degree: Degree,
    objective: Callable[[Vector], Objective],
) -> Tensor:  # fmt: skip
    """At most 40 damped Newton steps on objective(r - target) from x, each taken if it improves."""
    damping = 1e-2
    r, jacobian = _evaluate(x, powers, degree)
    value, w, d, rho = objective(r - target)
    for _ in range(40):
        columns, back = _orthonormal(jacobian)
        gradient = columns.T @ w
        hessian = columns.T @ (d[:, None] * columns) - rho * gradient.outer(gradient)
        hessian.diagonal().add_(damping * d.sum())
        trial = x - back @ torch.linalg.solve(hessian, gradient)
        r, trial_jacobian = _evaluate(trial, powers, degree)
        new = objective(r - target)
        if new[0] < value:
            small = value - new[0] <= 1e-9 * value
            (value, w, d, rho), x, jacobian = new, trial, trial_jacobian
            damping = max(damping / 8, 1e-12)
            if small:
                break
        else:
            damping *= 4
    return x


def _mean_square(e: Vector) -> Objective:
    return e.square().mean(), 2 * e / len(e), torch.full_like(e, 2 / len(e)), 0.0


def _soft_maximum(e: Vector, beta: float) -> Objective:
    largest = e.abs().max()
    up, down = (beta * (e - largest)).exp(), (beta * (-e - largest)).exp()
    total = (up + down).sum()
    d = beta * (up + down) / total
    return largest + total.log() / beta, (up - down) / total, d, beta


def _linearised(target: Vector, powers: Tensor, degree: Degree) -> Tensor:
    """The best of 30 least-squares fits of P - target Q, each weighted by the last one's 1 / Q."""
    p, q = degree
    columns = torch.cat([powers[:, : p + 1], -target[:, None] * powers[:, 1 : q + 1]], 1)
    fits, Q = [], torch.ones_like(target)
    for _ in range(30):
        orthonormal, back = _orthonormal(columns / Q[:, None])
        fits.append(back @ (orthonormal.T @ (target / Q)) / len(target))
        Q = 1 + (powers[:, 1 : q + 1] @ fits[-1][p + 1 :]).abs()
    return min(fits, key=lambda x: _largest_error(x, target, powers, degree))


def _relaxed_remez(x: Tensor, target: Vector, powers: Tensor, degree: Degree) -> Tensor:
    sharpness = 3.0
    while sharpness < SHARPNESS and (error := _largest_error(x, target, powers, degree)) > 1e-15:
        x = _descend(x, target, powers, degree, partial(_soft_maximum, beta=sharpness / error))
        sharpness *= 2
    return x


# --- differential correction: where that fails, another start -------------------------------


def _peaks(errors: Vector) -> Tensor:
    """Where |errors| is largest in each run of one sign."""
    bounds = (errors.sign().diff().nonzero()[:, 0] + 1).tolist()
    runs = pairwise([0, *bounds, len(errors)])
    return torch.tensor([i + int(errors[i:j].abs().argmax()) for i, j in runs])


def lower_bound(errors: Vector, degree: Degree) -> float:
    """A size that the largest error of no fit with S >= 0 of this degree falls below.

    errors [G] float64 are those of some fit, in the order of t. The bound is the least of
    p + q + 2 consecutive peaks of alternating signs (de la Vallee-Poussin), 0 if there are fewer.
    """
    heights, count = errors[_peaks(errors)].abs(), sum(degree) + 2
    return heights.unfold(0, count, 1).amin(1).max().item() if len(heights) >= count else 0.0


def _linear_program(A: Float64[Tensor, "m n"], b: Tensor, c: Tensor) -> Tensor:
    """The x with A x <= b and the least c.x, by an interior-point method that follows s y = gap."""
    x, s, y = torch.zeros_like(c), b.clamp_min(1), torch.ones_like(b)
    best, least = x, math.inf
    for _ in range(40):
        primal, dual, weight, mean = A @ x + s - b, A.T @ y + c, y / s, s @ y / len(b)
        worst = torch.stack([mean, primal.abs().max(), dual.abs().max()]).max().item()
        best, least = (x, worst) if worst < least else (best, least)
        factor, failed = torch.linalg.cholesky_ex(A.T @ (weight[:, None] * A))
        if failed or worst < 1e-10:
            break
        gap = 0.1 * mean / s - y
        right = -dual - A.T @ (gap + weight * primal)
        dx = torch.cholesky_solve(right[:, None], factor)[:, 0]
        ds = -primal - A @ dx
        dy = gap - weight * ds
        along, across = (0.99 / (-d / v).max().clamp_min(1) for d, v in ((ds, s), (dy, y)))
        x, s, y = x + along * dx, s + along * ds, y + across * dy
    return best


def _differential_correction(target: Vector, powers: Tensor, degree: Degree) -> Tensor:
    """The best fit with S >= 0 (Cheney and Loeb), from r = 0, on some 500 points and the peaks.

    A step finds the P and Q whose error is below the last one by the most, in terms of the last Q.
    """
    p, q = degree
    best = x = torch.zeros(p + q + 1).to(target)
    Q, least, patience = torch.eye(q + 1).to(target)[0], target.abs().max().item(), 5
    some = torch.arange(0, len(target), max(1, len(target) // 500))
    while patience:
        at = torch.cat([some, _peaks(_evaluate(x, powers, degree)[0] - target)]).unique()
        f, old = target[at, None], (powers[at, : q + 1] @ Q)[:, None]
        (N, back_N), (D, back_D) = (_orthonormal(powers[at, : n + 1] / old) for n in degree)
        one, zero = torch.ones_like(f), torch.zeros_like(f)
        rows = [
            (-N, (f - least) * D, -one),
            (N, -(f + least) * D, -one),
            (0 * N, back_D[0] / old - D, zero),  # S >= 0
            (0 * N, D, zero),  # Q grows by a factor of at most 3
        ]
        A, b = torch.cat([torch.cat(row, 1) for row in rows]), torch.cat([zero] * 3 + [3 * one])
        y = _linear_program(A, b[:, 0], torch.eye(p + q + 3).to(target)[-1])
        P, Q = back_N @ y[: p + 1], back_D @ y[p + 1 : -1]
        if not Q[0] > 0:
            break
        x, Q = torch.cat([P, Q[1:]]) / Q[0], Q / Q.abs().max()
        error = _largest_error(x, target, powers, degree)
        patience = 5 if error < least * (1 - 1e-3) else patience - 1
        best, least = (x, error) if error < least else (best, least)
    return best


# --- public ---------------------------------------------------------------------------------


def fit_rational(target: Vector, t: Vector, degree: Degree) -> RationalFit:
    """The rational function of the smallest largest error (arXiv:2606.14990, stage 1a).

    target and t [G] float64 on the CPU, t increasing within [-1, 1]; points may be missing, such
    as those around a jump; degree (p, q). Takes about a second. ValueError for other degrees than
    p >= 0 and q >= 1, fewer than p + q + 2 points, t out of range or target not finite.
    """
    if degree[0] < 0 or degree[1] < 1 or sum(degree) + 2 > len(t):
        raise ValueError(f"degree must be (0, 1) or more for {len(t)} points, got {degree}")
    if not (t.abs().max() <= 1 and (t.diff() > 0).all() and target.isfinite().all()):
        raise ValueError("t must increase within [-1, 1] and target be finite")
    powers = _powers(t, degree)
    x = _relaxed_remez(_linearised(target, powers, degree), target, powers, degree)
    errors = _evaluate(x, powers, degree)[0] - target
    if lower_bound(errors, degree) < 0.99 * errors.abs().max().item():
        start = _differential_correction(target, powers, degree)
        fits = x, start, _relaxed_remez(start, target, powers, degree)
        x = min(fits, key=lambda x: _largest_error(x, target, powers, degree))
    error = _largest_error(x, target, powers, degree)
    return RationalFit(x[: degree[0] + 1], x[degree[0] + 1 :], 1.0, 1.0, error)


def targets(function: Function, jump: float | None = None) -> tuple[Vector, Vector]:
    """A teacher's activation on the grid, in units of c_in: its values and the points t.

    ReLU: max(t, 0). JumpReLU, and TopK as a JumpReLU at the token's threshold: t + jump for t > 0,
    else 0, without the |t| < GAP; jump is threshold / c_in, JUMP unless given.
    ValueError for other functions, a jump that is not positive, or any for ReLU.
    """
    t = torch.linspace(-1, 1, GRID, dtype=torch.float64)
    if function == "relu" and jump is None:
        return t.relu(), t
    jump = JUMP if jump is None else jump
    if function != "jumprelu" or not 0 < jump < math.inf:
        raise ValueError(f'{function!r} with jump {jump}: only "jumprelu" has one, above 0')
    t = t[t.abs() > GAP * (1 - 1e-9)]
    return (t + jump) * (t > 0), t


def initial_coefficients(
    function: Function, degree: Degree | None = None, jump: float | None = None
) -> RationalFit:
    """The fit of `targets`, from the table if it is there, else fitted (arXiv:2606.14990).

    degree (p, q) is that of DEFAULT_DEGREE unless given. The error holds in float32 too, not in
    coarser dtypes: (9, 8) has coefficients of 4e7. ValueError as in `targets` and `fit_rational`.
    """
    target, t = targets(function, jump)
    degree = degree or DEFAULT_DEGREE[function]
    row = json.loads(TABLE.read_text()).get(f"{function} {degree[0]} {degree[1]}")
    if row is None or jump not in (None, JUMP):
        return fit_rational(target, t, degree)
    a, b = (torch.tensor(row[name], dtype=torch.float64) for name in "ab")
    return RationalFit(a, b, 1.0, 1.0, row["error"])


def calibrate(
    h: Samples, target: Samples, a: Tensor, b: Tensor, c_in: float, c_out: float,
    shift: Samples | float = 0.0,
) -> RationalFit:  # fmt: skip
    """Least squares of rational(h, a, b, c_in, c_out, shift) on samples (arXiv:2606.14990, 1c).

    h and the teacher's values target [G] of any floating dtype, with shift [G] or a number.
    c_in is the given one, or the 99 %, 99.9 % or 100 % quantile of |h - shift|, whichever ends
    best; beyond it t is clamped to [-1, 1], as in `rational`. For each, c_out is the best factor
    of the start and then a and b are refined. The error is never above the start's. Takes about a
    kilobyte a sample for (9, 8). ValueError for no samples, one that is not finite, or c <= 0.
    """
    degree, u, f = (len(a) - 1, len(b)), h.double() - shift, target.double()
    if not (min(len(a), len(b), len(u)) and (u + f).isfinite().all() and min(c_in, c_out) > 0):
        raise ValueError("a, b and samples must be there and finite, and c_in and c_out positive")
    sizes, start, fits = u.abs().sort().values, torch.cat([a, b]).to(u), []
    quantiles = {sizes[round(share * (len(u) - 1))].item() for share in (0.99, 0.999, 1)}
    for c in [c_in, *sorted(quantiles - {0})]:
        powers = _powers((u / c).clamp(-1, 1), degree)
        r = _evaluate(start, powers, degree)[0]
        factor = (r @ f / (r @ r)).item()
        factor = factor if 0 < factor < math.inf else c_out
        x = _descend(start, f / factor, powers, degree, _mean_square)
        error = (factor * _evaluate(x, powers, degree)[0] - f).square().mean().item()
        fits.append(RationalFit(x[: len(a)], x[len(a) :], c, factor, error))
    return min(fits, key=lambda fit: fit.error)
