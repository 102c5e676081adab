"""The bound on the log density beside Hutchinson's estimator: ``python -m benchmarks.likelihood``.

The data are mixtures of five Gaussians in several dimensions, whose density is known. A figure is the
mean absolute error over 256 states, in bits per dimension; of the bound also the mean of what is missing
to the truth, with its standard error. Evaluations, of each state, are calls of the denoiser and
vector-Jacobian products, though a product costs as much as one or two calls. At the evaluations of the
bound, Hutchinson's estimator is run over `HeunEDM` on the same grid with the probes left for it,
and with the steps and probes among `SPLITS` that come out best.

Two more tables are of the solvers that likelihoods, bounds and weights may be computed over, on Gaussian
data and on the mixture in 8 dimensions; ``python -m benchmarks.likelihood solvers`` writes them alone.
"""

from __future__ import annotations

import math
import sys
import warnings
from typing import Final

import torch
from torch import Tensor

from odesolvers import (
    BDIA,
    BELM,
    DDIM,
    EDICT,
    RK4,
    DampedStepRatio,
    Euler,
    HeunEDM,
    HeunStepRatio,
    McCallumFoster,
    ReversibleHeun,
    Rex,
    StabilityWarning,
    StepRatio,
    importance_samples,
    karras_sigmas,
    log_likelihood,
    log_likelihood_bound,
)
from odesolvers.extend import Solver
from odesolvers.models import Gaussian, GaussianMixture

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


ONE_STEP: Final[list[Solver]] = [Euler(), HeunEDM(), RK4()]
INVERTIBLE: Final[list[Solver]] = [
    BDIA(Euler(), StepRatio(1)),
    BDIA(Euler()),
    BDIA(RK4(), StepRatio(1)),
    ReversibleHeun(),
    McCallumFoster(HeunEDM()),
    BDIA(DDIM()),
    BDIA(DDIM(), 0.9),
    BDIA(Euler(), DampedStepRatio()),
    BELM(),
    BDIA(HeunEDM(), HeunStepRatio()),
    EDICT(),
    Rex(Euler()),
    Rex(RK4()),
]
NAMES: Final = {repr(BELM()): "BELM()"} | {repr(Rex(a)): f"Rex({a})" for a in (Euler(), RK4())}


def of_one_gaussian() -> tuple[Gaussian, Tensor, Tensor]:
    """As `problem`, of a Gaussian of deviation 0.5 in 8 dimensions."""
    generator = torch.Generator().manual_seed(1)
    true = torch.distributions.Normal(torch.tensor(0.0).double(), math.hypot(0.5, LOW))
    x = true.scale * torch.randn(STATES, 8, generator=generator, dtype=torch.float64)
    return Gaussian(0.0, 0.5), x, true.log_prob(x).sum(1)


def shown(value: Tensor) -> str:
    """A figure with as many digits as fit a column."""
    one = round(float(value), 3) + 0.0  # no -0.000
    if one < 1000:
        return f"{one:.3f}" if one < 10 else f"{one:.0f}"
    return f"{one:.0e}".replace("e+0", "e").replace("e+", "e")


@torch.no_grad()
def solvers() -> None:
    """Print and write what likelihoods, bounds and weights are worth over each solver."""
    problems = [(*of_one_gaussian(), 0.5), (*problem(8), DATA_STD)]
    divergence, bounds = [], []
    for solver in [*ONE_STEP, *INVERTIBLE]:
        cells, bound_cells = [f"`{NAMES.get(repr(solver), repr(solver))}`"], []
        for denoiser, x, true, _ in problems:
            for steps in (10, 40, 160):
                found = log_likelihood(denoiser, x, grid(steps), solver=solver, probes=None)
                cells.append(shown((true - found.log_p).abs().mean() / (8 * math.log(2))))
        divergence.append(cells)
        print(cells, flush=True)
        if solver in ONE_STEP:
            continue
        for denoiser, x, true, std in problems:
            for steps in (20, 160):
                options = {"samples": 16, "data_std": std}
                generator = torch.Generator().manual_seed(2)
                bound = log_likelihood_bound(
                    solver, denoiser, x, grid(steps), generator=generator, **options
                )
                bound_cells.append(shown((true - bound.log_p).mean() / (8 * math.log(2))))
        gaussian, x, _, std = problems[0]
        true = torch.distributions.Normal(0.0, math.hypot(std, LOW))
        for dimensions in (2, 8):
            noise = torch.randn(4096, dimensions, generator=torch.Generator().manual_seed(3))
            data, q = importance_samples(
                solver, gaussian, 80.0 * noise.double(), grid(20), samples=1, data_std=std
            )
            log_w = true.log_prob(data).sum(1) - q.log_p
            effective = torch.exp(2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0))
            bound_cells.append(f"{effective / len(data):.2f}")
        bounds.append([cells[0], *bound_cells])
        print(bounds[-1], flush=True)
    header = ["solver", "Gaussian, 10", "40", "160", "mixture, 10", "40", "160"]
    write(TABLES / "likelihood_solvers.md", f"{table(header, divergence, words=(0,))}\n")
    header = ["solver", "Gaussian, 20", "160", "mixture, 20", "160", "share, dim 2", "dim 8"]
    write(TABLES / "likelihood_bounds.md", f"{table(header, bounds, words=(0,))}\n")


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
    warnings.simplefilter("ignore", StabilityWarning)  # of what is to be shown
    solvers()
    if sys.argv[1:] != ["solvers"]:
        main()
