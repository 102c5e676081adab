"""Measures solvers, row by row, and skips the rows that are there."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..common import Problem, Reference, claimed, invertible, reference, relative_errors
from .data import data, fine_distance, larger_batch
from .measures import Meter, frechet_distance, normality, percentile, relative_distance
from .rows import Key, Row, Rows, note_name
from .solvers import Entry

DIVERGED = (FloatingPointError, OverflowError)


@dataclass(frozen=True)
class Run:
    """A row to measure."""

    problem: Problem
    entry: Entry
    budget: int
    seed: int

    @property
    def key(self) -> Key:
        """Identifies the row by names and settings."""
        return (
            self.problem.name,
            self.problem.setting,
            self.entry.name,
            self.entry.setting,
            self.budget,
            self.seed,
        )


def measure(run: Run, truth: Reference, real: Tensor | None) -> Row:
    """All measures of one solver on one grid; an error is infinite if the run diverged.

    Args:
        run: the row to measure.
        truth: the fine solution of its seed.
        real: data points for the Fréchet distance, or None.
    """
    problem, entry = run.problem, run.entry
    steps, extra_args = entry.steps(run.budget), problem.arguments()
    sigmas = problem.sigmas(steps)
    row = Row(*run.key, states=problem.states, steps=steps)

    try:
        solver = entry.make(problem, sigmas)
    except DIVERGED:
        row.sampling_median = row.sampling_95 = float("inf")
        row.diverged = "calibration"
        return row
    learned = getattr(getattr(solver, "gamma", None), "report", None)
    row.calibration_evaluations = None if learned is None else learned.evaluations

    diverged: list[str] = []
    noise, clean = truth.noise.to(problem.dtype), truth.clean.to(problem.dtype)

    def attempt(name: str, walk: Any, x: Any) -> tuple[Any, Meter, float]:
        """The solution, or None if it diverged; the calls; the seconds."""
        meter = Meter(problem.denoiser)
        begin = time.perf_counter()
        try:
            solution = walk(meter, x, sigmas, extra_args=extra_args)
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
        batch = larger_batch(problem, run.seed).to(problem.dtype)
        many, _, _ = attempt("sampling for Fréchet", solver.sample, batch)
        row.frechet = frechet_distance(many.x, real) if many else float("inf")

    if invertible(solver):
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
    """Errors of all states; infinite without a solution."""
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
    """The rows not yet measured with today's settings; for each seed, small budgets first."""
    runs = [
        Run(problem, entry, budget, seed)
        for problem in problems
        for seed in range(problem.seeds if seeds is None else seeds)
        for budget in budgets or problem.budgets
        for entry in solvers
    ]
    return [
        run for run in runs if run.key not in rows and run.entry.measured(run.problem, run.budget)
    ]


def measure_all(runs: Sequence[Run], rows: Rows, cache: Path) -> None:
    """Measures and appends row by row, so that an interrupted run loses only one row.

    Several processes may run at once: rows that another one has measured, or is at, are passed over.
    """
    bar = tqdm(total=len(runs), desc="suite")
    for problem, own in grouped(runs):
        real = data(problem) if problem.data is not None else None
        truths: dict[int, Reference] = {}
        for run in own:
            bar.set_postfix_str(f"{problem.name}, {run.entry.name}, {run.budget}, seed {run.seed}")
            bar.update()
            with claimed(cache, f"{rows.path.resolve()} {run.key}") as ours:
                rows.read()
                if run.key in rows or not ours:
                    continue
                if run.seed not in truths:
                    truth = truths[run.seed] = reference(problem, run.seed, cache)
                    if note_name(problem, run.seed) not in rows.notes():
                        distance = fine_distance(problem, run.seed)
                        rows.note(problem, run.seed, truth.convergence, distance)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # about inversions that amplify errors
                    rows.append(measure(run, truths[run.seed], real))
    bar.close()


def grouped(runs: Sequence[Run]) -> Iterator[tuple[Problem, list[Run]]]:
    """Runs by problem."""
    for problem in dict.fromkeys(run.problem for run in runs):
        yield problem, [run for run in runs if run.problem is problem]
