"""Levels of samplers that have no weights, by the search of `calibrate`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from odesolvers import Grid
from odesolvers.calibration.least_squares import Effort, LeastSquares, Trial, Vector
from odesolvers.calibration.objective import rows
from odesolvers.calibration.spacing import Spacing

from ..common import Problem


class LevelSearch(LeastSquares):
    """The least squares over the levels of one sampler, for samples alone."""

    def __init__(
        self, sampler: Any, problem: Problem, x: Tensor, target: Tensor, grid: Grid, effort: Effort
    ) -> None:
        super().__init__(effort)
        self.sampler, self.problem, self.x, self.target = sampler, problem, x, target
        self.spacing = Spacing(grid)
        self.extra_args = {name: v[: len(x)] for name, v in problem.arguments().items()}

    def admissible(self, at: Vector) -> Vector:
        return self.spacing.admissible(at)

    def trial(self, at: Vector) -> Trial:
        sigmas = torch.tensor(self.spacing.grid(at).levels, dtype=torch.float64)
        try:
            found = self.sampler.sample(
                self.problem.denoiser, self.x, sigmas, extra_args=self.extra_args
            )
        except FloatingPointError:
            return Trial.diverged(at)
        if not bool(found.x.isfinite().all()):
            return Trial.diverged(at)
        errors = {"sampling": rows(found.x - self.target, self.target)}
        return Trial.of(at, errors, {"sampling": 1.0})


def learned_levels(
    sampler: Any, problem: Problem, x: Tensor, target: Tensor, steps: int, max_runs: int
) -> tuple[list[float], int]:
    """The levels that a sampler's samples from `x` are nearest to `target` with, and the runs spent.

    From the problem's own grid and from those that `calibrate` starts from, whichever is best; and
    from the next best, as long as there are runs.
    """
    grid, effort = Grid.of(problem.sigmas(steps)), Effort(max_runs)
    search = LevelSearch(sampler, problem, x, target, grid, effort)
    starts = [grid, *search.spacing.starts()]
    trials = search.tried([search.spacing.unknowns(start) for start in starts])
    trials.sort(key=lambda trial: trial.value)
    found = [search.improve(trial, max_runs) for trial in trials if effort.runs < max_runs]
    best = min([*found, *trials], key=lambda trial: trial.value)
    return list(search.spacing.grid(best.at).levels), effort.runs
