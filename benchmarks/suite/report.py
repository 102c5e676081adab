"""The report of the suite, made of rows that were measured with today's settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ..common import Problem, save, table
from .plots import plot_errors, plot_pareto
from .results import Results, number
from .rows import Row, Rows
from .solvers import RECOMMENDED, Entry

BASELINES = {"DDIM": "DDIM", "k-diffusion dpmpp_2m": "DPM-Solver++(2M)"}
"""The samplers that the summary compares with, and their names in it."""

DDIM, DPM_SOLVER, UPWARDS = "DDIM", "k-diffusion dpmpp_2m", "DDIM upwards"
OURS = (RECOMMENDED, "BDIA Euler StepRatio(1)", "BDIA Euler damped")


def report(rows: Rows, problems: Sequence[Problem], solvers: Sequence[Entry], out: Path) -> None:
    """Writes the tables to ``out/tables`` and their plots to ``out/images``."""
    results = Results(rows, problems, solvers)
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    parts = ["## Problems", references(results, rows), "## Summary", summary(results)]
    for problem in results.problems:
        parts += [f"## {problem.name[0].upper()}{problem.name[1:]}"]
        for plot, what in ((plot_errors, "errors"), (plot_pareto, "pareto")):
            path = images / f"suite_{slug(problem)}_{what}.png"
            if plot(results, problem, path):
                parts.append(f"![{plot.__doc__}](../images/{path.name})")
        parts.append(problem_tables(results, problem))
    save(out / "tables" / "suite.md", "\n\n".join(parts))
    save(out / "tables" / "suite_worst.md", worst_cases(results))


def slug(problem: Problem) -> str:
    return problem.name.lower().replace(" ", "_")


def references(results: Results, rows: Rows) -> str:
    """The table of problems and of the convergence of their fine solutions."""
    lines = []
    for problem in results.problems:
        notes = [
            note
            for name, note in rows.notes().items()
            if name.startswith(f"{problem.name}, {problem.setting},")
        ]
        worst = max((note["convergence"] or 0.0 for note in notes), default=math.nan)
        floor = [note["frechet"] for note in notes if note["frechet"] is not None]
        lines.append(
            [
                problem.name,
                f"{problem.states} × {'×'.join(map(str, problem.shape))}",
                str(results.seeds(problem)),
                str(problem.dtype).removeprefix("torch."),
                f"{problem.top:g} to {problem.bottom:g}",
                str(problem.fine),
                number(worst),
                number(median(floor)) if floor else "",
            ]
        )
    header = ["problem", "states", "seeds", "dtype", "levels", "steps of RK4"]
    header += ["distance to half the steps", "its Fréchet distance"]
    return table(header, lines, words=(0, 1, 3))


def worst_cases(results: Results) -> str:
    """The worst ratios of this package's main solvers to the baselines, and their budgets."""
    lines = []
    for entry in results.solvers:
        if entry.name not in OURS:
            continue
        for problem in results.problems:
            cells = [
                worst(results, problem, entry.name, of, against, budgets)
                for of, against, budgets in (
                    ("sampling_median", DDIM, (5, 80)),
                    ("sampling_median", DPM_SOLVER, (5, 20)),
                    ("encoding_median", UPWARDS, (10, 80)),
                    ("code_std", None, (20, 80)),
                )
            ]
            if any(cells):
                lines.append([entry.name, problem.name, *cells])
    header = ["solver", "problem", "sampling over DDIM's", "over DPM-Solver++(2M)'s, to 20"]
    header += ["encoding over DDIM's upwards, from 10", "code std, from 20"]
    return table(header, lines, words=(0, 1))


def worst(
    results: Results,
    problem: Problem,
    solver: str,
    of: str,
    against: str | None,
    budgets: tuple[int, int],
) -> str:
    """The largest ratio to a baseline over a range of budgets; without a baseline, farthest from 1."""
    found = []
    for budget in results.budgets(problem):
        value = results.middle(problem, solver, budget, of)
        base = results.middle(problem, against, budget, of) if against else 1.0
        if value is None or base is None or not budgets[0] <= budget <= budgets[1]:
            continue
        ratio = value / base
        found.append((ratio if against else abs(ratio - 1), ratio, budget))
    if not found:
        return ""
    _, ratio, budget = max(found)
    return f"{ratio:.3f} (at {budget})" if ratio < 100 else f"{ratio:.0e} (at {budget})"


