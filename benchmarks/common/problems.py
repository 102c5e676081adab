"""The problems of the suite, and the fine solutions that its samplers are measured against.

Add an entry to `PROBLEMS`. A problem that changes gets a new `version`, so that rows measured
before are measured again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import exact_problems
import numpy as np
import round_trip
import torch
from suite_measures import frechet_distance, relative_errors
from torch import Tensor

from odesolvers import RK4, Denoiser, karras_sigmas
from odesolvers.models import IdealDenoiser, load_digits, load_letters

CPU = torch.device("cpu")
CACHE = Path(__file__).resolve().parent / "cache"
"""Fine solutions and learnt weights."""
FRECHET_SEED = 1000
"""Added to a seed: the noise of the larger batch that is compared with data."""
CALIBRATION_SEED = 2000
"""The noise on which a solver may be fitted to a problem: no measured seed has it."""

Model = tuple[Denoiser, Mapping[str, Any]]
"""A denoiser and its ``extra_args``."""


@dataclass(frozen=True)
class Problem:
    """A flow from noise at level `top` to nearly clean data at level `bottom`.

    `bottom` is above 0, so that the flow is determined in both directions: the end of the fine
    solution has one true latent, the noise it started from.

    Attributes:
        name: of the problem in tables and files.
        build: takes the number of states and returns the denoiser with its ``extra_args``.
        shape: of one state.
        states: how many are measured at once.
        dtype: of the states. Fine solutions are computed in float64 states whatever it is.
        bottom: the last noise level.
        top: the first.
        budgets: numbers of denoiser evaluations to compare at.
        seeds: how many repeats, each from noise of its own.
        fine: steps of the fine solution.
        data: draws that many data points, for the Fréchet distance; None where it is left out.
        frechet_states: the samples compared with as many data points or all there are.
        dear: the budgets of round trips and Fréchet distances, which cost more than all else together.
        calibration_runs: what fitting weights to it may cost, see `calibrate`.
        learnt_steps: the longest grid that weights are fitted on; on longer ones the best of the rules
            to start from is taken, among them the weights of this one.
        version: raised whenever anything else about the problem changes; 0 for a toy, of which nothing
            is kept.
    """

    name: str
    build: Callable[[int], Model]
    shape: tuple[int, ...]
    states: int
    dtype: torch.dtype = torch.float64
    bottom: float = 0.02
    top: float = 80.0
    budgets: tuple[int, ...] = (5, 6, 8, 10, 15, 20, 40, 80)
    seeds: int = 3
    fine: int = 1000
    data: Callable[[int], Tensor] | None = None
    frechet_states: int = 0
    dear: tuple[int, ...] = (10, 20, 40)
    calibration_runs: int = 80
    learnt_steps: int = 20
    version: int = 1

    @property
    def setting(self) -> str:
        """By which a measured row knows its problem."""
        return (
            f"version {self.version}, {self.states} states, {self.fine} fine steps, "
            f"{self.frechet_states} Fréchet states"
        )

    def sigmas(self, steps: int) -> Tensor:
        """`steps` steps of a Karras grid from `top` to `bottom`, without the level 0."""
        return karras_sigmas(steps + 1, self.bottom, self.top, append_zero=False)

    def calibration_noise(self) -> Tensor:
        """What a solver may be fitted to, on noise that is measured nowhere."""
        return self.noise(CALIBRATION_SEED).to(self.dtype)

    def noise(self, seed: int, states: int | None = None) -> Tensor:
        """Noise at level `top`, float64."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.states if states is None else states, *self.shape)
        return self.top * torch.randn(shape, generator=generator, dtype=torch.float64)

    def load(self) -> Instance:
        """Build the denoiser."""
        denoiser, extra_args = self.build(self.states)
        return Instance(self, denoiser, extra_args)


@dataclass(frozen=True)
class Instance:
    """A problem with its denoiser."""

    problem: Problem
    denoiser: Denoiser
    extra_args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reference:
    """The fine solution of one seed.

    Attributes:
        noise: where it starts, the true latent of `clean`; float64.
        clean: where it ends; float64.
        convergence: median relative distance of `clean` to the same solution with half the steps.
        frechet: distance between data and a fine solution of the batch that is compared with them.
    """

    noise: Tensor
    clean: Tensor
    convergence: float
    frechet: float | None


