"""Samplers and inverters side by side, at equal numbers of denoiser evaluations.

Measures, for every problem, solver, budget of evaluations and seed, on the same Karras levels, which
end above 0 so that the flow is determined in both directions:
- sampling: distance to a fine RK4 solution from the same noise, and the Fréchet distance to data;
- encoding: the fine solution's end, a lone tensor, encoded, against the noise it came from: distance,
  mean, standard deviation, normality;
- round trips, noise to data and back and an image to its code and back; evaluations of each; time.

Against: k-diffusion's and diffusers' samplers as installed, and the field's other invertible solvers.

    python benchmarks/suite.py              # goes on where it stopped, and writes the report
    python benchmarks/suite.py --quick      # a minute: few states of the mixture, into out/suite
    python benchmarks/suite.py --report     # the tables and plots alone
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from suite_measures import (
    Meter,
    frechet_distance,
    normality,
    percentile,
    relative_distance,
    relative_errors,
)
from suite_problems import (
    CACHE,
    FRECHET_SEED,
    PROBLEMS,
    Instance,
    Problem,
    Reference,
    data,
    reference,
)
from suite_report import report
from suite_rows import Row, Rows
from suite_solvers import Entry, entries
from torch import Tensor
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parent.parent
DIVERGED = (FloatingPointError, OverflowError)


@dataclass(frozen=True)
class Run:
    """One row to measure."""

    problem: Problem
    entry: Entry
    budget: int
    seed: int

    @property
    def key(self) -> tuple[str, str, str, str, int, int]:
        """By which it is known whether the row is there: names and settings."""
        return (
            self.problem.name,
            self.problem.setting,
            self.entry.name,
            self.entry.setting,
            self.budget,
            self.seed,
        )


def measure(run: Run, instance: Instance, truth: Reference, real: Tensor | None) -> Row:
    """Everything that is measured of one solver on one grid; what leaves the numbers is infinite."""
    problem, entry = run.problem, run.entry
    steps = entry.steps(run.budget)
    sigmas = problem.sigmas(steps)
    row = Row(*run.key, states=problem.states, steps=steps)

    try:
        solver = entry.make(instance, sigmas)
    except DIVERGED:
        row.sampling_median = row.sampling_95 = float("inf")
        row.diverged = "calibration"
        return row
    learnt = getattr(getattr(solver, "gamma", None), "report", None)
    row.calibration_evaluations = None if learnt is None else learnt.evaluations

    diverged: list[str] = []
    noise, clean = truth.noise.to(problem.dtype), truth.clean.to(problem.dtype)

    def attempt(name: str, walk: Any, x: Any) -> tuple[Any, Meter, float]:
        """The solution, or None where it diverged; the calls; the seconds."""
        meter = Meter(instance.denoiser)
        begin = time.perf_counter()
        try:
            solution = walk(meter, x, sigmas, extra_args=instance.extra_args)
        except DIVERGED:
            solution = None
        seconds = time.perf_counter() - begin
        if solution is None or not bool(solution.x.isfinite().all()):
            diverged.append(name)
        return solution, meter, seconds

    there, meter, seconds = attempt("sampling", solver.sample, noise)
    row.evaluations, row.seconds = meter.calls, seconds
    row.seconds_ratio = seconds / meter.seconds if meter.calls else None
    errors = errors_of(there, clean)
    row.sampling_median, row.sampling_95 = percentile(errors, 0.5), percentile(errors, 0.95)

    if real is not None and run.budget in problem.dear:
        batch = problem.noise(FRECHET_SEED + run.seed, problem.frechet_states).to(problem.dtype)
        many, _, _ = attempt("sampling for Fréchet", solver.sample, batch)
        row.frechet = frechet_distance(many.x, real) if many else float("inf")

    if hasattr(solver, "invert"):
        if there and run.budget in problem.dear:
            row.round_trip = float("inf")
            back, meter, _ = attempt("inversion", solver.invert, there.state)
            row.inversion_evaluations = meter.calls
            row.round_trip = relative_distance(back.x, noise) if back else float("inf")

        code, meter, _ = attempt("encoding", solver.invert, clean)
        row.encoding_evaluations = meter.calls
        errors = errors_of(code, truth.noise)
        row.encoding_median, row.encoding_95 = percentile(errors, 0.5), percentile(errors, 0.95)
        row.code_mean = row.code_std = float("inf")
        if code:
            latent = code.x.double()
            row.code_mean = float(latent.mean()) / problem.top
            row.code_std = float(latent.std() / truth.noise.std())
            row.code_ks = normality(latent / problem.top)
        if code and run.budget in problem.dear:
            again, _, _ = attempt("decoding", solver.sample, code.state)
            row.image_round_trip = relative_distance(again.x, clean) if again else float("inf")
    row.diverged = "; ".join(diverged)
    return row


def errors_of(solution: Any, truth: Tensor) -> Tensor:
    """Errors of all states, infinite where there is no solution."""
    if solution is None:
        return torch.full(truth.shape[:1], float("inf"))
    return relative_errors(solution.x, truth)


def missing(
    problems: Sequence[Problem],
    solvers: Sequence[Entry],
    budgets: Sequence[int] | None,
    seeds: int | None,
    rows: Rows,
) -> list[Run]:
    """What has not been measured with today's settings, small budgets first for each seed."""
    runs = [
        Run(problem, entry, budget, seed)
        for problem in problems
        for seed in range(problem.seeds if seeds is None else seeds)
        for budget in budgets or problem.budgets
        for entry in solvers
    ]
    return [
        run
        for run in runs
        if run.key not in rows
        and run.budget <= run.entry.largest
        and run.entry.steps(run.budget) >= 2
    ]


