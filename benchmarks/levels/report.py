"""The tables and the plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from odesolvers.writing import replacing

from ..common import DIGITS, IMAGES, MIXTURE, TABLES, Problem, table, write
from .carry import COUNTS, LEARNED, LEARNED_IN, LONGER, OTHERS, Setting
from .gradients import COSTS
from .measure import PEERS, STATES, row, rule_key

PUBLISHED = ("Karras", "even in log SNR", "even in VP time")
SMALL = (MIXTURE, DIGITS)
"""The problems whose denoisers are closed forms."""


def report(kept: dict[str, Any], problems: Sequence[Problem], budgets: Sequence[int]) -> None:
    """Writes every table and the plot."""
    cases = [(p, n) for p in problems for n in budgets if _errors(kept, p, n, "BDIA", ALONE)]
    write(TABLES / "levels.md", _levels(kept, cases))
    write(TABLES / "levels_samplers.md", _samplers(kept, cases))
    write(TABLES / "levels_carry.md", _carry(kept))
    write(TABLES / "levels_steps.md", _steps(kept))
    write(TABLES / "levels_states.md", _states(kept))
    write(TABLES / "levels_gradients.md", _gradients(kept))
    plot(kept, problems, IMAGES / "levels.png")


ALONE, JOINT = "weights alone", "weights and levels"


def _errors(
    kept: dict[str, Any], problem: Problem, budget: int, solver: str, grid: str
) -> list[list[float]]:
    """Sampling and, where there are any, encoding errors, one for each seed."""
    rows = [kept.get(row(problem, budget, solver, grid, seed)) for seed in range(problem.seeds)]
    return [list(ways) for ways in zip(*filter(None, rows), strict=True)]


def _text(values: Sequence[float]) -> str:
    """The median, with half the range over seeds in per cent of it."""
    middle = median(values)
    if not math.isfinite(middle):
        return "diverged"
    spread = f" ±{50 * (max(values) - min(values)) / middle:.0f}%" if len(values) > 1 else ""
    return f"{middle:.1e}{spread}"


def _levels(kept: dict[str, Any], cases: Sequence[tuple[Problem, int]]) -> str:
    header = [
        "problem",
        "evaluations",
        *(f"{name}: {way}" for name in (ALONE, JOINT) for way in "se"),
    ]
    header += ["ratio: s", "ratio: e", "best other sampler: s", "with learned levels: s", "runs"]
    lines = []
    for problem, n in cases:
        alone, joint = (_errors(kept, problem, n, "BDIA", grid) for grid in (ALONE, JOINT))
        if not joint:
            continue
        ratios = [f"{median(b) / median(a):.2f}" for a, b in zip(alone, joint, strict=True)]
        best = [_best(kept, problem, n, grids) for grids in (PUBLISHED, ("learned",))]
        runs = str(kept[rule_key(problem, n, STATES, True)]["runs"])
        cells = [_text(values) for values in (*alone, *joint)]
        lines.append([problem.name, str(n), *cells, *ratios, *best, runs])
    return table(header, lines)


def _best(kept: dict[str, Any], problem: Problem, n: int, grids: Sequence[str]) -> str:
    """The sampler with the smallest error on any of the grids, once all of them are measured."""
    found = [
        (_errors(kept, problem, n, name, grid), name)
        for name, (_, each) in PEERS.items()
        for grid in grids
        if n // each >= 2
    ]
    if not all(errors for errors, _ in found):
        return ""
    error, name = min((median(errors[0]), name) for errors, name in found)
    return f"{error:.1e} ({name})"


def _samplers(kept: dict[str, Any], cases: Sequence[tuple[Problem, int]]) -> str:
    header = ["problem", "evaluations", "sampler", *PUBLISHED, "learned"]
    lines = []
    for problem, n in cases:
        for name in PEERS:
            found = [_errors(kept, problem, n, name, grid) for grid in (*PUBLISHED, "learned")]
            if any(found):
                cells = [_text(errors[0]) if errors else "" for errors in found]
                lines.append([problem.name, str(n), name, *cells])
        joint = _errors(kept, problem, n, "BDIA", JOINT)
        alone = _errors(kept, problem, n, "BDIA", ALONE)
        if joint:
            cells = [_text(alone[0]), "", "", _text(joint[0])]
            lines.append([problem.name, str(n), "BDIA, calibrated", *cells])
    return table(header, lines, (0, 2))


def _pair(errors: Sequence[float] | None) -> str:
    return " / ".join(f"{error:.1e}" for error in errors) if errors else ""


def carry_key(setting: Setting) -> str:
    return f"digits, carried to {setting}"


def steps_key(problem: Problem, steps: int) -> str:
    return f"{problem.name} v{problem.version}, carried to {steps} steps"


def states_key(problem: Problem, states: int) -> str:
    return f"{problem.name} v{problem.version}, {states} states, seen and unseen"


def gradients_key(problem: Problem, steps: int) -> str:
    return f"{problem.name} v{problem.version}, {steps} steps, differences and gradients"


RULES = (ALONE, "with levels", "learned there")


def _carry(kept: dict[str, Any]) -> str:
    lines = []
    for setting in (LEARNED, *OTHERS):
        found = kept.get(carry_key(setting))
        if found:
            lines.append([setting.name, *(_pair(found.get(rule)) for rule in RULES)])
    return table(["used with", *RULES], lines)


def _steps(kept: dict[str, Any]) -> str:
    lines = []
    for problem in SMALL:
        for steps in LONGER:
            found = kept.get(steps_key(problem, steps))
            if found:
                cells = [_pair(found.get(rule)) for rule in RULES]
                lines.append([problem.name, str(steps), *cells])
    on = f"on {LEARNED_IN} steps"
    names = [f"{RULES[0]}, {on}", f"{RULES[1]}, {on}", "levels learned on as many"]
    return table(["problem", "steps", *names], lines)


def _states(kept: dict[str, Any]) -> str:
    lines = []
    for problem in SMALL:
        for states in COUNTS:
            found = kept.get(states_key(problem, states))
            if found:
                lines.append([problem.name, str(states), *map(_pair, found)])
    return table(["problem", "states", "on them", "on others"], lines)


def _gradients(kept: dict[str, Any]) -> str:
    lines = []
    for problem in SMALL:
        for steps in (6, 10):
            found = kept.get(gradients_key(problem, steps))
            for name, values in (found or {}).items():
                cells = ["" if math.isnan(value) else f"{value:.1e}" for value in values]
                lines.append([problem.name, str(steps), name, *cells])
    header = ["problem", "steps", "fit by", *(f"{cost} runs" for cost in COSTS)]
    return table(header, lines, (0, 2))


def plot(kept: dict[str, Any], problems: Sequence[Problem], path: Path) -> None:
    """Learned levels beside Karras's, on a logarithmic axis, a panel for each problem."""
    import matplotlib.pyplot as plt

    budgets = (6, 8, 10)
    learned = {
        (p.name, n): kept.get(rule_key(p, n, STATES, True)) for p in problems for n in budgets
    }
    shown = [p for p in problems if any(learned[p.name, n] for n in budgets)]
    figure, panels = plt.subplots(
        1,
        len(shown),
        figsize=(2.6 * len(shown) + 0.8, 3.2),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axes, problem in zip(panels[0], shown, strict=True):
        for n, colour in zip(budgets, ("#E69F00", "#009E73", "#0072B2"), strict=True):
            places = [k / n for k in range(n + 1)]
            axes.plot(places, problem.sigmas(n), color=colour, linestyle=":", linewidth=1)
            found = learned[problem.name, n]
            if found:
                axes.plot(
                    places,
                    found["levels"],
                    color=colour,
                    marker="o",
                    markersize=4,
                    label=f"{n} steps",
                )
        axes.set_yscale("log")
        axes.set_title(problem.name)
        axes.set_xlabel("k / n")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("noise level σ")
    panels[0][0].plot([], [], color="black", linestyle=":", linewidth=1, label="Karras")
    panels[0][0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        figure.savefig(file, dpi=150)
    plt.close(figure)
