"""Explicit Runge-Kutta methods of order two, three and four: EDM's Heun, Midpoint, RK3, RK4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from ..checks import check_choice
from ..formula import Combination, Denoise
from .base import IntegrationApproximator, euler, slope


@final
@dataclass(frozen=True, repr=False, eq=False)
class HeunEDM(IntegrationApproximator):
    """The average of the slopes at both ends (Karras et al. 2022, arXiv 2206.00364, algorithm 1).

    ``Δ = (τ - σ) (d + d') / 2`` with ``d = d(x, σ)`` and ``d' = d(x + (τ - σ) d, τ)``. Order 2, two
    evaluations. k-diffusion's `sample_heun` without churn. From the level 0, where the slope vanishes,
    it is the trapezoid rule with one evaluation.

    Under `BDIA` one quadratic through two slopes serves both sides, for the evaluations of Heun alone:

        Δ(ahead) = a d + a²/2 k        Δ(behind) = b d + b²/2 k        k = (d' - d) / c

    with a and b the steps ahead and behind, and the second slope d' at the Euler point of one of them,
    at c = a or c = b. To the level 0 both increments are Euler's, for the one slope that is known.

    Args:
        second: the side of the second slope under `BDIA`: "ahead", where F is EDM's Heun to the bit;
            "behind", which encodes better; or "both", one on each side, for three evaluations a step.

    Raises:
        ValueError: at construction, if `second` is something else.
    """

    second: str = "ahead"

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_choice("second", self.second, "ahead", "behind", "both")

    def increment(
        self, x: Combination, sigma: float, target: float, denoise: Denoise
    ) -> Combination:
        increment = euler(x, sigma, target, denoise)
        return (increment + (target - sigma) * slope(x + increment, target, denoise)) / 2

    def both_increments(
        self, x: Combination, sigma: float, ahead: float, behind: float, denoise: Denoise
    ) -> tuple[Combination, Combination]:
        if self.second == "both":
            return super().both_increments(x, sigma, ahead, behind, denoise)
        a, b = ahead - sigma, behind - sigma
        d = slope(x, sigma, denoise)
        if ahead == 0.0:
            return a * d, b * d
        c, level = (a, ahead) if self.second == "ahead" else (b, behind)
        k = (slope(x + c * d, level, denoise) - d) / c
        return a * d + (a * a / 2) * k, b * d + (b * b / 2) * k


def leaving(sigma: float, method: IntegrationApproximator) -> IntegrationApproximator:
    """`method` to leave the level `sigma` with; from the level 0 up it is `HeunEDM`.

    That needs the slope at the other end only; most others would learn nothing about the image.
    """
    return method if sigma > 0.0 else HeunEDM()


@final
@dataclass(frozen=True, repr=False, eq=False)
class Midpoint(IntegrationApproximator):
    """One Euler half-step to the middle of log σ, then the whole step with the slope found there.

    ``Δ = (τ - σ) d(u, m)`` with ``m = sqrt(σ τ)`` and ``u = x + (m - σ) d(x, σ)``: DPM-Solver-2 (Lu et
    al. 2022, arXiv 2206.00927, algorithm 1) in the unscaled state, and k-diffusion's `sample_dpm_2`
    without churn. From the level 0 the middle is the arithmetic one. Order 2, two evaluations.

    Under `BDIA` the quadratic through both slopes of the step ahead serves behind, for no evaluation:
    ``Δ(behind) = b d + b²/2 k`` with ``k = (d(u, m) - d) / (m - σ)``, see `HeunEDM`.

    Args:
        second: the side of the second slope under `BDIA`: "ahead", or "both", one on each side.

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
        middle = (sigma * target) ** 0.5 if sigma > 0.0 else target / 2
        u = x + euler(x, sigma, middle, denoise)
        return (target - sigma) * slope(u, middle, denoise)

    def both_increments(
        self, x: Combination, sigma: float, ahead: float, behind: float, denoise: Denoise
    ) -> tuple[Combination, Combination]:
        if self.second == "both":
            return super().both_increments(x, sigma, ahead, behind, denoise)
        a, b = ahead - sigma, behind - sigma
        d = slope(x, sigma, denoise)
        if ahead == 0.0:
            return a * d, b * d
        forward = self.increment(x, sigma, ahead, denoise)
        k = (forward / a - d) / ((sigma * ahead) ** 0.5 - sigma)
        return forward, b * d + (b * b / 2) * k


@final
@dataclass(frozen=True, repr=False, eq=False)
class RK3(IntegrationApproximator):
    """Ralston's third-order method (Ralston 1962; the advancing method of Bogacki-Shampine).

    Slopes at 0, 1/2 and 3/4 of the step, weighed 2/9, 3/9 and 4/9. Order 3, one evaluation
    shared by every target and two for each target.
    """

    order: ClassVar[int] = 3
    evaluations: ClassVar[int] = 3

    def increment(
        self, x: Combination, sigma: float, target: float, denoise: Denoise
    ) -> Combination:
        h = target - sigma
        k1 = slope(x, sigma, denoise)
        k2 = slope(x + (h / 2) * k1, sigma + h / 2, denoise)
        k3 = slope(x + (3 * h / 4) * k2, sigma + 3 * h / 4, denoise)
        return (h / 9) * (2 * k1 + 3 * k2 + 4 * k3)


@final
@dataclass(frozen=True, repr=False, eq=False)
class RK4(IntegrationApproximator):
    """The classical fourth-order method (Kutta 1901).

    Slopes at 0, 1/2, 1/2 and 1 of the step, weighed 1/6, 2/6, 2/6 and 1/6. Order 4, one evaluation
    shared by every target and three for each target.
    """

    order: ClassVar[int] = 4
    evaluations: ClassVar[int] = 4

    def increment(
        self, x: Combination, sigma: float, target: float, denoise: Denoise
    ) -> Combination:
        h = target - sigma
        k1 = slope(x, sigma, denoise)
        k2 = slope(x + (h / 2) * k1, sigma + h / 2, denoise)
        k3 = slope(x + (h / 2) * k2, sigma + h / 2, denoise)
        k4 = slope(x + h * k3, target, denoise)
        return (h / 6) * (k1 + 2 * k2 + 2 * k3 + k4)
