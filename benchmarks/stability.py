"""The expectations of `stability_report`, against measured round trips and codes.

On Karras grids from 80 to 0.002 and then 0:
- round trip: the relative error of the noise after `sample` and `invert` from its state, in float32 and
  float64, on a Gaussian of standard deviation 0.5, on a mixture of Gaussians and on the digits;
- encoding error: the relative distance of the code of a lone image to its true code on the mixture,
  where the image is a fine solution (1,000 steps of RK4); and the code's standard deviation over the
  true code's, right at 1.

Errors are medians over 16 states. Writes three reports, as `print` shows them, beside the table.

    python -m benchmarks.stability                                     # about 2 minutes on one core
    python -m benchmarks.stability --steps 6 --out out/stability.md    # a few seconds
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from odesolvers import (
    BDIA,
    DDIM,
    RK4,
    Euler,
    FixedPoint,
    GammaRule,
    HeunEDM,
    IntegrationApproximator,
    InversionWarning,
    StepRatio,
    karras_sigmas,
    stability_report,
)
from odesolvers.models import Gaussian

from .common import DIGITS, MIXTURE, TABLES, median_error, shown, table, write

APPROXIMATORS: list[IntegrationApproximator] = [Euler(), DDIM(), HeunEDM()]
GAMMAS: list[float | GammaRule] = [0.5, 0.8, 0.96, 1.0, StepRatio(1), StepRatio(2)]
EXAMPLES = [
    BDIA(Euler(), StepRatio(1)),
    BDIA(DDIM(), gamma=0.5),
    BDIA(DDIM(), gamma=0.5, arithmetic=FixedPoint()),
]


def round_trip(solver: BDIA, denoiser: torch.nn.Module, noise: Tensor, sigmas: Tensor) -> float:
    """The median relative error of the noise."""
    back = solver.invert(denoiser, solver.sample(denoiser, noise, sigmas).state, sigmas).x
    return median_error(back, noise)


def rows(steps: list[int]) -> list[list[str]]:
    """One row for each grid, method and gamma."""
    found = []
    mixture, start = MIXTURE.denoiser, MIXTURE.noise()
    images = RK4().sample(mixture, start, karras_sigmas(1000)).x
    models = {
        "Gaussian": (Gaussian(std=0.5), start),
        "mixture": (mixture, start),
        "digits": (DIGITS.denoiser, DIGITS.noise()),
    }
    cases = [(n, a, g) for n in steps for a in APPROXIMATORS for g in GAMMAS]
    for n, approximator, gamma in tqdm(cases):
        solver, sigmas = BDIA(approximator, gamma), karras_sigmas(n)
        report = stability_report(solver, sigmas)
        row = [str(n), type(approximator).__name__, shown(gamma)]
        for dtype in (torch.float32, torch.float64):
            row.append(f"{report.round_trip_error(dtype):.0e}")
            row += [
                f"{round_trip(solver, denoiser, noise[:16].to(dtype), sigmas):.0e}"
                for denoiser, noise in models.values()
            ]
        code = solver.invert(mixture, images, sigmas).x
        row += [f"{report.encoding_error:.0e}", f"{median_error(code, start):.0e}"]
        found.append([*row, f"{float(code.std() / start.std()):.3g}"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[18, 50, 80])
    parser.add_argument("--out", type=Path, default=TABLES / "stability.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore", InversionWarning)  # hopeless cases are measured too
    header = ["steps", "method", "gamma"]
    for dtype in ("float32", "float64"):
        header += [f"round trip, {dtype}: expected", "Gaussian", "mixture", "digits"]
    header += ["encoding error: expected", "mixture", "code std, mixture"]
    write(options.out, table(header, rows(options.steps), words=range(3)))
    reports = [str(stability_report(solver, karras_sigmas(50))) for solver in EXAMPLES]
    options.out.with_name("stability_reports.txt").write_text("\n\n".join(reports) + "\n")


if __name__ == "__main__":
    main()
