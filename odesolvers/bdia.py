"""Bi-directional integration approximation: any one-step method, refined and made invertible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from .approximators import IntegrationApproximator, leaving
from .arithmetic import Arithmetic, FloatingPoint
from .checks import check_approximator, check_arithmetic
from .combination import HERE
from .gamma import GammaRule, as_rule
from .grids import Grid
from .solver import InvertibleSolver
from .step import Step


@final
@dataclass(frozen=True)
class BDIA(InvertibleSolver):
    """BDIA (Zhang, Lewis, Kleijn, ECCV 2024, arXiv 2307.10829) over any one-step method.

    At each level the approximator is applied ahead and, from the same state, behind, over the
    interval the run has just crossed. How far it misses the state the run came from corrects the
    step:

        x_{i-1} = F + g_i (x_{i+1} - B)        F = x_i + Δ(i → i-1 | x_i)
        x_{i+1} = B + (x_{i-1} - F) / g_i      B = x_i + Δ(i → i+1 | x_i)

    F and B depend on x_i alone, so the second line undoes the first for the same evaluations,
    whatever the approximator. The first step has nothing behind it and is the approximator's own.

    Args:
        approximator: the one-step method Δ.
        gamma: a number in (0, 1], the paper's γ in the approximator's state scale, or a rule for
            g_i such as `StepRatio`. 0 gives the approximator itself, which cannot be inverted.
        arithmetic: how states are stored and combined: `FloatingPoint`, inverted up to rounding, by
            default; `FixedPoint`, inverted to the bit.
        batched: make the evaluations of a step that do not need each other's outputs in one call of the
            denoiser, on states stacked along the batch: a step over `HeunEDM` is two calls in sequence,
            as that of `HeunEDM` alone is, one of them of twice the batch and its memory. Tensors in
            `extra_args` are repeated for it: their first dimension is the batch of x, or 1. `nfe`
            counts each state that is evaluated.

    Raises:
        TypeError, ValueError: at construction, if `approximator` or `gamma` is not usable.
    """

    approximator: IntegrationApproximator
    gamma: float | GammaRule = 1.0
    arithmetic: Arithmetic = FloatingPoint()
    batched: bool = False

    def __post_init__(self) -> None:
        check_approximator(self, self.approximator)
        check_arithmetic(self.arithmetic)
        # One solver has one description, by which its states know it.
        rule = as_rule(self.gamma)
        rule.check_approximator(self.approximator)
        object.__setattr__(self, "gamma", rule)

    def __repr__(self) -> str:
        settings = (
            f"approximator={self.approximator}, gamma={self.gamma}, arithmetic={self.arithmetic}"
        )
        return f"BDIA({settings}, batched=True)" if self.batched else f"BDIA({settings})"

    @property
    def stacks(self) -> bool:
        return self.batched

    def step(self, behind: float, sigma: float, ahead: float, g: float) -> Step:
        """From x_{i+1} and x_i, at levels `behind` and `sigma`, to x_{i-1} at level `ahead`.

        Read as ``x_{i-1} = g x_{i+1} + (F - g B)`` and, backwards,
        ``x_{i+1} = (x_{i-1} - (F - g B)) / g``.
        """
        g = self.arithmetic.weight(g)
        if g == 0.0:
            return self.start(sigma, ahead)
        plan = self.approximator.plan(sigma, (ahead, behind))
        F, B = (HERE + increment for increment in plan.increments)
        return Step(plan.evaluations, gain=g, rest=F - g * B)

    def start(self, sigma: float, target: float) -> Step:
        """The step of a run that has one state only: the approximator's own.

        Where a lone image stands at the level 0 it is `HeunEDM`'s, see `leaving`.
        """
        return leaving(sigma, self.approximator).start(sigma, target)

    def known_encoding_error(self, grid: Grid) -> float | None:
        return as_rule(self.gamma).encoding_error(grid)

    def steps(self, grid: Grid) -> list[tuple[Step, ...]]:
        weights = as_rule(self.gamma).checked_weights(grid, self.approximator.scale)
        s = grid.levels
        later = zip(s, s[1:], s[2:], weights, strict=False)
        first = self.start(s[0], s[1])
        return [(first,), *((self.step(*levels_and_g),) for levels_and_g in later)]
