"""What `stability_report` expects of round trips and codes, against what they turn out to be.

Measures, on Karras grids from 80 to 0.002 and then 0:
- round trip: the relative error of the noise after `sample` and `invert` from its state, in float32 and
  float64, on a Gaussian of standard deviation 0.5, on a mixture of Gaussians and on the digits;
- encoding error: relative distance of the code of a lone image to its true latent on the mixture, where
  the image is a fine solution (1,000 steps of RK4) from that latent.
Medians over 16 states; and the standard deviation of the codes over that of the latents: 1 is right.
Writes three reports, as `print` has them, beside the table.

Against: the expectation, for which no denoiser is called.

Run: python benchmarks/stability_table.py        (about 2 minutes on one core)
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
from markdown_table import table
from round_trip import distance, problems
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

APPROXIMATORS: list[IntegrationApproximator] = [Euler(), DDIM(), HeunEDM()]
GAMMAS: list[float | GammaRule] = [0.5, 0.8, 0.96, 1.0, StepRatio(1), StepRatio(2)]
EXAMPLES = [
    BDIA(Euler(), StepRatio(1)),
    BDIA(DDIM(), gamma=0.5),
    BDIA(DDIM(), gamma=0.5, arithmetic=FixedPoint()),
]
TABLE = Path(__file__).parent.parent / "docs" / "tables" / "stability.md"


def round_trip(solver: BDIA, denoiser: torch.nn.Module, noise: Tensor, sigmas: Tensor) -> float:
    """Median relative error of the noise."""
    back = solver.invert(denoiser, solver.sample(denoiser, noise, sigmas).state, sigmas).x
    return distance(back.double(), noise.double())


def rows(steps: list[int]) -> list[list[str]]:
    """One row for each grid, method and gamma."""
    found = []
    models = problems()
    mixture, start = models["mixture"]
    images = RK4().sample(mixture, start, karras_sigmas(1000)).x
    models = {"Gaussian": (Gaussian(std=0.5), start), **models}
    cases = [(n, a, g) for n in steps for a in APPROXIMATORS for g in GAMMAS]
    for n, approximator, gamma in tqdm(cases):
        solver, sigmas = BDIA(approximator, gamma), karras_sigmas(n)
        report = stability_report(solver, sigmas)
        row = [str(n), str(approximator)[:-2], str(gamma).replace("power=", "")]
        for dtype in (torch.float32, torch.float64):
            row.append(f"{report.round_trip_error(dtype):.0e}")
            row += [
                f"{round_trip(solver, denoiser, noise[:16].to(dtype), sigmas):.0e}"
                for denoiser, noise in models.values()
            ]
        code = solver.invert(mixture, images, sigmas).x
        row += [f"{report.encoding_error:.0e}", f"{distance(code, start):.0e}"]
        found.append([*row, f"{float(code.std() / start.std()):.3g}"])
    return found


def markdown(lines: list[list[str]]) -> str:
    """A table of the rows, after the header."""
    header = ["steps", "method", "gamma"]
    for dtype in ("float32", "float64"):
        header += [f"round trip, {dtype}: expected", "Gaussian", "mixture", "digits"]
    header += ["encoding error: expected", "mixture", "code std, mixture"]
    return table(header, lines, words=range(3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[18, 50, 80])
    parser.add_argument("--out", type=Path, default=TABLE)
    options = parser.parse_args()
    warnings.simplefilter("ignore", InversionWarning)  # hopeless cases are what is measured
    text = markdown(rows(options.steps))
    print(text)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text + "\n")
    reports = [str(stability_report(solver, karras_sigmas(50))) for solver in EXAMPLES]
    options.out.with_name("stability_reports.txt").write_text("\n\n".join(reports) + "\n")


if __name__ == "__main__":
    main()
