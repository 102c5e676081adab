"""Weights learned jointly, against rules and against least squares at each step.

Sampling (s) and encoding (e) errors over Euler, geometric means over noise that no weights were learned
on: of `StepRatio(1)`, of the weights that bring each step nearest to the fine solution, of `calibrate`,
and of DDIM, sampled and run upwards.

    python -m benchmarks.calibration                # two minutes on one core; writes the table
    python -m benchmarks.calibration --budgets 6    # some evaluations only; writes nothing
"""

from __future__ import annotations

import argparse
import warnings
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from odesolvers import BDIA, DDIM, RK4, Euler, PerStep, StepRatio, calibrate

from .common import (
    DIGITS,
    MIXTURE,
    TABLES,
    Problem,
    Upwards,
    one_step,
    reference,
    relative_errors,
    table,
    write,
)

BUDGETS = (6, 10, 15, 20)
STATES = 16
SUBSTEPS = 16
"""Steps of the fine solution in each step of the grid."""
LOWEST, HIGHEST = 0.01, 2.0
"""The range of `calibrate`'s weights."""


@torch.no_grad()
def step_by_step(problem: Problem, x: Tensor, sigmas: Tensor) -> PerStep:
    """The weights that bring each step nearest to the fine solution, given those before it.

    ``g_i = <x_{i+1} - B, x*_{i-1} - F> / |x_{i+1} - B|²``
    """
    levels, weights = sigmas.tolist(), []
    older, current, fine = x, x, x
    for k, (sigma, target) in enumerate(pairwise(levels)):
        between = torch.linspace(sigma ** (1 / 7), target ** (1 / 7), SUBSTEPS + 1).double() ** 7
        between[0], between[-1] = sigma, target
        fine = RK4().sample(problem.denoiser, fine, between).x
        newer = one_step(Euler(), problem.denoiser, current, sigma, target)
        if k > 0:
            missed = older - one_step(Euler(), problem.denoiser, current, sigma, levels[k - 1])
            best = float((missed * (fine - newer)).sum() / missed.square().sum())
            weights.append(min(max(best, LOWEST), HIGHEST))
            newer = newer + weights[-1] * missed
        older, current = current, newer
    return PerStep(weights)


def errors(solver: Any, problem: Problem, sigmas: Tensor) -> tuple[float, float]:
    """Sampling and encoding errors on seed 0."""
    truth = reference(problem, 0)

    def mean(found: Tensor, right: Tensor) -> float:
        return float(relative_errors(found, right).clamp_min(1e-12).log().mean().exp())

    there = solver.sample(problem.denoiser, truth.noise, sigmas)
    code = solver.invert(problem.denoiser, truth.clean, sigmas)
    return mean(there.x, truth.clean), mean(code.x, truth.noise)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--budgets", type=int, nargs="+", help="evaluations; writes nothing")
    options = parser.parse_args()
    names = ["DDIM", "`StepRatio(1)`", "each step on its own", "`calibrate`"]
    header = ["problem", "evaluations", *(f"{name}: {way}" for name in names for way in "se")]
    cases = [(problem, n) for problem in (MIXTURE, DIGITS) for n in options.budgets or BUDGETS]
    lines = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about inversions that amplify errors
        for problem, budget in tqdm(cases):
            x, sigmas = problem.calibration_noise()[:STATES], problem.sigmas(budget)
            solvers = [
                Upwards(DDIM()),
                BDIA(Euler(), StepRatio(1)),
                BDIA(Euler(), step_by_step(problem, x, sigmas)),
                BDIA(Euler(), calibrate(problem.denoiser, x, sigmas)),
            ]
            found = [errors(solver, problem, sigmas) for solver in solvers]
            cells = [f"{error:.1e}" for pair in found for error in pair]
            lines.append([problem.name, str(budget), *cells])
    text = table(header, lines)
    if options.budgets:
        print(text)
    else:
        write(TABLES / "calibration.md", text)


if __name__ == "__main__":
    main()
