"""BELM: the contract, the paper's coefficients, and what it is equal to."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from odesolvers import (
    BDIA,
    BELM,
    DDIM,
    Euler,
    FixedPoint,
    GivenBELM,
    Grid,
    OptimalBELM,
    PerStep,
    StepRatio,
    karras_sigmas,
    vp_sigmas,
)

from .contract import GRID, TwoStepContract
from .problems import mixture, noise, relative_error
from .test_inversion import grids, shapes


def bdia_coefficients(sigmas: torch.Tensor, weights: list[float]) -> GivenBELM:
    """g, 1 - g and -(h_i + g h_{i+1}): BDIA over Euler, multiplied out by hand."""
    h = [-float(step) for step in torch.diff(sigmas)]
    return GivenBELM(
        (g, 1 - g, -(ahead + g * behind))
        for g, (behind, ahead) in zip(weights, pairwise(h), strict=True)
    )


class TestBELM(TwoStepContract):
    solver = BELM()


@pytest.mark.parametrize("sigmas", [karras_sigmas(15), vp_sigmas(15), GRID[:-1]], ids=len)
def test_optimal_belm_is_bdia_over_euler_with_the_squared_step_ratio(sigmas: torch.Tensor) -> None:
    x = noise(4, 3, sigma=float(sigmas[0]))
    belm, bdia = BELM(), BDIA(Euler(), StepRatio(2))
    there, same = belm.sample(mixture(), x, sigmas), bdia.sample(mixture(), x, sigmas)
    assert relative_error(there.x, same.x) < 1e-12
    assert there.nfe == same.nfe
    image = noise(4, 3, seed=1)
    code, other = belm.invert(mixture(), image, sigmas), bdia.invert(mixture(), image, sigmas)
    assert relative_error(code.x, other.x) < 1e-10


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_coefficients_of_ddim_bdia_reproduce_it(gamma: float) -> None:
    """γ weighs differences of z = x / sqrt(1 + σ²), in x it is γ s(σ_{i+1}) / s(σ_{i-1})."""
    sigmas = karras_sigmas(12)
    s = [(1 + float(sigma) ** 2) ** -0.5 for sigma in sigmas]
    weights = [gamma * behind / ahead for behind, ahead in zip(s, s[2:], strict=False)]
    x = noise(4, 3, sigma=80.0)
    belm = BELM(bdia_coefficients(sigmas, weights)).sample(mixture(), x, sigmas)
    assert relative_error(belm.x, BDIA(DDIM(), gamma).sample(mixture(), x, sigmas).x) < 1e-12


def test_optimal_coefficients_are_exact_for_parabolas() -> None:
    """Order 2: x = 1, σ and σ², with the slope of each, are stepped without error."""
    sigmas = [5.0, 4.2, 2.5, 2.3, 1.0, 0.0]
    for (behind, here, ahead), (a2, a1, b) in zip(
        zip(sigmas, sigmas[1:], sigmas[2:], strict=False),
        OptimalBELM().checked(Grid.of(sigmas)),
        strict=True,
    ):
        for power in (0, 1, 2):
            slope = power * here ** (power - 1) if power else 0.0
            stepped = a2 * behind**power + a1 * here**power + b * slope
            assert stepped == pytest.approx(ahead**power, abs=1e-12)
        assert a2 * behind**3 + a1 * here**3 + b * 3 * here**2 != pytest.approx(ahead**3, abs=1e-3)


@given(grids, shapes, st.lists(st.floats(0.3, 1.5), min_size=26, max_size=26), st.data())
def test_any_consistent_coefficients_are_undone(
    sigmas: torch.Tensor, shape: tuple[int, ...], weights: list[float], data: st.DataObject
) -> None:
    grid = Grid.of(sigmas)
    weights = weights[: grid.steps - 1]
    rule = bdia_coefficients(sigmas, weights)
    denoiser: Any = lambda x, s: 0.8 * torch.tanh(x)  # noqa: E731
    x = noise(*shape, sigma=grid.levels[0])
    solver = BELM(rule)
    there = solver.sample(denoiser, x, sigmas)
    same = BDIA(Euler(), PerStep(weights)).sample(denoiser, x, sigmas)
    assert float((there.x - same.x).norm()) <= 1e-9 * float(x.norm() + there.x.norm())
    back = solver.invert(denoiser, there.state, sigmas)
    growth = math.prod(max(1.0, 1 / g) for g in weights) * math.prod(max(1.0, g) for g in weights)
    size = max(float(x.abs().max()), float(there.x.abs().max()))
    assert float((back.x - x).abs().max()) <= 1e-12 * growth * size * grid.steps
    exact = replace(solver, arithmetic=FixedPoint())
    snapped = exact.arithmetic.snap(x)
    stop = data.draw(st.integers(1, grid.steps))
    try:
        state = exact.sample(denoiser, snapped, sigmas, stop=stop).state
        if stop > 1:
            assert torch.equal(exact.invert(denoiser, state, sigmas).x, snapped)
    except OverflowError:
        return  # refused aloud: an unstable run that left the range


def test_negative_weights_are_undone_to_the_bit() -> None:
    sigmas = torch.linspace(4.0, 1.0, 9, dtype=torch.float64)
    rule = bdia_coefficients(sigmas, [-0.5, 0.7, -1.0, 1.0, -0.9, 0.3, -0.25])
    solver = BELM(rule, FixedPoint())
    x = solver.arithmetic.snap(noise(3, 3, sigma=4.0))
    state = solver.sample(mixture(), x, sigmas).state
    assert torch.equal(solver.invert(mixture(), state, sigmas).x, x)
    plain = BELM(rule).sample(mixture(), x, sigmas)
    torch.testing.assert_close(solver.sample(mixture(), x, sigmas).x, plain.x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([(0.5, 0.5, -1.5)], "gives coefficients for 1 steps; a grid of 3 steps needs 2"),
        ([(0.5, 0.6, -1.5), (0.5, 0.5, -1.5)], r"a2 \+ a1 = 1\.1 at the step from sigmas\[1\] = 3"),
        ([(0.5, 0.5, -1.5), (0.5, 0.5, 1.5)], r"gives b = 1\.5 at the step from sigmas\[2\] = 2"),
        ([(0.5, 0.5, -1.5), (math.nan, 0.5, -1.5)], "coefficients must be finite"),
    ],
)
def test_coefficients_that_cannot_be_used(values: list[tuple[float, ...]], message: str) -> None:
    solver = BELM(GivenBELM(values))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        solver.sample(mixture(), noise(1, 3), [4.0, 3.0, 2.0, 1.0])


def test_other_input_that_cannot_be_used() -> None:
    with pytest.raises(TypeError, match="coefficients must be a rule such as OptimalBELM"):
        BELM(0.9)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="arithmetic must be an instance"):
        BELM(arithmetic=FixedPoint)  # type: ignore[arg-type]
    forgets = BELM(GivenBELM([(0.0, 1.0, -1.0), (0.5, 0.5, -1.5)]))
    state = forgets.sample(mixture(), noise(1, 3), [4.0, 3.0, 2.0, 1.0]).state
    with pytest.raises(ValueError, match=r"cannot be inverted: its step from sigmas\[1\]"):
        forgets.invert(mixture(), state, [4.0, 3.0, 2.0, 1.0])