def reference(instance: Instance, seed: int, cache: Path) -> Reference:
    """RK4 on a fine grid, kept in the folder `cache`."""
    problem = instance.problem
    name = (
        f"{problem.name.replace(' ', '_')}-v{problem.version}-{problem.states}x{problem.fine}"
        f"-{problem.frechet_states}-seed{seed}.npz"
    )
    if not (cache / name).exists():
        cache.mkdir(parents=True, exist_ok=True)
        found = solve(instance, seed)
        values = {key: np.asarray(value) for key, value in vars(found).items() if value is not None}
        part = cache / f"part-{name}"  # a run that is cut off leaves no half a file behind
        np.savez(part, **values)
        part.replace(cache / name)
    stored = np.load(cache / name)
    return Reference(
        torch.from_numpy(stored["noise"]),
        torch.from_numpy(stored["clean"]),
        float(stored["convergence"]),
        float(stored["frechet"]) if "frechet" in stored else None,
    )


def solve(instance: Instance, seed: int) -> Reference:
    """The fine solution, how far it has converged, and how far it is from data."""
    problem = instance.problem
    noise = problem.noise(seed)

    def fine(x: Tensor, steps: int) -> Tensor:
        sigmas, args = problem.sigmas(steps), instance.extra_args
        return RK4().sample(instance.denoiser, x, sigmas, extra_args=args, progress=True).x

    clean = fine(noise, problem.fine)
    half = fine(noise, problem.fine // 2)
    convergence = float(relative_errors(half, clean).median())
    distance = None
    if problem.data is not None:
        samples = fine(problem.noise(FRECHET_SEED + seed, problem.frechet_states), 250)
        distance = frechet_distance(samples, data(problem))
    return Reference(noise, clean, convergence, distance)


def data(problem: Problem) -> Tensor:
    """Data points at the level `bottom`, as samples are."""
    if problem.data is None:
        raise ValueError(f"{problem.name} has no data to compare samples with")
    clean = problem.data(50_000).double()
    generator = torch.Generator().manual_seed(FRECHET_SEED - 1)
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    return clean + problem.bottom * noise


def mixture(states: int) -> Model:
    """Five Gaussians in eight dimensions, those of `round_trip`."""
    del states
    return round_trip.problems()["mixture"][0], {}


def mixture_data(n: int) -> Tensor:
    return mixture(1)[0].sample(n, torch.Generator().manual_seed(FRECHET_SEED - 2))


def digits(states: int) -> Model:
    """The posterior mean over scikit-learn's digits."""
    del states
    return IdealDenoiser(load_digits()[0]), {}


def digits_data(n: int) -> Tensor:
    """All of them."""
    return load_digits()[0][:n]


def letters(states: int) -> Model:
    """The trained network that ships, in float32."""
    return load_letters(), {"class_labels": labels(states)}


def guided_letters(states: int) -> Model:
    """The same under classifier-free guidance of scale 3."""
    return exact_problems.letters(CPU), {"class_labels": labels(states)}


def labels(states: int) -> Tensor:
    return 3 * torch.arange(states) % 26


def stable_diffusion(states: int) -> Model:
    """A tiny pipeline with random weights in float32, under guidance of scale 5."""
    del states
    return exact_problems.stable_diffusion(CPU), {}


NETWORK: dict[str, Any] = {
    "dtype": torch.float32,
    "seeds": 2,
    "fine": 300,
    "dear": (20,),
    "calibration_runs": 40,
}
"""What evaluations of tens of milliseconds allow."""

# Networks: eight states are too few for a Fréchet distance, and random weights have no data.
PROBLEMS = (
    Problem("mixture", mixture, (8,), 256, data=mixture_data, frechet_states=2048, learnt_steps=40),
    Problem("digits", digits, (1, 8, 8), 64, data=digits_data, frechet_states=512, learnt_steps=40),
    Problem("letters", letters, (3, 32, 32), 8, **NETWORK),
    Problem("guided letters", guided_letters, (3, 32, 32), 4, **NETWORK),
    Problem(
        "tiny Stable Diffusion",
        stable_diffusion,
        (4, 8, 8),
        4,
        bottom=0.03,
        top=14.6,
        learnt_steps=40,
        **NETWORK,
    ),
)
