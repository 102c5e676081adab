"""Tables and plots of the suite: only rows measured with today's settings are in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from markdown_table import table
from suite_problems import Problem
from suite_rows import Row, Rows
from suite_solvers import RECOMMENDED, Entry

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BASELINES = {"DDIM": "DDIM", "k-diffusion dpmpp_2m": "DPM-Solver++(2M)"}
"""The samplers that a summary compares with, under the names they go by in it."""

DDIM, DPM_SOLVER, UPWARDS = "DDIM", "k-diffusion dpmpp_2m", "DDIM upwards"
OURS = (RECOMMENDED, "BDIA Euler StepRatio(1)", "BDIA Euler damped")

PARETO_BUDGETS = (10, 20)
TOP = 10.0
"""Errors above are drawn here: the state is lost."""

# Okabe and Ito's palette, which the colour-blind can tell apart, without its yellow.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#777777")
MARKERS = "osD^vPX*<>"
UNMARKED = {"color": "#BBBBBB", "marker": ".", "linestyle": "none"}

Errors = Callable[[Row], float | None]


@dataclass(frozen=True)
class Cell:
    """A measure over all seeds of one solver, problem and budget, and the most evaluations spent."""

    values: tuple[float, ...]
    evaluations: int
    budget: int

    @property
    def middle(self) -> float:
        return median(self.values)

    @property
    def fair(self) -> bool:
        """Whether it kept within the budget: only then does it compete."""
        return self.evaluations <= self.budget

    def error(self) -> str:
        """The median and, as half the range in parts of it, the spread over seeds."""
        text = number(self.middle)
        if len(self.values) > 1 and math.isfinite(max(self.values)) and self.middle > 0:
            spread = (max(self.values) - min(self.values)) / 2 / self.middle
            text += f" ±{100 * spread:.0f}%"
        return text if self.fair else f"{text} ({self.evaluations})"

    def ratio(self) -> str:
        """The median as a number near 1."""
        text = f"{self.middle:.3f}" if self.middle < 100 else number(self.middle)
        return text if self.fair else f"{text} ({self.evaluations})"


class Results:
    """The rows of today's problems and solvers, by name and budget."""

    def __init__(self, rows: Rows, problems: Sequence[Problem], solvers: Sequence[Entry]) -> None:
        problem_settings = {problem.name: problem.setting for problem in problems}
        settings = {entry.name: entry.setting for entry in solvers}
        self._rows = [
            row
            for row in rows
            if problem_settings.get(row.problem) == row.problem_setting
            and settings.get(row.solver) == row.solver_setting
        ]
        measured = {row.problem for row in self._rows}
        self.problems = [problem for problem in problems if problem.name in measured]
        self.solvers = [
            entry for entry in solvers if entry.name in {row.solver for row in self._rows}
        ]

    def budgets(self, problem: Problem) -> list[int]:
        return sorted({row.budget for row in self._rows if row.problem == problem.name})

    def rows(self, problem: Problem, solver: str, budget: int) -> list[Row]:
        """One for each seed."""
        key = (problem.name, solver, budget)
        return [row for row in self._rows if (row.problem, row.solver, row.budget) == key]

    def cell(self, problem: Problem, solver: str, budget: int, of: str) -> Cell | None:
        """The measure named `of`, of which "evaluations" are those spent on it."""
        rows = self.rows(problem, solver, budget)
        values = [value for row in rows if (value := getattr(row, of)) is not None]
        if not values:
            return None
        encoding = of.startswith(("encoding", "code"))
        spent = [(row.encoding_evaluations if encoding else row.evaluations) or 0 for row in rows]
        return Cell(tuple(values), max(spent), budget)

    def middle(self, problem: Problem, solver: str, budget: int, of: str) -> float | None:
        """The median of a measure, where it kept within the budget."""
        cell = self.cell(problem, solver, budget, of)
        return cell.middle if cell is not None and cell.fair else None

    def seeds(self, problem: Problem) -> int:
        return len({row.seed for row in self._rows if row.problem == problem.name})

    def invertible(self, entry: Entry) -> bool:
        mine = [row for row in self._rows if row.solver == entry.name]
        return any(row.encoding_median is not None for row in mine)


def report(rows: Rows, problems: Sequence[Problem], solvers: Sequence[Entry], out: Path) -> None:
    """Write the tables and the plots that they show, into ``out/tables`` and ``out/images``."""
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
    (out / "tables" / "suite.md").write_text("\n\n".join(parts) + "\n")
    (out / "tables" / "suite_worst.md").write_text(worst_cases(results) + "\n")


def slug(problem: Problem) -> str:
    return problem.name.lower().replace(" ", "_")


def number(value: float) -> str:
    """Two digits; in words what is not a number any more."""
    return f"{value:.1e}" if math.isfinite(value) else "diverged"


