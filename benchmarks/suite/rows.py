"""The suite's rows in a CSV file: appended one by one, and read again by the next run."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..common import Problem

Key = tuple[str, str, str, str, int, int]


@dataclass
class Row:
    """One solver on one grid from one seed's noise; None for a measure that does not apply.

    Sampling and encoding errors are relative to the root mean square of the truth, and are medians and
    95th percentiles over the states; round-trip errors are relative and over all elements at once.
    `code_mean` is in units of the first level, `code_std` in units of the true code's deviation, and
    `code_ks` is the Kolmogorov-Smirnov statistic against normal noise. `seconds` is the time of
    sampling, and `seconds_ratio` that time over the time inside the denoiser.
    """

    problem: str
    problem_setting: str
    solver: str
    solver_setting: str
    budget: int
    seed: int
    states: int
    steps: int
    evaluations: int | None = None
    sampling_median: float | None = None
    sampling_95: float | None = None
    frechet: float | None = None
    encoding_evaluations: int | None = None
    encoding_median: float | None = None
    encoding_95: float | None = None
    code_mean: float | None = None
    code_std: float | None = None
    code_ks: float | None = None
    inversion_evaluations: int | None = None
    round_trip: float | None = None
    image_round_trip: float | None = None
    seconds: float | None = None
    seconds_ratio: float | None = None
    calibration_evaluations: int | None = None
    diverged: str = ""

    @property
    def key(self) -> Key:
        """Names and settings: other settings make another row."""
        return (
            self.problem,
            self.problem_setting,
            self.solver,
            self.solver_setting,
            self.budget,
            self.seed,
        )


class Rows:
    """All rows of ``suite.csv`` in a folder, and notes on the fine solutions.

    Raises:
        ValueError: if the file has other columns than `Row`.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "suite.csv"
        self.notes_path = folder / "suite_references.json"
        self._columns = [column.name for column in fields(Row)]
        self._rows: dict[Key, Row] = {}
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        text = self.path.read_text()
        if not text.endswith("\n"):  # the row of an interrupted run is measured again
            text = text[: text.rfind("\n") + 1]
            self.path.write_text(text)
        reader = csv.DictReader(text.splitlines())
        if text and list(reader.fieldnames or []) != self._columns:
            raise ValueError(
                f"{self.path} has the columns {reader.fieldnames}, this version of the suite "
                f"{self._columns}: move the file away, or add what is missing"
            )
        for values in reader:
            row = Row(**{c.name: _parse(values[c.name], str(c.type)) for c in fields(Row)})  # type: ignore[arg-type]
            self._rows[row.key] = row

    def __contains__(self, key: Key) -> bool:
        return key in self._rows

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def append(self, row: Row) -> None:
        """Adds a row, to the file too."""
        begin = not self.path.exists() or self.path.stat().st_size == 0
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            if begin:
                writer.writeheader()
            writer.writerow({name: _text(value) for name, value in asdict(row).items()})
        self._rows[row.key] = row

    def note(self, problem: Problem, seed: int, convergence: float, frechet: float | None) -> None:
        """Records the convergence of a fine solution and its Fréchet distance to data."""
        notes = self.notes()
        notes[note_name(problem, seed)] = {"convergence": convergence, "frechet": frechet}
        self.notes_path.write_text(json.dumps(notes, indent=1, sort_keys=True) + "\n")

    def notes(self) -> dict[str, dict[str, float | None]]:
        """All notes, by `note_name`."""
        if not self.notes_path.exists():
            return {}
        notes: dict[str, dict[str, float | None]] = json.loads(self.notes_path.read_text())
        return notes


def note_name(problem: Problem, seed: int) -> str:
    return f"{problem.name}, {problem.setting}, seed {seed}"


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _parse(text: str, kind: str) -> object:
    """A value of `Row` from its text and its annotation."""
    if kind == "str":
        return text
    if text == "" and kind.endswith("None"):
        return None
    return int(text) if kind.startswith("int") else float(text)
