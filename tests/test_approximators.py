"""Every approximator under the contract, alone and refined."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, final

import pytest
import torch

from odesolvers import (
    BDIA,
    DDIM,
    RK3,
    RK4,
    Combination,
    Denoise,
    DPMSolverPP2S,
    Euler,
    Exponential,
    FlowEuler,
    HeunEDM,
    IntegrationApproximator,
    Midpoint,
    SmoothedOutput,
    StepRatio,
    karras_sigmas,
    slope,
)

from .contract import ApproximatorContract, TwoStepContract
from .problems import Recorder, mixture, noise

ALL: list[IntegrationApproximator] = [
    Euler(),
    DDIM(),
    FlowEuler(),
    HeunEDM(),
    Midpoint(),
    RK3(),
    RK4(),
    DPMSolverPP2S(),
]
# Their scale has no value at level 0, so that a constant gamma does not lead back from there.
EXPONENTIAL: list[IntegrationApproximator] = [Exponential(Midpoint()), Exponential(RK3())]


@final
@dataclass(frozen=True)
class Ralston(IntegrationApproximator):
    """One that is not in the library: what the guide to adding one ends with."""

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 2

    def increment(
        self, x: Combination, sigma: float, target: float, denoise: Denoise
    ) -> Combination:
        h = target - sigma
        k1 = slope(x, sigma, denoise)
        k2 = slope(x + (2 * h / 3) * k1, sigma + 2 * h / 3, denoise)
        return (h / 4) * (k1 + 3 * k2)


class TestEuler(ApproximatorContract):
    approximator = Euler()


class TestDDIM(ApproximatorContract):
    approximator = DDIM()


class TestFlowEuler(ApproximatorContract):
    approximator = FlowEuler()


class TestHeunEDM(ApproximatorContract):
    approximator = HeunEDM()


class TestMidpoint(ApproximatorContract):
    approximator = Midpoint()


class TestRK3(ApproximatorContract):
    approximator = RK3()


class TestRK4(ApproximatorContract):
    approximator = RK4()


class TestDPMSolverPP2S(ApproximatorContract):
    approximator = DPMSolverPP2S()


class TestExponentialMidpoint(ApproximatorContract):
    approximator = Exponential(Midpoint())


class TestExponentialRK4(ApproximatorContract):
    approximator = Exponential(RK4())


class TestAnothersApproximator(ApproximatorContract):
    approximator = Ralston()


class TestBDIAEuler(TwoStepContract):
    solver = BDIA(Euler())


class TestBDIADDIM(TwoStepContract):
    solver = BDIA(DDIM())


class TestBDIAFlowEuler(TwoStepContract):
    solver = BDIA(FlowEuler())


class TestBDIAHeunEDM(TwoStepContract):
    solver = BDIA(HeunEDM())


class TestBDIAMidpoint(TwoStepContract):
    solver = BDIA(Midpoint())


class TestBDIARK3(TwoStepContract):
    solver = BDIA(RK3())


class TestBDIARK4(TwoStepContract):
    solver = BDIA(RK4())


class TestBDIADPMSolverPP2S(TwoStepContract):
    solver = BDIA(DPMSolverPP2S())


class TestBDIAAnothersApproximator(TwoStepContract):
    solver = BDIA(Ralston(), StepRatio(1))


class TestOBELM(TwoStepContract):
    solver = BDIA(Euler(), StepRatio(2))


class TestNeutral(TwoStepContract):
    solver = BDIA(HeunEDM(), StepRatio(1))


class TestSmoothed(TwoStepContract):
    solver = BDIA(DDIM(), SmoothedOutput(1.0))


@pytest.mark.parametrize("approximator", [*ALL, *EXPONENTIAL], ids=repr)
def test_coefficients_give_what_the_formula_gives_on_tensors(
    approximator: IntegrationApproximator,
) -> None:
    """The formula is run on coefficients; on the tensors themselves it must say the same."""
    x = noise(3, 3, sigma=2.0)

    def denoise(point: torch.Tensor, level: float) -> torch.Tensor:
        return mixture()(point, torch.full((3,), level, dtype=torch.float64))

    for target in (0.1, 0.5, 3.0):
        (planned,) = approximator.increments(mixture(), x, 2.0, (target,))
        direct = approximator.increment(x, 2.0, target, denoise)  # type: ignore[arg-type]
        torch.testing.assert_close(planned, direct, rtol=1e-13, atol=1e-13)


def test_scales_are_those_of_the_published_states() -> None:
    for approximator in (*ALL, *EXPONENTIAL):
        for sigma in (0.0, 0.1, 3.0, 80.0):
            expected = 1.0
            if isinstance(approximator, DDIM | DPMSolverPP2S):
                expected = (1 + sigma**2) ** -0.5
            elif isinstance(approximator, FlowEuler):
                expected = 1 / (1 + sigma)
            elif isinstance(approximator, Exponential):
                expected = 1 / sigma if sigma else math.inf
            assert approximator.scale(sigma) == pytest.approx(expected, rel=1e-14)


def test_ddim_and_euler_differ_in_scale_alone() -> None:
    assert DDIM().plan(2.0, (1.0, 3.0)) == Euler().plan(2.0, (1.0, 3.0))
    assert FlowEuler().plan(2.0, (1.0, 3.0)) == Euler().plan(2.0, (1.0, 3.0))
    assert (Euler().scale(3.0), DDIM().scale(3.0)) == (1.0, pytest.approx(10**-0.5))
    assert FlowEuler().scale(3.0) == 0.25


@pytest.mark.parametrize("targets", [(1.0,), (0.0,), (3.0,)])
def test_exponential_over_euler_is_euler(targets: tuple[float, ...]) -> None:
    x = noise(3, 3, sigma=2.0)
    (euler,) = Euler().increments(mixture(), x, 2.0, targets)
    (exponential,) = Exponential(Euler()).increments(mixture(), x, 2.0, targets)
    torch.testing.assert_close(exponential, euler, rtol=1e-13, atol=1e-13)


def test_exponential_heun_is_the_trapezoid_rule_for_the_denoisers_output() -> None:
    """In y = x / σ over t = 1/σ, where dy/dt = D: written out on tensors."""
    x, sigma, target = noise(3, 3, sigma=2.0), 2.0, 0.7
    h = 1 / target - 1 / sigma
    first = mixture()(x, torch.full((3,), sigma, dtype=torch.float64))
    ahead = target * (x / sigma + h * first)
    second = mixture()(ahead, torch.full((3,), target, dtype=torch.float64))
    expected = target * (x / sigma + h / 2 * (first + second))
    recorder = Recorder(mixture())
    (increment,) = Exponential(HeunEDM()).increments(recorder, x, sigma, (target,))
    torch.testing.assert_close(x + increment, expected, rtol=1e-13, atol=1e-13)
    assert recorder.sigmas == [sigma, target]


def test_exponential_evaluates_at_the_very_levels_of_the_grid() -> None:
    """Whatever the rounding of 1/σ: a call that is shared must be at one number."""
    for sigma, target in pairwise(karras_sigmas(60, append_zero=False).tolist()):
        for base in (HeunEDM(), RK4()):
            calls = Exponential(base).plan(sigma, (target,)).evaluations
            assert (calls[0].sigma, calls[-1].sigma) == (sigma, target)


def test_exponential_wraps_an_approximator() -> None:
    with pytest.raises(TypeError, match=r"Exponential wraps .* got <class"):
        Exponential(Euler)  # type: ignore[arg-type]
