"""The cost of a step beside the denoiser: time, operations, memory, and functions entered.

With a denoiser of one operation, on one CPU thread: microseconds a step beyond those of a loop that only
calls the denoiser, for each further step (from runs of 50 and 200) and for a run of 50 with everything
that a run does once; tensor operations a step, without views; and the largest number of states alive
outside the denoiser. 1.00 is the minimum of a two-step recurrence, three operations in place:
``a.mul_(g).add_(x, alpha=c).add_(d, alpha=e)``.

Compared are k-diffusion's `sample_euler` and `sample_heun` and diffusers' `DDIMScheduler` and
`DPMSolverMultistepScheduler`. All take turns in one process in random order; each turn runs twice, and
the second run is timed, in processor time of the thread; times are medians. The C library is told to
keep freed memory, because it returns it to the system at random moments. Networks and GPUs are in
`networks.py`.

    python -m benchmarks.overhead --write         # ten minutes; makes docs/tables/overhead.md
    python -m benchmarks.overhead --repeats 1     # half a minute
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import odesolvers
from odesolvers import BDIA, DDIM, Euler, FixedPoint, HeunEDM, karras_sigmas
from odesolvers.extend import Solver

from .common import TABLES, Denoiser, Watch, bare, k_diffusion, machine, seconds, table, write

SHAPES = [(1, 4, 64, 64), (16, 4, 64, 64)]
STEPS, MORE = 50, 200
KEPT = {"MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_THRESHOLD_": "1000000000"}
"""Settings with which glibc does not return freed memory to the system."""
BARE, MINIMUM = "bare", "three operations in place"
Run = Callable[[Denoiser, Tensor], Any]
VIEWS = {"aten.detach", "aten.alias", "aten.slice", "aten.split", "aten.unbind", "aten.view"}
VIEWS |= {"aten.select", "aten.unsqueeze", "aten.expand", "aten._local_scalar_dense"}


def half(x: Tensor, sigma: Tensor | float) -> Tensor:
    """The denoiser of one operation."""
    return x * 0.5


@torch.no_grad()
def minimum(denoiser: Denoiser, x: Tensor, steps: int) -> Tensor:
    """A two-step recurrence in three operations a step."""
    older, x, sigma = x.clone(), x.clone(), x.new_ones(len(x))
    for _ in range(steps):
        denoised = denoiser(x, sigma)
        older.mul_(0.9).add_(x, alpha=0.06).add_(denoised, alpha=0.04)
        older, x = x, older
        del denoised  # as the package does: the next output can have its memory
    return x


def sampling(solver: Solver, sigmas: Tensor) -> Run:
    return lambda denoiser, x: solver.sample(denoiser, x, sigmas)


def inverting(solver: BDIA, x: Tensor, sigmas: Tensor) -> Run:
    state = solver.sample(half, x, sigmas).state
    return lambda denoiser, x: solver.invert(denoiser, state, sigmas)


def diffusers(name: str, steps: int) -> Run:
    scheduler = getattr(importlib.import_module("diffusers"), name)()

    @torch.no_grad()
    def run(denoiser: Denoiser, x: Tensor) -> Tensor:
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            x = scheduler.step(denoiser(x, t), t, x).prev_sample
        return x

    return run


def contestants(x: Tensor, steps: int) -> dict[str, Run]:
    """A run of each, of that many steps."""
    sigmas, exact = karras_sigmas(steps), FixedPoint()
    refined, ddim = BDIA(Euler(), 0.96), BDIA(DDIM())
    return {
        BARE: partial(bare, steps=steps),
        MINIMUM: partial(minimum, steps=steps),
        "BDIA(Euler())": sampling(BDIA(Euler()), sigmas),
        "BDIA(Euler(), 0.96)": sampling(refined, sigmas),
        "BDIA(DDIM())": sampling(ddim, sigmas),
        "BDIA(DDIM(), arithmetic=FixedPoint())": sampling(BDIA(DDIM(), 1.0, exact), sigmas),
        "HeunEDM()": sampling(HeunEDM(), sigmas),
        "BDIA(HeunEDM())": sampling(BDIA(HeunEDM()), sigmas),
        "BDIA(Euler(), 0.96), inverting": inverting(refined, x, sigmas),
        "BDIA(DDIM()), inverting": inverting(ddim, x, sigmas),
        "k-diffusion sample_euler": k_diffusion("sample_euler", sigmas),
        "k-diffusion sample_heun": k_diffusion("sample_heun", sigmas),
        "diffusers DDIMScheduler": diffusers("DDIMScheduler", steps),
        "diffusers DPMSolverMultistepScheduler": diffusers("DPMSolverMultistepScheduler", steps),
    }


def operations_and_states(run: Run, x: Tensor) -> list[str]:
    """Operations a step, and states alive at once."""
    watch = Watch(half, x, x.numel())
    with watch:
        run(watch.denoise, x)
    made = sum(n for operation, n in watch.operations.items() if operation not in VIEWS)
    return [f"{made / STEPS:.1f}", f"{watch.peak / x.nbytes:.0f}"]


def overhead(repeats: int) -> str:
    """The table of all contestants."""
    rows: dict[str, list[str]] = {}
    for shape in SHAPES:
        x = torch.randn(shape)
        entered = {steps: contestants(x, steps) for steps in (STEPS, MORE)}
        runs = {
            (name, steps): partial(run, half, x)
            for steps, entrants in entered.items()
            for name, run in entrants.items()
        }
        times = seconds(runs, repeats * (8 if shape is SHAPES[0] else 1), clock=time.thread_time)
        beyond = {(name, n): (t - times[BARE, n]) * 1e6 for (name, n), t in times.items()}
        further = {
            name: (beyond[name, MORE] - beyond[name, STEPS]) / (MORE - STEPS)
            for name in entered[STEPS]
        }
        for name, run in entered[STEPS].items():
            if name == BARE:
                continue
            if name not in rows:  # these do not depend on the shape
                rows[name] = operations_and_states(run, x)
            rows[name] += [f"{further[name]:.0f}", f"{further[name] / further[MINIMUM]:.2f}"]
            rows[name] += [f"{beyond[name, STEPS] / beyond[MINIMUM, STEPS]:.2f}"]
    header = ["one thread", "operations a step", "states alive"]
    for shape in SHAPES:
        header += [f"µs a step, {shape}", "over the minimum", f"the same of a run of {STEPS}"]
    return table(header, [[name, *row] for name, row in rows.items()])


def functions_entered(run: Callable[[], Any]) -> list[str]:
    """The distinct functions of the package that a run enters, by file and name."""
    package, entered = str(Path(odesolvers.__file__).parent), {}

    def note(frame: Any, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(package):
            entered[code] = f"{Path(code.co_filename).name}: {code.co_name}"

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return list(entered.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--write", action="store_true", help="write docs/tables/overhead.md")
    options = parser.parse_args()
    if not KEPT.items() <= os.environ.items():  # they are read when a process starts
        command = [sys.executable, "-m", "benchmarks.overhead", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | KEPT)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # about grids that amplify errors
    run = partial(BDIA(HeunEDM()).sample, half, torch.randn(SHAPES[0]), karras_sigmas(STEPS))
    run()
    functions = functions_entered(run)
    text = "\n\n".join(
        [
            f"{machine()}.",
            overhead(options.repeats),
            f"A repeated `sample` of `BDIA(HeunEDM())` enters {len(functions)} functions of the "
            f"package: {', '.join(f'`{name}`' for name in functions)}.",
        ]
    )
    if options.write:
        write(TABLES / "overhead.md", text)
    else:
        print(text)


if __name__ == "__main__":
    main()
