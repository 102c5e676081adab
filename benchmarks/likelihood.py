"""The bound on the log density beside Hutchinson's estimator: ``python -m benchmarks.likelihood``.

The data are mixtures of five Gaussians in several dimensions, whose density is known. A figure is the
mean of what is missing to the truth over 256 states, in bits per dimension, with its standard error; of
Hutchinson's estimator, which errs either way, it is the mean absolute error.
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


def main() -> None:
    """Print the tables, and write them to ``docs/tables/likelihood.md``."""
    rows = []
    for dimensions in (2, 8, 32, 128):
        denoiser, x, log_p = problem(dimensions)
        scale = dimensions * math.log(2)
        for steps in (10, 20, 40):
            sigmas = karras_sigmas(steps, LOW, 80.0, append_zero=False)
            row = [str(dimensions), str(steps)]
            for samples in (1, 16, 256):
                found = log_likelihood_bound(
                    BDIA(Euler(), StepRatio(1)),
                    denoiser,
                    x,
                    sigmas,
                    samples=samples,
                    data_std=DATA_STD,
                    generator=torch.Generator().manual_seed(2),
                )
                missing = (log_p - found.log_p) / scale
                row.append(f"{missing.mean():.3f} ± {missing.std() / math.sqrt(STATES):.3f}")
            for probes in (1, 16):
                guess = log_likelihood(
                    denoiser,
                    x,
                    sigmas,
                    solver=HeunEDM(),
                    probes=probes,
                    generator=torch.Generator().manual_seed(2),
                )
                row.append(f"{((log_p - guess.log_p) / scale).abs().mean():.3f}")
            rows.append(row)
            print(row, flush=True)
    header = ["dimensions", "steps", "K = 1", "K = 16", "K = 256", "1 probe", "16 probes"]
    write(TABLES / "likelihood.md", f"{machine()}.\n\n{table(header, rows, words=())}\n")


if __name__ == "__main__":
    main()
