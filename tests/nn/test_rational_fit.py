import json
import math

import pytest
import torch
from scipy.optimize import linprog

from fastsae.nn import rational_table
from fastsae.nn.rational_fit import (
    DEFAULT_DEGREE,
    TABLE,
    RationalFit,
    calibrate,
    initial_coefficients,
    targets,
)
from fastsae.nn.rational_table import ROWS, SHARPNESS, fit_rational, lower_bound
from fastsae_kernels.rational import rational, rational_reference

ERRORS = {  # that a fit can reach, computed elsewhere; of JumpReLU one that it can be better than
    ("relu", 3, 2): 2.185e-2,
    ("relu", 5, 4): 4.25e-3,
    ("relu", 7, 6): 1.14e-3,
    ("jumprelu", 9, 8): 8.5e-4,
}
pytestmark = pytest.mark.usefixtures("one_thread")
TABULATED = pytest.mark.parametrize(("function", "p", "q"), ERRORS)


def values(fit, t):
    """At t in [-1, 1]"""
    a, b, c_in, c_out = (torch.as_tensor(c, dtype=t.dtype) for c in fit[:4])
    return rational_reference(t, a, b, c_in, c_out)


def errors(fit, function):
    target, t = targets(function)
    return values(fit, t) - target


@TABULATED
def test_errors_of_the_table(function, p, q):
    fit = initial_coefficients(function, (p, q))
    assert fit.a.shape == (p + 1,) and fit.b.shape == (q,)
    assert fit.error <= 1.001 * ERRORS[function, p, q]
    assert errors(fit, function).abs().max().item() == pytest.approx(fit.error, rel=1e-9)


@TABULATED
def test_float32_keeps_the_error(function, p, q):
    """To within the unit roundoff of every term of P and Q, which sum to a few times P and Q."""
    fit = initial_coefficients(function, (p, q))
    target, t = targets(function)
    got = rational(t.float(), fit.a.float(), fit.b.float(), 1.0, 1.0)
    rounding = 4 * (p + q) * torch.finfo(torch.float32).eps
    assert (got - target).abs().max() <= fit.error + rounding


def test_the_table_is_complete():
    assert list(json.loads(TABLE.read_text())) == [f"{f} {p} {q}" for f, p, q in ROWS]
    assert set(ROWS) == ERRORS.keys()
    assert all((f, *degree) in ROWS for f, degree in DEFAULT_DEGREE.items())


@TABULATED
def test_the_table_is_what_the_fit_gives(function, p, q):
    """The errors exceed the least by at most log(2 G) / SHARPNESS of it.

    So the values are known to within that times the inverse of the constant of strong unicity:
    some 10 here, by what differs from a fit by differential correction.
    """
    kept, fit = initial_coefficients(function, (p, q)), fit_rational(*targets(function), (p, q))
    t = targets(function)[1]
    slack = math.log(2 * len(t)) / SHARPNESS
    assert fit.error == pytest.approx(kept.error, rel=slack)
    assert (values(fit, t) - values(kept, t)).abs().max() <= 10 * slack * kept.error


@TABULATED
def test_equioscillation(function, p, q):
    """p + q + 2 peaks of alternating signs reach the error, so that none with S >= 0 is better."""
    fit = initial_coefficients(function, (p, q))
    assert lower_bound(errors(fit, function), (p, q)) >= 0.9999 * fit.error
    assert lower_bound(errors(fit, function), (p + 1, q)) == 0


def feasible(target, t, degree, error):
    """Whether some P and Q = 1 + S with S >= 0 have this error: by scipy's solver."""
    p, q = degree
    P, S = (t[:, None] ** torch.arange(first, n + 1) for first, n in ((0, p), (1, q)))
    f = target[:, None]
    A = torch.cat(
        [
            torch.cat([-P, (f - error) * S], 1),
            torch.cat([P, -(f + error) * S], 1),
            torch.cat([0 * P, -S], 1),
        ]
    )
    b = torch.cat([error - target, error + target, 0 * target])
    c, free = torch.zeros(p + q + 1), (None, None)
    return linprog(c.numpy(), A.numpy(), b.numpy(), bounds=free).status == 0


@pytest.mark.parametrize(("p", "q"), [(3, 2), (5, 4)])
def test_scipy_finds_no_better_fit(p, q):
    target, t = targets("relu")
    error = initial_coefficients("relu", (p, q)).error
    some = slice(None, None, 4)
    assert feasible(target[some], t[some], (p, q), 1.002 * error)
    assert not feasible(target[some], t[some], (p, q), 0.998 * error)


@TABULATED
def test_differential_correction_alone(function, p, q, monkeypatch):
    """From r = 0, and without the steps that end the fit."""
    monkeypatch.setattr(rational_table, "linearized", lambda f, *_: f.new_zeros(p + q + 1))
    monkeypatch.setattr(rational_table, "relaxed_remez", lambda x, *_: x)
    fit = fit_rational(*targets(function), (p, q))
    assert fit.error <= 1.1 * initial_coefficients(function, (p, q)).error


