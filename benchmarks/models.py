"""Every kind of model under several solvers: does it come back, and is its code noise?

Measures, for each model and solver, on 18 levels of the model's own range, in float32 states:
- round trip: relative error of the noise after `sample` and `invert` from its state;
- in float64 states, over the same float32 network;
- code: mean and standard deviation, over the first noise level, of a sample that is encoded on its own
  (0 and 1 would be right; a network with random weights has no data, so its codes mean little).

Against: nothing; it is the table of `docs/models.md`.

Run: python benchmarks/model_table.py        (about 3 minutes on one core)
"""

from __future__ import annotations

from pathlib import Path

import torch
from exact_problems import PROBLEMS, Problem
from markdown_table import table
from tqdm.auto import tqdm

from odesolvers import (
    BDIA,
    DDIM,
    DPMSolverPP2S,
    Euler,
    FixedPoint,
    HeunEDM,
    StepRatio,
    karras_sigmas,
)
from odesolvers.models import InDtype

SOLVERS = {
    "DDIM, 1": BDIA(DDIM(), 1.0),
    "Euler, StepRatio(1)": BDIA(Euler(), StepRatio(1)),
    "Euler, StepRatio(2)": BDIA(Euler(), StepRatio(2)),
    "HeunEDM, StepRatio(1)": BDIA(HeunEDM(), StepRatio(1)),
    "DPMSolverPP2S, StepRatio(1)": BDIA(DPMSolverPP2S(), StepRatio(1)),
    "HeunEDM, StepRatio(2), FixedPoint()": BDIA(HeunEDM(), StepRatio(2), FixedPoint()),
}
TABLE = Path(__file__).parent.parent / "docs" / "tables" / "models.md"
NETWORKS = ("random convolutions", "letters, guided", "EDM DDPM++, random")


def row(problem: Problem, name: str, solver: BDIA) -> list[str]:
    """One line of the table."""
    denoiser, args = problem.build(torch.device("cpu")), problem.arguments()
    sigmas = karras_sigmas(18, problem.sigma_min, problem.sigma_max)
    errors = []
    for dtype in (torch.float32, torch.float64):
        x = problem.noise(dtype)
        if isinstance(solver.arithmetic, FixedPoint):
            x = solver.arithmetic.snap(x)
        wrapped = InDtype(denoiser, torch.float32) if problem.name in NETWORKS else denoiser
        there = solver.sample(wrapped, x, sigmas, extra_args=args)
        back = solver.invert(wrapped, there.state, sigmas, extra_args=args)
        errors.append(float((back.x - x).norm() / x.norm()))
    code = solver.invert(wrapped, there.x, sigmas, extra_args=args).x / sigmas[0]
    shown = ["0" if error == 0 else f"{error:.0e}" for error in errors]
    return [problem.name, name, *shown, f"{float(code.mean()):.2g}", f"{float(code.std()):.3g}"]


def main() -> None:
    header = ["model", "BDIA over", "round trip, float32", "float64", "code mean", "code std"]
    pairs = [(problem, *item) for problem in PROBLEMS for item in SOLVERS.items()]
    text = table(header, [row(*pair) for pair in tqdm(pairs)], words=(0, 1))
    print(text)
    TABLE.write_text(text + "\n")


if __name__ == "__main__":
    main()
