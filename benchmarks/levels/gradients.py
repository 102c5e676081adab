"""Gradients of the denoiser against differences of whole runs, for the same fit from the same start."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from odesolvers import BDIA, RK4, DampedStepRatio, Euler, Grid, PerStep
from odesolvers.calibration.least_squares import Effort, LeastSquares, Trial, Vector
from odesolvers.calibration.objective import lengths, rows
from odesolvers.calibration.spacing import Spacing
from odesolvers.gamma import step_ratios

from ..common import Problem
from .measure import FINE, training

COSTS = (50, 100, 200, 400)
"""Denoiser calls, in units of a run that samples and encodes the batch."""


class Differences(LeastSquares):
    """The fit of `calibrate`, which records the least objective after every run."""

    def __init__(self, problem: Problem, steps: int, max_runs: int) -> None:
        super().__init__(Effort(max_runs))
        self.problem, self.steps = problem, steps
        self.x, self.args = training(problem)
        fine = problem.sigmas(FINE)
        self.target = RK4().sample(problem.denoiser, self.x, fine, extra_args=self.args).x
        self.spacing = Spacing(Grid.of(problem.sigmas(steps)))
        self.trace: list[float] = []

    def start(self) -> Vector:
        """`DampedStepRatio` on levels that are even in flow-matching time."""
        grid = self.spacing.starts()[2]
        g = DampedStepRatio(0.3, 3).weights(grid, lambda sigma: 1.0)
        return np.append(np.log(g) - np.log(step_ratios(grid)), self.spacing.unknowns(grid))

    def admissible(self, at: Vector) -> Vector:
        return at

    def trial(self, at: Vector) -> Trial:
        grid = self.spacing.grid(at[self.steps - 1 :])
        g = np.exp(at[: self.steps - 1]) * step_ratios(grid)
        solver, options = BDIA(Euler(), PerStep(g.tolist())), {"extra_args": self.args}
        found: dict[str, Tensor] = {}
        try:
            ends: Any = solver.sample(self.problem.denoiser, self.x, grid, **options)
            found["sampling"] = rows(ends.x - self.target, self.target)
            codes: Any = solver.invert(self.problem.denoiser, self.target, grid, **options)
            found["encoding"] = rows(codes.x - self.x, self.x)
            trial = Trial.of(at, found, {"sampling": 1.0, "encoding": 1.0})
        except FloatingPointError:
            trial = Trial.diverged(at)
        self.trace.append(min([*self.trace[-1:], trial.value]))
        return trial


def by_gradients(fit: Differences) -> Callable[[Tensor], Tensor]:
    """The objective of `fit` as a function that autograd differentiates, of weights and levels alike."""
    n, ends = fit.steps, fit.spacing.ends
    top, low = (end ** (1 / 7) for end in ends)

    def objective(at: Tensor) -> Tensor:
        steps = torch.cat([at.new_zeros(1), at[n - 1 :]]).softmax(0)
        inner = (top + steps.cumsum(0)[:-1] * (low - top)) ** 7
        s = torch.cat([at.new_tensor([ends[0]]), inner, at.new_tensor([ends[1]])])
        h = s[:-1] - s[1:]
        g = at[: n - 1].exp() * h[1:] / h[:-1]

        def slope(x: Tensor, k: int) -> Tensor:
            return (x - fit.problem.denoiser(x, s[k].expand(len(x)), **fit.args)) / s[k]

        older, x = fit.x, fit.x - h[0] * slope(fit.x, 0)
        for k in range(1, n):
            d = slope(x, k)
            older, x = x, x - h[k] * d + g[k - 1] * (older - x - h[k - 1] * d)
        sampling = lengths(rows(x - fit.target, fit.target)).log().mean()
        newer, x = fit.target, fit.target + h[n - 1] * slope(fit.target, n)
        for k in range(n - 1, 0, -1):
            d = slope(x, k)
            newer, x = x, x + h[k - 1] * d + (newer - x + h[k] * d) / g[k - 1]
        encoding = lengths(rows(x - fit.x, fit.x)).log().mean()
        return (sampling + encoding) / 2

    return objective


def compare(problem: Problem, steps: int) -> dict[str, list[float]]:
    """The geometric mean of both errors after each of `COSTS`, by differences and by L-BFGS.

    A gradient counts as two runs beside the run that it belongs to.
    """
    fit = Differences(problem, steps, max(COSTS))
    start = fit.run(fit.start())
    fit.improve(start, max(COSTS))
    spent, best, trace = 0, math.inf, list[tuple[int, float]]()
    objective, at = by_gradients(fit), torch.tensor(start.at, requires_grad=True)
    assert abs(objective(at).item() - start.value) < 1e-6, "not the objective of `calibrate`"
    optimiser = torch.optim.LBFGS([at], max_iter=max(COSTS), line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        nonlocal spent, best
        optimiser.zero_grad()
        value = objective(at)
        value.backward()
        spent += 3
        best = min(best, float(value))
        trace.append((spent, best))
        return value

    optimiser.step(closure)
    return {
        "differences": [math.exp(fit.trace[min(cost, len(fit.trace)) - 1]) for cost in COSTS],
        "L-BFGS": [
            math.exp(min((value for used, value in trace if used <= cost), default=math.nan))
            for cost in COSTS
        ],
    }
