"""Rules for g_i, the weight of the refinement term of `BDIA`.

A step ahead over ``h_i = σ_i - σ_{i-1}`` after a step behind of ``h_{i+1}`` reads, in the unscaled
state x, ``x_{i-1} = F + g_i (x_{i+1} - B)``. The recurrence has a second solution that alternates
in sign; each step multiplies it by ``-g_i`` when sampling and by ``-1/g_i`` when inverting. A rule
is therefore a choice between accuracy when sampling (large g_i keeps that solution alive) and
stability when inverting (small g_i amplifies it). What a contraction by g_i destroys is side
information, ``log2(1 / g_i)`` bits for each element, which `FixedPoint` stores. So each rule has an
order, an amplification each way, which is a product of its weights, and a number of bits;
`stability_report` gives them for any solver and grid.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .approximators import IntegrationApproximator
from .grids import Grid
from .settings import Settings
from .values import number


def step_ratios(grid: Grid) -> list[float]:
    """The ratio ``h_i / h_{i+1}`` of each step but the first to the one before it."""
    h = [sigma - target for sigma, target in grid.intervals()]
    return [ahead / behind for behind, ahead in pairwise(h)]


class GammaRule(Settings, ABC):
    """Gives g_i for every step but the first from the grid alone."""

    @abstractmethod
    def weights(self, grid: Grid, scale: Callable[[float], float]) -> list[float]:
        """The ``grid.steps - 1`` weights, in sampling order, for the unscaled state x.

        Args:
            grid: the noise levels.
            scale: s(σ) of the approximator, see `IntegrationApproximator.scale`.
        """

    def check_approximator(self, approximator: object) -> None:
        """Raises a ValueError for an approximator that the rule was not made for."""
        del approximator

    def encoding_error(self, grid: Grid) -> float | None:
        """Measured relative error of codes on `grid`, or None."""
        del grid
        return None

    def checked_weights(self, grid: Grid, scale: Callable[[float], float]) -> list[float]:
        """`weights`, refused where there are too few or too many or one is not usable."""
        try:
            weights = [number(f"a weight of {self}", g) for g in self.weights(grid, scale)]
        except OverflowError as error:
            raise ValueError(f"{self} gives weights beyond all numbers on this grid") from error
        if len(weights) != grid.steps - 1:
            raise ValueError(
                f"{self} gives {len(weights)} weights; a grid of {grid.steps} steps needs "
                f"{grid.steps - 1} (every step but the first)"
            )
        for k, g in enumerate(weights, start=1):
            if not (math.isfinite(g) and g >= 0):
                raise ValueError(
                    f"{self} gives the weight {g} at the step from sigmas[{k}] = "
                    f"{grid.levels[k]:.6g}; weights must be finite and not negative"
                )
        return weights


@dataclass(frozen=True, repr=False, eq=False)
class ConstantGamma(GammaRule):
    """The paper's constant γ, which weighs differences of the scaled state ``z = s(σ) x``.

    In x it is ``g_i = γ s(σ_{i+1}) / s(σ_{i-1})``.

    - Order: over a base of odd order p, γ = 1 gains an order; 0 < γ < 1 keeps order p with the error
      constant times (1 - γ) / (1 + γ). Over an even order neither order nor constant change.
    - Amplification of the alternating error of z over n weights: γ^n sampling, γ^-n inverting. In x
      both are multiplied by the ratio of s at the ends, 1 over `Euler`.
    - Side information: ``n log2(1/γ)`` bits in z.

    Attributes:
        gamma: in [0, 1]; 0 is the base solver alone, which has no inverse.
    """

    gamma: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "gamma", number("gamma", self.gamma))
        if not 0 <= self.gamma <= 1:
            raise ValueError(
                f"gamma must be in (0, 1], or 0 for the base solver without inverse, got "
                f"{self.gamma}"
            )

    def weights(self, grid: Grid, scale: Callable[[float], float]) -> list[float]:
        if self.gamma == 0:
            return [0.0] * (grid.steps - 1)
        s = [scale(sigma) for sigma in grid.levels]
        return [self.gamma * behind / ahead for behind, ahead in zip(s, s[2:], strict=False)]


@dataclass(frozen=True, repr=False, eq=False)
class StepRatio(GammaRule):
    """``g_i = factor (h_i / h_{i+1})^power``: the step ahead over the step behind, in σ.

    - Order: ``power = p + 1`` cancels the leading error over a base of odd order p, which gains an
      order, see `order_gaining`. Over `Euler` it is 2, and the solver is O-BELM (Wang et al., NeurIPS
      2024, arXiv 2410.07273). Any power gains it where steps change slowly, with another constant; an
      even order stays as it is.
    - Amplification in x: the weights multiply to the last step over the first, to the power. Steps
      that shorten towards the data damp when sampling, by that, and amplify by its inverse when
      inverting.
    - Side information: ``power · log2(first step / last step)`` bits, however many steps there are.

    ``power = 1`` is the neutral rule: little amplification either way, in variance-preserving units,
    on Stable Diffusion's schedule with trailing timesteps, and more on grids that end with
    short steps.

    A `factor` below 1 damps the alternating solution by as much a step, and inverting amplifies by it;
    over a base of odd order it costs the order gained, as a constant γ below 1 does.

    The steps are those of x whatever the scale of the approximator, as in the derivation.
    """

    power: float = 1.0
    factor: float = 1.0

    def __post_init__(self) -> None:
        for name in ("power", "factor"):
            object.__setattr__(self, name, number(name, getattr(self, name)))
        if not math.isfinite(self.power):
            raise ValueError(f"power must be a finite number, got {self.power}")
        if not 0 < self.factor <= 1:
            raise ValueError(f"factor must be in (0, 1], got {self.factor}")

    def weights(self, grid: Grid, scale: Callable[[float], float]) -> list[float]:
        del scale
        return [self.factor * r**self.power for r in step_ratios(grid)]


@dataclass(frozen=True, repr=False, eq=False)
class HeunStepRatio(GammaRule):
    """``g_i = r² / (1 + 2 r)`` with ``r = h_i / h_{i+1}``: for samples of `BDIA` over `HeunEDM`.

    With the second slope ahead, every choice of g_i keeps order 2, and this one makes the error several
    times smaller than Heun's at the same evaluations; on Gaussian data the order is 3 (measured).

    - Amplification: sampling damps the alternating solution by 1/3 a step on equal steps. Inverting
      amplifies by as much: the way back needs `FixedPoint`, and codes of lone images are no noise.
    - Side information: ``log2(3)`` bits for each step, on equal steps.
    """

    def weights(self, grid: Grid, scale: Callable[[float], float]) -> list[float]:
        del scale
        return [r**2 / (1 + 2 * r) for r in step_ratios(grid)]


@dataclass(frozen=True, repr=False, eq=False)
class DampedStepRatio(GammaRule):
    """`StepRatio(1)` above a noise level, and a rule that damps below it.

    ``g_i = (h_i / h_{i+1}) (ψ_i / ψ_{i+1})`` with ``ψ = (1 + (cutoff / σ)²)^(-power / 2)`` at the middle
    of each step: 1 far above `cutoff`, and falling as σ^power far below it. At low noise a sample is
    all but determined and steps are all but exact; what is left to do there is to get rid of the
    alternating error that higher levels have made. Sampling multiplies it by another
    ``(σ / cutoff)^power`` on the way down, and encoding amplifies by as much what it errs by at the
    lowest levels, which is little where the model's flow is simple there, and not little where it
    is not. As steps shrink, g_i goes to 1: a base of odd order gains its order.

    Attributes:
        cutoff: in the units of σ; the standard deviation of the data, or less for less damping.
        power: 0 is `StepRatio(1)`.
    """

    cutoff: float = 0.5
    power: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "cutoff", number("cutoff", self.cutoff))
        object.__setattr__(self, "power", number("power", self.power))
        if not (0 < self.cutoff < math.inf and 0 <= self.power < math.inf):
            raise ValueError(
                "a damped step ratio needs cutoff > 0 and power >= 0, got cutoff = "
                f"{self.cutoff}, power = {self.power}"
            )

    def weights(self, grid: Grid, scale: Callable[[float], float]) -> list[float]:
        del scale
        middles = [(sigma + target) / 2 for sigma, target in grid.intervals()]
        psi = [(1 + (self.cutoff / m) ** 2) ** (-self.power / 2) for m in middles]
        return [r * (b / a) for r, (a, b) in zip(step_ratios(grid), pairwise(psi), strict=True)]


@dataclass(frozen=True, repr=False, eq=False)
class PerStep(GammaRule):
    """Given weights g_i in x, one for every step but the first, in sampling order.

    - Order: that of the base at least, for weights that stay below 1.
    - Amplification in x: the product of the values sampling, of their inverses inverting.
    - Side information: the sum of ``log2(1 / g_i)``, see `side_information_bound`.
    """

    values: tuple[float, ...]

    def __init__(self, values: Sequence[float]) -> None:
        if not isinstance(values, Iterable) or isinstance(values, str | bytes):
            raise TypeError(
                f"PerStep needs one weight for every step but the first, got {values!r}"
            )
        object.__setattr__(self, "values", tuple(number("a weight of PerStep", g) for g in values))
        for k, g in enumerate(self.values):
            if not (math.isfinite(g) and g >= 0):
                raise ValueError(f"weights must be finite and not negative, got {g} as values[{k}]")

    def weights(self, grid: Grid, scale: Callable[[float], float]) -> list[float]:
        del grid, scale
        return list(self.values)


@dataclass(frozen=True, repr=False, eq=False)
class SmoothedOutput(GammaRule):
    """Any rule, with its last weight g replaced by ``g / (1 + g)``.

    Cancels the alternating part of the returned sample for no evaluation, as Gragg's smoothing does
    (Gragg 1965): all of it where the last weight g is that of the step before, g', and all but
    ``(g' - g) / (g' (1 + g))`` of what stands at the last state but one where it is not. That is for a
    flow that hardly bends over the last two steps.

    - Order: that of `rule`.
    - Amplification: inverting, that of `rule` times ``1 + g``, for the last step divides by
      ``g / (1 + g)``.
    - Side information: ``log2(1 + g)`` bits more, 1 for g = 1.
    """

    rule: GammaRule

    def __init__(self, rule: float | GammaRule) -> None:
        object.__setattr__(self, "rule", as_rule(rule))

    def check_approximator(self, approximator: object) -> None:
        self.rule.check_approximator(approximator)

    def weights(self, grid: Grid, scale: Callable[[float], float]) -> list[float]:
        weights = self.rule.weights(grid, scale)
        return [*weights[:-1], *(g / (1 + g) for g in weights[-1:])]


def order_gaining(approximator: IntegrationApproximator) -> StepRatio:
    """The rule with which `BDIA` over a base of odd order p has order p + 1: ``StepRatio(p + 1)``.

    The base errs by ``C h^{p+1}`` ahead and by ``C (-h)^{p+1}``, of the same sign for odd p, behind. So
    ``F + g (x_{i+1} - B)`` errs by ``C (h_i^{p+1} - g h_{i+1}^{p+1})``, which vanishes for
    ``g = (h_i / h_{i+1})^{p+1}``. For even p the signs differ, and no positive weight cancels it.

    >>> from odesolvers import RK3, order_gaining
    >>> order_gaining(RK3())
    StepRatio(4)

    Raises:
        TypeError: if `approximator` is not an `IntegrationApproximator`.
        ValueError: if its order is even.
    """
    if not isinstance(approximator, IntegrationApproximator):
        raise TypeError(
            "order_gaining is for an IntegrationApproximator instance such as Euler(), got "
            f"{approximator!r}"
        )
    if approximator.order % 2 == 0:
        raise ValueError(
            f"{approximator} has the even order {approximator.order}, where no weights gain an order: "
            "use StepRatio(1) to invert with little amplification, or a base of odd order such as "
            "Euler() or RK3()"
        )
    return StepRatio(approximator.order + 1)


def as_rule(gamma: object) -> GammaRule:
    """A rule as it is; a number as `ConstantGamma`."""
    if isinstance(gamma, GammaRule):
        return gamma
    try:
        return ConstantGamma(number("gamma", gamma))
    except TypeError as error:
        raise TypeError(
            "gamma must be a number in (0, 1] or a GammaRule such as StepRatio(1), got "
            f"{type(gamma).__name__}"
        ) from error
