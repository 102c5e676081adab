"""The search for a rule for g_i that needs no calibration, samples well and encodes well.

Measures, for every candidate (a rule, a base, a first step) and problem of the suite, at 5 to 20
evaluations:
- sampling: the median error over that of DDIM at the same evaluations, the worst over the budgets;
- encoding: the median error of the code of a lone image over that of DDIM run upwards, the worst over
  budgets of 10 and more.

Against: DDIM both ways, whose ratios are 1 by definition. The last columns are the worst over all
problems: a rule that is good everywhere has a sampling ratio below 1 and an encoding ratio below 0.5.

    python benchmarks/gamma_search.py                     # all, a quarter of an hour on one core
    python benchmarks/gamma_search.py --problems mixture digits      # a minute
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, final

from markdown_table import table
from suite_problems import CACHE, PROBLEMS, Instance, Problem, reference
from suite_solvers import UpwardDDIM
from torch import Tensor
from tqdm.auto import tqdm

from odesolvers import (
    BDIA,
    DDIM,
    Combination,
    ConstantGamma,
    DampedStepRatio,
    Denoise,
    DPMSolverPP2S,
    Euler,
    Exponential,
    GammaRule,
    HeunEDM,
    IntegrationApproximator,
    Midpoint,
    SmoothedOutput,
    State,
    StepRatio,
)

TABLE = Path(__file__).resolve().parent.parent / "docs" / "tables" / "gamma_search.md"
BUDGETS = {"mixture": (5, 6, 8, 10, 15, 20), "digits": (5, 6, 8, 10, 15, 20)}
FEW = (5, 10, 20)


@final
@dataclass(frozen=True)
class GaussianEuler(IntegrationApproximator):
    """Euler in the variables of EDM's preconditioner, exact on Gaussian data of standard deviation s.

    With ``z = x / sqrt(s² + σ²)`` and the network's part F of the output, ``D = c_skip x + c_out F``,
    the flow is ``dz = -F d(arctan(σ / s))``; F is held over the step.
    """

    std: float
    order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 1

    def increment(
        self, x: Combination, sigma: float, target: float, denoise: Denoise
    ) -> Combination:
        s = self.std
        here, there = math.hypot(s, sigma), math.hypot(s, target)
        f = (denoise(x, sigma) - (s / here) ** 2 * x) / (sigma * s / here)
        angle = math.atan(target / s) - math.atan(sigma / s)
        return there * (x / here - angle * f) - x


@dataclass(frozen=True)
class BetterStart:
    """A solver whose first step, in either direction, is `HeunEDM`'s, for one evaluation more."""

    solver: BDIA

    def sample(
        self, denoiser: Any, x: Tensor, sigmas: Tensor, *, extra_args: Mapping[str, Any]
    ) -> Any:
        first = HeunEDM().sample(denoiser, x, sigmas, extra_args=extra_args, stop=1)
        state = replace(first.state, partner=x, solver=repr(self.solver))
        return self.solver.sample(denoiser, state, sigmas, extra_args=extra_args)

    def invert(
        self, denoiser: Any, x: Tensor, sigmas: Tensor, *, extra_args: Mapping[str, Any]
    ) -> Any:
        last, levels = len(sigmas) - 1, tuple(sigmas.tolist())
        (move,) = HeunEDM().increments(
            denoiser, x, levels[-1], (levels[-2],), extra_args=extra_args
        )
        state = State(x, x + move, last, levels, repr(self.solver))
        return self.solver.invert(denoiser, state, sigmas, extra_args=extra_args)


@dataclass(frozen=True)
class Candidate:
    """What is tried, under its name."""

    name: str
    solver: Any
    spare: int = 0
    """Evaluations of the first step beyond those of the others; negative for fewer."""
    per_step: int = 1

    def steps(self, budget: int) -> int:
        return (budget - self.spare) // self.per_step


def over(base: IntegrationApproximator, rule: float | GammaRule, per_step: int = 1) -> Candidate:
    shown = f"γ = {rule:g}" if isinstance(rule, float) else repr(rule)
    # The first step has nothing behind it to evaluate.
    spare = base.evaluations - per_step
    return Candidate(f"{base!r}, {shown}", BDIA(base, rule), spare, per_step)


