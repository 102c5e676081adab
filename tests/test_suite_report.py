"""The report of the benchmark suite."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.suite import report, solvers
from benchmarks.suite.results import Results
from benchmarks.suite.rows import Row, Rows
from benchmarks.suite.solvers import plain
from odesolvers import DDIM

from .suite_runs import tiny


def synthetic(name: str, budget: int, sampling: float, encoding: float | None, **more: Any) -> Row:
    values = {"evaluations": budget, "encoding_evaluations": budget, **more}
    values.update(sampling_median=sampling, encoding_median=encoding)
    return Row("tiny", tiny().setting, name, "s", budget, values.pop("seed", 0), 4, 5, **values)


@pytest.fixture
def results(tmp_path: Path) -> Results:
    rows = Rows(tmp_path)
    for row in (
        synthetic("DDIM", 10, 0.2, None),
        synthetic(solvers.RECOMMENDED, 10, 0.1, 0.3),
        synthetic("ahead", 10, 0.04, 0.2),
        synthetic("ahead", 10, 0.06, 0.2, seed=1),
        synthetic("ahead", 10, 0.05, 0.2, seed=2),
        synthetic("dear", 10, 0.01, 0.01, encoding_evaluations=90),
        replace(synthetic("ahead", 10, 9.0, 9.0), solver_setting="of yesterday"),
    ):
        rows.append(row)
    names = ("DDIM", solvers.RECOMMENDED, "ahead", "dear")
    entries = [replace(plain(name, "test", DDIM()), setting="s") for name in names]
    return Results(rows, [tiny()], entries)


def test_tables_mark_the_best_within_the_budget(results: Results) -> None:
    assert report.by_budget(results, tiny(), "encoding_median") == [
        [solvers.RECOMMENDED, "3.0e-01"],
        ["ahead", "**2.0e-01 ±0%**"],
        ["dear", "1.0e-02 (90)"],
    ]
    sampling = dict(report.by_budget(results, tiny(), "sampling_median"))
    assert sampling["ahead"] == "5.0e-02 ±20%"
    assert sampling["dear"] == "**1.0e-02**"


def test_summary_counts_and_names(results: Results) -> None:
    lines = report.summary(results).splitlines()[2:]
    cells = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in lines}
    assert cells["ahead"] == ["test", "1 of 1", "", "", "tiny 10 |"]
    assert cells["dear"] == ["test", "1 of 1", "", "", " |"]  # its encoding costs too much
    assert "DDIM" not in cells


def test_worst_cases_are_the_largest_ratios_and_say_where(results: Results) -> None:
    (line,) = report.worst_cases(results).splitlines()[2:]
    cells = line.strip("| ").split(" | ")
    assert cells[:3] == [solvers.RECOMMENDED, "tiny", "0.500 (at 10)"]
    assert "DPM" not in line


def test_ratios_are_best_near_one() -> None:
    assert report.off(1.1, True) < report.off(0.8, True)
    assert report.off(1.1, True) > report.off(0.95, True)
    assert report.off(math.inf, True) == math.inf


@pytest.mark.usefixtures("k_diffusion")
def test_settings_name_what_changes() -> None:
    assert tiny().setting != tiny(version=2).setting
    assert tiny().setting != tiny(fine=401).setting
    names = [entry.name for entry in solvers.entries()]
    assert len(names) == len(set(names))
    assert {*report.BASELINES, solvers.RECOMMENDED} <= set(names)
    assert Row.__dataclass_fields__.keys() >= {"encoding_median", "code_std"}
