"""Two-step linear formulas with one evaluation: BELM."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, final

from .approximators import Euler, leaving, slope
from .arithmetic import Arithmetic, FloatingPoint
from .checks import check_arithmetic
from .combination import HERE, Combination
from .grids import Grid
from .solver import InvertibleSolver
from .step import Evaluation, Step


class Coefficients(NamedTuple):
    """Of one step ``x_{i-1} = a2 x_{i+1} + a1 x_i + b ε(x_i, σ_i)``."""

    a2: float
    a1: float
    b: float


class BELMRule(ABC):
    """Gives the coefficients of every step but the first from the grid alone."""

    @abstractmethod
    def coefficients(self, grid: Grid) -> list[Coefficients]:
        """``grid.steps - 1`` of them, in sampling order, for the unscaled state x."""

    def checked(self, grid: Grid) -> list[Coefficients]:
        """`coefficients`, refused where they are too few or too many or not consistent.

        Raises:
            ValueError: naming the step.
        """
        given = self.coefficients(grid)
        if len(given) != grid.steps - 1:
            raise ValueError(
                f"{self} gives coefficients for {len(given)} steps; a grid of {grid.steps} steps "
                f"needs {grid.steps - 1} (every step but the first)"
            )
        h = [sigma - target for sigma, target in grid.intervals()]
        for k, ((behind, ahead), (a2, a1, b)) in enumerate(
            zip(pairwise(h), given, strict=True), start=1
        ):
            where = f"at the step from sigmas[{k}] = {grid.levels[k]:.6g}"
            if not all(map(math.isfinite, (a2, a1, b))):
                raise ValueError(f"{self} gives {(a2, a1, b)} {where}; coefficients must be finite")
            if abs(a2 + a1 - 1) > 1e-9 * max(1.0, abs(a2)):
                raise ValueError(
                    f"{self} gives a2 + a1 = {a2 + a1!r} {where}: a state that stands still would not, "
                    "so the sum must be 1"
                )
            expected = -(ahead + a2 * behind)
            if abs(b - expected) > 1e-9 * (ahead + abs(a2) * behind):
                raise ValueError(
                    f"{self} gives b = {b!r} {where}; order 1 needs b = -(h_i + a2 h_(i+1)) = "
                    f"{expected!r} for the step ahead h_i = {ahead:.6g} and the step behind "
                    f"h_(i+1) = {behind:.6g}"
                )
        return given


@final
@dataclass(frozen=True)
class OptimalBELM(BELMRule):
    """Those that cancel the leading error: O-BELM.

    ``a2 = (h_i / h_{i+1})²``, ``a1 = 1 - a2``, ``b = -h_i (h_i + h_{i+1}) / h_{i+1}``. Order 2.
    """

    def coefficients(self, grid: Grid) -> list[Coefficients]:
        h = [sigma - target for sigma, target in grid.intervals()]
        return [
            Coefficients(
                a2=(ahead / behind) ** 2,
                a1=(behind + ahead) * (behind - ahead) / behind**2,
                b=-ahead * (ahead + behind) / behind,
            )
            for behind, ahead in pairwise(h)
        ]


@final
@dataclass(frozen=True)
class GivenBELM(BELMRule):
    """Given coefficients (a2, a1, b) in x, for every step but the first, in sampling order."""

    values: tuple[Coefficients, ...]

    def __init__(self, values: Iterable[tuple[float, float, float]]) -> None:
        object.__setattr__(self, "values", tuple(Coefficients(*map(float, v)) for v in values))

    def coefficients(self, grid: Grid) -> list[Coefficients]:
        del grid
        return list(self.values)


@final
@dataclass(frozen=True)
class BELM(InvertibleSolver):
    """BELM (Wang et al., NeurIPS 2024, arXiv 2410.07273): two-step formulas with one evaluation.

        x_{i-1} = a2 x_{i+1} + a1 x_i + b ε(x_i, σ_i)              ε(x, σ) = (x - D(x, σ)) / σ
        x_{i+1} = (x_{i-1} - a1 x_i - b ε(x_i, σ_i)) / a2

    in x = z / α. Consistency fixes ``a1 = 1 - a2`` and order 1 fixes ``b = -(h_i + a2 h_{i+1})``, so
    that the family has one free number a step, and is that of ``BDIA(Euler(), gamma)`` with g_i = a2.
    The optimal coefficients, of order 2, are ``BDIA(Euler(), StepRatio(2))``. On equal steps it is
    zero-stable for ``|a2| <= 1``; on others the products of the a2 over any stretch of steps must stay
    bounded, which is the caller's to see to. The first step is Euler's.

    Args:
        coefficients: the rule for (a2, a1, b).
        arithmetic: see `BDIA`; where it replaces a2 by a fraction, a1 and b follow.

    Raises:
        TypeError: at construction, if an argument is not usable.
        ValueError: in a run, if the coefficients do not fit the grid, see `BELMRule.checked`.
    """

    coefficients: BELMRule = OptimalBELM()
    arithmetic: Arithmetic = FloatingPoint()

    def __post_init__(self) -> None:
        if not isinstance(self.coefficients, BELMRule):
            raise TypeError(
                f"coefficients must be a rule such as OptimalBELM(), got {self.coefficients!r}"
            )
        check_arithmetic(self.arithmetic)

    def step(self, behind: float, sigma: float, ahead: float, given: Coefficients) -> Step:
        """From x_{i+1} and x_i, at levels `behind` and `sigma`, to x_{i-1} at level `ahead`."""
        a2, a1, b = given
        weight = self.arithmetic.weight(a2)
        if weight != a2:
            a2, a1, b = weight, 1 - weight, ahead - sigma + weight * (sigma - behind)
        epsilon = slope(HERE, sigma, lambda point, level: Combination({1: 1.0}))
        return Step((Evaluation(HERE, sigma),), gain=a2, rest=a1 * HERE + b * epsilon)

    def start(self, sigma: float, target: float) -> Step:
        """Euler's step; from a lone image at the level 0 `HeunEDM`'s, as in `BDIA`."""
        return leaving(sigma, Euler()).start(sigma, target)

    def steps(self, grid: Grid) -> list[tuple[Step, ...]]:
        s = grid.levels
        later = zip(s, s[1:], s[2:], self.coefficients.checked(grid), strict=False)
        return [(self.start(s[0], s[1]),), *((self.step(*levels),) for levels in later)]
