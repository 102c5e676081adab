"""BELM against the paper's own formula, in its coefficients a2, a1 and b."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from odesolvers import (
    BDIA,
    BELM,
    DDIM,
    Euler,
    FixedPoint,
    PerStep,
    StepRatio,
    karras_sigmas,
    vp_sigmas,
)

from .contract import GRID, TwoStepContract
from .problems import mixture, noise, relative_error


class TestBELM(TwoStepContract):
    solver = BELM()


Coefficients = tuple[float, float, float]


def optimal(sigmas: torch.Tensor) -> list[Coefficients]:
    """The paper's O-BELM: a2 = h_i² / h_{i+1}², a1 = 1 - a2, b = -h_i (h_i + h_{i+1}) / h_{i+1}."""
    steps = pairwise(float(-step) for step in torch.diff(sigmas))
    return [((h / b) ** 2, 1 - (h / b) ** 2, -h * (h + b) / b) for b, h in steps]


def consistent(sigmas: torch.Tensor, a2: list[float]) -> list[Coefficients]:
    """A given a2, and the a1 and b that make the formula exact for lines."""
    steps = pairwise(float(-step) for step in torch.diff(sigmas))
    return [(g, 1 - g, -(h + g * b)) for g, (b, h) in zip(a2, steps, strict=True)]


def papers_run(
    sigmas: torch.Tensor, x: torch.Tensor, coefficients: list[Coefficients]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last two states of ``x_{i-1} = a2 x_{i+1} + a1 x_i + b ε(x_i)``, after a step of DDIM."""

    def epsilon(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return (x - mixture()(x, sigma.expand(len(x)))) / sigma

    behind, here = x, x + (sigmas[1] - sigmas[0]) * epsilon(x, sigmas[0])
    for sigma, (a2, a1, b) in zip(sigmas[1:], coefficients, strict=False):
        behind, here = here, a2 * behind + a1 * here + b * epsilon(here, sigma)
    return behind, here


@pytest.mark.parametrize("sigmas", [karras_sigmas(15), vp_sigmas(15), GRID[:-1]], ids=len)
def test_the_default_has_the_optimal_coefficients(sigmas: torch.Tensor) -> None:
    x = noise(4, 3, sigma=float(sigmas[0]))
    behind, here = papers_run(sigmas, x, optimal(sigmas))
    there = BELM().sample(mixture(), x, sigmas)
    assert there.state.partner is not None
    assert relative_error(there.x, here) < 1e-12
    assert relative_error(there.state.partner, behind) < 1e-12
    assert there.nfe == len(sigmas) - 1


def test_given_coefficients_are_those_of_the_formula() -> None:
    sigmas = torch.linspace(4.0, 1.0, 9, dtype=torch.float64)
    a2 = [0.5, 0.7, 1.2, 1.0, 0.9, 0.3, 0.25]
    x = noise(3, 3, sigma=4.0)
    _, here = papers_run(sigmas, x, consistent(sigmas, a2))
    assert relative_error(BELM(a2).sample(mixture(), x, sigmas).x, here) < 1e-13


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_coefficients_of_ddim_bdia_reproduce_it(gamma: float) -> None:
    """γ weighs differences of z = x / sqrt(1 + σ²), in x it is γ s(σ_{i+1}) / s(σ_{i-1})."""
    sigmas = karras_sigmas(12)
    s = [(1 + float(sigma) ** 2) ** -0.5 for sigma in sigmas]
    weights = [gamma * behind / ahead for behind, ahead in zip(s, s[2:], strict=False)]
    x = noise(4, 3, sigma=80.0)
    _, here = papers_run(sigmas, x, consistent(sigmas, weights))
    bdia = BDIA(DDIM(), gamma).sample(mixture(), x, sigmas).x
    assert relative_error(bdia, here) < 1e-12
    assert relative_error(bdia, BELM(weights).sample(mixture(), x, sigmas).x) < 1e-12


def test_optimal_coefficients_are_exact_for_parabolas() -> None:
    """Order 2: a flow whose slope is that of a parabola in σ is stepped without error."""
    sigmas = [5.0, 4.2, 2.5, 2.3, 1.0, 0.0]

    def flow(power: int, sigma: torch.Tensor) -> torch.Tensor:
        return sigma.unsqueeze(1) ** power

    for power in (1, 2, 3):

        def denoiser(x: torch.Tensor, sigma: torch.Tensor, power: int = power) -> torch.Tensor:
            return x - sigma.unsqueeze(1) * power * flow(power - 1, sigma)

        start = [torch.tensor([[level**power]], dtype=torch.float64) for level in sigmas]
        solver = BELM()
        lone = solver.sample(denoiser, start[0], sigmas, stop=1).state
        pair = type(lone)(start[1], start[0], 1, lone.sigmas, lone.solver)
        error = float((solver.sample(denoiser, pair, sigmas).x - start[-1]).abs())
        assert error < 1e-12 if power < 3 else error > 1e-3


def test_it_is_bdia_and_goes_by_that_name() -> None:
    assert BELM() == BDIA(Euler(), StepRatio(2))
    assert BELM([0.5, 1.0]) == BDIA(Euler(), PerStep([0.5, 1.0]))
    assert BELM(arithmetic=FixedPoint()).arithmetic == FixedPoint()
    with pytest.raises(TypeError, match=r"arithmetic must be .*such as"):
        BELM(arithmetic=FixedPoint)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gives 1 weights; a grid of 3 steps needs 2"):
        BELM([0.5]).sample(mixture(), noise(1, 3), [4.0, 3.0, 2.0, 1.0])
