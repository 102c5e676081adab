"""Exponential integrators in the data prediction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, final

from ..checks import check_choice, check_is
from ..formula import Combination, Denoise
from .base import IntegrationApproximator, check_approximator, euler
from .first_order import variance_preserving
from .runge_kutta import leaving
from .tableaus import Dopri5


@final
@dataclass(frozen=True, repr=False, eq=False)
class DPMSolverPP2S(IntegrationApproximator):
    """DPM-Solver++(2S), single step (Lu et al. 2022, arXiv 2211.01095, algorithm 1, r = 1/2).

    The linear part of the flow is solved exactly: ``Δ = (1 - τ/σ) (D(u, m) - x)``, with the middle of
    log σ, ``m = sqrt(σ τ)``, and ``u = x + (1 - m/σ) (D(x, σ) - x)``. From the level 0, where the slope
    vanishes, it stays put. Order 2, two evaluations; state scale variance preserving, as published.

    Under `BDIA` the outputs of the step ahead serve behind, for no evaluation: the formula of algorithm
    1 for any r, ``(1 - τ/σ) (D - x + (D(u, m) - D) / (2 r))``, at ``r = log(m/σ) / log(τ/σ) < 0``.

    Args:
        second: the side of the second output under `BDIA`: "ahead", or "both", one on each side.

    Raises:
        ValueError: at construction, if `second` is something else.
    """

    second: str = "ahead"

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_choice("second", self.second, "ahead", "both")

    def increment(
        self, x: Combination, sigma: float, target: float, denoise: Denoise
    ) -> Combination:
        if sigma == 0.0:
            return euler(x, sigma, target, denoise)
        middle = (sigma * target) ** 0.5
        u = x + (1 - middle / sigma) * (denoise(x, sigma) - x)
        return (1 - target / sigma) * (denoise(u, middle) - x)

    def both_increments(
        self, x: Combination, sigma: float, ahead: float, behind: float, denoise: Denoise
    ) -> tuple[Combination, Combination]:
        if self.second == "both":
            return super().both_increments(x, sigma, ahead, behind, denoise)
        D = denoise(x, sigma)
        if ahead == 0.0:
            return D - x, (1 - behind / sigma) * (D - x)
        middle = (sigma * ahead) ** 0.5
        forward = self.increment(x, sigma, ahead, denoise)
        second = forward / (1 - ahead / sigma) + x
        r = math.log(middle / sigma) / math.log(behind / sigma)
        return forward, (1 - behind / sigma) * (D - x + (second - D) / (2 * r))

    def scale(self, sigma: float) -> float:
        return variance_preserving(sigma)


@final
@dataclass(frozen=True, repr=False, eq=False)
class Exponential(IntegrationApproximator):
    """Any method, in ``y = x / σ`` over the time 1/σ, where the flow is ``dy / d(1/σ) = D(x, σ)``.

    The linear part of the flow is solved exactly, and what the method integrates is the denoiser's
    output. From the level σ, in the units ``u = σ / s`` of time and ``y = u x`` of state, which are 1
    and x where the step starts, the method is given ``D'(y, u) = y - u D(y / u, σ / u)``, whose slope
    ``(y - D') / u`` is D, and ``Δ = (x + increment) / u_τ - x``. Over `Euler` it is Euler again. Order
    and evaluations are the method's; state scale 1/σ, which a constant γ of `BDIA` cannot step to the
    level 0 in. From the level 0 up it is `HeunEDM`.

    Args:
        approximator: the method.

    Raises:
        TypeError: at construction, if `approximator` is not an instance of one.
    """

    approximator: IntegrationApproximator

    def __post_init__(self) -> None:
        check_approximator(self, self.approximator)

    @property
    def order(self) -> int:
        return self.approximator.order

    @property
    def evaluations(self) -> int:
        return self.approximator.evaluations

    def increment(
        self, x: Combination, sigma: float, target: float, denoise: Denoise
    ) -> Combination:
        if sigma == 0.0:
            return leaving(sigma, self.approximator).increment(x, sigma, target, denoise)
        end, transformed = sigma / target, _transformed(sigma, target, denoise)
        return (x + self.approximator.increment(x, 1.0, end, transformed)) / end - x

    def embedded(
        self, x: Combination, sigma: float, target: float, denoise: Denoise
    ) -> tuple[Combination, Combination]:
        """`increment` over `Dopri5` and the estimate of its error, see `Dopri5.embedded`.

        Raises:
            TypeError: over another method.
        """
        check_is(self.approximator, Dopri5, "an estimate of the error needs Exponential(Dopri5())")
        method: Any = self.approximator
        end, transformed = sigma / target, _transformed(sigma, target, denoise)
        increment, error = method.embedded(x, 1.0, end, transformed)
        return (x + increment) / end - x, error / end

    def scale(self, sigma: float) -> float:
        return 1 / sigma if sigma > 0.0 else math.inf


def _transformed(sigma: float, target: float, denoise: Denoise) -> Denoise:
    """The denoiser D' of `Exponential`, for a step from `sigma` to `target`."""
    end = sigma / target

    def transformed(y: Combination, u: float) -> Combination:
        # Evaluations at the target itself are at that number and not at one that is near it.
        return y - u * denoise(y / u, target if u == end else sigma / u)

    return transformed
