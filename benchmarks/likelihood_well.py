"""Importance weights on a double well: ``python -m benchmarks.likelihood_well``.

U has two wells along one direction and is harmonic along the others; quadrature gives the normalisation
of ``exp(-U)`` and the free energy of each well. A network of about 4,000 weights learns samples of it of
which half are from each well, as those of a simulation may be that has not crossed the barrier often.
Samples of the network are weighted by ``exp(-U) / q``, with q by `importance_samples`, by
`log_likelihood_bound`, and by the divergence of the flow, integrated by `HeunEDM` on the grid of the
samples. Evaluations, of each sample and its weight, are calls of the denoiser and vector-Jacobian
products. Reported are the effective sample size ``(Σ w)² / Σ w²`` as a share of the samples, and the
errors of ``log Z`` and of the difference in free energy between the wells, in units of kT, as root mean
squares over `BLOCKS` independent sets of `SIZE` samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn

from odesolvers import (
    BDIA,
    Euler,
    HeunEDM,
    StepRatio,
    importance_samples,
    karras_sigmas,
    log_likelihood,
    log_likelihood_bound,
)

from .common import TABLES, machine, table, write

LOW: Final = 0.02
HIGH: Final = 20.0
SOLVER: Final = BDIA(Euler(), StepRatio(1))
BLOCKS: Final = 8
SIZE: Final = 1000
DATA_STD: Final = 0.35


class Well:
    """The energy ``4 (u² - 1)² + u / 2 + Σ v² / 2 s²`` along rotated axes u, v."""

    def __init__(self, dimensions: int) -> None:
        generator = torch.Generator().manual_seed(dimensions)
        square = torch.randn(dimensions, dimensions, generator=generator, dtype=torch.float64)
        self.axes = torch.linalg.qr(square)[0]
        self.widths = torch.linspace(0.2, 0.5, dimensions - 1, dtype=torch.float64)
        self.u = torch.linspace(-2.5, 2.5, 100_001, dtype=torch.float64)
        self.boltzmann = torch.exp(-self._along(self.u))
        Z = torch.trapezoid(self.boltzmann, self.u)
        right = torch.trapezoid(self.boltzmann * (self.u > 0), self.u) / Z
        self.log_Z = float(Z.log() + (self.widths * math.sqrt(2 * math.pi)).log().sum())
        self.difference = float(torch.log((1 - right) / right))
        """The free energy of the right well less that of the left one."""

    @staticmethod
    def _along(u: Tensor) -> Tensor:
        return 4 * (u**2 - 1) ** 2 + u / 2

    def energy(self, x: Tensor) -> Tensor:
        """U of each state, ``(B,)``."""
        y = x.double() @ self.axes
        return self._along(y[:, 0]) + 0.5 * (y[:, 1:] / self.widths).square().sum(1)

    def is_right(self, x: Tensor) -> Tensor:
        """Whether each state is in the right well."""
        return (x.double() @ self.axes)[:, 0] > 0

    def samples(self, n: int, seed: int) -> Tensor:
        """`n` independent samples of ``exp(-U)``, but with half of them from each well."""
        generator = torch.Generator().manual_seed(seed)
        share = torch.where(self.u > 0, math.exp(self.difference), 1.0)
        cumulated = torch.cumulative_trapezoid(share * self.boltzmann, self.u)
        places = cumulated[-1] * torch.rand(n, generator=generator, dtype=torch.float64)
        u = self.u[torch.searchsorted(cumulated, places)]
        v = self.widths * torch.randn(n, len(self.widths), generator=generator, dtype=torch.float64)
        return torch.cat([u[:, None], v], 1) @ self.axes.T


class Network(nn.Module):
    """A denoiser with two hidden layers, under the preconditioning of Karras et al. 2022."""

    def __init__(self, dimensions: int, width: int = 56, std: float = 0.5) -> None:
        super().__init__()
        self.std = std
        self.layers = nn.Sequential(
            nn.Linear(dimensions + 1, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, dimensions),
        )

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        s = sigma[:, None].to(x.dtype)
        norm = torch.sqrt(s**2 + self.std**2)
        raw: Tensor = self.layers(torch.cat([x / norm, s.log() / 4], 1))
        return x * (self.std / norm) ** 2 + s * self.std / norm * raw


def train(well: Well, dimensions: int, steps: int = 12_000, batch: int = 512) -> Network:
    """The network after training by Adam, with averaged weights, in float64."""
    torch.manual_seed(0)
    network, data = Network(dimensions), well.samples(100_000, seed=1).float()
    averaged = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x = data[torch.randint(len(data), (batch,))]
        sigma = torch.exp(-1.0 + 1.6 * torch.randn(batch)).clamp(LOW / 2, 2 * HIGH)
        denoised = network(x + sigma[:, None] * torch.randn_like(x), sigma)
        weight = (sigma**2 + network.std**2) / (sigma * network.std) ** 2
        loss = (weight[:, None] * (denoised - x) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        averaged.update_parameters(network)
    return averaged.module.double().requires_grad_(False)  # type: ignore[no-any-return]


def grid(steps: int) -> Tensor:
    """The levels of that many steps."""
    return karras_sigmas(steps + 1, LOW, HIGH, append_zero=False)


Weighed = tuple[Tensor, Tensor, int]
"""Samples, the logarithms of their densities, and the evaluations for each."""


def unweighted(network: Network, x: Tensor) -> Weighed:
    """Samples as they are; nan for densities that are not known."""
    drawn = HeunEDM().sample(network, x, grid(20))
    return drawn.x, torch.full((len(x),), torch.nan), drawn.nfe


def pairs(network: Network, x: Tensor, steps: int, samples: int) -> Weighed:
    """By `importance_samples`."""
    args = {"samples": samples, "data_std": DATA_STD}
    data, found = importance_samples(
        SOLVER, network, x, grid(steps), generator=torch.Generator().manual_seed(1), **args
    )
    return data, found.log_p, found.nfe


def bound(network: Network, x: Tensor, steps: int, samples: int) -> Weighed:
    """By the bound, for samples of the same solver."""
    drawn = SOLVER.sample(network, x, grid(steps))
    found = log_likelihood_bound(
        SOLVER,
        network,
        drawn.x,
        grid(steps),
        samples=samples,
        data_std=DATA_STD,
        generator=torch.Generator().manual_seed(1),
    )
    return drawn.x, found.log_p, drawn.nfe + found.nfe


def divergence(network: Network, x: Tensor, steps: int, probes: int | None) -> Weighed:
    """By the divergence of the flow, with the exact trace or by random signs."""
    drawn = HeunEDM().sample(network, x, grid(steps))
    generator = torch.Generator().manual_seed(1)
    found = log_likelihood(network, drawn.x, grid(steps), probes=probes, generator=generator)
    products = x.shape[1] if probes is None else probes
    return drawn.x, found.log_p, drawn.nfe + found.nfe * (1 + products)


def contestants(dimensions: int) -> list[tuple[str, Callable[[Network, Tensor], Weighed]]]:
    """Names and weights, at about 11, 21, 161 and 321 evaluations."""
    found: list[tuple[str, Callable[[Network, Tensor], Weighed]]] = []
    found.append(("none, 20 steps", unweighted))

    def add(name: str, way: Callable[..., Weighed], steps: int, number: int | None) -> None:
        found.append((f"{name}, {steps} steps", lambda network, x: way(network, x, steps, number)))

    exact = 2 * (2 + dimensions)  # evaluations of a step
    for steps, K in ((10, 1), (20, 1), (10, 16), (20, 16)):
        evaluations = 1 + K * steps
        add(f"importance samples, K = {K}", pairs, steps, K)
        if K > 1:
            add(f"bound, K = {K}", bound, steps, K)
        add("divergence, 1 probe", divergence, max(2, round(evaluations / 6)), 1)
        if evaluations // exact >= 2:
            add("divergence, exact trace", divergence, min(100, round(evaluations / exact)), None)
    return found


def errors(well: Well, x: Tensor, log_q: Tensor) -> tuple[float, float, float]:
    """Effective share of the samples, and the errors of log Z and of the free energy difference."""
    known = not bool(log_q.isnan().any())
    log_w = -well.energy(x) - log_q if known else torch.zeros(len(x)).double()
    effective = torch.exp(2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)) / len(x)
    log_Z = log_w.logsumexp(0) - math.log(len(x)) if known else math.nan
    right = well.is_right(x)
    difference = log_w[~right].logsumexp(0) - log_w[right].logsumexp(0)
    return float(effective), float(log_Z) - well.log_Z, float(difference) - well.difference


def main() -> None:
    """Print the table, and write it to ``docs/tables/likelihood_well.md``."""
    torch.set_num_threads(1)
    rows = []
    for dimensions in (2, 8):
        well = Well(dimensions)
        network = train(well, dimensions)
        generator = torch.Generator().manual_seed(0)
        shape = BLOCKS * SIZE, dimensions
        x = HIGH * torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, weigh in contestants(dimensions):
            data, log_q, evaluations = weigh(network, x)
            blocks = zip(data.split(SIZE), log_q.split(SIZE), strict=True)
            found = torch.tensor([errors(well, *block) for block in blocks])
            off = found[:, 1:].square().mean(0).sqrt()
            figures = [f"{found[:, 0].mean():.2f}", *(f"{e:.3f}" for e in off)]
            shown = ["" if figure == "nan" else figure for figure in figures]
            rows.append([str(dimensions), name, str(evaluations), *shown])
            print(rows[-1], flush=True)
    header = ["dimensions", "weights", "evaluations", "effective", "log Z", "free energy"]
    write(TABLES / "likelihood_well.md", f"{machine()}.\n\n{table(header, rows, words=(1,))}\n")


if __name__ == "__main__":
    main()
