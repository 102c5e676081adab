"""Every kind of model under several solvers: does it come back, and is its code noise?

For each model and solver, on 18 levels of the model's own range:
- the relative error of the noise after `sample` and `invert` from its state, in float32 and in float64
  states, the latter over the same float32 network;
- the mean and the standard deviation of the code of a lone sample, over the first noise level; right
  are 0 and 1, but a network with random weights has no data, so its codes mean little.

    python -m benchmarks.models             # about 3 minutes on one core
    python -m benchmarks.models --quick     # the closed forms only; writes nothing
"""

from __future__ import annotations

import argparse

import torch
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

from .common import EXACT_PROBLEMS, TABLES, Problem, table, write

SOLVERS = {
    "DDIM, 1": BDIA(DDIM(), 1.0),
    "Euler, StepRatio(1)": BDIA(Euler(), StepRatio(1)),
    "Euler, StepRatio(2)": BDIA(Euler(), StepRatio(2)),
    "HeunEDM, StepRatio(1)": BDIA(HeunEDM(), StepRatio(1)),
    "DPMSolverPP2S, StepRatio(1)": BDIA(DPMSolverPP2S(), StepRatio(1)),
    "HeunEDM, StepRatio(2), FixedPoint()": BDIA(HeunEDM(), StepRatio(2), FixedPoint()),
}


def row(problem: Problem, name: str, solver: BDIA) -> list[str]:
    """One line of the table."""
    denoiser, args = problem.denoiser, problem.arguments()
    if problem.dtype == torch.float32:
        denoiser = InDtype(denoiser, torch.float32)
    sigmas = karras_sigmas(18, problem.bottom, problem.top)
    errors = []
    for dtype in (torch.float32, torch.float64):
        x = problem.noise().to(dtype)
        if isinstance(solver.arithmetic, FixedPoint):
            x = solver.arithmetic.snap(x)
        there = solver.sample(denoiser, x, sigmas, extra_args=args)
        back = solver.invert(denoiser, there.state, sigmas, extra_args=args)
        errors.append(float((back.x - x).norm() / x.norm()))
    code = solver.invert(denoiser, there.x, sigmas, extra_args=args).x / sigmas[0]
    shown = ["0" if error == 0 else f"{error:.0e}" for error in errors]
    return [problem.name, name, *shown, f"{float(code.mean()):.2g}", f"{float(code.std()):.3g}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the closed forms only")
    options = parser.parse_args()
    header = ["model", "BDIA over", "round trip, float32", "float64", "code mean", "code std"]
    problems = EXACT_PROBLEMS[:3] if options.quick else EXACT_PROBLEMS
    pairs = [(problem, *item) for problem in problems for item in SOLVERS.items()]
    text = table(header, [row(*pair) for pair in tqdm(pairs)], words=(0, 1))
    if options.quick:
        print(text)
    else:
        write(TABLES / "models.md", text)


if __name__ == "__main__":
    main()
