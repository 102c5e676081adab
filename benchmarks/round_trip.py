"""Every method with every gamma: sampling, going back, and encoding.

On a mixture of Gaussians and on the digits, 50 Karras steps from 80 to 0.002 and then 0:
- sampling error: the median distance to a fine solution (2,000 steps of RK4), relative to the data;
- round trip: the relative error of the noise after `sample` and `invert` from its state, in float32
  and in float64;
- encoding error: the relative distance of the code of a lone image to its true code (mixture only: a
  digit does not determine its noise), and the code's standard deviation over the noise's, right at 1.

The rows of gamma 0 are the base methods alone.

    python -m benchmarks.round_trip                                    # about 3 minutes on one core
    python -m benchmarks.round_trip --steps 6 --fine 100 --out out/round_trip.md     # a few seconds
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
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

from .common import DIGITS, MIXTURE, TABLES, median_error, shown, table, write

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


def rows(steps: int, fine: int) -> list[list[str]]:
    """One row for each problem, method and gamma."""
    found = []
    pairs = [(a, g) for a in APPROXIMATORS for g in GAMMAS] + MORE
    sigmas, finer = karras_sigmas(steps), karras_sigmas(fine)
    for problem in (MIXTURE, DIGITS):
        denoiser, noise = problem.denoiser, problem.noise()
        reference = RK4().sample(denoiser, noise, finer, progress=True).x
        for approximator, gamma in tqdm(pairs, desc=problem.name):
            solver = BDIA(approximator, gamma)
            there = solver.sample(denoiser, noise, sigmas)
            row = [
                problem.name,
                type(approximator).__name__,
                shown(gamma),
            ]
            row += [str(there.nfe), f"{median_error(there.x, reference):.1e}"]
            if gamma == 0.0:
                found.append([*row, "", "", "", ""])
                continue
            for dtype in (torch.float32, torch.float64):
                start = noise.to(dtype)
                state = solver.sample(denoiser, start, sigmas).state
                back = solver.invert(denoiser, state, sigmas).x
                row.append(f"{float((back - start).norm() / start.norm()):.1e}")
            if problem is MIXTURE:
                code = solver.invert(denoiser, reference, sigmas).x
                row += [
                    f"{median_error(code, noise):.1e}",
                    f"{float(code.std() / noise.std()):.3g}",
                ]
            else:
                row += ["", ""]
            found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--fine", type=int, default=2000, help="steps of the fine solution")
    parser.add_argument("--out", type=Path, default=TABLES / "round_trip.md")
    options = parser.parse_args()
    header = ["problem", "method", "gamma", "evaluations", "sampling error", "round trip float32"]
    header += ["round trip float64", "encoding error", "code std"]
    write(options.out, table(header, rows(options.steps, options.fine), words=range(3)))


if __name__ == "__main__":
    main()
