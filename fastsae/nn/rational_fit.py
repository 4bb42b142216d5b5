"""Coefficients for a rational function that approximates ReLU or JumpReLU (arXiv:2606.14990).

    r(t) = P(t) / (1 + |S(t)|),   P = sum_i a[i] t^i, i = 0..p,   S = sum_j b[j - 1] t^j, j = 1..q

rational_table.json holds minimax fits, written by `python -m fastsae.nn.rational_table`. Other
degrees, other jumps and a teacher's own pre-activations are fitted by least squares at run time.

Letters: G grid points or samples; p and q the degrees; x the coefficients a and b, concatenated.
All fits are in float64.
"""

import json
import math
from collections.abc import Callable
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
"""Value, gradient w, d and rho of a function of the errors; its Hessian is diag(d) - rho w w^T."""

GRID, GAP, JUMP = 4001, 0.01, 0.1
"""Of `targets`: points on [-1, 1], the distance left out around a jump, the jump's height."""
DEFAULT_DEGREE: dict[str, Degree] = {"relu": (3, 2), "jumprelu": (9, 8)}
TABLE = Path(__file__).with_name("rational_table.json")


class RationalFit(NamedTuple):
    """Coefficients a [p + 1] and b [q] in float64 and the scales, as `rational` takes them."""

    a: Tensor
    b: Tensor
    c_in: float
    c_out: float
    error: float
    """Largest error on the grid; from `calibrate`, the mean squared error on the samples."""


def initial_coefficients(
    function: Function, degree: Degree | None = None, jump: float | None = None
) -> RationalFit:
    """The fit to `targets`: minimax from the table, or least squares for what it does not list.

    degree (p, q) defaults to DEFAULT_DEGREE. A tabulated fit keeps its error in float32, but not
    in lower precision: (9, 8) has coefficients of 4e7. ValueError as in `targets`.
    """
    target, t = targets(function, jump)
    degree = degree or DEFAULT_DEGREE[function]
    row = json.loads(TABLE.read_text()).get(f"{function} {degree[0]} {degree[1]}")
    if row is not None and jump in (None, JUMP):
        a, b = (torch.tensor(row[name], dtype=torch.float64) for name in "ab")
        return RationalFit(a, b, 1.0, 1.0, row["error"])
    powers = powers_of(t, degree)
    x = descend(linearized(target, powers, degree), target, powers, degree, mean_square)
    return fit_from(x, target, powers, degree)


def targets(function: Function, jump: float | None = None) -> tuple[Vector, Vector]:
    """A teacher's activation on the grid, in units of c_in: its values and the points t.

    ReLU: max(t, 0). JumpReLU, and TopK as a JumpReLU at the token's threshold: t + jump for t > 0,
    else 0, without the |t| < GAP; jump is threshold / c_in, by default JUMP.
    ValueError for other functions, a jump that is not positive, or any jump for ReLU.
    """
    t = torch.linspace(-1, 1, GRID, dtype=torch.float64)
    if function == "relu" and jump is None:
        return t.relu(), t
    jump = JUMP if jump is None else jump
    if function != "jumprelu" or not 0 < jump < math.inf:
        raise ValueError(f'{function!r} with jump {jump}: only "jumprelu" has one, above 0')
    t = t[t.abs() > GAP * (1 - 1e-9)]
    return (t + jump) * (t > 0), t