def measure_all(runs: Sequence[Run], rows: Rows, cache: Path) -> None:
    """Measure and append row by row, so that nothing is lost where it is cut off."""
    bar = tqdm(total=len(runs), desc="suite")
    for problem, own in grouped(runs):
        instance = problem.load()
        real = data(problem) if problem.data is not None else None
        truths: dict[int, Reference] = {}
        for run in own:
            if run.seed not in truths:
                truths[run.seed] = reference(instance, run.seed, cache)
                rows.note(problem, run.seed, truths[run.seed])
            bar.set_postfix_str(f"{problem.name}, {run.entry.name}, {run.budget}, seed {run.seed}")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of inversions that are not to be trusted
                rows.append(measure(run, instance, truths[run.seed], real))
            bar.update()
    bar.close()


def grouped(runs: Sequence[Run]) -> Iterator[tuple[Problem, list[Run]]]:
    """Runs by problem, each of which is loaded once."""
    for problem in dict.fromkeys(run.problem for run in runs):
        yield problem, [run for run in runs if run.problem is problem]


def chosen(kind: str, items: Sequence[Any], names: Sequence[str] | None) -> list[Any]:
    """The items of these names, or whose names contain them."""
    if not names:
        return list(items)
    found = []
    for name in names:
        exact = [item for item in items if item.name == name]
        matches = exact or [item for item in items if name.lower() in item.name.lower()]
        if not matches:
            known = ", ".join(item.name for item in items)
            raise SystemExit(f"no {kind} is called {name!r}; there are: {known}")
        found += [item for item in matches if item not in found]
    return found


def quick(problem: Problem) -> Problem:
    """The same with less of everything, for a first look."""
    frechet = min(problem.frechet_states, 256)
    return replace(problem, states=8, fine=100, frechet_states=frechet, budgets=(10, 20), seeds=1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--problems", nargs="+", help="names, or parts of them; all by default")
    parser.add_argument("--solvers", nargs="+", help="likewise")
    parser.add_argument("--budgets", nargs="+", type=int, help="evaluations; the problem's own")
    parser.add_argument("--seeds", type=int, help="repeats; the problem's own")
    parser.add_argument("--quick", action="store_true", help="8 states, few steps, out/suite")
    parser.add_argument("--report", action="store_true", help="measure nothing, write the report")
    parser.add_argument("--out", type=Path, help="receives tables/ and images/; docs by default")
    parser.add_argument("--cache", type=Path, default=CACHE)
    options = parser.parse_args(arguments)

    out = options.out or (ROOT / "out" / "suite" if options.quick else ROOT / "docs")
    everything = [quick(problem) for problem in PROBLEMS] if options.quick else list(PROBLEMS)
    asked = options.problems or (["mixture"] if options.quick else None)
    problems = chosen("problem", everything, asked)
    solvers = chosen("solver", entries(), options.solvers)
    rows = Rows(out / "tables")
    if not options.report:
        runs = missing(problems, solvers, options.budgets, options.seeds, rows)
        measure_all(runs, rows, options.cache)
    # Read again: another run may have been measuring other problems into the same file.
    report(Rows(out / "tables"), everything, entries(), out)
    print(f"tables in {out / 'tables'}, plots in {out / 'images'}")


if __name__ == "__main__":
    main()
