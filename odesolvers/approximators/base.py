"""The abstract one-step method, written once as a formula and used as coefficients."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, final

from torch import Tensor

from ..combination import HERE, Combination
from ..grids import Grid, level_dtype
from ..solver import Denoiser, Solver
from ..step import Evaluation, Step

Denoise: TypeAlias = Callable[[Combination, float], Combination]
"""Asks for the denoiser's output at a point and a noise level."""


@dataclass(frozen=True)
class Plan:
    """Denoiser calls from one state, and the increments to each target in terms of their outputs."""

    evaluations: tuple[Evaluation, ...]
    increments: tuple[Combination, ...]


class IntegrationApproximator(Solver):
    """Estimates ``Δ(σ → τ | x) ≈ ∫_σ^τ (x - D(x, s)) / s ds`` from the state at σ alone.

    Subclasses write `increment` as an ordinary formula in `x` and `denoise(point, sigma)`. It is
    run once per pair of noise levels, on coefficients rather than tensors, so it may branch on the
    levels but not on the values of the state. Both directions are allowed: ``τ < σ`` denoises,
    ``τ > σ`` adds noise.

    Attributes:
        order: p, where one step over a length h errs by O(h^{p+1}).
        evaluations: denoiser calls of one step to a level above 0. Further targets from the same
            state share the first of them.
    """

    states: ClassVar[int] = 1

    @property
    @abstractmethod
    def order(self) -> int:
        """See above."""

    @property
    @abstractmethod
    def evaluations(self) -> int:
        """See above."""

    @abstractmethod
    def increment(
        self, x: Combination, sigma: float, target: float, denoise: Denoise
    ) -> Combination:
        """The increment to add to the state `x` at level `sigma` to arrive at level `target` above 0.

        To the level 0 every method takes the Euler step, which lands on the denoiser's output, as
        EDM's algorithm 1 does: no slope can be evaluated there.
        """

    def scale(self, sigma: float) -> float:
        """s(σ): the state in which the method is published is ``z = s(σ) x``; 1 by default.

        A one-step method is the same in any scale. The two-step recurrence of `BDIA` is not: its
        constant γ multiplies differences of `z`.
        """
        del sigma
        return 1.0

    @final
    def plan(self, sigma: float, targets: Sequence[float]) -> Plan:
        """The denoiser calls and the increments from `sigma` to each of `targets`.

        Calls at the same point and level are made once, whatever the number of targets that use
        them.
        """
        evaluations: list[Evaluation] = []

        def denoise(point: Combination, level: float) -> Combination:
            call = Evaluation(point, level)
            if call not in evaluations:
                evaluations.append(call)
            return Combination({evaluations.index(call) + 1: 1.0})

        increments = tuple(
            (self.increment if target > 0.0 else euler)(HERE, sigma, target, denoise)
            for target in targets
        )
        for increment in increments:
            if not isinstance(increment, Combination):
                raise TypeError(
                    f"{type(self).__name__}.increment must return a combination of x and denoiser "
                    f"outputs, got {increment!r}"
                )
        return Plan(tuple(evaluations), increments)

    @final
    def increments(
        self,
        denoiser: Denoiser,
        x: Tensor,
        sigma: float,
        targets: Sequence[float],
        *,
        extra_args: Mapping[str, Any] | None = None,
    ) -> list[Tensor]:
        """Evaluate ``Δ(sigma → target | x)`` for each of `targets`, each of the shape of `x`.

        For use outside the loops of `sample` and `invert`; nothing is checked here.

        Args:
            denoiser: see `Denoiser`.
            x: state ``(B, ...)`` at level `sigma`.
            sigma: its noise level.
            targets: the levels to lead to; all share what can be shared.
            extra_args: keyword arguments for every call of the denoiser.
        """
        plan = self.plan(sigma, targets)
        values = [x]
        for call in plan.evaluations:
            level = x.new_full(x.shape[:1], call.sigma, dtype=level_dtype(x.dtype))
            point = self.arithmetic.combine(call.point, values)
            values.append(denoiser(point, level, **(extra_args or {})).to(x.dtype))
        return [self.arithmetic.combine(increment, values) for increment in plan.increments]

    @final
    def start(self, sigma: float, target: float) -> Step:
        plan = self.plan(sigma, (target,))
        return Step(plan.evaluations, rest=HERE + plan.increments[0])

    @final
    def steps(self, grid: Grid) -> list[tuple[Step, ...]]:
        return [(self.start(sigma, target),) for sigma, target in grid.intervals()]


def slope(x: Combination, sigma: float, denoise: Denoise) -> Combination:
    """``d(x, σ) = (x - D(x, σ)) / σ``, the right-hand side of the probability-flow ODE.

    At σ = 0 it is the limit, 0, for no evaluation: ``D(x, σ) - x = σ² ∇log p`` vanishes faster than σ
    wherever the data have a smooth density.
    """
    if sigma == 0.0:
        return Combination({})
    return (x - denoise(x, sigma)) / sigma


def euler(x: Combination, sigma: float, target: float, denoise: Denoise) -> Combination:
    """``(τ - σ) d(x, σ)``: the Euler increment, which lands on D(x, σ) where the target is 0."""
    return (target - sigma) * slope(x, sigma, denoise)
