"""Propagation of errors through the shears of a run, over data that is Gaussian.

On such data the denoiser is linear, ``D = v x / (v + σ²)`` for the variance v, so every shear is a known
linear map of a pair of numbers, and the flow is known too: ``x(σ) ∝ sqrt(v + σ²)``. The errors of all
steps are taken to be independent; the covariance of those of a pair costs a few multiplications a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from .formula import Shear
from .grids import Grid

Plan: TypeAlias = "list[tuple[int, tuple[Shear, ...]]]"
"""The steps of a solver down a grid, numbered."""

ROUNDING: Final = 0.4
"""Root mean square error of rounding, over unit roundoff and the root mean square of what is rounded."""


@dataclass(frozen=True)
class Stage:
    """One shear over Gaussian data: ``newer = gain · older + slope · here``.

    `older`, `here` and `newer` are the levels of the three states; `spread` is the sum of squares of the
    terms whose sum is `slope`.
    """

    gain: float
    slope: float
    spread: float
    older: float
    here: float
    newer: float
    data_std: float

    @property
    def sizes(self) -> tuple[float, float, float]:
        """Root mean squares of the three states on the exact flow."""
        v = self.data_std
        return math.hypot(v, self.older), math.hypot(v, self.here), math.hypot(v, self.newer)


@dataclass(frozen=True)
class LinearRun:
    """The steps of a solver over Gaussian data, as linear maps of a pair of numbers.

    Attributes:
        steps: the stages of each step down the grid.
        grid: the noise levels.
        data_std: the standard deviation of the data.
        solver: the solver.
    """

    steps: list[list[Stage]]
    grid: Grid
    data_std: float
    solver: Any

    @classmethod
    def of(cls, solver: Any, plan: Plan, grid: Grid, last: int, data_std: float = 0.5) -> LinearRun:
        """The steps of `solver`, which `plan` holds, down to the level `last`."""
        linear, older, here = [], grid.levels[0], grid.levels[0]
        for (_, shears), newer in zip(plan[:last], grid.levels[1:], strict=False):
            stages = []
            for shear in shears:
                slope, spread = _slope(shear, data_std)
                stages.append(Stage(shear.gain, slope, spread, older, here, newer, data_std))
                older, here = here, newer
            linear.append(stages)
        return cls(linear, grid, data_std, solver)

    @property
    def stages(self) -> list[Stage]:
        """The stages of all steps, down the grid."""
        return [stage for step in self.steps for stage in step]

    @property
    def neighbours(self) -> bool:
        """Whether the states of a pair are neighbours on the grid, as in every two-step solver."""
        return self.solver.states == 2 and not self.solver.coupled

    @property
    def undoable(self) -> list[list[Stage]]:
        """All steps but, of a two-step solver, the first, which starts from a single state."""
        return self.steps[1:] if self.neighbours else self.steps

    def path(self, last: int, stop: int) -> list[Stage]:
        """The stages that lead from level `last` up to `stop`, in the order of their undoing."""
        first = stop + 1 if self.neighbours else stop
        return [stage for step in reversed(self.steps[first:last]) for stage in reversed(step)]

    def size(self, k: int) -> float:
        """The root mean square of the state at level `k` on the exact flow."""
        return math.hypot(self.data_std, self.grid.levels[k])

    def neighbour(self, last: int) -> float:
        """The state that a lone image at level `last` is paired with."""
        if not self.neighbours:
            return self.size(last)
        up = self.solver.start(self.grid.levels[last], self.grid.levels[last - 1])
        return _slope(up, self.data_std)[0] * self.size(last)

    def sizes(self) -> Iterator[tuple[float, float, float]]:
        """Root mean squares of the three states of each stage, truncation errors included."""
        if self.neighbours:
            for stage, errors in zip(self.stages, _do(self.stages), strict=True):
                older, here, newer = map(math.hypot, stage.sizes, map(_root, errors))
                yield older, here, newer
        else:
            for older, here, newer in self._coupled():
                yield abs(older), abs(here), abs(newer)

    def _coupled(self) -> Iterator[tuple[float, float, float]]:
        """The three states of each stage of a coupled solver, from a pair of the exact size."""
        older = here = self.size(0)
        for stage in self.stages:
            newer = stage.gain * older + stage.slope * here
            yield older, here, newer
            older, here = here, newer

    def round_trip_error(self, last: int, stop: int) -> float:
        """The relative error of the state at `stop`, undone from the pair at `last`, in roundoffs."""
        sizes = dict(zip(map(id, self.stages), self.sizes(), strict=True))

        def rounded(stage: Stage, variance: float) -> float:
            return _rounded(stage, sizes[id(stage)], variance)

        return _undo(self.path(last, stop), rounded) / self.size(stop)

    def encoding_error(self, last: int, stop: int) -> float:
        """The relative error of a lone image at level `last`, encoded up to level `stop`.

        A coupled solver passes through states that are not of the flow, so that the errors of its
        stages are no sum of independent ones; that of the whole run is taken instead.
        """
        path, size = self.path(last, stop), self.size(stop)
        if self.neighbours:
            start = self.neighbour(last) - self.size(last - 1)
            return _undo(path, _truncated, start) / size
        return abs(self.code_size(last, stop) - size) / size

    def code_size(self, last: int, stop: int) -> float:
        """The size at level `stop` of the code of a lone image at level `last`."""
        here, newer = self.neighbour(last), self.size(last)
        for stage in self.path(last, stop):
            here, newer = (newer - stage.slope * here) / stage.gain, here
        return abs(here) if math.isfinite(here) else math.inf

    def sampling_error(self, roundoff: float = 0.0) -> float:
        """The relative error of a sample, by truncation and, in a two-step solver, by rounding."""
        size = self.size(len(self.steps))
        if self.neighbours:
            return _root([newer for *_, newer in _do(self.stages, roundoff)][-1]) / size
        first = [self.size(0), *(here for _, here, _ in self._coupled())][-1]
        return abs(first - size) / size

    def amplification_down(self, unit: float) -> float:
        """The largest growth of an alternating error down the grid, of ``x / sqrt(1 + unit² σ²)``."""
        return largest_product(
            math.prod(abs(s.gain) * _scale(s.here, s.newer, unit) for s in step)
            for step in self.steps
        )

    def amplification_up(self, unit: float) -> float:
        """The largest growth of an alternating error up the grid."""
        return largest_product(
            math.prod(_scale(s.here, s.older, unit) / abs(s.gain) for s in step)
            for step in reversed(self.undoable)
        )


def _slope(shear: Shear, data_std: float) -> tuple[float, float]:
    """The factor of the current state in `rest`, and the sum of squares of its terms."""
    v = data_std * data_std
    values = [1.0]
    for point, sigma in shear.calls:
        x = sum(c * values[k] for k, c in point.terms.items())
        values.append(v / (v + sigma * sigma) * x)
    terms = [c * values[k] for k, c in shear.rest.terms.items()]
    return sum(terms), sum(term * term for term in terms)


def _rounded(stage: Stage, sizes: tuple[float, float, float], variance: float) -> float:
    """Variance of the rounding errors of a stage and its undoing, in `older`, in squared roundoffs.

    `sizes` are the root mean squares of its states, `variance` is that of the error of `here`.

    Both ways one product and one sum are rounded. Where the weight is 1 or near it, the roundings back
    undo most of those on the way, and this is too high by a factor of 3 or more. `rest` is the same to
    the bit both ways where `here` is: its rounding counts in the share of elements that differ.
    """
    older, here, newer = (size * size for size in sizes)  # unlike a power, this may overflow
    g = stage.gain
    share = min(1.0, variance / (ROUNDING * ROUNDING * here)) if here else 1.0
    rest = 2.0 * share * stage.spread * here
    inexact = 0.0 if abs(math.frexp(g)[0]) == 0.5 else 1.0  # a power of two multiplies exactly
    there = newer + (1.0 + inexact) * g * g * older
    return ROUNDING * ROUNDING * ((there + rest) / (g * g) + inexact * older)


def _truncated(stage: Stage, variance: float) -> float:
    """The squared error of `older`, computed from exact states."""
    del variance
    older, here, newer = stage.sizes
    error = (newer - stage.slope * here) / stage.gain - older
    return error * error


def _undo(
    path: Iterable[Stage], local: Callable[[Stage, float], float], start: float = 0.0
) -> float:
    """Standard deviation of the error of the last state found, where `here` begins off by `start`.

    Each stage adds an independent error of variance ``local(stage, variance of here)``:

        older = (newer - slope · here) / gain
    """
    hh, hn, nn = start * start, 0.0, 0.0
    for stage in path:
        r, g = stage.slope, stage.gain
        oo = (nn - 2.0 * r * hn + r * r * hh) / (g * g)
        oh = (hn - r * hh) / g
        hh, hn, nn = max(oo, 0.0) + local(stage, hh), oh, hh
    return _root(hh)


def _do(path: Iterable[Stage], roundoff: float = 0.0) -> Iterator[tuple[float, float, float]]:
    """Variances of the errors of older, here and newer, stage by stage down the grid:

    newer = gain · older + slope · here
    """
    oo, oh, hh = 0.0, 0.0, 0.0
    for stage in path:
        older, here, newer = stage.sizes
        r, g = stage.slope, stage.gain
        # A product and a sum are rounded: errors of their terms, which may be larger than the sum.
        rounding = roundoff * math.hypot(newer, g * older, math.sqrt(stage.spread) * here)
        local = math.hypot(g * older + r * here - newer, rounding)
        nn = max(g * g * oo + 2.0 * g * r * oh + r * r * hh, 0.0) + local * local
        yield oo, hh, nn
        oo, oh, hh = hh, g * oh + r * hh, nn


def _root(variance: float) -> float:
    return math.sqrt(variance) if variance < math.inf else math.inf  # also of what is no number


def _scale(sigma: float, target: float, unit: float) -> float:
    return math.hypot(1.0, unit * sigma) / math.hypot(1.0, unit * target)


def largest_product(factors: Iterable[float]) -> float:
    """The largest product of consecutive factors, 1 for none."""
    worst = product = 1.0
    for factor in factors:
        product = max(product, 1.0) * factor
        worst = max(worst, product)
    return worst
