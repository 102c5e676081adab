"""The solvers of the suite: those of this package, of other papers, of k-diffusion and of diffusers.

Add an entry to `entries`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from odesolvers import (
    BDIA,
    BELM,
    DDIM,
    EDICT,
    RK4,
    Calibrated,
    DampedStepRatio,
    DDIMInversion,
    DPMSolverPP2S,
    Euler,
    FixedPointInversion,
    HeunEDM,
    HeunStepRatio,
    IntegrationApproximator,
    McCallumFoster,
    Midpoint,
    ReversibleHeun,
    Rex,
    SmoothedOutput,
    State,
    StepRatio,
    calibrate,
)
from odesolvers.models import Gaussian

from ..common import CACHE, Denoiser, Problem, Upwards
from .measures import Meter
from .peers import Diffusers, KDiffusion, Sampler

RECOMMENDED = "BDIA Euler calibrated"
"""The solver that the report compares the others with."""


@dataclass(frozen=True)
class Entry:
    """A named solver.

    Attributes:
        name: in tables, and on the command line.
        family: "BDIA", "one-step", "k-diffusion", "diffusers", or "invertible" for others.
        make: the solver for a problem and a grid.
        setting: identifies the solver's settings in measured rows.
        plotted: whether it is in the plots too.
        largest: the largest budget to measure it at.
        levels: whether it fits levels, and so is measured on grids of up to half `learned_steps` only.
    """

    name: str
    family: str
    make: Callable[[Problem, Tensor], Sampler]
    setting: str
    plotted: bool = False
    largest: int = 80
    levels: bool = False

    def measured(self, problem: Problem, budget: int) -> bool:
        """Whether it is measured on a problem at a budget."""
        longest = problem.learned_steps // 2 if self.levels else budget
        return budget <= self.largest and 2 <= self.steps(budget) <= longest

    def steps(self, budget: int) -> int:
        """The most steps whose evaluations do not exceed `budget`; below 2 it is not measured."""
        two, three = evaluations(self, 2), evaluations(self, 3)
        return 2 + (budget - two) // (three - two)


@cache
def evaluations(entry: Entry, steps: int) -> int:
    """Evaluations of sampling with that many steps, counted on a Gaussian."""
    toy = Problem("toy", lambda device: Gaussian(), (2,), states=2, version=0)
    meter, sigmas = Meter(toy.denoiser), toy.sigmas(steps)
    entry.make(toy, sigmas).sample(meter, toy.noise(), sigmas)
    return meter.calls


def plain(name: str, family: str, solver: Sampler, *, plotted: bool = False) -> Entry:
    """An entry of a solver that is the same for every problem."""
    return Entry(name, family, lambda problem, sigmas: solver, repr(solver), plotted)


STARTS = 14
"""Enough runs to score all starting weights, and too few to improve them."""


@dataclass(frozen=True)
class CalibratedBDIA:
    """BDIA with weights fitted to the problem, once for each grid.

    The weights are kept beside the fine solutions. The evaluations spent on the fit are in its report,
    and are not counted as the solver's.
    """

    approximator: IntegrationApproximator
    states: int = 16
    version: int = 2

    def __call__(self, problem: Problem, sigmas: Tensor) -> Sampler:
        return BDIA(self.approximator, self.rule(problem, len(sigmas) - 1))

    def rule(self, problem: Problem, steps: int) -> Calibrated:
        kept = problem.version > 0
        longer = steps > problem.learned_steps
        runs = STARTS if longer else max(problem.calibration_runs, 2 * steps)
        x = problem.calibration_noise()[: self.states]
        name = f"{problem.name.replace(' ', '_')}-v{problem.version}"
        path = CACHE / f"{name}-weights-{steps}-of-{len(x)}-in-{runs}.json"
        with suppress(FileNotFoundError, ValueError):  # not there, or damaged
            return Calibrated.load(path)
        rule = calibrate(
            problem.denoiser,
            x,
            problem.sigmas(steps),
            base=self.approximator,
            starts=[self.rule(problem, problem.learned_steps)] if longer else [],
            extra_args=problem.arguments(),
            max_runs=runs if kept else 1,
            reference_steps=64 if kept else 1,
        )
        if kept:
            path.parent.mkdir(parents=True, exist_ok=True)
            rule.save(path)
        return rule


@dataclass(frozen=True)
class OnOwnLevels:
    """A calibrated solver on the levels that were learned with its weights, whatever grid is given."""

    solver: BDIA
    gamma: Calibrated

    def sample(self, denoiser: Denoiser, x: Tensor, sigmas: Tensor, **options: Any) -> Any:
        return self.solver.sample(denoiser, x, self.gamma.sigmas, **options)

    def invert(self, denoiser: Denoiser, x: Tensor | State, sigmas: Tensor, **options: Any) -> Any:
        return self.solver.invert(denoiser, x, self.gamma.sigmas, **options)


@dataclass(frozen=True)
class CalibratedLevels:
    """BDIA with weights and levels fitted to the problem, kept beside the fine solutions.

    Where calls are dear, the fit has three times the runs of weights alone.
    """

    approximator: IntegrationApproximator
    states: int = 16
    version: int = 1

    def __call__(self, problem: Problem, sigmas: Tensor) -> Sampler:
        kept, steps = problem.version > 0, len(sigmas) - 1
        runs = min(30 * steps + 60, 3 * problem.calibration_runs)
        x = problem.calibration_noise()[: self.states]
        name = f"{problem.name.replace(' ', '_')}-v{problem.version}"
        path = CACHE / f"{name}-levels-{steps}-of-{len(x)}-in-{runs}.json"
        try:
            rule = Calibrated.load(path)
        except (FileNotFoundError, ValueError):  # not there, or damaged
            rule = calibrate(
                problem.denoiser,
                x,
                sigmas,
                levels=True,
                base=self.approximator,
                extra_args={k: v[: len(x)] for k, v in problem.arguments().items()},
                max_runs=runs if kept else 1,
                reference_steps=64 if kept else 1,
            )
            if kept:
                path.parent.mkdir(parents=True, exist_ok=True)
                rule.save(path)
        return OnOwnLevels(BDIA(self.approximator, rule), rule)


@dataclass(frozen=True)
class Iterated:
    """Fixed-point inversion to a tolerance that the precision of the denoiser allows."""

    max_iterations: int
    double: float = 1e-9
    single: float = 1e-4

    def __call__(self, problem: Problem, sigmas: Tensor) -> Sampler:
        del sigmas
        tolerance = self.double if problem.dtype == torch.float64 else self.single
        return FixedPointInversion(DDIM(), tolerance, self.max_iterations)


def entries() -> list[Entry]:
    """All solvers, in the order of the tables."""
    bdia, one_step, field = "BDIA", "one-step", "invertible"
    learned, levels = CalibratedBDIA(Euler()), CalibratedLevels(Euler())
    return [
        Entry(RECOMMENDED, bdia, learned, repr(learned), plotted=True),
        Entry("BDIA Euler calibrated, levels", bdia, levels, repr(levels), levels=True),
        plain("BDIA Euler StepRatio(1)", bdia, BDIA(Euler(), StepRatio(1)), plotted=True),
        plain("BDIA Euler damped", bdia, BDIA(Euler(), DampedStepRatio()), plotted=True),
        plain("BDIA Euler 1", bdia, BDIA(Euler(), 1.0)),
        plain("BDIA DDIM 1", bdia, BDIA(DDIM(), 1.0), plotted=True),
        plain("BDIA DDIM 1 smoothed", bdia, BDIA(DDIM(), SmoothedOutput(1.0))),
        plain(
            "BDIA Euler StepRatio(1) smoothed", bdia, BDIA(Euler(), SmoothedOutput(StepRatio(1)))
        ),
        plain("BDIA HeunEDM HeunStepRatio()", bdia, BDIA(HeunEDM(), HeunStepRatio())),
        plain("BDIA HeunEDM StepRatio(1)", bdia, BDIA(HeunEDM(), StepRatio(1))),
        plain("BDIA HeunEDM behind StepRatio(1)", bdia, BDIA(HeunEDM("behind"), StepRatio(1))),
        plain("BDIA DPMSolverPP2S StepRatio(1)", bdia, BDIA(DPMSolverPP2S(), StepRatio(1))),
        plain("BDIA Midpoint StepRatio(1)", bdia, BDIA(Midpoint(), StepRatio(1))),
        plain("O-BELM", field, BELM(), plotted=True),
        plain("EDICT", field, EDICT(), plotted=True),
        plain("McCallum-Foster Euler", field, McCallumFoster(Euler())),
        plain("McCallum-Foster RK4", field, McCallumFoster(RK4())),
        plain("Rex Euler", field, Rex(Euler())),
        plain("Rex Midpoint", field, Rex(Midpoint()), plotted=True),
        plain("reversible Heun", field, ReversibleHeun()),
        plain("DDIM inversion", field, DDIMInversion(), plotted=True),
        plain("DDIM upwards", field, Upwards(DDIM()), plotted=True),
        Entry("fixed-point DDIM, 5", field, Iterated(5), repr(Iterated(5))),
        Entry("fixed-point DDIM, 30", field, Iterated(30), repr(Iterated(30)), largest=20),
        plain("DDIM", one_step, DDIM(), plotted=True),
        plain("HeunEDM", one_step, HeunEDM()),
        plain("Midpoint", one_step, Midpoint()),
        plain("DPMSolverPP2S", one_step, DPMSolverPP2S()),
        plain("RK4", one_step, RK4()),
        plain("k-diffusion euler", "k-diffusion", KDiffusion("sample_euler")),
        plain("k-diffusion heun", "k-diffusion", KDiffusion("sample_heun")),
        plain("k-diffusion dpm_2", "k-diffusion", KDiffusion("sample_dpm_2")),
        plain("k-diffusion dpmpp_2m", "k-diffusion", KDiffusion("sample_dpmpp_2m"), plotted=True),
        plain("k-diffusion lms", "k-diffusion", KDiffusion("sample_lms")),
        plain("diffusers DDIM", "diffusers", Diffusers("DDIMScheduler")),
        plain("diffusers DPM-Solver++", "diffusers", Diffusers("DPMSolverMultistepScheduler")),
        plain("diffusers UniPC", "diffusers", Diffusers("UniPCMultistepScheduler"), plotted=True),
    ]
