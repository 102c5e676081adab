"""Fine solutions of the problems, and the errors of solvers against them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from odesolvers import RK4, IntegrationApproximator, State
from odesolvers.writing import replacing

from .problems import Denoiser, Problem

CACHE = Path(__file__).resolve().parents[1] / "cache"
"""The folder of fine solutions and learned weights, which git ignores."""

UNREADABLE = (FileNotFoundError, EOFError, KeyError, ValueError, BadZipFile, zlib.error)
"""Errors of numpy for a file that is not there, is empty, cut or something else."""


@dataclass(frozen=True)
class Reference:
    """The fine solution from one seed's noise, in float64.

    Attributes:
        noise: its start, the true code of `clean`.
        clean: its end.
        convergence: the median relative distance of `clean` to the solution with half the steps.
    """

    noise: Tensor
    clean: Tensor
    convergence: float


def reference(problem: Problem, seed: int, cache: Path = CACHE) -> Reference:
    """The fine solution of a problem by RK4, kept in the folder `cache`."""
    name = f"{problem.name.replace(' ', '_')}-v{problem.version}-{problem.states}x{problem.fine}"
    path = cache / f"{name}-seed{seed}.npz"
    with suppress(*UNREADABLE), path.open("rb") as file, np.load(file) as stored:
        arrays = (torch.from_numpy(stored[key]) for key in ("noise", "clean"))
        return Reference(*arrays, float(stored["convergence"]))
    cache.mkdir(parents=True, exist_ok=True)
    noise = problem.noise(seed)
    clean, half = (solve(problem, noise, n) for n in (problem.fine, problem.fine // 2))
    convergence = median_error(half, clean)
    with replacing(path) as file:
        np.savez(file, noise=noise.numpy(), clean=clean.numpy(), convergence=convergence)
    return Reference(noise, clean, convergence)


def solve(problem: Problem, noise: Tensor, steps: int) -> Tensor:
    """The flow from `noise` to the problem's last level by RK4."""
    sigmas, args = problem.sigmas(steps), problem.arguments()
    return RK4().sample(problem.denoiser, noise, sigmas, extra_args=args, progress=True).x


def relative_errors(x: Tensor, y: Tensor) -> Tensor:
    """``|x - y|`` of each state over the root mean square of ``|y|``; infinite if x is not finite."""
    x, y = x.double().flatten(1), y.double().flatten(1)
    errors = (x - y).norm(dim=1) / y.norm(dim=1).square().mean().sqrt()
    return errors.nan_to_num(nan=math.inf)


def median_error(x: Tensor, y: Tensor) -> float:
    """The median of `relative_errors`."""
    return float(relative_errors(x, y).median())


def invertible(solver: object) -> bool:
    """Whether a solver encodes. One-step methods refuse to: they lose the state that they came from."""
    return hasattr(solver, "invert") and not isinstance(solver, IntegrationApproximator)


def sampling_error(solver: Any, problem: Problem, steps: int, truth: Reference) -> float:
    """The median error of samples on a grid of `steps` steps; infinite if the run diverged."""
    return error_of_run(solver.sample, truth.noise, truth.clean, problem, steps)


def encoding_error(solver: Any, problem: Problem, steps: int, truth: Reference) -> float:
    """The median error of codes on a grid of `steps` steps; infinite if the run diverged."""
    return error_of_run(solver.invert, truth.clean, truth.noise, problem, steps)


def error_of_run(run: Any, start: Tensor, end: Tensor, problem: Problem, steps: int) -> float:
    """The median error of ``run(denoiser, x, sigmas)`` from `start`, against `end`."""
    sigmas, args = problem.sigmas(steps), problem.arguments()
    try:
        found = run(problem.denoiser, start.to(problem.dtype), sigmas, extra_args=args).x
    except FloatingPointError:
        return math.inf
    return median_error(found, end)


@torch.no_grad()
def one_step(
    method: IntegrationApproximator,
    denoiser: Denoiser,
    x: Tensor,
    sigma: float,
    target: float,
    extra_args: Mapping[str, Any] | None = None,
) -> Tensor:
    """One step of a method from `sigma` to `target`, in either direction."""
    shear, values = method.start(sigma, target), [x]
    for point, level in shear.calls:
        y = point.of(values)
        values.append(denoiser(y, y.new_full(y.shape[:1], level), **(extra_args or {})))
    return shear.rest.of(values)


@dataclass(frozen=True)
class Upwards:
    """A one-step method that encodes by running up the grid, which does not undo its sampling.

    Over DDIM that is the inversion of Song et al. 2021: each step takes the noise found at the state it
    starts from. `DDIMInversion` takes the noise at the level above, as diffusers does.
    """

    method: IntegrationApproximator

    def sample(self, denoiser: Denoiser, x: Tensor, sigmas: Tensor, **options: Any) -> Any:
        return self.method.sample(denoiser, x, sigmas, **options)

    def invert(
        self,
        denoiser: Denoiser,
        x: Tensor | State,
        sigmas: Tensor,
        *,
        extra_args: Mapping[str, Any] | None = None,
    ) -> Code:
        x = x.current if isinstance(x, State) else x
        for sigma, target in pairwise(sigmas.flip(0).tolist()):
            x = one_step(self.method, denoiser, x, sigma, target, extra_args)
        return Code(x, x)


@dataclass(frozen=True)
class Code:
    """The result of `Upwards.invert`, whose state is one tensor."""

    x: Tensor
    state: Tensor