def candidates() -> list[Candidate]:
    rules: list[GammaRule] = [StepRatio(1), StepRatio(1.5), StepRatio(2)]
    rules += [DampedStepRatio(c, p) for c in (0.05, 0.1, 0.2, 0.3, 0.5, 1.0) for p in (1, 2, 3)]
    rules += [SmoothedOutput(StepRatio(1)), SmoothedOutput(DampedStepRatio())]
    starts = [StepRatio(1), DampedStepRatio(), DampedStepRatio(0.1, 2)]
    return [
        Candidate("DDIM", UpwardDDIM()),
        over(Euler(), 1.0),
        over(DDIM(), 1.0),
        over(Exponential(Euler()), 1.0),
        Candidate("DDIM(), γ = 1, smoothed", BDIA(DDIM(), SmoothedOutput(ConstantGamma(1.0)))),
        *(over(Euler(), rule) for rule in rules),
        *(over(GaussianEuler(std), StepRatio(1)) for std in (0.5, 1.0)),
        *(
            Candidate(f"first step HeunEDM(), {rule!r}", BetterStart(BDIA(Euler(), rule)), spare=1)
            for rule in starts
        ),
        *(
            over(base, rule, per_step=3)
            for base in (HeunEDM(), Midpoint(), DPMSolverPP2S())
            for rule in (StepRatio(1), StepRatio(2))
        ),
    ]


def errors(
    candidate: Any, instance: Instance, sigmas: Tensor, noise: Tensor, clean: Tensor
) -> tuple[float, float]:
    """Median sampling and encoding error; infinite where the run diverged."""

    def median(walk: Callable[..., Any], start: Tensor, truth: Tensor) -> float:
        try:
            x = walk(instance.denoiser, start, sigmas, extra_args=instance.extra_args).x
        except FloatingPointError:
            return math.inf
        distance = (x - truth).double().flatten(1).norm(dim=1)
        return float(
            distance.median() / truth.double().flatten(1).norm(dim=1).square().mean().sqrt()
        )

    return median(candidate.sample, noise, clean), median(candidate.invert, clean, noise)


def ratios(instance: Instance, tried: Sequence[Candidate], bar: Any) -> list[tuple[float, float]]:
    """The worst ratios over the budgets of one problem, for each candidate."""
    problem = instance.problem
    truth = reference(instance, 0, CACHE)
    noise, clean = truth.noise.to(problem.dtype), truth.clean.to(problem.dtype)
    budgets = BUDGETS.get(problem.name, FEW)
    grids = {budget: problem.sigmas(budget) for budget in budgets}
    base = {b: errors(UpwardDDIM(), instance, grids[b], noise, clean) for b in budgets}
    worst = []
    for candidate in tried:
        bar.set_postfix_str(f"{problem.name}, {candidate.name}")
        sampling, encoding = [0.0], [0.0]
        for budget in budgets:
            if (steps := candidate.steps(budget)) < 2:
                continue
            s, e = errors(candidate.solver, instance, problem.sigmas(steps), noise, clean)
            sampling.append(s / base[budget][0])
            if budget >= 10:
                encoding.append(e / base[budget][1])
        worst.append((max(sampling), max(encoding)))
        bar.update()
    return worst


def number(ratio: float) -> str:
    if not math.isfinite(ratio):
        return "lost"
    return f"{ratio:.2f}" if ratio < 100 else f"{ratio:.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--problems", nargs="+", help="names of the suite's; all by default")
    parser.add_argument("--out", type=Path, default=TABLE)
    options = parser.parse_args()
    problems: list[Problem] = [
        p for p in PROBLEMS if not options.problems or p.name in options.problems
    ]
    tried = candidates()
    with tqdm(total=len(problems) * len(tried)) as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of inversions that are not to be trusted
        columns = [ratios(problem.load(), tried, bar) for problem in problems]
    header = ["candidate", *(f"{p.name}: {way}" for p in problems for way in ("s", "e"))]
    lines = []
    for k, candidate in enumerate(tried):
        pairs = [column[k] for column in columns]
        cells = [number(ratio) for pair in pairs for ratio in pair]
        worst = [number(max(pair[way] for pair in pairs)) for way in (0, 1)]
        lines.append([f"`{candidate.name}`", *cells, *worst])
    text = table([*header, "worst s", "worst e"], lines)
    print(text)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
