"""The batch that solvers are fitted to: where its states should end, and how far off they do."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from ..approximators import RK4
from ..grids import Grid
from ..run import Denoiser
from ..solver import Solver
from .objective import eight_bits, rows


class Batch:
    """Noise, the fine solution from it, and the errors of solvers against both.

    Args:
        denoiser, extra_args: see `Solver.sample`.
        x: noise, ``(B, ...)``.
        grid: its first level is that of `x`, its last that of the samples.
        steps: steps of the fine solution, at least.

    Attributes:
        target: the end of the fine solution.
        path: the fine solution at every level of `grid`.
        evaluations: denoiser calls so far.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        grid: Grid,
        extra_args: Mapping[str, Any] | None,
        steps: int,
    ) -> None:
        self.denoiser, self.x, self.extra_args = denoiser, x, extra_args
        self.lowest = float(getattr(denoiser, "sigma_min", 0.0))
        self.evaluations = 0
        self._solve_finely(grid, steps)

    def _solve_finely(self, grid: Grid, steps: int) -> None:
        """Computes the target by `RK4` on a refinement of the grid.

        A step to level 0 is refined down to the lowest level of the denoiser, where it has one.
        """
        each, fine = max(1, math.ceil(steps / grid.steps)), [grid.levels[0]]
        for sigma, target in grid.intervals():
            roots = np.linspace(sigma ** (1 / 7), target ** (1 / 7), each + 1)[1:]
            inner = (roots[:-1] ** 7).tolist()
            fine += [level for level in inner if level >= self.lowest] + [target]
        path: dict[int, Tensor] = {}

        def keep(info: Mapping[str, Any]) -> None:
            if info["i"] % each == 0:
                path[info["i"] // each] = info["x"].cpu()

        solution = RK4().sample(
            self.denoiser, self.x, fine, extra_args=self.extra_args, callback=keep
        )
        self.evaluations += solution.nfe
        self.target = solution.x
        self.path = [*(path[k] for k in range(grid.steps)), solution.x.cpu()]

    def sampled(self, solver: Solver, grid: Grid) -> Tensor:
        """Samples of the batch from its noise."""
        end = solver.sample(self.denoiser, self.x, grid, extra_args=self.extra_args)
        self.evaluations += end.nfe
        return end.x

    def encoded(self, solver: Solver, grid: Grid, images: Tensor) -> Tensor:
        """Codes of lone images."""
        code = solver.invert(self.denoiser, images, grid, extra_args=self.extra_args)
        self.evaluations += code.nfe
        return code.x

    def errors(
        self, solver: Solver, grid: Grid, kinds: Collection[str]
    ) -> dict[str, Tensor] | None:
        """The errors of each of these kinds, see `Objective` and `rows`; None if a run diverged."""
        found: dict[str, Tensor] = {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of weights that amplify: that is measured here
                if "sampling" in kinds or "consistency" in kinds:
                    samples = self.sampled(solver, grid)
                if "sampling" in kinds:
                    found["sampling"] = rows(samples - self.target, self.target)
                if "encoding" in kinds:
                    code = self.encoded(solver, grid, self.target)
                    found["encoding"] = rows(code - self.x, self.x)
                if "consistency" in kinds:
                    code = self.encoded(solver, grid, eight_bits(samples))
                    found["consistency"] = rows(code - self.x, self.x)
        except FloatingPointError:
            return None
        return found
