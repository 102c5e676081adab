"""The suite's rows in a CSV file: appended one by one, and read again by the next run."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..common import Problem, append, locked, save

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
        self.read()

    def read(self) -> None:
        """Reads the rows of the file, those of other processes too.

        A line that is no row, because a disk was full or a process was killed, is passed over: the row
        is measured again.
        """
        text = self.path.read_bytes() if self.path.exists() else b""
        header, *lines = text.split(b"\n")[:-1] or [b""]  # what has no end is no line
        names = header.decode(errors="replace").split(",")
        if header and names != self._columns:
            raise ValueError(
                f"{self.path} has the columns {names}, this version of the suite {self._columns}: move "
                "the file away, or add what is missing"
            )
        for line in lines:
            with suppress(ValueError, csv.Error):
                row = _row(line)
                self._rows[row.key] = row

    def __contains__(self, key: Key) -> bool:
        return key in self._rows

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def append(self, row: Row) -> None:
        """Adds a row, to the file too."""
        head, lines = io.StringIO(), io.StringIO()
        csv.writer(head, lineterminator="\n").writerow(self._columns)
        values = [_text(value) for value in asdict(row).values()]
        csv.writer(lines, lineterminator="\n").writerow(values)
        append(self.path, lines.getvalue(), head.getvalue())
        self._rows[row.key] = row

    def note(self, problem: Problem, seed: int, convergence: float, frechet: float | None) -> None:
        """Records the convergence of a fine solution and its Fréchet distance to data."""
        with locked(self.path):  # against another process that adds a note
            notes = self.notes()
            notes[note_name(problem, seed)] = {"convergence": convergence, "frechet": frechet}
            save(self.notes_path, json.dumps(notes, indent=1, sort_keys=True))

    def notes(self) -> dict[str, dict[str, float | None]]:
        """All notes, by `note_name`; none if the file is damaged, since all can be made again."""
        notes: object = None
        if self.notes_path.exists():
            with suppress(ValueError, RecursionError):
                notes = json.loads(self.notes_path.read_text("utf-8"))
        return notes if isinstance(notes, dict) else {}


def note_name(problem: Problem, seed: int) -> str:
    return f"{problem.name}, {problem.setting}, seed {seed}"


def _row(line: bytes) -> Row:
    """The row in a line of the file, or a ValueError."""
    (values,) = csv.reader([line.decode()], strict=True)
    columns = fields(Row)
    parsed = (_parse(v, str(c.type)) for v, c in zip(values, columns, strict=True))
    return Row(*parsed)  # type: ignore[arg-type]


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
