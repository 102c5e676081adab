"""Dormand-Prince 5(4) against scipy's, and EES(2,5) against its paper."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import RK45

from odesolvers import EES25, RK4, Dopri5, Exponential, HeunEDM, IntegrationApproximator
from odesolvers.extend import trace

from .problems import increment, mixture, moved, noise, reference, relative_error


def test_dopri5_is_scipys_rk45() -> None:
    """One step of theirs, and the norm of their error, which is that of `embedded`."""
    x, sigma, target = noise(1, 3, sigma=2.0), 2.0, 1.1

    def flow(level: float, y: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        z = torch.from_numpy(y)[None]
        return ((z - mixture()(z, torch.tensor([level], dtype=torch.float64)))[0] / level).numpy()

    theirs = RK45(flow, sigma, x[0].numpy(), target, first_step=sigma - target, rtol=1, atol=1)
    theirs.step()
    assert theirs.t == target
    ours = x + increment(Dopri5(), mixture(), x, sigma, target)
    assert relative_error(ours[0], torch.from_numpy(theirs.y)) < 1e-15
    calls, (step, error) = trace(lambda z, D: Dopri5().embedded(z, sigma, target, D))
    assert relative_error(x + moved(mixture(), calls, x, step), ours) < 1e-15
    estimate = theirs._estimate_error(theirs.K, theirs.t - theirs.t_old)
    found = moved(mixture(), calls, x, error)[0].abs()
    assert relative_error(found, torch.from_numpy(np.abs(estimate))) < 1e-10


@pytest.mark.parametrize("approximator", [Dopri5(), Exponential(Dopri5())], ids=repr)
def test_the_embedded_method_is_of_order_4(approximator: Dopri5 | Exponential) -> None:
    """Its error is O(h⁵), and the step less that error is a method of order 4 of its own."""
    x, sigma, estimates, errors = noise(4, 3, sigma=2.0), 2.0, [], []
    steps = (0.2, 0.1, 0.05)
    for h in steps:
        target = sigma - h
        calls, (step, error) = trace(lambda z, D: approximator.embedded(z, sigma, target, D))  # noqa: B023
        estimate = moved(mixture(), calls, x, error)
        estimates.append(float(estimate.norm()))
        exact = reference(mixture(), x, sigma, target) - x
        errors.append(float((moved(mixture(), calls, x, step) - estimate - exact).norm()))
        assert estimates[-1] == pytest.approx(errors[-1], rel=0.2)
    for sizes in (estimates, errors):
        assert np.polyfit(np.log(steps), np.log(sizes), 1)[0] == pytest.approx(5, abs=0.5)


def test_an_estimate_needs_an_embedded_method() -> None:
    with pytest.raises(TypeError, match=r"needs Exponential\(Dopri5\(\)\), got RK4\(\)"):
        trace(lambda z, D: Exponential(RK4()).embedded(z, 2.0, 1.0, D))


@pytest.mark.parametrize(
    ("approximator", "order"), [(EES25(), 6), (Exponential(EES25()), 6), (HeunEDM(), 4)], ids=repr
)
def test_a_step_back_undoes_a_step_to_the_order(
    approximator: IntegrationApproximator, order: int
) -> None:
    """O(h⁶) for EES(2,5), and O(h⁴) for others of order 2, of which the leading errors cancel."""
    x, sigma, misses = noise(4, 3, sigma=2.0), 2.0, []
    steps = (0.2, 0.1, 0.05)
    for h in steps:
        end = x + increment(approximator, mixture(), x, sigma, sigma - h)
        back = end + increment(approximator, mixture(), end, sigma - h, sigma)
        misses.append(float((back - x).norm()))
    assert np.polyfit(np.log(steps), np.log(misses), 1)[0] == pytest.approx(order, abs=0.4)


def test_ees25_is_the_published_tableau_at_one_tenth() -> None:
    """EES(2,5;x) of the paper: its weights are x, 1/2 and 1/2 - x."""
    p = 0.1
    a21 = (1 + 2 * p) / (4 * (1 - p))
    a31 = (4 * p - 1) ** 2 / (4 * (p - 1) * (1 - 4 * p**2))
    a32 = (1 - p) / (1 - 4 * p**2)
    x, sigma, h = noise(3, 3, sigma=2.0), 2.0, -0.7

    def d(x: torch.Tensor, level: float) -> torch.Tensor:
        return (x - mixture()(x, torch.full((3,), level, dtype=x.dtype))) / level

    k1 = d(x, sigma)
    k2 = d(x + h * a21 * k1, sigma + a21 * h)
    k3 = d(x + h * (a31 * k1 + a32 * k2), sigma + (a31 + a32) * h)
    expected = h * (p * k1 + k2 / 2 + (0.5 - p) * k3)
    found = increment(EES25(), mixture(), x, sigma, sigma + h)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
