"""Grids by the error of a step: scipy's own levels, and what solvers make of them both ways."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import RK45, solve_ivp

from odesolvers import (
    RK4,
    Dopri5,
    Euler,
    Exponential,
    FixedPoint,
    McCallumFoster,
    Rex,
    adaptive_sigmas,
)

from .problems import Recorder, mixture, noise, reference, relative_error

TOP, BOTTOM = 10.0, 0.05
X = noise(1, 3, sigma=TOP)


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-6])
def test_without_beta_the_levels_are_scipys(tolerance: float, up: bool) -> None:
    start, end = (BOTTOM, TOP) if up else (TOP, BOTTOM)
    x = noise(1, 3, seed=1) if up else X

    def flow(sigma: float, y: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        z = torch.from_numpy(y)[None]
        return ((z - mixture()(z, torch.tensor([sigma], dtype=torch.float64)))[0] / sigma).numpy()

    recorder = Recorder(mixture())
    options = {"rtol": tolerance, "atol": tolerance, "first_step": 0.05}
    found = adaptive_sigmas(recorder, x, start, end, beta=0.0, **options)
    theirs = solve_ivp(flow, (start, end), x[0].numpy(), "RK45", **options)
    levels = np.sort(theirs.t)[::-1]
    assert len(found) == len(levels)
    np.testing.assert_allclose(found.numpy(), levels, rtol=1e-8)
    assert len(recorder.points) == theirs.nfev


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_in_the_time_of_rex_every_step_is_within_the_tolerance_and_sets_the_next(
    beta: float,
) -> None:
    """Each step again by scipy, for x / σ in 1/σ; the error and the tolerance are those of x."""
    found = adaptive_sigmas(
        mixture(),
        X,
        TOP,
        BOTTOM,
        approximator=Exponential(Dopri5()),
        rtol=1e-6,
        atol=1e-5,
        beta=beta,
    ).tolist()

    def flow(t: float, y: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        x, sigma = torch.from_numpy(y)[None] / t, torch.tensor([1 / t], dtype=torch.float64)
        return mixture()(x, sigma)[0].numpy()

    y, before, predicted = X[0].numpy() / TOP, 1e-4, []
    for sigma, target in pairwise(found):
        h = 1 / target - 1 / sigma
        step = RK45(flow, 1 / sigma, y, 1 / target, first_step=h, rtol=1e3, atol=1e3)
        step.step()
        scale = 1e-5 + 1e-6 * np.maximum(abs(y) * sigma, abs(step.y) * target)
        error = step._estimate_error(step.K, h) * target
        r = float(np.sqrt(np.mean((error / scale) ** 2)))
        assert r <= 1
        predicted.append(h * min(10.0, 0.9 * r ** -(0.2 - 0.75 * beta) * before**beta))
        y, before = step.y, max(r, 1e-4)
    taken = [1 / target - 1 / sigma for sigma, target in pairwise(found)]
    kept = [abs(h / p - 1) < 1e-6 for h, p in zip(taken[1:-1], predicted, strict=False)]
    shorter = [h < p * (1 + 1e-6) for h, p in zip(taken[1:], predicted, strict=False)]
    assert all(shorter)  # where a step was rejected, or ends the way
    assert sum(kept) > len(kept) / 2


@pytest.mark.parametrize("approximator", [Dopri5(), Exponential(Dopri5())], ids=repr)
def test_solutions_are_as_close_as_asked(approximator: Dopri5 | Exponential) -> None:
    exact, x = reference(mixture(), noise(8, 3, sigma=TOP), TOP, BOTTOM), noise(8, 3, sigma=TOP)
    errors = []
    for tolerance in (1e-3, 1e-5, 1e-7):
        grid = adaptive_sigmas(
            mixture(),
            x,
            TOP,
            BOTTOM,
            approximator=approximator,
            rtol=tolerance,
            atol=tolerance,
        )
        found = approximator.sample(mixture(), x, grid)
        errors.append(float((found.x - exact).abs().max()))
        assert errors[-1] < 20 * tolerance
    assert errors[-1] < 1e-2 * errors[0]


@pytest.mark.parametrize("make", [McCallumFoster, Rex])
def test_the_grid_leads_down_and_exactly_back(make: Any) -> None:
    base = Dopri5() if make is McCallumFoster else Exponential(Dopri5())
    grid = adaptive_sigmas(mixture(), X, TOP, BOTTOM, approximator=base, rtol=1e-5, atol=1e-5)
    for arithmetic in (None, FixedPoint()):
        solver = make(Dopri5()) if arithmetic is None else make(Dopri5(), arithmetic=arithmetic)
        x = X if arithmetic is None else arithmetic.snap(X)
        there = solver.sample(mixture(), x, grid)
        assert there.nfe == 12 * (len(grid) - 1)
        assert float((there.x - reference(mixture(), x, TOP, BOTTOM)).abs().max()) < 2e-4
        back = solver.invert(mixture(), there.state)
        if arithmetic is None:
            assert relative_error(back.x, x) < 1e-11
        else:
            assert torch.equal(back.x, x)


def test_a_grid_chosen_from_data_up() -> None:
    image = reference(mixture(), X, TOP, BOTTOM)
    grid = adaptive_sigmas(mixture(), image, BOTTOM, TOP, rtol=1e-5, atol=1e-5)
    assert (float(grid[0]), float(grid[-1])) == (TOP, BOTTOM)
    assert bool((grid.diff() < 0).all())
    code = McCallumFoster(Dopri5()).invert(mixture(), image, grid)
    assert relative_error(code.x, X) < 1e-3


def test_the_worst_element_of_a_batch_sets_the_steps() -> None:
    """However many others there are, of which the mean error would be smaller."""
    few, many = (
        adaptive_sigmas(mixture(), torch.cat([0.0 * X] * n + [X]), TOP, BOTTOM) for n in (1, 50)
    )
    assert torch.equal(few, many)


def test_extra_args_dtypes_and_the_input_are_kept() -> None:
    recorder = Recorder(lambda x, sigma, shift: mixture()(x, sigma) + shift)
    x = X.float()
    before = x.clone()
    grid = adaptive_sigmas(recorder, x, TOP, BOTTOM, extra_args={"shift": 0.5})
    assert grid.dtype == torch.float64
    assert all(args == {"shift": 0.5} for args in recorder.extra_args)
    assert all(point.dtype == torch.float32 for point in recorder.points)
    assert torch.equal(x, before)


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"must be Dopri5\(\) or Exponential.*got RK4\(\)"):
        adaptive_sigmas(mixture(), X, TOP, BOTTOM, approximator=RK4())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"needs Exponential\(Dopri5\(\)\), got Euler\(\)"):
        adaptive_sigmas(mixture(), X, TOP, BOTTOM, approximator=Exponential(Euler()))
    for sigma, target in ((TOP, 0.0), (0.0, TOP), (TOP, TOP), (TOP, float("nan"))):
        with pytest.raises(ValueError, match="must be two levels above 0, got"):
            adaptive_sigmas(mixture(), X, sigma, target)
    for option in ({"rtol": -1.0}, {"rtol": 0.0, "atol": 0.0}, {"beta": 0.3}):
        with pytest.raises(ValueError, match=r"needs tolerances .* and beta"):
            adaptive_sigmas(mixture(), X, TOP, BOTTOM, **option)
    for step in (0.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="first_step must be above 0, got"):
            adaptive_sigmas(mixture(), X, TOP, BOTTOM, first_step=step)
    with pytest.raises(ValueError, match=r"3 steps of Dopri5\(\) led from sigma = 10 to .* only"):
        adaptive_sigmas(mixture(), X, TOP, BOTTOM, rtol=1e-9, atol=1e-9, max_steps=3)
    with pytest.raises(TypeError, match="x must be a tensor"):
        adaptive_sigmas(mixture(), 1.0, TOP, BOTTOM)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be callable"):
        adaptive_sigmas(1.0, X, TOP, BOTTOM)  # type: ignore[arg-type]
    with pytest.raises(FloatingPointError, match="the denoiser's output is not finite"):
        adaptive_sigmas(lambda x, sigma: x / 0, X, TOP, BOTTOM)
    with pytest.raises(ValueError, match="the denoiser wrote to its input"):
        adaptive_sigmas(lambda x, sigma: x.mul_(2).clone(), X, TOP, BOTTOM)
