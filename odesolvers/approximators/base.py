"""The abstract one-step method, written once as a formula and used as coefficients."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, final

from ..checks import check_is
from ..formula import Combination, Denoise, Shear
from ..grids import Grid
from ..solver import Solver


class IntegrationApproximator(Solver):
    """Estimates ``Δ(σ → τ | x) ≈ ∫_σ^τ (x - D(x, s)) / s ds`` from the state at σ alone.

    Subclasses write `increment` as an ordinary formula in `x` and ``denoise(point, sigma)``. It is run
    once for each pair of noise levels, on coefficients rather than tensors, so it may branch on the
    levels but not on the values of the state. Both directions are allowed: ``τ < σ`` denoises,
    ``τ > σ`` adds noise.

    Attributes:
        order: p, where one step over a length h errs by O(h^{p+1}).
        evaluations: denoiser calls of one step to a level above 0.
    """

    states: ClassVar[int] = 1

    @property
    @abstractmethod
    def order(self) -> int:
        """The order p of the method."""

    @property
    @abstractmethod
    def evaluations(self) -> int:
        """Denoiser calls of one step."""

    @abstractmethod
    def increment(
        self, x: Combination, sigma: float, target: float, denoise: Denoise
    ) -> Combination:
        """``Δ(σ → τ | x)``, the increment of the state `x` at `sigma` to the level `target` above 0.

        To the level 0 every method takes the Euler step, which lands on the denoiser's output, as
        EDM's algorithm 1 does: no slope can be evaluated there.
        """

    def both_increments(
        self, x: Combination, sigma: float, ahead: float, behind: float, denoise: Denoise
    ) -> tuple[Combination, Combination]:
        """``Δ(σ → ahead | x)`` and ``Δ(σ → behind | x)``, the two that a step of `BDIA` is made of.

        By default each is `increment`, and only equal calls are shared. A method may continue its own
        local polynomial behind instead, which costs no call: both must be functions of `x` alone.
        """
        return (
            self.increment_to(x, sigma, ahead, denoise),
            self.increment_to(x, sigma, behind, denoise),
        )

    def scale(self, sigma: float) -> float:
        """s(σ): the state in which the method is published is ``z = s(σ) x``; 1 by default.

        A one-step method is the same in any scale. The two-step recurrence of `BDIA` is not: its
        constant γ multiplies differences of `z`.
        """
        del sigma
        return 1.0

    @final
    def increment_to(
        self, x: Combination, sigma: float, target: float, denoise: Denoise
    ) -> Combination:
        """`increment`, and to the level 0 the increment of Euler's method."""
        return (self.increment if target > 0.0 else euler)(x, sigma, target, denoise)

    @final
    def start(self, sigma: float, target: float) -> Shear:
        return Shear.of(lambda x, D: x + self.increment_to(x, sigma, target, D))

    @final
    def steps(self, grid: Grid) -> list[tuple[Shear, ...]]:
        return [(self.start(sigma, target),) for sigma, target in grid.intervals()]


def slope(x: Combination, sigma: float, denoise: Denoise) -> Combination:
    """``d(x, σ) = (x - D(x, σ)) / σ``, the right-hand side of the probability-flow ODE.

    At σ = 0 it is the limit, 0, for no evaluation: ``D(x, σ) - x = σ² ∇log p`` vanishes faster than σ
    wherever the data have a smooth density.
    """
    if sigma == 0.0:
        return 0.0 * x
    return (x - denoise(x, sigma)) / sigma


def euler(x: Combination, sigma: float, target: float, denoise: Denoise) -> Combination:
    """``(τ - σ) d(x, σ)``: the Euler increment, which lands on D(x, σ) where the target is 0."""
    return (target - sigma) * slope(x, sigma, denoise)


def check_approximator(solver: object, approximator: object) -> None:
    """An instance of `IntegrationApproximator`, or a TypeError."""
    what = f"{type(solver).__name__} wraps an IntegrationApproximator instance such as HeunEDM()"
    check_is(approximator, IntegrationApproximator, what)