def test_a_fit_that_needs_both():
    """Of a jump without a gap: no fit is nearer than half of it but between two grid points."""
    t = torch.linspace(-1, 1, 401, dtype=torch.float64)
    step = (t > 0.303).double()
    fit = fit_rational(step, t, (5, 4))
    assert fit.error < 0.5
    assert lower_bound(values(fit, t) - step, (5, 4)) >= 0.99 * fit.error


@pytest.mark.parametrize(
    ("function", "degree", "jump"),
    [("relu", (1, 2), None), ("jumprelu", (9, 8), 0.2), ("jumprelu", (5, 4), 0.5)],
)
def test_least_squares_for_what_the_table_does_not_list(function, degree, jump):
    """Its mean square is below the minimax fit's, so its largest error is not far above."""
    fit, (target, t) = initial_coefficients(function, degree, jump), targets(function, jump)
    minimax = fit_rational(target, t, degree)
    errors, best = values(fit, t) - target, values(minimax, t) - target
    assert errors.abs().max().item() == pytest.approx(fit.error, rel=1e-9)
    assert errors.square().mean() < best.square().mean()
    assert fit.error < 8 * minimax.error


def test_an_exact_fit():
    t = torch.linspace(-1, 1, 101, dtype=torch.float64)
    target = (1 + t) / (1 + 2 * t**2)
    assert fit_rational(target, t, (1, 2)).error < 1e-12
    assert fit_rational(0 * t, t, (3, 2)).error == 0


def samples(function, dtype=torch.float64):
    """h, the teacher's values and the shift, of a TopK's threshold per token or of ReLU"""
    h = 1.5 * torch.randn(5000, dtype=dtype)
    shift = 1 + 0.2 * torch.randn(5000, dtype=dtype) if function == "jumprelu" else 0.0
    return h, h * (h > shift), shift


def mean_square(fit, h, target, shift):
    h, target = h.double(), target.double()
    c_in, c_out = torch.tensor(fit[2:4], dtype=torch.float64)
    got = rational_reference(h, fit.a, fit.b, c_in, c_out, shift)
    return (got - target).square().mean().item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", ["relu", "jumprelu"])
def test_calibration_improves(function, dtype):
    h, target, shift = samples(function, dtype)
    start = initial_coefficients(function)._replace(c_in=8.0, c_out=8.0)
    fit = calibrate(h, target, *start[:4], shift)
    assert fit.c_in > 0 and fit.c_out > 0
    assert fit.error == pytest.approx(mean_square(fit, h, target, shift), rel=1e-6)
    assert fit.error < 0.6 * mean_square(start, h, target, shift)
    h, target, shift = samples(function, dtype)
    assert mean_square(fit, h, target, shift) < 0.6 * mean_square(start, h, target, shift)


@pytest.mark.parametrize("seed", range(4))
def test_calibration_is_never_worse(seed):
    torch.manual_seed(seed)
    a, b = (torch.randn(n, dtype=torch.float64) for n in (4, 2))
    start = RationalFit(a, b, torch.rand(()).item() * 4 + 0.1, 1.0, 0.0)
    h, target, shift = samples("jumprelu")
    first = calibrate(h, target, *start[:4], shift)
    assert first.error <= mean_square(start, h, target, shift)
    assert calibrate(h, target, *first[:4], shift).error <= first.error * (1 + 1e-12)


def test_calibration_clamps_an_outlier():
    h, target, shift = samples("relu")
    h[0], target[0] = 100.0, 5.0
    fit = calibrate(h, target, *initial_coefficients("relu")[:2], 8.0, 8.0, shift)
    assert fit.c_in < 10


def test_calibration_of_what_cannot_be_improved():
    h = torch.zeros(5)
    a, b = (torch.zeros(n, dtype=torch.float64) for n in (2, 1))
    fit = calibrate(h, h, a, b, 2.0, 3.0)
    assert (fit.c_in, fit.c_out, fit.error) == (2, 3, 0)


T = torch.linspace(-1, 1, 11, dtype=torch.float64)


@pytest.mark.parametrize(("function", "jump"), [("relu", 0.1), ("jumprelu", 0.0)])
def test_nonsense_jumps(function, jump):
    with pytest.raises(ValueError, match='only "jumprelu" has one, above 0'):
        initial_coefficients(function, jump=jump)


@pytest.mark.parametrize(
    "changes", [{"h": T / 0}, {"target": T / 0}, {"c_in": 0.0}, {"c_out": -1.0}, {"a": T[:0]}],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_nonsense_calibration(changes):
    good = {"h": T, "target": T.relu(), "a": T[:4], "b": T[:2], "c_in": 1.0, "c_out": 1.0}
    with pytest.raises(ValueError, match="must be finite"):
        calibrate(**{**good, **changes})
