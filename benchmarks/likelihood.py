"""The bound on the log density beside Hutchinson's estimator: ``python -m benchmarks.likelihood``.

The data are mixtures of five Gaussians in several dimensions, whose density is known. A figure is the
mean absolute error over 256 states, in bits per dimension; of the bound also the mean of what is missing
to the truth, with its standard error. Evaluations, of each state, are calls of the denoiser and
vector-Jacobian products, though a product costs as much as one or two calls. At the evaluations of the
bound, Hutchinson's estimator is run over `HeunEDM` on the same grid with the probes left for it,
and with the steps and probes among `SPLITS` that come out best.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from odesolvers import (
    BDIA,
    Euler,
    HeunEDM,
    StepRatio,
    karras_sigmas,
    log_likelihood,
    log_likelihood_bound,
)
from odesolvers.models import GaussianMixture

from .common import TABLES, machine, table, write

LOW: Final = 0.02
STATES: Final = 256
DATA_STD: Final = 0.35  # about that of one Gaussian
SPLITS: Final = (1, 3, 15, 63, 255)
"""Probes of Hutchinson's estimator, for which the evaluations left give the steps."""


def problem(dimensions: int) -> tuple[GaussianMixture, Tensor, Tensor]:
    """The denoiser, states at the level `LOW`, and their log density."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(5, dimensions, generator=generator, dtype=torch.float64)
    stds = 0.2 + 0.3 * torch.rand(5, generator=generator).double()
    wide = torch.sqrt(stds**2 + LOW**2)[:, None].expand(5, dimensions)
    true = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(5).double()),
        torch.distributions.Independent(torch.distributions.Normal(means, wide), 1),
    )
    torch.manual_seed(1)
    x = true.sample((STATES,))
    return GaussianMixture(means, stds), x, true.log_prob(x)


def grid(steps: int) -> Tensor:
    """The levels of that many steps."""
    return karras_sigmas(steps + 1, LOW, 80.0, append_zero=False)


class Measured:
    """Errors on one problem, in bits per dimension."""

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions
        self.denoiser, self.x, self.log_p = problem(dimensions)
        self.known: dict[tuple[int, int | None], float] = {}

    def bound(self, steps: int, samples: int) -> tuple[Tensor, int]:
        """What the bound misses, for each state, and the evaluations of each."""
        found = log_likelihood_bound(
            BDIA(Euler(), StepRatio(1)),
            self.denoiser,
            self.x,
            grid(steps),
            samples=samples,
            data_std=DATA_STD,
            generator=torch.Generator().manual_seed(2),
        )
        return self._missing(found.log_p), found.nfe

    def hutchinson(self, steps: int, probes: int) -> float:
        """The mean absolute error of the estimator, by the exact trace where that costs less."""
        exact = None if probes >= self.dimensions else probes
        if (steps, exact) not in self.known:
            found = log_likelihood(
                self.denoiser,
                self.x,
                grid(steps),
                solver=HeunEDM(),
                probes=exact,
                generator=torch.Generator().manual_seed(2),
            )
            self.known[steps, exact] = self._missing(found.log_p).abs().mean().item()
        return self.known[steps, exact]

    def best(self, evaluations: int) -> tuple[float, str]:
        """The least error among `SPLITS`, and the steps and probes."""
        found = []
        for probes in SPLITS:
            products = min(probes, self.dimensions)
            steps = min(evaluations // (2 * (1 + products)), 1000)
            if steps >= 2:
                name = "exact" if products == self.dimensions else str(probes)
                found.append((self.hutchinson(steps, probes), f"{steps} × {name}"))
        return min(found)

    def _missing(self, log_p: Tensor) -> Tensor:
        return (self.log_p - log_p) / (self.dimensions * math.log(2))


def main() -> None:
    """Print the table, and write it to ``docs/tables/likelihood.md``."""
    rows = []
    for dimensions in (2, 8, 32, 128):
        measured = Measured(dimensions)
        for steps in (10, 20, 40):
            for samples in (1, 16, 256):
                missing, evaluations = measured.bound(steps, samples)
                probes = evaluations // (2 * steps) - 1
                beside = f"{measured.hutchinson(steps, probes):.3f}" if probes > 0 else ""
                least, split = measured.best(evaluations)
                rows.append(
                    [
                        str(dimensions),
                        str(steps),
                        str(samples),
                        str(evaluations),
                        f"{missing.mean():.3f} ± {missing.std() / math.sqrt(STATES):.3f}",
                        f"{missing.abs().mean():.3f}",
                        beside,
                        f"{least:.3f}",
                        split,
                    ]
                )
                print(rows[-1], flush=True)
    header = [
        "dim",
        "steps",
        "K",
        "evaluations",
        "bound misses",
        "error",
        "same grid",
        "best",
        "steps × probes",
    ]
    write(TABLES / "likelihood.md", f"{machine()}.\n\n{table(header, rows, words=())}\n")


if __name__ == "__main__":
    main()
