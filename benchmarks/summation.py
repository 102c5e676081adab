"""Three ways to form a step from the same coefficients, by their rounding.

A step ``x_{i-1} = g x_{i+1} + b x_i + c D`` has g + b + c = 1. As *sums*, ``c (D + (b / c) x_i)`` is
added to ``g x_{i+1}``. As a *mean*, x_{i+1} is moved by 1 - g towards the mean of x_i and D: what this
package does. As *moves*, x_{i+1} is moved towards D and then towards x_i, and no scratch tensor is
needed. On a mixture of Gaussians in float32, whose denoiser is evaluated in float64; samples against
those of a run in float64, and the noise that comes back against the noise.

Run: python benchmarks/summation.py [--write]     (seconds; --write makes docs/tables/summation.md)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from markdown_table import table
from torch import Tensor

from odesolvers import BDIA, DDIM, Euler, FloatingPoint, GammaRule, Grid, StepRatio, karras_sigmas
from odesolvers.models import GaussianMixture
from odesolvers.step import Step

TABLE = Path(__file__).parent.parent / "docs" / "tables" / "summation.md"
MIXTURE = GaussianMixture(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), 0.3)
Way = Callable[[Step, Tensor, Tensor, Tensor], Tensor]


def denoise(x: Tensor, sigma: float) -> Tensor:
    """In float64, so that the rounding is that of the steps."""
    return MIXTURE(x.double(), torch.full(x.shape[:1], sigma, dtype=torch.float64)).to(x.dtype)


def sums_ahead(step: Step, older: Tensor, x: Tensor, D: Tensor) -> Tensor:
    g, b, c = step.gain, step.rest[0], step.rest[1]
    return (older * g).add_(torch.add(D, x, alpha=b / c), alpha=c)


def sums_back(step: Step, newer: Tensor, x: Tensor, D: Tensor) -> Tensor:
    g, b, c = step.gain, step.rest[0], step.rest[1]
    return torch.sub(newer, torch.add(D, x, alpha=b / c), alpha=c) / g


def mean_ahead(step: Step, older: Tensor, x: Tensor, D: Tensor) -> Tensor:
    return FloatingPoint().forward(step, older, [x, D])


def mean_back(step: Step, newer: Tensor, x: Tensor, D: Tensor) -> Tensor:
    return FloatingPoint().inverse(step, newer, [x, D])


def moves_ahead(step: Step, older: Tensor, x: Tensor, D: Tensor) -> Tensor:
    g, b, c = step.gain, step.rest[0], step.rest[1]
    return torch.lerp(older, D, c / (g + c)).lerp_(x, b)


def moves_back(step: Step, newer: Tensor, x: Tensor, D: Tensor) -> Tensor:
    g, b, c = step.gain, step.rest[0], step.rest[1]
    return torch.lerp(newer, x, -b / (g + c)).lerp_(D, -c / g)


WAYS: dict[str, tuple[Way, Way]] = {
    "sums": (sums_ahead, sums_back),
    "mean": (mean_ahead, mean_back),
    "moves": (moves_ahead, moves_back),
}


def there_and_back(way: tuple[Way, Way], steps: list[Step], x: Tensor) -> tuple[Tensor, Tensor]:
    """The sample, and the noise again."""
    ahead, back = way
    first, *later = steps
    older, here = x, FloatingPoint().combine(first.rest, [x, denoise(x, level(first))])
    for step in later:
        older, here = here, ahead(step, older, here, denoise(here, level(step)))
    sample = here
    for step in reversed(later):
        older, here = back(step, here, older, denoise(older, level(step))), older
    return sample, older


def level(step: Step) -> float:
    (call,) = step.evaluations
    return call.sigma


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    options = parser.parse_args()
    noise = 80 * torch.randn(256, 3, generator=torch.Generator().manual_seed(1))
    gammas: list[float | GammaRule] = [0.96, 0.9, StepRatio(1), StepRatio(2)]
    lines = []
    for solver in [BDIA(base, gamma) for base in (Euler(), DDIM()) for gamma in gammas]:
        for n in (5, 18, 50):
            steps = [step for (step,) in solver.steps(Grid.of(karras_sigmas(n)))]
            exact, _ = there_and_back(WAYS["mean"], steps, noise.double())
            row = [f"{solver.approximator}, {solver.gamma}, {n}"]
            for way in WAYS.values():
                sample, back = there_and_back(way, steps, noise)
                off = float((sample - exact).norm() / exact.norm())
                row += [f"{off:.1e}", f"{float((back - noise).norm() / noise.norm()):.1e}"]
            lines.append(row)
    header = ["method, gamma, steps"]
    header += [f"{name}, {what}" for name in WAYS for what in ("sample", "round trip")]
    text = table(header, lines) + "\n"
    print(text)
    if options.write:
        TABLE.write_text(text)


if __name__ == "__main__":
    main()
