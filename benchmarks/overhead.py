"""What a step costs beside the denoiser, in time, operations and memory.

Measures, with a denoiser of one operation on one CPU thread: microseconds a step beyond those of a loop
that does nothing but call the denoiser, from runs of 50 and 200 steps; the same of a run of 50 with all
that a run does once; tensor operations a step, views left out; and the largest number of states alive
outside the denoiser. Then how the time grows with the batch, the size of the image and the steps, with
the straight line through it; and a whole run compiled.

Against: the least that a two-step recurrence needs, ``a.mul_(g).add_(x, alpha=c).add_(d, alpha=e)``; the
same as one kernel, made by `torch.compile`; k-diffusion's `sample_euler` and `sample_heun`; diffusers'
`DDIMScheduler` and `DPMSolverMultistepScheduler`. All in one process, taking turns in an order drawn
anew for each round; each turn runs twice and the second is timed; the medians. The C library keeps the
memory it has, for when it gives some back is chance.

Networks, and all that needs a GPU, are in `networks.py`.

Run: python benchmarks/overhead.py [--write]    (ten minutes; --write makes docs/tables/overhead.md)
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from markdown_table import table
from torch import Tensor
from watch import Watch

from odesolvers import BDIA, DDIM, Compiled, Euler, FixedPoint, HeunEDM, Solver, karras_sigmas

TABLE = Path(__file__).parent.parent / "docs" / "tables" / "overhead.md"
SHAPES = [(1, 4, 64, 64), (16, 4, 64, 64)]
STEPS, MORE = 50, 200
KEPT = {"MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_THRESHOLD_": "1000000000"}
"""Settings under which glibc does not return what is freed to the system."""
BARE, MINIMUM, FUSED = "bare", "three operations in place", "one, by torch.compile"
Name = TypeVar("Name", bound=Hashable)
Run = Callable[[Callable[..., Tensor], Tensor], Any]
VIEWS = {"aten.detach", "aten.alias", "aten.slice", "aten.split", "aten.unbind", "aten.view"}
VIEWS |= {"aten.select", "aten.unsqueeze", "aten.expand", "aten._local_scalar_dense"}


def half(x: Tensor, sigma: Tensor | float) -> Tensor:
    """The denoiser of one operation."""
    return x * 0.5


@torch.no_grad()
def bare(denoiser: Callable[..., Tensor], x: Tensor, steps: int = STEPS) -> None:
    sigma = x.new_ones(len(x))
    for _ in range(steps):
        denoiser(x, sigma)


@torch.no_grad()
def minimum(denoiser: Callable[..., Tensor], x: Tensor, steps: int = STEPS) -> Tensor:
    older, x, sigma = x.clone(), x.clone(), x.new_ones(len(x))
    for _ in range(steps):
        denoised = denoiser(x, sigma)
        older.mul_(0.9).add_(x, alpha=0.06).add_(denoised, alpha=0.04)
        older, x = x, older
        del denoised  # as we do: its memory is that of the next
    return x


def fused(steps: int) -> Run:
    """The recurrence with its combination compiled, for numbers that change from step to step."""

    @torch.compile(dynamic=True)
    def combine(older: Tensor, x: Tensor, denoised: Tensor, g: Tensor, c: Tensor) -> None:
        older.copy_(g * older + c * x + (1 - g - c) * denoised)

    @torch.no_grad()
    def run(denoiser: Callable[..., Tensor], x: Tensor) -> Tensor:
        older, x, sigma = x.clone(), x.clone(), x.new_ones(len(x))
        g, c = torch.tensor([0.9, 0.06], dtype=torch.float64)
        for _ in range(steps):
            denoised = denoiser(x, sigma)
            combine(older, x, denoised, g, c)
            older, x = x, older
            del denoised
        return x

    return run


def ours(solver: Solver, sigmas: Tensor) -> Run:
    return lambda denoiser, x: solver.sample(denoiser, x, sigmas)


def back(solver: BDIA, x: Tensor, sigmas: Tensor) -> Run:
    state = solver.sample(half, x, sigmas).state
    return lambda denoiser, x: solver.invert(denoiser, state, sigmas)


def k_diffusion(name: str, sigmas: Tensor) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = getattr(importlib.import_module("k_diffusion.sampling"), name)
    sigmas = sigmas.float()
    return lambda denoiser, x: sampler(denoiser, x, sigmas.to(x.device), disable=True)


def diffusers(name: str, steps: int) -> Run:
    scheduler = getattr(importlib.import_module("diffusers"), name)()

    @torch.no_grad()
    def run(denoiser: Callable[..., Tensor], x: Tensor) -> Tensor:
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            x = scheduler.step(denoiser(x, t), t, x).prev_sample
        return x

    return run


def contestants(x: Tensor, steps: int) -> dict[str, Run]:
    """A run of each, of as many steps."""
    sigmas = karras_sigmas(steps)
    refined, ddim = BDIA(Euler(), 0.96), BDIA(DDIM())
    return {
        BARE: partial(bare, steps=steps),
        MINIMUM: partial(minimum, steps=steps),
        FUSED: fused(steps),
        "BDIA(Euler())": ours(BDIA(Euler()), sigmas),
        "BDIA(Euler(), 0.96)": ours(refined, sigmas),
        "BDIA(DDIM())": ours(ddim, sigmas),
        "BDIA(DDIM(), arithmetic=FixedPoint())": ours(
            BDIA(DDIM(), arithmetic=FixedPoint()), sigmas
        ),
        "HeunEDM()": ours(HeunEDM(), sigmas),
        "BDIA(HeunEDM())": ours(BDIA(HeunEDM()), sigmas),
        "BDIA(HeunEDM(), batched=True)": ours(BDIA(HeunEDM(), batched=True), sigmas),
        "BDIA(Euler(), 0.96), inverting": back(refined, x, sigmas),
        "BDIA(DDIM()), inverting": back(ddim, x, sigmas),
        "k-diffusion sample_euler": k_diffusion("sample_euler", sigmas),
        "k-diffusion sample_heun": k_diffusion("sample_heun", sigmas),
        "diffusers DDIMScheduler": diffusers("DDIMScheduler", steps),
        "diffusers DPMSolverMultistepScheduler": diffusers("DPMSolverMultistepScheduler", steps),
    }


def seconds(
    runs: Mapping[Name, Callable[[], Any]], repeats: int, *, twice: bool = True
) -> dict[Name, float]:
    """The median time of each, all taking turns; of two runs a turn, that of the second.

    The order is drawn anew for each round, for a run finds the caches as the one before has left them.
    """
    for run in runs.values():
        run()
    times: dict[Name, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name in random.sample(list(runs), len(runs)):
            if twice:
                runs[name]()
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def operations_and_states(run: Run, x: Tensor) -> list[str]:
    """Of a step, and alive at once."""
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
        times = seconds(runs, repeats * (8 if shape is SHAPES[0] else 1))
        beyond = {(name, n): (t - times[BARE, n]) * 1e6 for (name, n), t in times.items()}
        slope = {
            name: (beyond[name, MORE] - beyond[name, STEPS]) / (MORE - STEPS)
            for name in entered[STEPS]
        }
        for name, run in entered[STEPS].items():
            if name == BARE:
                continue
            if name not in rows:  # they do not depend on the shape
                # To an observer of operations a compiled one is made of those it was compiled from.
                rows[name] = ["–", "–"] if name == FUSED else operations_and_states(run, x)
            row = rows[name]
            row += [f"{slope[name]:.0f}", f"{slope[name] / slope[MINIMUM]:.2f}"]
            row += [f"{beyond[name, STEPS] / beyond[MINIMUM, STEPS]:.2f}"]
    header = ["one thread", "operations a step", "states alive"]
    for shape in SHAPES:
        header += [f"µs a step, {shape}", "over the minimum", f"the same of a run of {STEPS}"]
    return table(header, [[name, *row] for name, row in rows.items()])


def scaling(repeats: int) -> str:
    """The time of a run against three sizes, and the line through it."""
    solver, rows = BDIA(DDIM()), []
    cases = {
        "batch of (4, 64, 64)": [(b, (b, 4, 64, 64), STEPS) for b in (1, 2, 4, 8, 16)],
        "pixels of (1, 4, n, n)": [(n * n, (1, 4, n, n), STEPS) for n in (32, 64, 96, 128)],
        "steps of (1, 4, 64, 64)": [(n, (1, 4, 64, 64), n) for n in (10, 25, 50, 100, 200)],
    }
    times = seconds(
        {
            (name, size): partial(solver.sample, half, torch.randn(shape), karras_sigmas(n))
            for name, sizes in cases.items()
            for size, shape, n in sizes
        },
        repeats,
    )
    for name, sizes in cases.items():
        at = np.array([size for size, _, _ in sizes], float)
        y = np.array([times[name, size] for size, _, _ in sizes]) * 1e3
        slope, intercept = np.polyfit(at, y, 1)
        explained = 1 - np.square(y - slope * at - intercept).sum() / np.square(y - y.mean()).sum()
        line = f"{intercept:.2f} + {slope:.3g} n"
        shown = ", ".join(f"{ms:.2f}" for ms in y)
        rows.append([name, ", ".join(map(str, at.astype(int))), shown, line, f"{explained:.3f}"])
    return table(["n", "at", "ms a run", "line", "R²"], rows)


def compiled(repeats: int) -> str:
    """A convolution, step by step and as one program."""
    network = torch.nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
    solver, sigmas, rows = BDIA(DDIM()), karras_sigmas(20), []

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return network(x)  # type: ignore[no-any-return]

    for shape in SHAPES:
        x, whole = torch.randn(shape), Compiled()
        start = time.perf_counter()
        solver.sample(denoiser, x, sigmas, execution=whole)
        spent = time.perf_counter() - start
        runs: dict[str, Callable[[], Any]] = {
            "plain": partial(solver.sample, denoiser, x, sigmas),
            "compiled": partial(solver.sample, denoiser, x, sigmas, execution=whole),
        }
        times = seconds(runs, repeats)
        ratio = times["compiled"] / times["plain"]
        rows.append([str(shape), *(f"{t * 1e3:.2f}" for t in times.values()), f"{ratio:.2f}"])
        rows[-1].append(f"{spent:.0f}")
    header = ["a convolution, 20 steps", "step by step, ms", "Compiled(), ms", "ratio"]
    return table([*header, "compiling, s"], rows)


def machine() -> str:
    """What this runs on."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{model}, one thread; {device}; {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    options = parser.parse_args()
    if not KEPT.items() <= os.environ.items():  # read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEPT)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of grids that amplify: that is not what is measured
    parts = [machine() + ".", overhead(options.repeats), scaling(options.repeats)]
    text = "\n\n".join([*parts, compiled(options.repeats)]) + "\n"
    print(text)
    if options.write:
        TABLE.parent.mkdir(parents=True, exist_ok=True)
        TABLE.write_text(text)


if __name__ == "__main__":
    main()
