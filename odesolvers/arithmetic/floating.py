"""Floating point: the state is the tensor itself, and inversion is exact up to rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..combination import Combination
from ..step import Step
from .base import Arithmetic
from .stack import Stack


@dataclass(frozen=True)
class FloatingPoint(Arithmetic):
    """States in the dtype they come in.

    `rest` is formed first and on its own. It is a function of the current state alone, computed in
    the same order in both directions, so its rounding is the same to the bit and drops out of a
    round trip: what remains is the rounding of one multiplication and one addition a step.
    """

    def combine(self, combination: Combination, values: Sequence[Tensor]) -> Tensor:
        terms = list(combination)
        if not terms:
            return torch.zeros_like(values[0])
        (first, factor), *others = terms
        total = values[first] * factor
        for k, c in others:
            total.add_(values[k], alpha=c)
        return total

    def forward(
        self,
        step: Step,
        older: Tensor | None,
        values: Sequence[Tensor],
        stack: Stack | None = None,
    ) -> Tensor:
        rest = self.combine(step.rest, values)
        return rest if older is None or step.gain == 0.0 else rest.add_(older, alpha=step.gain)

    def inverse(
        self, step: Step, newer: Tensor, values: Sequence[Tensor], stack: Stack | None = None
    ) -> Tensor:
        rest = self.combine(step.rest, values)
        return torch.sub(newer, rest, out=rest).div_(step.gain)
