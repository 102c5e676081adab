"""BDIA over Heun against EDM's Heun, at equal evaluations.

First table: the sampling error of BDIA over ``HeunEDM("ahead")`` under several rules for the weights,
over that of `HeunEDM` at the same evaluations; below 1 is better.

Second table: sampling / encoding errors over those of `HeunEDM` run down / up, for the three places of
the second slope under `StepRatio(1)`, and for the second slope behind under weights that `calibrate`
learned on other noise, with the error of samples weighed four times that of codes.

Errors are medians over the states of seed 0, on Karras grids from 80 to 0.02.

    python -m benchmarks.heun --write     # an hour on one core; makes docs/tables/heun.md
    python -m benchmarks.heun --quick     # a minute: the mixture, few evaluations
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tqdm.auto import tqdm

from odesolvers import (
    BDIA,
    Calibrated,
    GammaRule,
    HeunEDM,
    HeunStepRatio,
    Objective,
    StepRatio,
    calibrate,
)

from .common import (
    CACHE,
    DIGITS,
    EMOJI,
    MIXTURE,
    TABLES,
    Problem,
    Reference,
    Upwards,
    encoding_error,
    reference,
    sampling_error,
    table,
    write,
)


@dataclass(frozen=True, repr=False, eq=False)
class ScaledStepRatio(GammaRule):
    """``g_i = factor (h_i / h_{i+1})^power``"""

    factor: float
    power: float

    def weights(self, grid: object, scale: Callable[[float], float]) -> list[float]:
        ratios = StepRatio(self.power).weights(grid, scale)  # type: ignore[arg-type]
        return [self.factor * ratio for ratio in ratios]


RULES: dict[str, GammaRule] = {
    "HeunStepRatio()": HeunStepRatio(),
    "h/h'": StepRatio(1),
    "(h/h')^2": StepRatio(2),
    "(h/h')^2.5": StepRatio(2.5),
    "(h/h')^3": StepRatio(3),
    "1/2 (h/h')^2": ScaledStepRatio(1 / 2, 2),
    "1/2 (h/h')^3": ScaledStepRatio(1 / 2, 3),
    "1/3 h/h'": ScaledStepRatio(1 / 3, 1),
}
"""The rules of the first table; h is the step ahead and h' the step behind."""
BUDGETS = (10, 14, 20, 36, 80)
BOTH_WAYS: list[tuple[str, GammaRule | None]] = [
    ("ahead", StepRatio(1)),
    ("behind", StepRatio(1)),
    ("behind", None),
    ("both", StepRatio(1)),
]
"""The columns of the second table: the place of the second slope, and a rule or None for `calibrate`."""
PROBLEMS = {MIXTURE: 128, DIGITS: 64, EMOJI: 4}
"""The problems, and the number of states that weights are learned on."""


def steps(second: str, budget: int) -> int:
    """The most steps within `budget` evaluations; the first one takes two."""
    return budget // 2 if second != "both" else 1 + (budget - 2) // 3


def over_heun(
    solver: object, second: str, problem: Problem, budget: int, truth: Reference
) -> tuple[float, float]:
    """Sampling and encoding errors over those of `HeunEDM` down and up."""
    heun, n = Upwards(HeunEDM()), steps(second, budget)
    sampling, encoding = (
        error(solver, problem, n, truth) / error(heun, problem, budget // 2, truth)
        for error in (sampling_error, encoding_error)
    )
    return sampling, encoding


def by_rule(problems: Sequence[Problem], budgets: Sequence[int]) -> str:
    """The first table: sampling under several rules."""
    lines = []
    for problem in problems:
        truth = reference(problem, 0)
        for budget in tqdm(budgets, desc=problem.name):
            heun = sampling_error(HeunEDM(), problem, budget // 2, truth)
            cells = []
            for rule in RULES.values():
                solver = BDIA(HeunEDM("ahead"), rule)
                own = sampling_error(solver, problem, budget // 2, truth)
                cells.append(number(own / heun))
            lines.append([problem.name, str(budget), f"{heun:.1e}", *cells])
    header = ["problem", "evaluations", "HeunEDM's error", *(f"`{name}`" for name in RULES)]
    return table(header, lines)


def both_ways(problems: Sequence[Problem], budgets: Sequence[int]) -> str:
    """The second table: sampling and encoding, both over those of `HeunEDM`."""
    lines = []
    for problem in problems:
        truth = reference(problem, 0)
        for budget in tqdm(budgets, desc=problem.name):
            cells = []
            for second, rule in BOTH_WAYS:
                base, n = HeunEDM(second), steps(second, budget)
                solver = BDIA(base, rule or learned(problem, base, n))
                pair = over_heun(solver, second, problem, budget, truth)
                cells.append(" / ".join(map(number, pair)))
            lines.append([problem.name, str(budget), *cells])
    header = ["problem", "evaluations"]
    header += [
        f"{second}, {'`StepRatio(1)`' if rule else 'calibrated'}" for second, rule in BOTH_WAYS
    ]
    return table(header, lines)


def learned(problem: Problem, base: HeunEDM, n: int) -> Calibrated:
    """Weights for `n` steps, learned on noise that is measured nowhere, and kept for the next run."""
    x = problem.calibration_noise()[: PROBLEMS[problem]]
    objective = Objective(sampling=4)
    name = f"{problem.name}-v{problem.version}-{base}-{objective}-weights-{n}-of-{len(x)}.json"
    if not (CACHE / name).exists():
        rule = calibrate(
            problem.denoiser,
            x,
            problem.sigmas(n),
            base=base,
            objective=objective,
            extra_args={key: value[: len(x)] for key, value in problem.arguments().items()},
            max_runs=2 * problem.calibration_runs,
        )
        CACHE.mkdir(parents=True, exist_ok=True)
        rule.save(CACHE / name)
    return Calibrated.load(CACHE / name)


def number(ratio: float) -> str:
    """Two digits."""
    return f"{ratio:.2g}" if ratio < 100 else f"{ratio:.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="the mixture, at 10 and 20 evaluations"
    )
    parser.add_argument("--write", action="store_true", help="write docs/tables/heun.md")
    options = parser.parse_args()
    problems = [MIXTURE] if options.quick else list(PROBLEMS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about inversions that amplify errors
        text = "\n\n".join(
            [
                by_rule(problems, (10, 20) if options.quick else BUDGETS),
                both_ways(problems, (20,) if options.quick else BUDGETS[2:]),
            ]
        )
    if options.write:
        write(TABLES / "heun.md", text)
    else:
        print(text)


if __name__ == "__main__":
    main()
