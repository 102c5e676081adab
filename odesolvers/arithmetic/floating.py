"""Floating point: the state is the tensor itself, and inversion is exact up to rounding."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import Arithmetic


@dataclass(frozen=True, repr=False, eq=False)
class FloatingPoint(Arithmetic):
    """States in their own dtype. ``rest`` has the same bits both ways and drops out of a round trip."""

    def forward(self, gain: float, a: Tensor | None, rest: Tensor, memory: None) -> Tensor:
        return rest if a is None or gain == 0.0 else rest.add_(a, alpha=gain)

    def inverse(self, gain: float, c: Tensor, rest: Tensor, memory: None) -> Tensor:
        a = c - rest
        return a if gain == 1.0 else a.div_(gain)