def references(results: Results, rows: Rows) -> str:
    """How many states, and how far the fine solutions have converged."""
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
    """How far ours are from the baselines where they do worst, and at which budget that is."""
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
    """The largest ratio to a baseline over a range of budgets; without one, what is farthest from 1."""
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
    """Each measure by budget, and the rest at one budget."""
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
    """A row for each solver that has the measure; the best of every column in bold."""
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
            if math.isfinite(value) and value <= 1.005 * best:  # those that are the same method too
                texts[name] = f"**{texts[name]}**"
        columns.append(texts)
    return [
        [name, *(texts.get(name, "") for texts in columns)]
        for name in names
        if any(name in texts for texts in columns)
    ]


def off(value: float, ratio: bool) -> float:
    """How far from right: an error from 0, a ratio from 1."""
    if not ratio:
        return value
    return abs(math.log(value)) if 0 < value < math.inf else math.inf


def details(results: Results, problem: Problem, budget: int) -> str:
    """What was spent and what came back, at one budget."""
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
    """For each invertible solver: where it is ahead of the usual samplers, and of `RECOMMENDED`."""
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
    """In how many of the cases in which both were measured `solver` has the smaller error."""
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


def plot_errors(results: Results, problem: Problem, path: Path) -> bool:
    """Sampling and encoding error against evaluations, side by side."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(7.4, 4.2), sharey=True, layout="constrained")
    for axes, of in zip(panels, ("sampling_median", "encoding_median"), strict=True):
        for entry, style in styles(results):
            cells = [
                results.cell(problem, entry.name, budget, of) for budget in results.budgets(problem)
            ]
            have = [cell for cell in cells if cell is not None]
            if have:
                spent = [cell.evaluations for cell in have]
                axes.plot(spent, [min(cell.middle, TOP) for cell in have], **style)
                low, high = ([min(f(cell.values), TOP) for cell in have] for f in (min, max))
                axes.fill_between(spent, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axes.set_xscale("log")
        axes.set_yscale("log")
        plain_ticks(axes, results.budgets(problem))
        axes.set_xlabel("denoiser evaluations")
        axes.grid(alpha=0.3)
    panels[0].set_title(f"{problem.name}: sampling error")
    panels[1].set_title("encoding error")
    panels[0].set_ylabel("relative to the fine solution")
    legend(figure, results)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def plot_pareto(results: Results, problem: Problem, path: Path) -> bool:
    """Sampling error against encoding error: the nearer to the lower left corner the better."""
    import matplotlib.pyplot as plt

    budgets = [budget for budget in PARETO_BUDGETS if budget in results.budgets(problem)]
    if not budgets:
        return False
    figure, row = plt.subplots(
        1,
        len(budgets),
        figsize=(7.4, 4.4),
        sharex=True,
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    marked = {entry.name: style for entry, style in styles(results)}
    for axes, budget in zip(row[0], budgets, strict=True):
        for entry in results.solvers:
            x = results.middle(problem, entry.name, budget, "sampling_median")
            y = results.middle(problem, entry.name, budget, "encoding_median")
            style = marked.get(entry.name, UNMARKED)
            if x is not None and y is not None:
                point = {**style, "linestyle": "none", "markersize": 7, "zorder": 3}
                axes.plot([min(x, TOP)], [min(y, TOP)], **point)
            elif x is not None and entry.name in marked:
                axes.axvline(min(x, TOP), color=style["color"], linestyle="--", linewidth=1.2)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(f"{problem.name}, {budget} evaluations")
        axes.set_xlabel("sampling error (dashed: no inverse)")
        axes.grid(alpha=0.3)
    row[0][0].set_ylabel("encoding error")
    legend(figure, results, others="other invertible")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def styles(results: Results) -> list[tuple[Entry, dict[str, Any]]]:
    """The solvers that are drawn, each in a colour and a marker of its own."""
    plotted = [entry for entry in results.solvers if entry.plotted]
    return [
        (
            entry,
            {
                "color": COLOURS[k % len(COLOURS)],
                "marker": MARKERS[k % len(MARKERS)],
                "linestyle": "-" if results.invertible(entry) else "--",
                "linewidth": 1.5,
                "markersize": 5,
            },
        )
        for k, entry in enumerate(plotted)
    ]


def legend(figure: Any, results: Results, others: str = "") -> None:
    """One legend under all panels, with a word for the points that are not marked."""
    from matplotlib.lines import Line2D

    pairs = styles(results)
    handles = [Line2D([], [], label=entry.name, **style) for entry, style in pairs]
    handles += [Line2D([], [], label=others, **UNMARKED)] if others else []
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9, frameon=False)


def plain_ticks(axes: Axes, values: Sequence[int]) -> None:
    """The budgets as ticks of a logarithmic axis."""
    axes.set_xticks(values, [str(value) for value in values])
    axes.minorticks_off()
