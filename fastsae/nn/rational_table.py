"""Writes fastsae/nn/rational_table.json: minimax fits of ReLU and JumpReLU (arXiv:2606.14990, 1a).

    python -m fastsae.nn.rational_table

A fit minimizes the largest error on a grid by damped Newton steps on the soft maximum of the errors
e = r - target, (1 / beta) log sum_i 2 cosh(beta e_i), where beta doubles until it is close to the
maximum: a relaxed Remez exchange, whose weights gather at the extremal points by themselves. The
best r equioscillates: its error reaches one size p + q + 2 times, with alternating signs. Where
that fails, differential correction finds another start by linear programs that lead to about the
best S >= 0 from any start. The best fit is kept.
"""

import json
import math
from functools import partial
from itertools import pairwise

import torch
from jaxtyping import Float64
from torch import Tensor

from .rational_fit import (
    TABLE,
    Degree,
    Function,
    Objective,
    RationalFit,
    Vector,
    descend,
    evaluate,
    fit_from,
    largest_error,
    linearized,
    orthonormal,
    powers_of,
    targets,
)

ROWS: tuple[tuple[Function, int, int], ...] = (
    ("relu", 3, 2),
    ("relu", 5, 4),
    ("relu", 7, 6),
    ("jumprelu", 9, 8),
)
SHARPNESS = 1e6
"""In the end the soft maximum exceeds the maximum by at most log(2 G) / SHARPNESS of it."""


def fit_rational(target: Vector, t: Vector, degree: Degree) -> RationalFit:
    """The rational function of degree (p, q) with the smallest largest error at increasing t."""
    powers = powers_of(t, degree)
    x = relaxed_remez(linearized(target, powers, degree), target, powers, degree)
    errors = evaluate(x, powers, degree)[0] - target
    if lower_bound(errors, degree) < 0.99 * errors.abs().max().item():
        start = differential_correction(target, powers, degree)
        fits = x, start, relaxed_remez(start, target, powers, degree)
        x = min(fits, key=lambda x: largest_error(x, target, powers, degree))
    return fit_from(x, target, powers, degree)


def soft_maximum(e: Vector, beta: float) -> Objective:
    largest = e.abs().max()
    up, down = (beta * (e - largest)).exp(), (beta * (-e - largest)).exp()
    total = (up + down).sum()
    d = beta * (up + down) / total
    return largest + total.log() / beta, (up - down) / total, d, beta


def relaxed_remez(x: Tensor, target: Vector, powers: Tensor, degree: Degree) -> Tensor:
    sharpness = 3.0
    while sharpness < SHARPNESS and (error := largest_error(x, target, powers, degree)) > 1e-15:
        x = descend(x, target, powers, degree, partial(soft_maximum, beta=sharpness / error))
        sharpness *= 2
    return x


def peaks(errors: Vector) -> Tensor:
    """Where |errors| is largest in each run of one sign."""
    bounds = (errors.sign().diff().nonzero()[:, 0] + 1).tolist()
    runs = pairwise([0, *bounds, len(errors)])
    return torch.tensor([i + int(errors[i:j].abs().argmax()) for i, j in runs])


def lower_bound(errors: Vector, degree: Degree) -> float:
    """A lower bound on the largest error of every fit of this degree with S >= 0.

    errors [G] are those of one fit, in the order of t. The bound is the smallest of p + q + 2
    consecutive peaks of alternating signs (de la Vallee-Poussin), 0 if there are fewer.
    """
    heights, count = errors[peaks(errors)].abs(), sum(degree) + 2
    return heights.unfold(0, count, 1).amin(1).max().item() if len(heights) >= count else 0.0


def linear_program(A: Float64[Tensor, "m n"], b: Tensor, c: Tensor) -> Tensor:
    """The x that minimizes c.x subject to A x <= b, by a primal-dual interior-point method."""
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


def differential_correction(target: Vector, powers: Tensor, degree: Degree) -> Tensor:
    """The best fit with S >= 0 (Cheney and Loeb), from r = 0, on some 500 points and the peaks.

    A step finds the P and Q that reduce the last error the most, relative to the last Q.
    """
    p, q = degree
    best = x = torch.zeros(p + q + 1).to(target)
    Q, least, patience = torch.eye(q + 1).to(target)[0], target.abs().max().item(), 5
    some = torch.arange(0, len(target), max(1, len(target) // 500))
    while patience:
        at = torch.cat([some, peaks(evaluate(x, powers, degree)[0] - target)]).unique()
        f, old = target[at, None], (powers[at, : q + 1] @ Q)[:, None]
        (N, back_N), (D, back_D) = (orthonormal(powers[at, : n + 1] / old) for n in degree)
        one, zero = torch.ones_like(f), torch.zeros_like(f)
        rows = [
            (-N, (f - least) * D, -one),
            (N, -(f + least) * D, -one),
            (0 * N, back_D[0] / old - D, zero),  # S >= 0
            (0 * N, D, zero),  # Q grows by a factor of at most 3
        ]
        A, b = torch.cat([torch.cat(row, 1) for row in rows]), torch.cat([zero] * 3 + [3 * one])
        y = linear_program(A, b[:, 0], torch.eye(p + q + 3).to(target)[-1])
        P, Q = back_N @ y[: p + 1], back_D @ y[p + 1 : -1]
        if not Q[0] > 0:
            break
        x, Q = torch.cat([P, Q[1:]]) / Q[0], Q / Q.abs().max()
        error = largest_error(x, target, powers, degree)
        patience = 5 if error < least * (1 - 1e-3) else patience - 1
        best, least = (x, error) if error < least else (best, least)
    return best


def main() -> None:
    rows = {}
    for function, p, q in ROWS:
        fit = fit_rational(*targets(function), (p, q))
        rows[f"{function} {p} {q}"] = {"error": fit.error, "a": fit.a.tolist(), "b": fit.b.tolist()}
    TABLE.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
