"""MALI's asynchronous leapfrog, in the paper's variables, is BDIA over Euler on the midpoints."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from odesolvers import (
    BDIA,
    MALI,
    Euler,
    FixedPoint,
    StepRatio,
    karras_sigmas,
    midpoint_sigmas,
)

from .contract import TwoStepContract
from .problems import Recorder, mixture, noise, relative_error


class TestMALI(TwoStepContract):
    solver = MALI()


class TestMALIDamped(TwoStepContract):
    solver = MALI(0.95)
    encoding_grid = karras_sigmas(30, sigma_min=0.01, sigma_max=10.0)


def slope(x: torch.Tensor, sigma: float) -> torch.Tensor:
    return (x - mixture()(x, torch.full(x.shape[:1], sigma, dtype=x.dtype))) / sigma


@pytest.mark.parametrize("eta", [1.0, 0.9, 0.6])
@pytest.mark.parametrize("end", [True, False])
def test_it_is_algorithm_1_of_the_paper(eta: float, end: bool) -> None:
    """From z and v = f(z), step by step; and algorithm 2, its inverse, from the last pair."""
    sigmas = karras_sigmas(9, 0.1, 10.0, append_zero=end)
    x = noise(4, 3, sigma=10.0)
    levels = sigmas.tolist()
    z, v = x, slope(x, levels[0])
    for sigma, target in pairwise(levels):
        h = target - sigma
        k = z + h / 2 * v
        v = v + 2 * eta * (slope(k, sigma + h / 2) - v)
        z = k + h / 2 * v
    recorder = Recorder(mixture())
    ours = MALI(eta).sample(recorder, x, midpoint_sigmas(sigmas))
    assert relative_error(ours.x, z) < 1e-13
    assert ours.nfe == len(levels)
    middles = [(sigma + target) / 2 for sigma, target in pairwise(levels)]
    assert recorder.sigmas == [levels[0], *middles]

    for sigma, target in list(pairwise(levels))[::-1]:
        h = target - sigma
        k = z - h / 2 * v
        v = (v - 2 * eta * slope(k, sigma + h / 2)) / (1 - 2 * eta)
        z = k - h / 2 * v
    assert relative_error(z, x) < 1e-7
    back = MALI(eta).invert(mixture(), ours.state)
    assert relative_error(back.x, x) < 1e-7


@pytest.mark.parametrize("eta", [1.0, 0.75])
def test_fixed_point_is_exact_to_the_bit(eta: float) -> None:
    solver, grid = MALI(eta, FixedPoint()), midpoint_sigmas(karras_sigmas(20))
    x = solver.arithmetic.snap(noise(4, 3, sigma=80.0))
    there = solver.sample(mixture(), x, grid)
    assert torch.equal(solver.invert(mixture(), there.state).x, x)


def test_undamped_it_is_the_step_ratio() -> None:
    assert MALI() == BDIA(Euler(), StepRatio(1))


def test_midpoints() -> None:
    assert midpoint_sigmas([4.0, 2.0, 1.0, 0.0]).tolist() == [4.0, 3.0, 1.5, 0.5, 0.0]
    with pytest.raises(ValueError, match="sigmas must decrease strictly"):
        midpoint_sigmas([1.0, 2.0])


def test_dampings_that_cannot_be_used() -> None:
    for eta in (0.5, 0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"eta must be in \(1/2, 1\], got"):
            MALI(eta)
    with pytest.raises(TypeError, match="eta must be a number"):
        MALI("1")  # type: ignore[arg-type]
    for factor in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"factor must be in \(0, 1\], got"):
            StepRatio(1, factor)
