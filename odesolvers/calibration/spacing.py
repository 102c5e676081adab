"""Noise levels as unknowns of a fit: always decreasing, between ends that stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from ..grids import Grid
from .least_squares import Vector

_RHO: Final = 7.0
_WIDEST: Final = 5.0
"""The most by which the logarithm of a step may differ from that of the first, in σ^(1/7)."""


class Spacing:
    """All grids of n steps between two ends, by n - 1 unknowns.

    The unknowns are ``log(Δ_k / Δ_0)`` for k = 1 ... n - 1, of the steps ``Δ_k = u_k - u_{k+1}`` in
    ``u = σ^(1/7)``: all are 0 on a grid of `karras_sigmas`. Every vector is a decreasing grid.

    A grid that ends in 0 has its other levels above the lowest one of the denoiser.

    Args:
        grid: its steps and its ends.
        lowest: the lowest level of the denoiser, 0 for none.
    """

    def __init__(self, grid: Grid, lowest: float = 0.0) -> None:
        self.ends, self.steps = (grid.levels[0], grid.levels[-1]), grid.steps
        low = self.ends[1] if self.ends[1] > 0 else min(max(lowest, 0.0), grid.levels[-2])
        self._top, self._low = self.ends[0] ** (1 / _RHO), low ** (1 / _RHO)

    def unknowns(self, grid: Grid) -> Vector:
        """The unknowns of a grid of these ends."""
        u = np.array(grid.levels) ** (1 / _RHO)
        u[-1] = self._low
        steps = np.log(np.maximum(u[:-1] - u[1:], np.finfo(float).tiny))
        return self.admissible(steps[1:] - steps[0])

    def admissible(self, unknowns: Vector) -> Vector:
        """`unknowns` of steps that no precision merges."""
        return np.clip(unknowns, -_WIDEST, _WIDEST)

    def grid(self, unknowns: Vector) -> Grid:
        """The grid of these unknowns."""
        steps = np.exp(np.concatenate([[0.0], unknowns]))
        share = np.cumsum(steps[:-1]) / steps.sum()
        inner = (self._top + share * (self._low - self._top)) ** _RHO
        return Grid((self.ends[0], *inner.tolist(), self.ends[1]))

    def starts(self) -> list[Grid]:
        """Grids to start from: even in log σ, and even in the time ``σ / (σ + shift)``.

        That is the time of flow matching, shifted as Esser et al. 2024 (arXiv 2403.03206) do: dense
        where samples are decided, sparse at both ends, where the flow is nearly straight.
        """
        top = self.ends[0]
        low = max(self._low**_RHO, 1e-4 * top)
        found = [np.geomspace(top, low, self.steps + 1)]
        for shift in (0.3, 1.0, 3.0):
            t = np.linspace(top / (top + shift), low / (low + shift), self.steps + 1)
            found.append(shift * t / (1 - t))
        return [Grid((top, *levels[1:-1].tolist(), self.ends[1])) for levels in found]

    def among(self, grid: Grid, known: Sequence[float]) -> Grid:
        """The grid with its inner levels moved to the nearest of the levels `known`, no two to one.

        Raises:
            ValueError: if too few of them lie between the ends.
        """
        top, last = self.ends
        single = np.float32  # the ends may be among them, rounded
        inside = (level for level in known if single(last) < single(level) < single(top))
        table = sorted(set(inside), reverse=True)
        inner = self.steps - 1
        if len(table) < inner:
            raise ValueError(
                f"a grid of {self.steps} steps has {inner} inner levels, and only {len(table)} of the "
                f"levels to choose from lie between its ends, {top:.6g} and {last:.6g}"
            )
        u, chosen, place = np.array(table) ** (1 / _RHO), [], 0
        for k, level in enumerate(grid.levels[1:-1]):
            end = len(table) - (inner - k) + 1  # leaves enough for the levels that follow
            place += int(np.abs(u[place:end] - level ** (1 / _RHO)).argmin())
            chosen.append(table[place])
            place += 1
        return Grid((top, *chosen, last))
