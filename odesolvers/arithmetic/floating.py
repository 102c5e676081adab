"""Floating point: the state is the tensor itself, and inversion is exact up to rounding."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import Arithmetic


@dataclass(frozen=True, repr=False, eq=False)
class FloatingPoint(Arithmetic):
    """States in their own dtype. ``rest`` has the same bits both ways and drops out of a round trip.

    In float16 and bfloat16 a step is summed in float32 and rounded once, so that neither the layout of a
    tensor nor the other elements of its batch matter here; in the kernels of a network they may.
    """

    def forward(self, gain: float, a: Tensor | None, rest: Tensor, memory: None) -> Tensor:
        return rest if a is None or gain == 0.0 else rest.add_(a, alpha=gain)

    def inverse(self, gain: float, c: Tensor, rest: Tensor, memory: None) -> Tensor:
        a = c - rest
        return a if gain == 1.0 else a.div_(gain)
