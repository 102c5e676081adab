"""The second-order method of EDM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from ..combination import Combination
from .base import Denoise, IntegrationApproximator, euler, slope


@final
@dataclass(frozen=True)
class HeunEDM(IntegrationApproximator):
    """The average of the slopes at both ends (Karras et al. 2022, arXiv 2206.00364, algorithm 1).

    ``Δ = (τ - σ) (d(x, σ) + d(x + (τ - σ) d(x, σ), τ)) / 2``. Order 2, one evaluation
    shared by every target and one for each target.

    k-diffusion's `sample_heun` without churn. From the level 0, where the slope vanishes, it is the
    trapezoid rule with one evaluation.
    """

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 2

    def increment(
        self, x: Combination, sigma: float, target: float, denoise: Denoise
    ) -> Combination:
        increment = euler(x, sigma, target, denoise)
        return (increment + (target - sigma) * slope(x + increment, target, denoise)) / 2


def leaving(sigma: float, method: IntegrationApproximator) -> IntegrationApproximator:
    """`method` to leave the level `sigma` with; from the level 0 up it is `HeunEDM`.

    That needs the slope at the other end only; most others would learn nothing about the image.
    """
    return method if sigma > 0.0 else HeunEDM()
