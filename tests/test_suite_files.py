"""Files of the benchmark suite, after full disks and killed processes and beside other runs."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.common import reference
from benchmarks.suite import __main__ as suite, run as suite_run
from benchmarks.suite.rows import Row, Rows
from benchmarks.suite.solvers import plain
from odesolvers import BDIA, DDIM, Euler, StepRatio

from .suite_runs import Lost, measure, tiny


def test_rows_come_back_from_the_file(tmp_path: Path) -> None:
    row = measure(BDIA(Euler(), StepRatio(1)))
    lost = replace(measure(Lost(None)), solver="lost")
    rows = Rows(tmp_path)
    rows.append(row)
    rows.append(lost)
    again = {found.solver: found for found in Rows(tmp_path)}
    assert again["lost"] == replace(lost, **shortened(lost))
    assert again["solver"] == replace(row, **shortened(row))


def shortened(row: Row) -> dict[str, float]:
    """Its numbers in the six digits of the file."""
    return {key: float(f"{v:.6g}") for key, v in vars(row).items() if isinstance(v, float)}


def some(solver: str, **values: Any) -> Row:
    """A row whose setting has a letter of two bytes, as all rows of the suite have."""
    return Row("tiny", "256 for Fréchet", solver, repr(solver), 10, 0, 4, 5, **values)


def solvers(folder: Path) -> list[str]:
    return [row.solver for row in Rows(folder)]


def test_a_row_that_was_cut_off_anywhere_is_measured_again(tmp_path: Path) -> None:
    rows = Rows(tmp_path)
    for name in ("first", "second"):
        rows.append(some(name, seconds=0.25, diverged="sampling; encoding"))
    whole = rows.path.read_bytes()
    second = whole.rindex(b"tiny")
    assert "é".encode()[:1] in whole[second:]
    for cut in (*range(second, len(whole)), 0, 1, 20, whole.index(b"\n")):
        rows.path.write_bytes(whole[:cut])
        left = ["first"] if cut >= second else []
        again = Rows(tmp_path)
        assert [row.solver for row in again] == left
        assert rows.path.read_bytes() == whole[:cut]  # reading changes nothing
        again.append(some("next"))
        assert solvers(tmp_path) == [*left, "next"]


def test_a_cut_row_that_another_process_wrote_behind_is_passed_over(tmp_path: Path) -> None:
    rows = Rows(tmp_path)
    rows.append(some("first"))
    begin = rows.path.read_bytes()
    rows.append(some("second", diverged="sampling"))
    row = rows.path.read_bytes()[len(begin) :]
    third, accent = row.replace(b"second", b"third"), row.index("é".encode())
    for broken in (row[:-12] + b"\n", row[: accent + 1] + b"\n", b"\n", b'"\n', b"\0\n", begin):
        rows.path.write_bytes(begin + broken + third)
        assert solvers(tmp_path) == ["first", "third"]
    for cut in range(1, len(row) - 1):  # a cut name is at most the beginning of an unknown one
        rows.path.write_bytes(begin + row[:cut] + row + third)
        assert [row.solver for row in Rows(tmp_path) if row.problem == "tiny"] == ["first", "third"]


@pytest.mark.parametrize("free", [0, 1, 20, 40])
def test_a_full_disk_costs_the_row_that_met_it(tmp_path: Path, free: int) -> None:
    rows = Rows(tmp_path)
    rows.append(some("first"))
    rows.note(tiny(), 0, 1e-6, None)
    notes, size = rows.notes(), rows.path.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + free, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            rows.append(some("second"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (free, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            rows.note(tiny(), 1, 1e-6, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    again = Rows(tmp_path)
    assert again.notes() == notes
    again.append(some("third"))
    assert solvers(tmp_path) == ["first", "third"]
    assert {path.name for path in tmp_path.iterdir()} == {"suite.csv", "suite_references.json"}


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b'{"a"'])
def test_damaged_notes_are_made_again(tmp_path: Path, content: bytes) -> None:
    rows = Rows(tmp_path)
    rows.notes_path.write_bytes(content)
    assert rows.notes() == {}
    rows.note(tiny(), 0, 1e-6, 0.5)
    (note,) = Rows(tmp_path).notes().values()
    assert note == {"convergence": 1e-6, "frechet": 0.5}


@pytest.mark.parametrize("part", [slice(0, 0), slice(0, 300), slice(0, -1), slice(5, None)])
def test_a_damaged_fine_solution_is_solved_again(tmp_path: Path, part: slice) -> None:
    problem = tiny(fine=8)
    solved = reference(problem, 0, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[part])
    again = reference(problem, 0, tmp_path)
    assert torch.equal(again.clean, solved.clean)
    assert np.load(path)["clean"].tolist() == solved.clean.tolist()
    assert list(tmp_path.iterdir()) == [path]


def test_rows_of_several_processes_are_all_there(tmp_path: Path) -> None:
    """Threads stand for processes here: each opens the file for itself, which is what is locked."""

    def write(k: int) -> None:
        rows = Rows(tmp_path)
        for n in range(20):
            rows.append(some(f"{k}-{n}"))
            rows.note(tiny(), 20 * k + n, 0.0, None)

    threads = [threading.Thread(target=write, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(solvers(tmp_path)) == sorted(f"{k}-{n}" for k in range(4) for n in range(20))
    assert len(Rows(tmp_path).notes()) == 80
    assert Rows(tmp_path).path.read_bytes().count(b"problem,") == 1


CLAIMS = """
import sys
from pathlib import Path
from benchmarks.common import claimed
with claimed(Path(sys.argv[1]), sys.argv[2]) as ours:
    print(ours, flush=True)
    sys.stdin.read()
