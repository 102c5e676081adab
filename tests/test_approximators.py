"""Every approximator under the contract, alone and refined."""

from __future__ import annotations

from dataclasses import dataclass
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
    FlowEuler,
    HeunEDM,
    IntegrationApproximator,
    Midpoint,
    SmoothedOutput,
    StepRatio,
    slope,
)

from .contract import ApproximatorContract, InvertibleContract
from .problems import mixture, noise

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


class TestAnothersApproximator(ApproximatorContract):
    approximator = Ralston()


class TestBDIAEuler(InvertibleContract):
    solver = BDIA(Euler())


class TestBDIADDIM(InvertibleContract):
    solver = BDIA(DDIM())


class TestBDIAFlowEuler(InvertibleContract):
    solver = BDIA(FlowEuler())


class TestBDIAHeunEDM(InvertibleContract):
    solver = BDIA(HeunEDM())


class TestBDIAMidpoint(InvertibleContract):
    solver = BDIA(Midpoint())


class TestBDIARK3(InvertibleContract):
    solver = BDIA(RK3())


class TestBDIARK4(InvertibleContract):
    solver = BDIA(RK4())


class TestBDIADPMSolverPP2S(InvertibleContract):
    solver = BDIA(DPMSolverPP2S())


class TestBDIAAnothersApproximator(InvertibleContract):
    solver = BDIA(Ralston(), StepRatio(1))


class TestOBELM(InvertibleContract):
    solver = BDIA(Euler(), StepRatio(2))


class TestNeutral(InvertibleContract):
    solver = BDIA(HeunEDM(), StepRatio(1))


class TestSmoothed(InvertibleContract):
    solver = BDIA(DDIM(), SmoothedOutput(1.0))


@pytest.mark.parametrize("approximator", ALL, ids=repr)
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
    for approximator in ALL:
        for sigma in (0.0, 0.1, 3.0, 80.0):
            expected = 1.0
            if isinstance(approximator, DDIM | DPMSolverPP2S):
                expected = (1 + sigma**2) ** -0.5
            elif isinstance(approximator, FlowEuler):
                expected = 1 / (1 + sigma)
            assert approximator.scale(sigma) == pytest.approx(expected, rel=1e-14)


def test_ddim_and_euler_differ_in_scale_alone() -> None:
    assert DDIM().plan(2.0, (1.0, 3.0)) == Euler().plan(2.0, (1.0, 3.0))
    assert FlowEuler().plan(2.0, (1.0, 3.0)) == Euler().plan(2.0, (1.0, 3.0))
    assert (Euler().scale(3.0), DDIM().scale(3.0)) == (1.0, pytest.approx(10**-0.5))
    assert FlowEuler().scale(3.0) == 0.25
