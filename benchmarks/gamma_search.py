"""A search for a rule for g_i that needs no calibration, samples well and encodes well.

For each candidate (a rule, a base, a first step) and each problem of the suite, at 5 to 20 evaluations:
- sampling (s): the median error over that of DDIM at the same evaluations, the worst of all budgets;
- encoding (e): the median error of the code of a lone image over that of DDIM run upwards, the worst of
  the budgets of 10 and more.

The last columns are the worst of all problems. A rule that is good everywhere has a sampling ratio below
1 and an encoding ratio below 0.5.

    python -m benchmarks.gamma_search                                # a quarter of an hour on one core
    python -m benchmarks.gamma_search --problems mixture digits --out out/search.md     # a minute
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, final

from torch import Tensor
from tqdm.auto import tqdm

from odesolvers import (
    BDIA,
    DDIM,
    ConstantGamma,
    DampedStepRatio,
    DPMSolverPP2S,
    Euler,
    Exponential,
    GammaRule,
    HeunEDM,
    HeunStepRatio,
    IntegrationApproximator,
    Midpoint,
    SmoothedOutput,
    State,
    StepRatio,
)
from odesolvers.extend import Combination, Denoise

from .common import (
    PROBLEMS,
    TABLES,
    Problem,
    Upwards,
    encoding_error,
    one_step,
    reference,
    sampling_error,
    shown,
    table,
    write,
)

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
        newer = one_step(HeunEDM(), denoiser, x, levels[-1], levels[-2], extra_args)
        state = State(x, newer, last, levels, repr(self.solver))
        return self.solver.invert(denoiser, state, sigmas, extra_args=extra_args)


@dataclass(frozen=True)
class Candidate:
    """A named solver to try."""

    name: str
    solver: Any
    spare: int = 0
    """Evaluations of the first step beyond those of a later one; negative for fewer."""
    per_step: int = 1

    def steps(self, budget: int) -> int:
        return (budget - self.spare) // self.per_step


def over(base: IntegrationApproximator, rule: float | GammaRule, per_step: int = 1) -> Candidate:
    name = f"γ = {rule:g}" if isinstance(rule, float) else shown(rule)
    # The first step evaluates nothing behind it.
    spare = base.evaluations - per_step
    return Candidate(f"{base!r}, {name}", BDIA(base, rule), spare, per_step)


def candidates() -> list[Candidate]:
    rules: list[GammaRule] = [StepRatio(1), StepRatio(1.5), StepRatio(2)]
    rules += [DampedStepRatio(c, p) for c in (0.05, 0.1, 0.2, 0.3, 0.5, 1.0) for p in (1, 2, 3)]
    rules += [SmoothedOutput(StepRatio(1)), SmoothedOutput(DampedStepRatio())]
    starts = [StepRatio(1), DampedStepRatio(), DampedStepRatio(0.1, 2)]
    return [
        Candidate("DDIM", Upwards(DDIM())),
        over(Euler(), 1.0),
        over(DDIM(), 1.0),
        over(Exponential(Euler()), 1.0),
        Candidate("DDIM(), γ = 1, smoothed", BDIA(DDIM(), SmoothedOutput(ConstantGamma(1.0)))),
        *(over(Euler(), rule) for rule in rules),
        *(over(GaussianEuler(std), StepRatio(1)) for std in (0.5, 1.0)),
        *(
            Candidate(
                f"first step HeunEDM(), {shown(rule)}", BetterStart(BDIA(Euler(), rule)), spare=1
            )
            for rule in starts
        ),
        *(
            over(base, rule, 2)
            for base in (HeunEDM(), HeunEDM("behind"), Midpoint(), DPMSolverPP2S())
            for rule in (StepRatio(1), StepRatio(2), HeunStepRatio())
        ),
    ]


def ratios(problem: Problem, tried: Sequence[Candidate], bar: Any) -> list[tuple[float, float]]:
    """The worst ratios of one problem for each candidate."""
    truth = reference(problem, 0)
    budgets = BUDGETS.get(problem.name, FEW)
    base = Upwards(DDIM())
    ddim = {
        n: (sampling_error(base, problem, n, truth), encoding_error(base, problem, n, truth))
        for n in budgets
    }
    worst = []
    for candidate in tried:
        bar.set_postfix_str(f"{problem.name}, {candidate.name}")
        solver, sampling, encoding = candidate.solver, [0.0], [0.0]
        for budget in budgets:
            if (steps := candidate.steps(budget)) < 2:
                continue
            sampling.append(sampling_error(solver, problem, steps, truth) / ddim[budget][0])
            if budget >= 10:
                encoding.append(encoding_error(solver, problem, steps, truth) / ddim[budget][1])
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
    parser.add_argument("--out", type=Path, default=TABLES / "gamma_search.md")
    options = parser.parse_args()
    problems: list[Problem] = [
        p for p in PROBLEMS if not options.problems or p.name in options.problems
    ]
    tried = candidates()
    with tqdm(total=len(problems) * len(tried)) as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about inversions that amplify errors
        columns = [ratios(problem, tried, bar) for problem in problems]
    header = ["candidate", *(f"{p.name}: {way}" for p in problems for way in ("s", "e"))]
    lines = []
    for k, candidate in enumerate(tried):
        pairs = [column[k] for column in columns]
        cells = [number(ratio) for pair in pairs for ratio in pair]
        worst = [number(max(pair[way] for pair in pairs)) for way in (0, 1)]
        lines.append([f"`{candidate.name}`", *cells, *worst])
    write(options.out, table([*header, "worst s", "worst e"], lines))


if __name__ == "__main__":
    main()
