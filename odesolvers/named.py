"""Published solvers that are others of this package under a name of their own."""

from __future__ import annotations

from collections.abc import Sequence

from .approximators import Euler, Exponential, IntegrationApproximator
from .arithmetic import Arithmetic, FloatingPoint
from .bdia import BDIA
from .coupled import McCallumFoster
from .gamma import PerStep, StepRatio


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
