"""Explicit Runge-Kutta methods that are given by a tableau: Dormand-Prince 5(4), and EES(2,5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, TypeAlias, final

from ..formula import Combination, Denoise
from .base import IntegrationApproximator, slope

Row: TypeAlias = "tuple[float, ...]"

DORMAND_PRINCE: Final[tuple[Row, ...]] = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
"""The coefficients of each stage after the first; those of the last are the weights, too."""
DORMAND_PRINCE_LEVELS: Final[Row] = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
DORMAND_PRINCE_ERROR: Final[Row] = (
    *(71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
)
"""The weights of order 5 less those of order 4."""


@final
@dataclass(frozen=True, repr=False, eq=False)
class Dopri5(IntegrationApproximator):
    """The method of Dormand and Prince (1980), RK5(4)7M: MATLAB's `ode45`, scipy's `RK45`.

    Order 5, six evaluations. A seventh, at the end of the step, gives the difference to an embedded
    method of order 4, see `embedded`; by that `adaptive_sigmas` chooses a grid. From the level 0, where
    the slope vanishes, it has five evaluations.
    """

    order: ClassVar[int] = 5
    evaluations: ClassVar[int] = 6

    def increment(
        self, x: Combination, sigma: float, target: float, denoise: Denoise
    ) -> Combination:
        *coefficients, weights = DORMAND_PRINCE
        k = _slopes(x, sigma, target, denoise, coefficients, DORMAND_PRINCE_LEVELS)
        return _weighed(target - sigma, weights, k)

    def embedded(
        self, x: Combination, sigma: float, target: float, denoise: Denoise
    ) -> tuple[Combination, Combination]:
        """`increment`, and its difference to that of order 4, which estimates the error of a step.

        The last of its seven evaluations is the first of the next step.
        """
        k = _slopes(x, sigma, target, denoise, DORMAND_PRINCE, DORMAND_PRINCE_LEVELS)
        h = target - sigma
        return _weighed(h, DORMAND_PRINCE[-1], k), _weighed(h, DORMAND_PRINCE_ERROR, k)


@final
@dataclass(frozen=True, repr=False, eq=False)
class EES25(IntegrationApproximator):
    """EES(2,5), explicit and effectively symmetric (Shmelev et al. 2025, arXiv 2507.21006).

    Slopes at 0, 1/3 and 5/6 of the step, weighed 1/10, 1/2 and 2/5: the paper's family at its parameter
    1/10. Order 2, three evaluations. A step back over -h undoes the step over h up to ``O(h⁶)``, where
    another method of order 2 leaves ``O(h³)``: `ReverseStepInversion` over it nearly leads back.
    """

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 3

    def increment(
        self, x: Combination, sigma: float, target: float, denoise: Denoise
    ) -> Combination:
        k = _slopes(x, sigma, target, denoise, ((1 / 3,), (-5 / 48, 15 / 16)), (1 / 3, 5 / 6))
        return _weighed(target - sigma, (1 / 10, 1 / 2, 2 / 5), k)


def _slopes(
    x: Combination,
    sigma: float,
    target: float,
    denoise: Denoise,
    coefficients: Sequence[Row],
    levels: Row,
) -> list[Combination]:
    """The slopes of all stages, the first at `x` itself; `levels` in units of the step."""
    h, k = target - sigma, [slope(x, sigma, denoise)]
    for row, c in zip(coefficients, levels, strict=False):
        # The end of the step is the target itself, and not a number near it.
        k.append(slope(x + _weighed(h, row, k), target if c == 1.0 else sigma + c * h, denoise))
    return k


def _weighed(h: float, weights: Row, slopes: Sequence[Combination]) -> Combination:
    terms = [h * weight * k for weight, k in zip(weights, slopes, strict=False)]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
