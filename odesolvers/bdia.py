"""Bi-directional integration approximation: any one-step method, refined and made invertible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from .approximators import IntegrationApproximator, check_approximator, leaving
from .arithmetic import Arithmetic, FloatingPoint, check_arithmetic
from .formula import Combination, Denoise, Shear
from .gamma import ConstantGamma, GammaRule, as_rule
from .grids import Grid
from .solver import Solver


@final
@dataclass(frozen=True, repr=False, eq=False)
class BDIA(Solver):
    """BDIA (Zhang, Lewis, Kleijn, ECCV 2024, arXiv 2307.10829) over any one-step method.

    At each level the approximator is applied ahead and, from the same state, behind, over the
    interval that the run has just crossed. Its miss of the state that the run came from corrects the
    step:

        x_{i-1} = F + g_i (x_{i+1} - B)        F = x_i + Δ(i → i-1 | x_i)
        x_{i+1} = B + (x_{i-1} - F) / g_i      B = x_i + Δ(i → i+1 | x_i)

    F and B depend on x_i alone, so the second line undoes the first by the same evaluations,
    whatever the approximator. The first step has nothing behind it and is the approximator's own.

    Args:
        approximator: the one-step method Δ.
        gamma: a number in (0, 1], the paper's γ in the approximator's state scale, 1 by default; or a
            rule for g_i such as `StepRatio`. 0 gives the approximator itself, which cannot be inverted.
        arithmetic: the representation of states: `FloatingPoint`, inverted up to rounding, by
            default; `FixedPoint`, inverted to the bit.

    Raises:
        TypeError, ValueError: at construction, if an argument is not usable.
    """

    approximator: IntegrationApproximator
    gamma: float | GammaRule = ConstantGamma(1.0)
    arithmetic: Arithmetic = FloatingPoint()

    def __post_init__(self) -> None:
        check_approximator(self, self.approximator)
        check_arithmetic(self.arithmetic)
        rule = as_rule(self.gamma)
        rule.check_approximator(self.approximator)
        object.__setattr__(self, "gamma", rule)

    def step(self, behind: float, sigma: float, ahead: float, g: float) -> Shear:
        """The shear from x_{i+1} and x_i, at the levels `behind` and `sigma`, to x_{i-1} at `ahead`."""
        g = self.arithmetic.weight(g)
        if g == 0.0:
            return self.start(sigma, ahead)

        def rest(x: Combination, D: Denoise) -> Combination:
            to_ahead, to_behind = self.approximator.both_increments(x, sigma, ahead, behind, D)
            F, B = x + to_ahead, x + to_behind
            return F - g * B  # x_{i-1} = g x_{i+1} + rest(x_i)

        return Shear.of(rest, gain=g)

    def start(self, sigma: float, target: float) -> Shear:
        """The approximator's own step; from a lone image at the level 0 `HeunEDM`'s, see `leaving`."""
        return leaving(sigma, self.approximator).start(sigma, target)

    def steps(self, grid: Grid) -> list[tuple[Shear, ...]]:
        s, rule = grid.levels, as_rule(self.gamma)
        weights = rule.checked_weights(grid, self.approximator.scale)
        later = zip(s, s[1:], s[2:], weights, strict=False)
        return [(self.start(s[0], s[1]),), *((self.step(*levels),) for levels in later)]

    def encoding_error(self, grid: Grid) -> float | None:
        return as_rule(self.gamma).encoding_error(grid)
