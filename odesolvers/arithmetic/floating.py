"""Floating point: the state is the tensor itself, and inversion is exact up to rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..combination import Combination, Factored, Mean
from ..step import Blend, Move, Step
from .base import Arithmetic
from .stack import Stack

_NARROW = torch.float16
"""Whose range a mean of states may leave, where the states do not: its weights may be large."""


@dataclass(frozen=True)
class FloatingPoint(Arithmetic):
    """States in the dtype they come in.

    `rest` is formed first and on its own, up to a factor. It is a function of the current state alone,
    computed in the same order in both directions, so its rounding is the same to the bit and drops out
    of a round trip: what remains is that of moving the other state towards the mean that it is, by
    `torch.lerp`, or of one multiplication and one addition where it is none, see `Step.blend`. Steps of
    one call go the short way of `move` instead; a subclass is not asked to, and its methods are called.
    """

    def combine(
        self, combination: Combination, values: Sequence[Tensor], out: Tensor | None = None
    ) -> Tensor:
        mean = combination.mean
        if mean is not None and mean.moves:
            return _mean(mean, values, out)
        factored = combination.factored
        if factored is None:
            return torch.zeros_like(values[0])
        if not factored.others:
            return torch.mul(values[factored.k], factored.factor, out=out)
        total, factor = _sum(factored, values, out)
        return total if factor == 1.0 else total.mul_(factor)

    def forward(
        self,
        step: Step,
        older: Tensor | None,
        values: Sequence[Tensor],
        stack: Stack | None = None,
        out: Tensor | None = None,
        scratch: Tensor | None = None,
    ) -> Tensor:
        blend = step.blend
        if blend is not None and older is not None and older.dtype is not _NARROW:
            return _blended(blend, older, values, out, scratch)
        if older is None or step.gain == 0.0:
            return self.combine(step.rest, values, out)
        gain, factored = step.gain, step.rest.factored
        if factored is None:
            return torch.mul(older, gain, out=out)
        rest, factor = _sum(factored, values, scratch)
        if gain == 1.0:
            if out is older:
                return older.add_(rest, alpha=factor)
            return torch.add(older, rest, alpha=factor, out=out)
        scaled = older.mul_(gain) if out is older else torch.mul(older, gain, out=out)
        return scaled.add_(rest, alpha=factor)

    def inverse(
        self,
        step: Step,
        newer: Tensor,
        values: Sequence[Tensor],
        stack: Stack | None = None,
        out: Tensor | None = None,
        scratch: Tensor | None = None,
    ) -> Tensor:
        blend = step.unblend
        if blend is not None and newer.dtype is not _NARROW:
            return _blended(blend, newer, values, out, scratch)
        factored = step.rest.factored
        if factored is None:
            return torch.div(newer, step.gain, out=out)
        rest, factor = _sum(factored, values, scratch)
        if out is newer:
            older = newer.sub_(rest, alpha=factor)
        else:
            older = torch.sub(newer, rest, alpha=factor, out=out)
        return older if step.gain == 1.0 else older.div_(step.gain)


def _blended(
    blend: Blend,
    state: Tensor,
    values: Sequence[Tensor],
    out: Tensor | None,
    scratch: Tensor | None,
) -> Tensor:
    """``kept · state + moved · mean``, from the end that it is nearer to."""
    mean = _mean(blend.mean, values, scratch)
    if blend.nearer_to_the_mean:
        return torch.lerp(mean, state, blend.kept, out=out)
    return torch.lerp(state, mean, blend.moved, out=out)


def move(how: Move, state: Tensor, here: Tensor, denoised: Tensor, scratch: Tensor | None) -> None:
    """What `FloatingPoint` does with a stage that is a `Move`, in place: `state` becomes the new one.

    Equal to `FloatingPoint.forward` and `inverse` to the bit; runs in float32 and float64 take it.
    """
    _, turned, adds, weight, back, share = how
    if turned:
        here, denoised = denoised, here
    if adds:
        term = torch.add(here, denoised, alpha=weight, out=scratch)
        torch.add(state, term, alpha=share, out=state)
        return
    term = torch.lerp(here, denoised, weight, out=scratch)
    if back:
        torch.lerp(term, state, share, out=state)
    else:
        torch.lerp(state, term, share, out=state)


def _mean(mean: Mean, values: Sequence[Tensor], out: Tensor | None) -> Tensor:
    """A tensor that is the mean; of one term, the value itself."""
    first, moves = mean
    if not moves:
        return values[first]
    k, weight = moves[0]
    moved = torch.lerp(values[first], values[k], weight, out=out)
    for k, weight in moves[1:]:
        moved.lerp_(values[k], weight)
    return moved


def _sum(factored: Factored, values: Sequence[Tensor], out: Tensor | None) -> tuple[Tensor, float]:
    """A tensor, and the factor by which it is the combination; of one term, the value itself."""
    factor, k, others = factored
    if not others:
        return values[k], factor
    if values[k].element_size() < 4:
        # In half precision the sum could overflow where the combination does not.
        total = torch.mul(values[k], factor, out=out)
        for j, ratio in others:
            total.add_(values[j], alpha=factor * ratio)
        return total, 1.0
    j, ratio = others[0]
    total = torch.add(values[k], values[j], alpha=ratio, out=out)
    for j, ratio in others[1:]:
        total.add_(values[j], alpha=ratio)
    return total, factor
