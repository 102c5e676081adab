"""The plots of the suite."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from odesolvers.writing import replacing

from ..common import Problem
from .results import Results
from .solvers import Entry

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PARETO_BUDGETS = (10, 20)
TOP = 10.0
"""Larger errors are drawn here, because the state is lost."""

# Okabe and Ito's palette, which the colour-blind can tell apart, without its yellow.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#777777")
MARKERS = "osD^vPX*<>"
UNMARKED = {"color": "#BBBBBB", "marker": ".", "linestyle": "none"}


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
    with replacing(path) as file:
        figure.savefig(file, dpi=150)
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
    with replacing(path) as file:
        figure.savefig(file, dpi=150)
    plt.close(figure)
    return True


def styles(results: Results) -> list[tuple[Entry, dict[str, Any]]]:
    """The plotted solvers, each with its own colour and marker."""
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
    """One legend under all panels; `others` labels the grey points."""
    from matplotlib.lines import Line2D

    pairs = styles(results)
    handles = [Line2D([], [], label=entry.name, **style) for entry, style in pairs]
    handles += [Line2D([], [], label=others, **UNMARKED)] if others else []
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9, frameon=False)


def plain_ticks(axes: Axes, values: Sequence[int]) -> None:
    """Marks the budgets as ticks of a logarithmic axis."""
    axes.set_xticks(values, [str(value) for value in values])
    axes.minorticks_off()
