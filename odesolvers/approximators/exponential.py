"""Exponential integrators in the data prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from ..combination import Combination
from .base import Denoise, IntegrationApproximator, euler
from .euler import variance_preserving


@final
@dataclass(frozen=True)
class DPMSolverPP2S(IntegrationApproximator):
    """DPM-Solver++(2S), single step (Lu et al. 2022, arXiv 2211.01095, algorithm 1, r = 1/2).

    The linear part of the flow is solved exactly: ``Δ = (1 - τ/σ) (D(u, m) - x)``, with the middle of
    log σ, ``m = sqrt(σ τ)``, and ``u = x + (1 - m/σ) (D(x, σ) - x)``. From the level 0, where the slope
    vanishes, it stays put. Order 2, one evaluation shared by every target and one for each target;
    state scale variance preserving, as published.
    """

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 2

    def increment(
        self, x: Combination, sigma: float, target: float, denoise: Denoise
    ) -> Combination:
        if sigma == 0.0:
            return euler(x, sigma, target, denoise)
        middle = (sigma * target) ** 0.5
        u = x + (1 - middle / sigma) * (denoise(x, sigma) - x)
        return (1 - target / sigma) * (denoise(u, middle) - x)

    def scale(self, sigma: float) -> float:
        return variance_preserving(sigma)
