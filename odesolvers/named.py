"""Published solvers that are others of this package under a name of their own."""

from __future__ import annotations

from collections.abc import Sequence

from .approximators import Euler, Exponential, IntegrationApproximator
from .arithmetic import Arithmetic, FloatingPoint
from .bdia import BDIA
from .coupled import McCallumFoster
from .gamma import PerStep, StepRatio
from .values import number


def BELM(a2: Sequence[float] | None = None, arithmetic: Arithmetic = FloatingPoint()) -> BDIA:
    """BELM (Wang et al., NeurIPS 2024, arXiv 2410.07273): two-step formulas with one evaluation.

        x_{i-1} = a2 x_{i+1} + a1 x_i + b ε(x_i, σ_i)              ε(x, σ) = (x - D(x, σ)) / σ

    in x = z / α. Consistency fixes ``a1 = 1 - a2`` and order 1 fixes ``b = -(h_i + a2 h_{i+1})``: the
    family has one free number a step, and is `BDIA` over `Euler` with ``g_i = a2``.

    Args:
        a2: for every step but the first, in sampling order. By default ``(h_i / h_{i+1})²``, which
            cancels the leading error: O-BELM, of order 2.
        arithmetic: see `BDIA`.

    Raises:
        TypeError, ValueError: if an argument is not usable.
    """
    return BDIA(Euler(), StepRatio(2) if a2 is None else PerStep(a2), arithmetic)


def Rex(
    approximator: IntegrationApproximator,
    zeta: float = 0.999,
    arithmetic: Arithmetic = FloatingPoint(),
) -> McCallumFoster:
    """Rex (Blasingame and Liu, arXiv 2502.08834), for the flow: `McCallumFoster` over `Exponential`.

    The coupling is that of McCallum and Foster, in ``y = x / σ`` over the time 1/σ, where the flow is
    ``dy / d(1/σ) = D(x, σ)``; its weights in x are therefore r = τ / σ and ζ r. Order that of the
    approximator, twice its evaluations. Sampling contracts both states by τ / σ a step, all of which
    `FixedPoint` has to store.

    Args:
        approximator: the one-step method that is run in these variables.
        zeta: the coupling ζ, in (0, 1].
        arithmetic: see `BDIA`.

    Raises:
        TypeError, ValueError: if an argument is not usable.
    """
    return McCallumFoster(Exponential(approximator), zeta, arithmetic)


def MALI(eta: float = 1.0, arithmetic: Arithmetic = FloatingPoint()) -> BDIA:
    """The asynchronous leapfrog integrator of MALI (Zhuang et al. 2021, arXiv 2102.04668, algorithm 1).

    It carries the state z with a velocity v, which begins as the slope d(z, σ). Over a step h:

        k = z + h v / 2          v' = v + 2 η (d(k, σ + h / 2) - v)          z' = k + h v' / 2

    The midpoints k follow `BDIA` over `Euler` with ``g_i = (2 η - 1) h_i / h_{i+1}``, h the distances of
    midpoints, and z is where they begin and end. So MALI is that solver on another grid: n of its steps
    over `sigmas` are n + 1 steps over ``midpoint_sigmas(sigmas)``, at one evaluation each, to the same
    sample and, by the same evaluations, back. From a lone image at the level 0 up, see `BDIA`.

    Order 2 for η = 1, where it is ``StepRatio(1)``; 1 for less, which damps the alternating error when
    sampling and amplifies it when inverting.

    Args:
        eta: the damping η, in (1/2, 1]; at 1/2 the velocity is forgotten, and nothing leads back.
        arithmetic: see `BDIA`.

    Raises:
        TypeError, ValueError: if an argument is not usable.
    """
    eta = number("eta", eta)
    if not 0.5 < eta <= 1:
        raise ValueError(f"eta must be in (1/2, 1], got {eta}")
    return BDIA(Euler(), StepRatio(factor=2 * eta - 1), arithmetic)
