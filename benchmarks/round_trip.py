"""What each method and each gamma is worth: sampling, going back, and encoding.

Measures, on a mixture of Gaussians and on the digits, 50 Karras steps from 80 to 0.002 and then 0:
- sampling error: median distance to a fine solution (2,000 steps of RK4), relative to the data;
- round trip: relative error of the noise after `sample` and `invert` from its state, in float32 and
  in float64;
- encoding error: relative distance of the code of a lone image to its true latent (mixture only:
  a digit does not determine its noise), and the standard deviation of the code, to be compared with
  that of the noise drawn, 0.991.

Against: the base method alone (gamma = 0) and DDIM, at the evaluations they take.

Run: python benchmarks/round_trip.py        (about 3 minutes on one core)
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch
from markdown_table import table
from torch import Tensor
from tqdm.auto import tqdm

from odesolvers import (
    BDIA,
    DDIM,
    RK3,
    RK4,
    DPMSolverPP2S,
    Euler,
    GammaRule,
    HeunEDM,
    IntegrationApproximator,
    Midpoint,
    SmoothedOutput,
    StepRatio,
    karras_sigmas,
)
from odesolvers.models import GaussianMixture, IdealDenoiser, load_digits

APPROXIMATORS: list[IntegrationApproximator] = [
    Euler(),
    DDIM(),
    Midpoint(),
    HeunEDM(),
    DPMSolverPP2S(),
    RK3(),
    RK4(),
]
GAMMAS: list[float | GammaRule] = [0.0, 1.0, 0.5, StepRatio(1), StepRatio(2)]
MORE: list[tuple[IntegrationApproximator, GammaRule]] = [
    (DDIM(), SmoothedOutput(1.0)),
    (Euler(), SmoothedOutput(StepRatio(1))),
]
TABLE = Path(__file__).parent.parent / "docs" / "tables" / "round_trip.md"


def problems() -> dict[str, tuple[torch.nn.Module, Tensor]]:
    """Denoiser and starting noise at sigma = 80, of each problem."""
    g = torch.Generator().manual_seed(0)
    means = torch.randn(5, 8, generator=g, dtype=torch.float64)
    stds = 0.2 + 0.3 * torch.rand(5, generator=g, dtype=torch.float64)
    mixture = GaussianMixture(means, stds)
    digits = IdealDenoiser(load_digits()[0])
    return {
        "mixture": (mixture, 80 * torch.randn(256, 8, generator=g, dtype=torch.float64)),
        "digits": (digits, 80 * torch.randn(64, 1, 8, 8, generator=g, dtype=torch.float64)),
    }


def distance(x: Tensor, y: Tensor) -> float:
    """Median over the batch of |x - y| / |y|, in rms."""
    d, size = (x - y).flatten(1).norm(dim=1), y.flatten(1).norm(dim=1)
    return float(d.median() / size.square().mean().sqrt())


def rows(steps: int) -> list[list[str]]:
    """One row for each problem, method and gamma."""
    found = []
    pairs = [(a, g) for a in APPROXIMATORS for g in GAMMAS] + MORE
    sigmas, fine = karras_sigmas(steps), karras_sigmas(2000)
    for name, (denoiser, noise) in problems().items():
        reference = RK4().sample(denoiser, noise, fine, progress=True).x
        for approximator, gamma in tqdm(pairs, desc=name):
            solver = BDIA(approximator, gamma)
            there = solver.sample(denoiser, noise, sigmas)
            row = [
                name,
                str(approximator)[:-2],
                str(gamma).replace("power=", "").replace("rule=", ""),
            ]
            row += [str(there.nfe), f"{distance(there.x, reference):.1e}"]
            if gamma == 0.0:
                found.append([*row, "", "", "", ""])
                continue
            for dtype in (torch.float32, torch.float64):
                start = noise.to(dtype)
                state = solver.sample(denoiser, start, sigmas).state
                back = solver.invert(denoiser, state, sigmas).x
                row.append(f"{float((back - start).norm() / start.norm()):.1e}")
            if name == "mixture":
                code = solver.invert(denoiser, reference, sigmas).x
                row += [f"{distance(code, noise):.1e}", f"{float(code.std() / sigmas[0]):.3g}"]
            else:
                row += ["", ""]
            found.append(row)
    return found


def markdown(lines: list[list[str]]) -> str:
    """A table of the rows, after the header."""
    header = ["problem", "method", "gamma", "evaluations", "sampling error", "round trip float32"]
    header += ["round trip float64", "encoding error", "code std"]
    return table(header, lines, words=range(3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=TABLE)
    options = parser.parse_args()
    text = markdown(rows(options.steps))
    print(
        f"torch {torch.__version__}, {platform.machine()}, {options.steps} Karras steps\n\n{text}"
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
