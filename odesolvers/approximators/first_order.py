"""First order: Euler, and DDIM and FlowEuler, which are Euler in other scales of the state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

from ..formula import Combination, Denoise
from .base import IntegrationApproximator, euler


@final
@dataclass(frozen=True, repr=False, eq=False)
class Euler(IntegrationApproximator):
    """``Δ = (τ - σ) d(x, σ)``. Order 1, one evaluation, shared by every target.

    k-diffusion's `sample_euler` without churn.
    """

    order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 1

    def increment(
        self, x: Combination, sigma: float, target: float, denoise: Denoise
    ) -> Combination:
        return euler(x, sigma, target, denoise)


@final
@dataclass(frozen=True, repr=False, eq=False)
class DDIM(IntegrationApproximator):
    """Deterministic DDIM (Song et al. 2021, arXiv 2010.02502, equation 12 with η = 0).

    In ``x = z / sqrt(ᾱ)`` it is `Euler`; the state it is published in is the variance-preserving
    ``z = x / sqrt(1 + σ²)``, the scale in which `BDIA` applies a constant γ. Order 1, one evaluation.
    """

    order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 1

    def increment(
        self, x: Combination, sigma: float, target: float, denoise: Denoise
    ) -> Combination:
        return euler(x, sigma, target, denoise)

    def scale(self, sigma: float) -> float:
        return variance_preserving(sigma)


@final
@dataclass(frozen=True, repr=False, eq=False)
class FlowEuler(IntegrationApproximator):
    """The own sampler of flow-matching models, ``z' = z + (t' - t) v(z, t)``.

    In ``x = z / (1 - t)``, ``σ = t / (1 - t)`` it is `Euler`; the state it is published in is
    ``z = x / (1 + σ)``, the scale in which `BDIA` applies a constant γ. Order 1, one evaluation. See
    `odesolvers.models.FlowDenoiser`.
    """

    order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 1

    def increment(
        self, x: Combination, sigma: float, target: float, denoise: Denoise
    ) -> Combination:
        return euler(x, sigma, target, denoise)

    def scale(self, sigma: float) -> float:
        return 1 / (1 + sigma)


def variance_preserving(sigma: float) -> float:
    """``s(σ) = 1 / sqrt(1 + σ²)``: data of unit variance keeps unit variance at every level."""
    return 1 / math.sqrt(1 + sigma * sigma)
