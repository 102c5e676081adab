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
    EES25,
    RK3,
    RK4,
    Dopri5,
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
)
from odesolvers.extend import Combination, Denoise, slope

from .contract import ApproximatorContract, TwoStepContract
from .problems import (
    Recorder,
    both_increments,
    increment,
    mixture,
    noise,
)

ALL: list[IntegrationApproximator] = [
    Euler(),
    DDIM(),
    FlowEuler(),
    HeunEDM(),
    Midpoint(),
    RK3(),
    RK4(),
    DPMSolverPP2S(),
    Dopri5(),
    EES25(),
]
# Their scale has no value at level 0, so that a constant gamma does not lead back from there.
EXPONENTIAL: list[IntegrationApproximator] = [Exponential(Midpoint()), Exponential(RK3())]


@final
@dataclass(frozen=True, repr=False, eq=False)
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


class TestHeunBehind(ApproximatorContract):
    approximator = HeunEDM("behind")
    keeps_its_step = False


class TestHeunBoth(ApproximatorContract):
    approximator = HeunEDM("both")


class TestMidpoint(ApproximatorContract):
    approximator = Midpoint()


class TestRK3(ApproximatorContract):
    approximator = RK3()


class TestRK4(ApproximatorContract):
    approximator = RK4()


class TestDPMSolverPP2S(ApproximatorContract):
    approximator = DPMSolverPP2S()


class TestDopri5(ApproximatorContract):
    approximator = Dopri5()


class TestEES25(ApproximatorContract):
    approximator = EES25()


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


class TestBDIAHeunBehind(TwoStepContract):
    solver = BDIA(HeunEDM("behind"))


class TestBDIAHeunBoth(TwoStepContract):
    solver = BDIA(HeunEDM("both"))


class TestBDIAMidpoint(TwoStepContract):
    solver = BDIA(Midpoint())


class TestBDIAMidpointBoth(TwoStepContract):
    solver = BDIA(Midpoint("both"))


class TestBDIARK3(TwoStepContract):
    solver = BDIA(RK3())


class TestBDIARK4(TwoStepContract):
    solver = BDIA(RK4())


class TestBDIADPMSolverPP2S(TwoStepContract):
    solver = BDIA(DPMSolverPP2S())


class TestBDIADPMSolverPP2SBoth(TwoStepContract):
    solver = BDIA(DPMSolverPP2S("both"))


class TestBDIADopri5(TwoStepContract):
    solver = BDIA(Dopri5())


class TestBDIAEES25(TwoStepContract):
    solver = BDIA(EES25())


class TestBDIAExponential(TwoStepContract):
    solver = BDIA(Exponential(HeunEDM()), StepRatio(1))


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
        planned = increment(approximator, mixture(), x, 2.0, target)
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
    for target in (1.0, 3.0):
        assert DDIM().start(2.0, target) == Euler().start(2.0, target)
        assert FlowEuler().start(2.0, target) == Euler().start(2.0, target)
    assert (Euler().scale(3.0), DDIM().scale(3.0)) == (1.0, pytest.approx(10**-0.5))
    assert FlowEuler().scale(3.0) == 0.25


@pytest.mark.parametrize("target", [1.0, 0.0, 3.0])
def test_exponential_over_euler_is_euler(target: float) -> None:
    x = noise(3, 3, sigma=2.0)
    euler = increment(Euler(), mixture(), x, 2.0, target)
    exponential = increment(Exponential(Euler()), mixture(), x, 2.0, target)
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
    found = increment(Exponential(HeunEDM()), recorder, x, sigma, target)
    torch.testing.assert_close(x + found, expected, rtol=1e-13, atol=1e-13)
    assert recorder.sigmas == [sigma, target]


def test_exponential_evaluates_at_the_very_levels_of_the_grid() -> None:
    """Whatever the rounding of 1/σ: a call that is shared must be at one number."""
    for sigma, target in pairwise(karras_sigmas(60, append_zero=False).tolist()):
        for base in (HeunEDM(), RK4()):
            calls = Exponential(base).start(sigma, target).calls
            assert (calls[0].sigma, calls[-1].sigma) == (sigma, target)


def test_exponential_wraps_an_approximator() -> None:
    with pytest.raises(TypeError, match=r"Exponential wraps .* got <class"):
        Exponential(Euler)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [HeunEDM, Midpoint, DPMSolverPP2S])
def test_the_second_output_of_a_step_serves_both_sides(kind: type[IntegrationApproximator]) -> None:
    """`BDIA` costs what the method costs; with an output on each side, one more a step."""
    sides = ("ahead", "behind", "both") if kind is HeunEDM else ("ahead", "both")
    for grid in (karras_sigmas(7), karras_sigmas(7, append_zero=False)):
        x = noise(2, 3, sigma=80.0)
        alone = kind().sample(mixture(), x, grid).nfe
        for second in sides:
            solver = BDIA(kind(second))  # type: ignore[call-arg]
            more = len(grid) - 2 if second == "both" else 0  # in every step but the first
            assert solver.sample(mixture(), x, grid).nfe == alone + more


@pytest.mark.parametrize("kind", [HeunEDM, Midpoint, DPMSolverPP2S])
def test_a_side_that_there_is_not(kind: type[IntegrationApproximator]) -> None:
    with pytest.raises(ValueError, match=r"second must be 'ahead'.* or 'both', got 'left'"):
        kind("left")  # type: ignore[call-arg]


@pytest.mark.parametrize("ahead", [1.2, 0.0])
@pytest.mark.parametrize("second", ["ahead", "behind"])
def test_heun_continues_one_quadratic_to_both_sides(second: str, ahead: float) -> None:
    """The slope ``d + k t`` at the time t from the step, fitted to two slopes, integrated by hand."""
    x, sigma, behind = noise(3, 3, sigma=2.0), 2.0, 2.7

    def d(x: torch.Tensor, level: float) -> torch.Tensor:
        return (x - mixture()(x, torch.full((3,), level, dtype=x.dtype))) / level

    first = d(x, sigma)
    level = ahead if second == "ahead" else behind
    k = torch.zeros_like(x)
    if ahead > 0.0:
        k = (d(x + (level - sigma) * first, level) - first) / (level - sigma)
    found = both_increments(HeunEDM(second), mixture(), x, sigma, ahead, behind)
    for target, change in zip((ahead, behind), found, strict=True):
        t = target - sigma
        torch.testing.assert_close(change, t * first + t**2 / 2 * k, rtol=1e-12, atol=1e-12)
