"""Data points of the problems that have some, and how far fine solutions are from them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import Problem, solve
from .measures import frechet_distance

SEED = 1000
"""Added to a run's seed for the noise of the larger batch that is compared with data."""


def larger_batch(problem: Problem, seed: int) -> Tensor:
    """The noise of the samples that are compared with data, in float64."""
    return problem.noise(SEED + seed, problem.frechet_states)


def data(problem: Problem) -> Tensor:
    """Data points at the level `bottom`, as samples are.

    Raises:
        ValueError: if the problem has no data.
    """
    if problem.data is None:
        raise ValueError(f"{problem.name} has no data to compare samples with")
    clean = problem.data(50_000).double()
    generator = torch.Generator().manual_seed(SEED - 1)
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    return clean + problem.bottom * noise


def fine_distance(problem: Problem, seed: int) -> float | None:
    """The Fréchet distance between data and a fine solution; None for a problem without data."""
    if problem.data is None:
        return None
    return frechet_distance(solve(problem, larger_batch(problem, seed), 250), data(problem))
