"""Solvers that carry two coupled states down the grid: EDICT, McCallum-Foster, Rex, reversible Heun.

Each step is a sequence of shears of the pair, ``(a, b) -> (b, gain · a + rest(b))``, listed here as in
the papers and undone in reverse order. The step to the level 0 is taken in the plain state x, whatever
the scale of the approximator: the ratio of two scales may not be finite there.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Final, final

from .approximators import (
    IntegrationApproximator,
    check_approximator,
    euler,
    leaving,
    slope,
    variance_preserving,
)
from .arithmetic import Arithmetic, FloatingPoint, check_arithmetic
from .checks import checked_share
from .formula import Combination, Shear
from .grids import Grid
from .solver import Solver

SWAP: Final = Shear((), rest=Combination({}), gain=1.0)
"""``(a, b) -> (b, a)``"""


class CoupledSolver(Solver):
    """A solver of two states that go down the grid together, each updated with the help of the other.

    The pair is (state, companion), both at one level, and begins as the same tensor twice: a run from
    a lone tensor, at either end, costs no evaluation to start. The sample is the first of them.
    """

    coupled: ClassVar[bool] = True

    @abstractmethod
    def step(self, sigma: float, target: float) -> tuple[Shear, ...]:
        """The shears of (state, companion) from level `sigma` to level `target`."""

    @final
    def steps(self, grid: Grid) -> list[tuple[Shear, ...]]:
        return [self.step(sigma, target) for sigma, target in grid.intervals()]

    @final
    def start(self, sigma: float, target: float) -> Shear:
        raise TypeError(
            f"{self} starts with two copies of a lone state, not with a step of its own"
        )


@final
@dataclass(frozen=True, repr=False, eq=False)
class EDICT(CoupledSolver):
    """EDICT (Wallace, Gokul, Naik, CVPR 2023, arXiv 2211.12446, equations 14 and 15).

    Two states take the DDIM step, each with the noise found at the other, and are then mixed to keep
    them together. In the unscaled state x, with s(σ) = 1 / sqrt(1 + σ²):

        x' = x + (τ - σ) ε(y)              y' = y + (τ - σ) ε(r x')            ε(x) = (x - D(x, σ)) / σ
        x'' = p x' + (1 - p) y'            y'' = p y' + (1 - p) x''            r = s(τ) / s(σ)

    The factor r is part of the published method: its second call hands the network the
    variance-preserving state x', which is in the scale of the level τ, with the level σ.

    Order 1 at best, two evaluations a step, both at σ. Inverting amplifies the difference of the two
    states by 1 / p² a step, which for the default is 1,400 over 50 steps. The order of x and y is not
    alternated.

    Args:
        p: the mixing weight, in (0, 1]; 1 does not mix.
        arithmetic: see `BDIA`.

    Raises:
        TypeError, ValueError: at construction, if `p` or `arithmetic` is not usable.
    """

    p: float = 0.93
    arithmetic: Arithmetic = FloatingPoint()

    def __post_init__(self) -> None:
        object.__setattr__(self, "p", checked_share("p", self.p))
        check_arithmetic(self.arithmetic)

    def step(self, sigma: float, target: float) -> tuple[Shear, ...]:
        """The shears from (x, y) at level `sigma` to (x'', y'') at level `target`."""
        p, r = (
            self.arithmetic.weight(self.p),
            variance_preserving(target) / variance_preserving(sigma),
        )
        mix = Shear.of(lambda y, D: (1 - p) * y, gain=p)
        return (
            Shear.of(lambda y, D: euler(y, sigma, target, D), gain=1.0),
            Shear.of(lambda x, D: euler(r * x, sigma, target, D), gain=1.0),
            mix,
            mix,
        )


@final
@dataclass(frozen=True, repr=False, eq=False)
class McCallumFoster(CoupledSolver):
    """The reversible coupling of McCallum and Foster (2024, arXiv 2410.11648), over any one-step method.

    In the state ``z = s(σ) x`` of the approximator Ψ, over a step h from σ to τ:

        y' = ζ y + (1 - ζ) v + Ψ_h(v)          v' = v - Ψ_{-h}(y')
        v  = v' + Ψ_{-h}(y')                   y  = (y' - (1 - ζ) v - Ψ_h(v)) / ζ

    or in x, with r = s(σ) / s(τ), and r = 1 to the level 0:

        y' = ζ r (y - v) + v + Δ(σ → τ | v)    v' = r (v - y' - Δ(τ → σ | y')) + y'

    Order that of the approximator, twice its evaluations. Inverting amplifies the difference of the two
    states by 1 / ζ a step, and both by 1 / r. From the level 0 up, Δ is that of `HeunEDM`, as in `BDIA`.

    Args:
        approximator: the one-step method.
        zeta: the coupling ζ, in (0, 1].
        arithmetic: see `BDIA`.

    Raises:
        TypeError, ValueError: at construction, if an argument is not usable.
    """

    approximator: IntegrationApproximator
    zeta: float = 0.999
    arithmetic: Arithmetic = FloatingPoint()

    def __post_init__(self) -> None:
        check_approximator(self, self.approximator)
        object.__setattr__(self, "zeta", checked_share("zeta", self.zeta))
        check_arithmetic(self.arithmetic)

    def step(self, sigma: float, target: float) -> tuple[Shear, ...]:
        """The shears from (y, v) at level `sigma` to (y', v') at level `target`."""
        scale, weight = self.approximator.scale, self.arithmetic.weight
        r = scale(sigma) / scale(target) if target > 0.0 else 1.0
        ahead = self.approximator.increment_to
        behind = leaving(target, self.approximator).increment_to
        g, r = weight(self.zeta * r), weight(r)
        return (
            Shear.of(lambda v, D: v + ahead(v, sigma, target, D) - g * v, gain=g),
            Shear.of(lambda y, D: y - r * (y + behind(y, target, sigma, D)), gain=r),
        )


@final
@dataclass(frozen=True, repr=False, eq=False)
class ReversibleHeun(CoupledSolver):
    """Reversible Heun (Kidger, Foster, Li, Lyons 2021, arXiv 2105.13493), for the flow's slope d.

    Over a step h = τ - σ, on (y, ŷ):

        ŷ' = 2 y - ŷ + h d(ŷ, σ)               y' = y + h (d(ŷ, σ) + d(ŷ', τ)) / 2

    Order 2 for one evaluation a step, and one more for the run: the slope at ŷ' is that of the next
    step. ŷ is the leapfrog rule, ``BDIA(Euler(), 1.0)``, and y its output smoothed as Gragg (1965) does.
    Neither is damped in either direction. The step to the level 0 is Euler's, ``y' = y + h d(ŷ, σ)``,
    and leaves ŷ as it is.

    Args:
        arithmetic: see `BDIA`. All weights are 1 or -1: `FixedPoint` needs no side information.

    Raises:
        TypeError: at construction, if `arithmetic` is not usable.
    """

    arithmetic: Arithmetic = FloatingPoint()

    def __post_init__(self) -> None:
        check_arithmetic(self.arithmetic)

    def step(self, sigma: float, target: float) -> tuple[Shear, ...]:
        """The shears from (y, ŷ) at level `sigma` to (y', ŷ') at level `target`."""
        h = target - sigma
        if target == 0.0:
            return _along_slope(sigma, h), SWAP
        # ŷ' = 2 (y + h d(ŷ, σ) / 2) - ŷ
        reflect = Shear.of(lambda y, D: 2.0 * y, gain=-1.0)
        return _along_slope(sigma, h / 2), reflect, _along_slope(target, h / 2), SWAP


def _along_slope(sigma: float, h: float) -> Shear:
    """``(a, b) -> (b, a + h d(b, σ))``"""
    return Shear.of(lambda b, D: h * slope(b, sigma, D), gain=1.0)
