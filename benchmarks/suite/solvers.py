"""The solvers of the suite: ours, the field's, and those of k-diffusion and diffusers as installed.

Add an entry to `entries`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from itertools import pairwise
from typing import Any, Protocol

import torch
from suite_measures import Meter
from suite_problems import CACHE, Instance, Problem
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
    Denoiser,
    DPMSolverPP2S,
    Euler,
    FixedPointInversion,
    HeunEDM,
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
from odesolvers.models import Gaussian, import_k_diffusion
from odesolvers.models.stable_diffusion import import_diffusers

RECOMMENDED = "BDIA Euler calibrated"
"""The solver that the report compares the others with."""


class Sampled(Protocol):
    """What sampling returns; `odesolvers.Solution` is one."""

    @property
    def x(self) -> Tensor: ...


class Sampler(Protocol):
    """What is measured. One that can be inverted has `invert` as well, as `odesolvers` has it."""

    def sample(
        self,
        denoiser: Denoiser,
        x: Tensor,
        sigmas: Tensor,
        *,
        extra_args: Mapping[str, Any] | None = None,
    ) -> Sampled: ...


@dataclass(frozen=True)
class Entry:
    """A solver under its name.

    Attributes:
        name: in tables, and on the command line.
        family: "BDIA", "one-step", "k-diffusion", "diffusers" or "invertible", the rest of the field.
        make: the solver for a problem on a grid, fitted to both where it needs that.
        setting: by which a measured row knows its solver.
        plotted: whether it is drawn, beside being tabulated.
        largest: the largest budget it is measured at.
    """

    name: str
    family: str
    make: Callable[[Instance, Tensor], Sampler]
    setting: str
    plotted: bool = False
    largest: int = 80

    def steps(self, budget: int) -> int:
        """The most steps whose evaluations do not exceed `budget`; below 2 there is nothing to do."""
        two, three = evaluations(self, 2), evaluations(self, 3)
        return 2 + (budget - two) // (three - two)


@cache
def evaluations(entry: Entry, steps: int) -> int:
    """Of sampling with so many steps: counted on a Gaussian."""
    toy = Problem("toy", lambda states: (Gaussian(), {}), (2,), states=2, version=0).load()
    meter, sigmas = Meter(toy.denoiser), toy.problem.sigmas(steps)
    entry.make(toy, sigmas).sample(meter, toy.problem.noise(0), sigmas)
    return meter.calls


def plain(name: str, family: str, solver: Sampler, *, plotted: bool = False) -> Entry:
    """An entry that is the same on every problem."""
    return Entry(name, family, lambda instance, sigmas: solver, repr(solver), plotted)


@dataclass(frozen=True)
class Sample:
    """What sampling with a peer returns."""

    x: Tensor


@dataclass(frozen=True)
class KDiffusion:
    """A sampler of k-diffusion, called as it is."""

    sampler: str
    release: str = field(default_factory=lambda: version("k-diffusion"))

    def sample(
        self,
        denoiser: Denoiser,
        x: Tensor,
        sigmas: Tensor,
        *,
        extra_args: Mapping[str, Any] | None = None,
    ) -> Sample:
        function = getattr(import_k_diffusion().sampling, self.sampler)
        args = dict(extra_args or {})
        return Sample(function(denoiser, x, sigmas.to(x.dtype), extra_args=args, disable=True))


@dataclass(frozen=True)
class Diffusers:
    """A scheduler of diffusers, driven over given levels with the data prediction D.

    It walks ``z = x / sqrt(1 + σ²)`` and knows levels by their place in a table. `DDIMScheduler` reads
    its table ``ᾱ``, which becomes that of the levels, one training timestep each; the multistep
    schedulers read `sigmas`, which are replaced after `set_timesteps`. They end above the level 0
    (``final_sigmas_type="sigma_min"``), and everything else stands as it comes: solver order 2, and
    the last step of order 1 where there are few (`lower_order_final`: below 15 steps for
    `DPMSolverMultistepScheduler`, always for `UniPCMultistepScheduler`).
    `DPMSolverMultistepScheduler` rounds its state to float32 in every step.
    """

    scheduler: str
    settings: tuple[tuple[str, Any], ...] = ()
    release: str = field(default_factory=lambda: version("diffusers"))

    @torch.no_grad()
    def sample(
        self,
        denoiser: Denoiser,
        x: Tensor,
        sigmas: Tensor,
        *,
        extra_args: Mapping[str, Any] | None = None,
    ) -> Sample:
        scheduler = self._on(sigmas)
        roots = torch.sqrt(1 + sigmas**2).tolist()
        z = x / roots[0]
        for sigma, root, t in zip(sigmas, roots, scheduler.timesteps, strict=False):
            levels = sigma.to(x.dtype).expand(x.shape[0])
            denoised = denoiser(z * root, levels, **(extra_args or {}))
            z = scheduler.step(denoised, t, z).prev_sample
        return Sample(z * roots[-1])

    def _on(self, sigmas: Tensor) -> Any:
        """The scheduler, new, with these levels."""
        steps, kind = len(sigmas) - 1, getattr(import_diffusers(), self.scheduler)
        settings = {"prediction_type": "sample", **dict(self.settings)}
        if self.scheduler == "DDIMScheduler":
            scheduler = kind(
                num_train_timesteps=len(sigmas), clip_sample=False, steps_offset=1, **settings
            )
            scheduler.alphas_cumprod = 1 / (1 + sigmas.flip(0) ** 2)
            scheduler.set_timesteps(steps)
        else:
            scheduler = kind(final_sigmas_type="sigma_min", **settings)
            scheduler.set_timesteps(steps)
            scheduler.sigmas = sigmas
        return scheduler


STARTS = 14
"""Runs that score all weights to start from, and move none."""


@dataclass(frozen=True)
class CalibratedBDIA:
    """BDIA with weights fitted to the problem, once for each grid.

    A rule is kept beside the fine solutions. What it cost is in its report, and is not counted as
    evaluations of the solver.
    """

    approximator: IntegrationApproximator
    states: int = 16
    version: int = 2

    def __call__(self, instance: Instance, sigmas: Tensor) -> Sampler:
        return BDIA(self.approximator, self.rule(instance, len(sigmas) - 1))

    def rule(self, instance: Instance, steps: int) -> Calibrated:
        problem = instance.problem
        kept = problem.version > 0
        longer = steps > problem.learnt_steps
        runs = STARTS if longer else max(problem.calibration_runs, 2 * steps)
        x = problem.calibration_noise()[: self.states]
        name = f"{problem.name.replace(' ', '_')}-v{problem.version}"
        path = CACHE / f"{name}-weights-{steps}-of-{len(x)}-in-{runs}.json"
        if kept and path.exists():
            return Calibrated.load(path)
        rule = calibrate(
            instance.denoiser,
            x,
            problem.sigmas(steps),
            base=self.approximator,
            starts=[self.rule(instance, problem.learnt_steps)] if longer else [],
            extra_args=instance.extra_args,
            max_runs=runs if kept else 1,
            reference_steps=64 if kept else 1,
        )
        if kept:
            path.parent.mkdir(parents=True, exist_ok=True)
            rule.save(path)
        return rule


@dataclass(frozen=True)
class Iterated:
    """Fixed-point inversion to what the precision of the denoiser allows."""

    max_iterations: int
    double: float = 1e-9
    single: float = 1e-4

    def __call__(self, instance: Instance, sigmas: Tensor) -> Sampler:
        del sigmas
        tolerance = self.double if instance.problem.dtype == torch.float64 else self.single
        return FixedPointInversion(DDIM(), tolerance, self.max_iterations)


@dataclass(frozen=True)
class UpwardDDIM:
    """DDIM, and the same run upwards: each step with the noise found at the state it starts from.

    That is what Song et al. 2021 invert with. `DDIMInversion` asks for the noise at the level above,
    as diffusers does.
    """

    def sample(
        self,
        denoiser: Denoiser,
        x: Tensor,
        sigmas: Tensor,
        *,
        extra_args: Mapping[str, Any] | None = None,
    ) -> Sampled:
        return DDIM().sample(denoiser, x, sigmas, extra_args=extra_args)

    def invert(
        self,
        denoiser: Denoiser,
        x: Tensor | State,
        sigmas: Tensor,
        *,
        extra_args: Mapping[str, Any] | None = None,
    ) -> Code:
        x = x.current if isinstance(x, State) else x
        levels = sigmas.flip(0).tolist()
        for sigma, target in pairwise(levels):
            (move,) = DDIM().increments(denoiser, x, sigma, (target,), extra_args=extra_args)
            x = x + move
        return Code(x, x)


@dataclass(frozen=True)
class Code:
    """What `UpwardDDIM` returns: a state that is one tensor."""

    x: Tensor
    state: Tensor


def entries() -> list[Entry]:
    """All of them, in the order of the tables."""
    bdia, one_step, field = "BDIA", "one-step", "invertible"
    learnt = CalibratedBDIA(Euler())
    return [
        Entry(RECOMMENDED, bdia, learnt, repr(learnt), plotted=True),
        plain("BDIA Euler StepRatio(1)", bdia, BDIA(Euler(), StepRatio(1)), plotted=True),
        plain("BDIA Euler damped", bdia, BDIA(Euler(), DampedStepRatio()), plotted=True),
        plain("BDIA Euler 1", bdia, BDIA(Euler(), 1.0)),
        plain("BDIA DDIM 1", bdia, BDIA(DDIM(), 1.0), plotted=True),
        plain("BDIA DDIM 1 smoothed", bdia, BDIA(DDIM(), SmoothedOutput(1.0))),
        plain(
            "BDIA Euler StepRatio(1) smoothed", bdia, BDIA(Euler(), SmoothedOutput(StepRatio(1)))
        ),
        plain("BDIA HeunEDM StepRatio(1)", bdia, BDIA(HeunEDM(), StepRatio(1))),
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
        plain("DDIM upwards", field, UpwardDDIM(), plotted=True),
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