"""


def test_a_row_that_another_process_is_at_is_passed_over(
    tmp_path: Path, counted: list[tuple[str, int]]
) -> None:
    cache, rows = tmp_path / "cache", Rows(tmp_path / "out")
    entry = plain("solver", "test", DDIM())
    runs = [suite_run.Run(tiny(fine=8), entry, budget, 0) for budget in (5, 6, 7)]
    name = f"{rows.path.resolve()} {runs[1].key}"
    command = [sys.executable, "-c", CLAIMS, str(cache), name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"True\n"
        suite_run.measure_all(runs, rows, cache)
        assert counted == [("solver", 5), ("solver", 7)]
        other.kill()
    suite_run.measure_all(runs, rows, cache)
    assert counted[2:] == [("solver", 6)]


@pytest.mark.parametrize(
    "damaged", [b"", b"[]", b"null", b"3", b'"a"', b'{"a":', b"\xff", b"[" * 100_000]
)
def test_notes_that_are_damaged_are_begun_again(tmp_path: Path, damaged: bytes) -> None:
    rows = Rows(tmp_path)
    rows.notes_path.write_bytes(damaged)
    rows.note(tiny(), 0, 1e-6, None)
    assert [note["convergence"] for note in Rows(tmp_path).notes().values()] == [1e-6]


def test_a_file_with_other_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "suite.csv").write_text("problem,solver\nmixture,DDIM\n")
    with pytest.raises(ValueError, match="has the columns"):
        Rows(tmp_path)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Names and budgets of the rows that are measured."""
    calls: list[tuple[str, int]] = []
    original = suite_run.measure

    def counting(run: suite_run.Run, *rest: Any) -> Row:
        calls.append((run.entry.name, run.budget))
        return original(run, *rest)

    monkeypatch.setattr(suite_run, "measure", counting)
    return calls


@pytest.mark.usefixtures("k_diffusion")
def test_end_to_end_and_again(
    tmp_path: Path, counted: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, cache = tmp_path / "out", tmp_path / "cache"
    command = ["--quick", "--problems", "mixture", "--solvers", "DDIM", "BDIA Euler StepRatio(1)"]
    command += ["--out", str(out), "--cache", str(cache)]
    suite.main(command)
    names = ["DDIM", "BDIA Euler StepRatio(1)"]
    assert counted == [(name, budget) for budget in (10, 20) for name in names]
    text = (out / "tables" / "suite.md").read_text()
    for name in ("suite_mixture_errors.png", "suite_mixture_pareto.png"):
        assert name in text
        assert (out / "images" / name).stat().st_size > 1000
    notes = json.loads((out / "tables" / "suite_references.json").read_text())
    assert [note["convergence"] < 1e-3 for note in notes.values()] == [True]

    monkeypatch.setattr(suite, "report", lambda *arguments: None)  # once is enough
    counted.clear()
    suite.main(command)
    assert counted == []
    suite.main([*command, "--budgets", "10", "15"])
    assert counted == [(name, 15) for name in names]

    counted.clear()
    changed = plain("BDIA Euler StepRatio(1)", "BDIA", BDIA(Euler(), StepRatio(1.5)))
    entries = [plain("DDIM", "one-step", DDIM()), changed]
    monkeypatch.setattr(suite, "entries", lambda: entries)
    suite.main(command)
    assert counted == [(changed.name, budget) for budget in (10, 20)]

    counted.clear()
    problems = [replace(problem, version=99) for problem in suite.PROBLEMS]
    monkeypatch.setattr(suite, "PROBLEMS", problems)
    suite.main(command)
    assert len(counted) == 4


@pytest.mark.usefixtures("k_diffusion")
def test_unknown_names_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no solver is called 'DDPM'; there are: .*DDIM"):
        suite.main(["--quick", "--solvers", "DDPM", "--out", str(tmp_path)])
