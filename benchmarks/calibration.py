"""What learning the weights jointly, both ways, adds to rules and to least squares at each step.

Measures, on the mixture and the digits of the suite, over Euler: sampling and encoding error, geometric
means over noise that no weights were learnt on, of `StepRatio(1)`; of the weights that bring each step
nearest to the fine solution; of `calibrate`. Against: DDIM, sampled and run upwards.

    python benchmarks/calibration.py        # two minutes on one core
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from markdown_table import table
from suite_problems import CACHE, PROBLEMS, Instance, reference
from suite_solvers import UpwardDDIM
from torch import Tensor
from tqdm.auto import tqdm

from odesolvers import BDIA, Euler, Grid, Objective, PerStep, StepRatio, calibrate
from odesolvers.calibration import _Fit

BUDGETS = (6, 10, 15, 20)
STATES = 16
TABLE = Path(__file__).resolve().parent.parent / "docs" / "tables" / "calibration.md"


def step_by_step(instance: Instance, x: Tensor, sigmas: Tensor) -> PerStep:
    """Least squares at each step, within the range of learnt weights."""
    fit = _Fit(
        instance.denoiser, x, Grid.of(sigmas), Euler(), Objective(), instance.extra_args, math.inf
    )
    fit.solve_finely(128)
    return PerStep(np.exp(fit.step_by_step()).tolist())


def errors(solver: Any, instance: Instance, sigmas: Tensor) -> tuple[float, float]:
    """Sampling and encoding error on seed 0 of the suite."""
    truth = reference(instance, 0, CACHE)

    def mean(found: Tensor, right: Tensor) -> float:
        size = right.flatten(1).norm(dim=1).square().mean().sqrt()
        distance = (found - right).double().flatten(1).norm(dim=1)
        return float((distance / size).clamp_min(1e-12).log().mean().exp())

    there = solver.sample(instance.denoiser, truth.noise, sigmas, extra_args=instance.extra_args)
    code = solver.invert(instance.denoiser, truth.clean, sigmas, extra_args=instance.extra_args)
    return mean(there.x, truth.clean), mean(code.x, truth.noise)


def main() -> None:
    names = ["DDIM", "`StepRatio(1)`", "each step on its own", "`calibrate`"]
    header = ["problem", "evaluations", *(f"{name}: {way}" for name in names for way in "se")]
    lines = []
    problems = [problem for problem in PROBLEMS if problem.name in ("mixture", "digits")]
    with tqdm(total=len(problems) * len(BUDGETS)) as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of inversions that are not to be trusted
        for problem in problems:
            instance = problem.load()
            x = problem.calibration_noise()[:STATES]
            for budget in BUDGETS:
                sigmas = problem.sigmas(budget)
                solvers = [
                    UpwardDDIM(),
                    BDIA(Euler(), StepRatio(1)),
                    BDIA(Euler(), step_by_step(instance, x, sigmas)),
                    BDIA(Euler(), calibrate(instance.denoiser, x, sigmas)),
                ]
                found = [errors(solver, instance, sigmas) for solver in solvers]
                cells = [f"{error:.1e}" for pair in found for error in pair]
                lines.append([problem.name, str(budget), *cells])
                bar.update()
    text = table(header, lines)
    print(text)
    TABLE.write_text(text + "\n")


if __name__ == "__main__":
    main()
