"""The solvers of the suite: ours, the field's, and those of k-diffusion and diffusers as installed.

Add an entry to `entries`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from typing import Any, Protocol

import torch
from suite_measures import Meter
from suite_problems import CALIBRATION_SEED, Instance, Problem
from torch import Tensor

import odesolvers
from odesolvers import (
    BDIA,
    DDIM,
    RK4,
    Denoiser,
    DPMSolverPP2S,
    Euler,
    HeunEDM,
    IntegrationApproximator,
    Midpoint,
    SmoothedOutput,
    StepRatio,
)
from odesolvers.models import Gaussian, import_k_diffusion
from odesolvers.models.stable_diffusion import import_diffusers

RECOMMENDED = "BDIA Euler StepRatio(1)"
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
    """

    name: str
    family: str
    make: Callable[[Instance, Tensor], Sampler]
    setting: str
    plotted: bool = False

    def steps(self, budget: int) -> int:
        """The most steps whose evaluations do not exceed `budget`; below 2 there is nothing to do."""
        two, three = evaluations(self, 2), evaluations(self, 3)
        return 2 + (budget - two) // (three - two)


@cache
def evaluations(entry: Entry, steps: int) -> int:
    """Of sampling with so many steps: counted on a Gaussian."""
    toy = Problem("toy", lambda states: (Gaussian(), {}), (2,), states=2).load()
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


@dataclass(frozen=True)
class CalibratedBDIA:
    """BDIA with weights fitted to the problem, on noise that is measured nowhere."""

    approximator: IntegrationApproximator

    def __call__(self, instance: Instance, sigmas: Tensor) -> Sampler:
        problem = instance.problem
        x = problem.noise(CALIBRATION_SEED).to(problem.dtype)
        rule = odesolvers.calibrate(  # type: ignore[attr-defined]
            instance.denoiser, x, sigmas, base=self.approximator, extra_args=instance.extra_args
        )
        return BDIA(self.approximator, rule)


def entries() -> list[Entry]:
    """All of them, in the order of the tables."""
    bdia, one_step = "BDIA", "one-step"
    ours = [
        plain("BDIA Euler 1", bdia, BDIA(Euler(), 1.0)),
        plain("BDIA DDIM 1", bdia, BDIA(DDIM(), 1.0), plotted=True),
        plain("BDIA DDIM 1 smoothed", bdia, BDIA(DDIM(), SmoothedOutput(1.0))),
        plain(RECOMMENDED, bdia, BDIA(Euler(), StepRatio(1)), plotted=True),
        plain(f"{RECOMMENDED} smoothed", bdia, BDIA(Euler(), SmoothedOutput(StepRatio(1)))),
        plain("BDIA Euler StepRatio(2)", bdia, BDIA(Euler(), StepRatio(2)), plotted=True),
        plain("BDIA HeunEDM StepRatio(1)", bdia, BDIA(HeunEDM(), StepRatio(1))),
        plain("BDIA DPMSolverPP2S StepRatio(1)", bdia, BDIA(DPMSolverPP2S(), StepRatio(1))),
        plain("BDIA Midpoint StepRatio(1)", bdia, BDIA(Midpoint(), StepRatio(1))),
    ]
    if hasattr(odesolvers, "calibrate"):
        make = CalibratedBDIA(Euler())
        ours.append(Entry("BDIA Euler calibrated", bdia, make, repr(make), plotted=True))
    return [
        *ours,
        plain("DDIM", one_step, DDIM(), plotted=True),
        plain("Euler", one_step, Euler()),
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
        *field_entries(),
    ]


def field_entries() -> list[Entry]:
    """The rest of the field's invertible solvers, as far as this version of odesolvers has them."""
    wanted: list[tuple[str, str, Callable[[Any], Sampler], bool]] = [
        ("EDICT", "EDICT 0.93", lambda kind: kind(p=0.93), True),
        ("BELM", "BELM", lambda kind: kind(), False),
        ("McCallumFoster", "McCallum-Foster Euler", lambda kind: kind(Euler(), zeta=0.999), False),
        ("McCallumFoster", "McCallum-Foster RK4", lambda kind: kind(RK4(), zeta=0.999), False),
        ("Rex", "Rex Euler", lambda kind: kind(Euler(), zeta=0.999), False),
        ("Rex", "Rex Midpoint", lambda kind: kind(Midpoint(), zeta=0.999), True),
        ("ReversibleHeun", "reversible Heun", lambda kind: kind(), False),
        ("DDIMInversion", "DDIM inversion", lambda kind: kind(), True),
        (
            "FixedPointInversion",
            "fixed-point DDIM 5x",
            lambda kind: kind(DDIM(), tolerance=1e-9, max_iterations=5),
            False,
        ),
        (
            "FixedPointInversion",
            "fixed-point DDIM 50x",
            lambda kind: kind(DDIM(), tolerance=1e-9, max_iterations=50),
            False,
        ),
    ]
    return [
        plain(name, "invertible", make(getattr(odesolvers, kind)), plotted=plotted)
        for kind, name, make, plotted in wanted
        if hasattr(odesolvers, kind)
    ]
