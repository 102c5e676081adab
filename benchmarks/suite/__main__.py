"""Samplers and inverters side by side, at equal numbers of denoiser evaluations.

For every problem, solver, budget of evaluations and seed, on the same Karras levels, which end above 0
so that the flow can be inverted:
- sampling: the distance to a fine RK4 solution from the same noise, and the Fréchet distance to data;
- encoding: the code of the fine solution's end, given as a lone tensor, against the noise that it came
  from: distance, mean, standard deviation, normality;
- round trips from noise to data and back, and from an image to its code and back; evaluations; time.

Compared are the samplers of k-diffusion and diffusers as installed, and other invertible solvers.

    python -m benchmarks.suite              # continues where it stopped, and writes the report
    python -m benchmarks.suite --solvers EDICT HeunEDM --problems mixture     # some rows only
    python -m benchmarks.suite --quick      # a minute: few states of the mixture, into out/suite
    python -m benchmarks.suite --report     # only the tables and plots
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..common import CACHE, DOCS, PROBLEMS, Problem
from .report import report
from .rows import Rows
from .run import measure_all, missing
from .solvers import entries


def chosen(kind: str, items: Sequence[Any], names: Sequence[str] | None) -> list[Any]:
    """The items with these names, or with these parts of names."""
    if not names:
        return list(items)
    found = []
    for name in names:
        exact = [item for item in items if item.name == name]
        matches = exact or [item for item in items if name.lower() in item.name.lower()]
        if not matches:
            known = ", ".join(item.name for item in items)
            raise SystemExit(f"no {kind} is called {name!r}; there are: {known}")
        found += [item for item in matches if item not in found]
    return found


def quick(problem: Problem) -> Problem:
    """The same problem with fewer states, steps, budgets and seeds."""
    frechet = min(problem.frechet_states, 256)
    return replace(problem, states=8, fine=100, frechet_states=frechet, budgets=(10, 20), seeds=1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--problems", nargs="+", help="names, or parts of them; all by default")
    parser.add_argument("--solvers", nargs="+", help="likewise")
    parser.add_argument("--budgets", nargs="+", type=int, help="evaluations; the problem's own")
    parser.add_argument("--seeds", type=int, help="repeats; the problem's own")
    parser.add_argument("--quick", action="store_true", help="8 states, few steps, out/suite")
    parser.add_argument("--report", action="store_true", help="measure nothing, write the report")
    parser.add_argument("--out", type=Path, help="receives tables/ and images/; docs by default")
    parser.add_argument("--cache", type=Path, default=CACHE)
    options = parser.parse_args(arguments)

    out = options.out or (Path("out/suite") if options.quick else DOCS)
    everything = [quick(problem) for problem in PROBLEMS] if options.quick else list(PROBLEMS)
    asked = options.problems or (["mixture"] if options.quick else None)
    problems = chosen("problem", everything, asked)
    solvers = chosen("solver", entries(), options.solvers)
    rows = Rows(out / "tables")
    if not options.report:
        runs = missing(problems, solvers, options.budgets, options.seeds, rows)
        measure_all(runs, rows, options.cache)
    # Read again, because another run may have added rows to the same file.
    report(Rows(out / "tables"), everything, entries(), out)
    print(f"tables in {out / 'tables'}, plots in {out / 'images'}")


if __name__ == "__main__":
    main()