def problem_tables(results: Results, problem: Problem) -> str:
    """The tables of one problem: some measures by budget, the others at one budget."""
    parts = []
    for of, caption in (
        ("sampling_median", "Sampling error, median over the states"),
        ("sampling_95", "Sampling error, 95th percentile over the states"),
        ("frechet", "Fréchet distance of samples to data"),
        ("encoding_median", "Encoding error, median over the states"),
        ("code_std", "Standard deviation of the code over that of the true latent"),
    ):
        lines = by_budget(results, problem, of)
        if lines:
            header = ["solver", *map(str, results.budgets(problem))]
            parts.append(f"**{caption}**, by evaluations\n\n{table(header, lines)}")
    budgets = results.budgets(problem)
    budget = 20 if 20 in budgets else budgets[len(budgets) // 2]
    parts.append(details(results, problem, budget))
    return "\n\n".join(parts)


def by_budget(results: Results, problem: Problem, of: str) -> list[list[str]]:
    """A row for each solver with the measure; the best of every column is bold."""
    ratio = of == "code_std"
    names = [entry.name for entry in results.solvers]
    columns = []
    for budget in results.budgets(problem):
        cells = {name: results.cell(problem, name, budget, of) for name in names}
        texts = {
            name: (cell.ratio() if ratio else cell.error()) for name, cell in cells.items() if cell
        }
        fair = {name: off(cell.middle, ratio) for name, cell in cells.items() if cell and cell.fair}
        best = min(fair.values(), default=math.inf)
        for name, value in fair.items():
            if math.isfinite(value) and value <= 1.005 * best:  # equal methods too
                texts[name] = f"**{texts[name]}**"
        columns.append(texts)
    return [
        [name, *(texts.get(name, "") for texts in columns)]
        for name in names
        if any(name in texts for texts in columns)
    ]


def off(value: float, ratio: bool) -> float:
    """The distance from the ideal: 0 for an error, 1 for a ratio."""
    if not ratio:
        return value
    return abs(math.log(value)) if 0 < value < math.inf else math.inf


def details(results: Results, problem: Problem, budget: int) -> str:
    """The table of round trips and costs at one budget."""
    lines = []
    for entry in results.solvers:
        rows = results.rows(problem, entry.name, budget)
        if not rows:
            continue
        calls = [middle(rows, f"{what}evaluations") for what in ("", "inversion_", "encoding_")]
        errors = [middle(rows, of) for of in ("round_trip", "image_round_trip")]
        code = [middle(rows, "code_mean"), middle(rows, "code_ks")]
        fitted = middle(rows, "calibration_evaluations")
        lines.append(
            [
                entry.name,
                " / ".join(f"{n:.0f}" for n in calls if n is not None),
                *("" if error is None else number(error) for error in errors),
                *("" if value is None else f"{value:.3f}" for value in code),
                f"{middle(rows, 'seconds_ratio') or math.nan:.2f}",
                "" if fitted is None else f"{fitted:.0f}",
            ]
        )
    header = ["solver", "evaluations", "round trip", "image round trip", "code mean"]
    header += ["code normality", "time", "calibration"]
    caption = (
        f"**Round trips and costs**, {budget} evaluations: spent on sampling / inverting / encoding a "
        "lone image; seconds of sampling over those inside the denoiser; evaluations spent on fitting"
    )
    return f"{caption}\n\n{table(header, lines)}"


def middle(rows: Sequence[Row], of: str) -> float | None:
    values: list[Any] = [getattr(row, of) for row in rows if getattr(row, of) is not None]
    return median(values) if values else None


def summary(results: Results) -> str:
    """The table of cases in which invertible solvers beat the usual samplers and `RECOMMENDED`."""
    cases = [
        (problem, budget) for problem in results.problems for budget in results.budgets(problem)
    ]
    invertible = [entry for entry in results.solvers if results.invertible(entry)]
    lines = []
    for entry in invertible:
        line = [entry.name, entry.family]
        line += [won(results, cases, entry.name, name, "sampling_median") for name in BASELINES]
        line.append(won(results, cases, entry.name, UPWARDS, "encoding_median"))
        both = [
            f"{problem.name} {budget}"
            for problem, budget in cases
            if ahead(results, problem, budget, entry.name, RECOMMENDED)
        ]
        lines.append([*line, ", ".join(both)])
    header = ["solver", "family", *(f"samples better than {name}" for name in BASELINES.values())]
    header += ["encodes better than DDIM upwards"]
    header += [f"ahead of {RECOMMENDED} in both, where"]
    return table(header, lines, words=(0, 1, len(header) - 1))


def won(
    results: Results, cases: Sequence[tuple[Problem, int]], solver: str, baseline: str, of: str
) -> str:
    """The number of cases, of those measured for both, in which `solver` has the smaller error."""
    pairs = [
        [results.middle(problem, name, budget, of) for name in (solver, baseline)]
        for problem, budget in cases
    ]
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    return f"{sum(a < b for a, b in both)} of {len(both)}" if both else ""


def ahead(results: Results, problem: Problem, budget: int, solver: str, other: str) -> bool:
    """Whether `solver` has both the smaller sampling error and the smaller encoding error."""
    for of in ("sampling_median", "encoding_median"):
        a = results.middle(problem, solver, budget, of)
        b = results.middle(problem, other, budget, of)
        if a is None or b is None or not a < b:
            return False
    return True
