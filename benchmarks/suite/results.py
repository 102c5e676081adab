"""The rows of today's problems and solvers, by name and budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from ..common import Problem
from .rows import Row, Rows
from .solvers import Entry


@dataclass(frozen=True)
class Cell:
    """One measure of a solver at one budget: a value for each seed, and the most evaluations spent."""

    values: tuple[float, ...]
    evaluations: int
    budget: int

    @property
    def middle(self) -> float:
        return median(self.values)

    @property
    def fair(self) -> bool:
        """Whether the solver kept within the budget; otherwise it does not compete."""
        return self.evaluations <= self.budget

    def error(self) -> str:
        """The median as text, with half the range over seeds in per cent of it."""
        text = number(self.middle)
        if len(self.values) > 1 and math.isfinite(max(self.values)) and self.middle > 0:
            spread = (max(self.values) - min(self.values)) / 2 / self.middle
            text += f" ±{100 * spread:.0f}%"
        return text if self.fair else f"{text} ({self.evaluations})"

    def ratio(self) -> str:
        """The median as text, for a number near 1."""
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
        """The rows of all seeds."""
        key = (problem.name, solver, budget)
        return [row for row in self._rows if (row.problem, row.solver, row.budget) == key]

    def cell(self, problem: Problem, solver: str, budget: int, of: str) -> Cell | None:
        """The measure `of`, with the evaluations that it took; None if it was not measured."""
        rows = self.rows(problem, solver, budget)
        values = [value for row in rows if (value := getattr(row, of)) is not None]
        if not values:
            return None
        encoding = of.startswith(("encoding", "code"))
        spent = [(row.encoding_evaluations if encoding else row.evaluations) or 0 for row in rows]
        return Cell(tuple(values), max(spent), budget)

    def middle(self, problem: Problem, solver: str, budget: int, of: str) -> float | None:
        """The median of a measure; None if it was not measured or exceeded the budget."""
        cell = self.cell(problem, solver, budget, of)
        return cell.middle if cell is not None and cell.fair else None

    def seeds(self, problem: Problem) -> int:
        return len({row.seed for row in self._rows if row.problem == problem.name})

    def invertible(self, entry: Entry) -> bool:
        mine = [row for row in self._rows if row.solver == entry.name]
        return any(row.encoding_median is not None for row in mine)


def number(value: float) -> str:
    """Two digits, or "diverged"."""
    return f"{value:.1e}" if math.isfinite(value) else "diverged"