def calibrate(
    h: Samples, target: Samples, a: Tensor, b: Tensor, c_in: float, c_out: float,
    shift: Samples | float = 0.0,
) -> RationalFit:  # fmt: skip
    """Least squares of rational(h, a, b, c_in, c_out, shift) on samples (arXiv:2606.14990, 1c).

    h and the teacher's values target [G] of any floating dtype, with shift [G] or a number.
    c_in is the given one, or the 99%, 99.9% or 100% quantile of |h - shift|, whichever fits best
    (for a polynomial, the given one); beyond it t is clamped to [-1, 1], as in `rational`. For
    each, c_out is the best factor for the initial coefficients; then a and b are refined. The error
    never exceeds the initial one. Takes about a kilobyte per sample for (9, 8). ValueError without
    samples, for non-finite samples, or for c_in or c_out <= 0.
    """
    degree, u, f = (len(a) - 1, len(b)), h.double() - shift, target.double()
    if not (min(len(a), len(u)) and (u + f).isfinite().all() and min(c_in, c_out) > 0):
        raise ValueError("a and samples must be finite and not empty, c_in and c_out positive")
    sizes, start, fits = u.abs().sort().values, torch.cat([a, b]).to(u), []
    shares = (0.99, 0.999, 1) if len(b) else ()
    quantiles = {sizes[round(share * (len(u) - 1))].item() for share in shares}
    for c in [c_in, *sorted(quantiles - {0})]:
        powers = powers_of((u / c).clamp(-1, 1), degree)
        r = evaluate(start, powers, degree)[0]
        factor = (r @ f / (r @ r)).item()
        factor = factor if 0 < factor < math.inf else c_out
        x = descend(start, f / factor, powers, degree, mean_square)
        error = (factor * evaluate(x, powers, degree)[0] - f).square().mean().item()
        fits.append(RationalFit(x[: len(a)], x[len(a) :], c, factor, error))
    return min(fits, key=lambda fit: fit.error)


def powers_of(t: Vector, degree: Degree) -> Float64[Tensor, "G powers"]:
    return t[:, None] ** torch.arange(max(degree) + 1, device=t.device)


def evaluate(x: Tensor, powers: Tensor, degree: Degree) -> tuple[Vector, Tensor]:
    """r [G] and its derivatives [G, p + q + 1] in x"""
    p, q = degree
    numerator, denominator = powers[:, : p + 1], powers[:, 1 : q + 1]
    S = denominator @ x[p + 1 :]
    Q = 1 + S.abs()
    r = numerator @ x[: p + 1] / Q
    return r, torch.cat([numerator, -(r * S.sign())[:, None] * denominator], 1) / Q[:, None]


def largest_error(x: Tensor, target: Vector, powers: Tensor, degree: Degree) -> float:
    return (evaluate(x, powers, degree)[0] - target).abs().max().item()


def fit_from(x: Tensor, target: Vector, powers: Tensor, degree: Degree) -> RationalFit:
    error, p = largest_error(x, target, powers, degree), degree[0]
    return RationalFit(x[: p + 1], x[p + 1 :], 1.0, 1.0, error)


def orthonormal(columns: Float64[Tensor, "G n"]) -> tuple[Tensor, Tensor]:
    """Orthogonal columns of mean square 1, and the matrix that maps the given columns to them."""
    scale = columns.norm(dim=0).clamp_min(1e-300)
    Q, R = torch.linalg.qr(columns / scale)
    size = math.sqrt(len(columns))
    return size * Q, size * torch.linalg.pinv(R, rtol=1e-14) / scale[:, None]


def linearized(target: Vector, powers: Tensor, degree: Degree) -> Tensor:
    """The best of 30 least-squares fits of P - target Q, each weighted by the last one's 1 / Q."""
    p, q = degree
    columns = torch.cat([powers[:, : p + 1], -target[:, None] * powers[:, 1 : q + 1]], 1)
    fits, Q = [], torch.ones_like(target)
    for _ in range(30):
        basis, back = orthonormal(columns / Q[:, None])
        fits.append(back @ (basis.T @ (target / Q)) / len(target))
        Q = 1 + (powers[:, 1 : q + 1] @ fits[-1][p + 1 :]).abs()
    return min(fits, key=lambda x: largest_error(x, target, powers, degree))


def mean_square(e: Vector) -> Objective:
    return e.square().mean(), 2 * e / len(e), torch.full_like(e, 2 / len(e)), 0.0


def descend(
    x: Tensor, target: Vector, powers: Tensor, degree: Degree,
    objective: Callable[[Vector], Objective],
) -> Tensor:  # fmt: skip
    """Up to 40 damped Newton steps on objective(r - target) from x, keeping those that improve."""
    damping = 1e-2
    r, jacobian = evaluate(x, powers, degree)
    value, w, d, rho = objective(r - target)
    for _ in range(40):
        columns, back = orthonormal(jacobian)  # monomials are too ill-conditioned to solve in
        gradient = columns.T @ w
        hessian = columns.T @ (d[:, None] * columns) - rho * gradient.outer(gradient)
        hessian.diagonal().add_(damping * d.sum())
        trial = x - back @ torch.linalg.solve(hessian, gradient)
        r, trial_jacobian = evaluate(trial, powers, degree)
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
