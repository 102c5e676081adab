"""Noise levels learned with the weights of BDIA, against the weights alone and against other samplers.

Every calibration takes noise of another seed than those that are measured. Errors are geometric means
over states, medians over seeds, relative to a fine solution by RK4.

- levels: BDIA over Euler with weights alone and with levels; and DDIM, DPM-Solver++(2M, 3M), UniPC and
  EDM's Heun on published grids and on levels searched for at the same cost in denoiser calls;
- what learned levels carry over to; how many states are enough; gradients against differences.

    python -m benchmarks.levels                           # continues where it stopped; hours
    python -m benchmarks.levels --problems mixture digits --budgets 6 10
    python -m benchmarks.levels --report                  # only the tables and the plot
"""

from __future__ import annotations

import argparse

from tqdm.auto import tqdm

from ..common import DRAWINGS, PROBLEMS, TABLES, Kept
from ..suite.__main__ import chosen
from .carry import COUNTS, LEARNED, LONGER, OTHERS, carried, other_steps, with_states
from .gradients import compare
from .measure import measure
from .report import SMALL, carry_key, gradients_key, report, states_key, steps_key

ALL = (*PROBLEMS[:2], DRAWINGS, *PROBLEMS[2:])
BUDGETS = (5, 6, 8, 10)
SEEDS = 3


def generalisation(kept: Kept) -> None:
    """What learned levels carry over to, how many states they need, and what gradients would give."""
    for setting in (LEARNED, *OTHERS):
        kept(carry_key(setting), lambda setting=setting: carried(setting, kept))
    for problem in SMALL:
        for steps in LONGER:
            key = steps_key(problem, steps)
            kept(key, lambda p=problem, n=steps: other_steps(p, n, kept))
        for states in COUNTS:
            key = states_key(problem, states)
            kept(key, lambda p=problem, n=states: with_states(p, n, kept))
        for steps in (6, 10):
            kept(gradients_key(problem, steps), lambda p=problem, n=steps: compare(p, n))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--problems", nargs="+", help="names, or parts of them; all by default")
    parser.add_argument("--budgets", nargs="+", type=int, default=BUDGETS, help="evaluations")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--no-peers", action="store_true", help="BDIA only")
    parser.add_argument("--carry", action="store_true", help="what carries over, and no more")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args()
    kept, problems = Kept(TABLES / "levels.jsonl"), chosen("problem", ALL, options.problems)
    if not options.report and not options.carry:
        for problem, budget in tqdm([(p, n) for p in problems for n in options.budgets]):
            measure(problem, budget, min(options.seeds, problem.seeds), kept, not options.no_peers)
    if options.carry or not (options.report or options.problems):
        generalisation(kept)
    if options.report or not (options.carry or options.problems):
        report(kept.read(), ALL, BUDGETS)


if __name__ == "__main__":
    main()
