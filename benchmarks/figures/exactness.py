"""Round trips in floating point and in fixed point: error, side information, time.

Noise to data to noise and data to noise to data, on denoisers in closed form and on small networks.
Compared are the same solver in float32 and float64, the bits that any exact inverse must keep (the sum
of log2 1/g_i), and 32 bits for each state of a stored trajectory.

    python -m benchmarks.figures.exactness              # tables and plots, a quarter of an hour
    python -m benchmarks.figures.exactness --quick      # fewer steps and repeats; writes nothing
    python -m benchmarks.figures.exactness --problems   # only the table of denoisers
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from odesolvers import (
    BDIA,
    DDIM,
    Euler,
    FixedPoint,
    GammaRule,
    HeunEDM,
    StepRatio,
    karras_sigmas,
    side_information_bound,
)
from odesolvers.models import IdealDenoiser, load_digits

from ..common import EXACT_PROBLEMS, IMAGES, TABLES, Denoiser, Problem, table

GAMMAS: dict[str, float | GammaRule] = {
    "1": 1.0,
    "0.96": 0.96,
    "0.5": 0.5,
    "step ratio 1": StepRatio(1),
    "step ratio 2": StepRatio(2),
}
TABLE_STEPS = (18, 50, 100, 1000)
PLOT_STEPS = (5, 10, 18, 30, 50, 100, 200, 400, 1000)


@dataclass(frozen=True)
class RoundTrip:
    """The round trip of one solver on one grid."""

    steps: int
    gamma: str
    float32: float
    float64: float
    exact: bool
    bits: int
    bound: float


def relative_error(solver: BDIA, denoiser: Denoiser, x: Tensor, sigmas: Tensor) -> float:
    """The relative error of noise -> data -> noise; infinite if the run diverged."""
    try:
        state = solver.sample(denoiser, x, sigmas).state
        back = solver.invert(denoiser, state, sigmas).x
    except FloatingPointError:
        return math.inf
    return float((back - x).double().norm() / x.double().norm())


def round_trip(steps: int, gamma: str, device: str) -> RoundTrip:
    """The round trip noise -> data -> noise of BDIA over Euler on digits."""
    denoiser = IdealDenoiser(load_digits()[0][:300]).to(device)
    sigmas = karras_sigmas(steps)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(16, 1, 8, 8, generator=generator, dtype=torch.float64).to(device) * 80
    plain = BDIA(Euler(), GAMMAS[gamma])
    solver = BDIA(Euler(), GAMMAS[gamma], FixedPoint())

    exact, bits = True, 0
    for dtype in (torch.float32, torch.float64):
        x = solver.arithmetic.snap(noise.to(dtype))
        state = solver.sample(denoiser, x, sigmas).state
        bits = max(bits, state.side.bits_per_element)
        exact &= torch.equal(solver.invert(denoiser, state, sigmas).x, x)
    return RoundTrip(
        steps,
        gamma,
        relative_error(plain, denoiser, noise.float(), sigmas),
        relative_error(plain, denoiser, noise, sigmas),
        exact,
        bits,
        side_information_bound(solver, sigmas),
    )


@dataclass(frozen=True)
class Times:
    """Seconds of the same runs in floating and in fixed point, and the number of denoiser calls."""

    plain: list[float]
    fixed: list[float]
    calls: int

    def ratio(self, of: Callable[[list[float]], float]) -> float:
        return of(self.fixed) / of(self.plain)


def measure_times(
    shape: Sequence[int], gamma: str, steps: int, repeats: int, device: str, milliseconds: float
) -> Times:
    """Times sampling and inverting at most 25 steps, in floating and fixed point by turns.

    The denoiser takes `milliseconds`. If that is 0 the times are processor times, which other work on
    the machine disturbs less.
    """
    clock = time.perf_counter if milliseconds else time.process_time

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        if milliseconds:
            if device == "cuda":
                torch.cuda.synchronize()
            time.sleep(milliseconds / 1e3)
        return x * 0.5

    sigmas, stop = karras_sigmas(steps), min(steps, 25)
    x = torch.randn(*shape, device=device) * 80
    solvers = [BDIA(Euler(), GAMMAS[gamma]), BDIA(Euler(), GAMMAS[gamma], FixedPoint())]
    seconds: list[list[float]] = [[], []]
    for repeat in range(repeats + 1):
        for solver, times in zip(solvers, seconds, strict=True):
            begin = clock()
            state = solver.sample(denoiser, x, sigmas, stop=stop).state
            back = solver.invert(denoiser, state, sigmas)
            if device == "cuda":
                torch.cuda.synchronize()
            times += [clock() - begin] if repeat else []
            assert back.x.shape == x.shape
    return Times(*seconds, calls=2 * stop - 1)


def exact_cases(problem: Problem, device: str, quick: bool) -> tuple[int, int, int]:
    """Counts round trips by approximator, gamma, dtype and direction: exact, tried, out of range."""
    denoiser = problem.build(torch.device(device))
    args = problem.arguments(device)
    exact = tried = refused = 0
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for approximator in (Euler(), DDIM(), HeunEDM()):
            for gamma in GAMMAS.values():
                solver = BDIA(approximator, gamma, FixedPoint())
                sigmas = karras_sigmas(5 if quick else 18, problem.bottom, problem.top)
                x = solver.arithmetic.snap(problem.noise().to(device, dtype))
                solution = solver.sample(denoiser, x, sigmas, extra_args=args)
                back = solver.invert(denoiser, solution.state, sigmas, extra_args=args)
                exact, tried = exact + torch.equal(back.x, x), tried + 1

                image = solver.arithmetic.snap(x / problem.top)
                try:
                    code = solver.invert(denoiser, image, sigmas, extra_args=args)
                except OverflowError:
                    refused += 1
                    continue
                again = solver.sample(denoiser, code.state, sigmas, extra_args=args)
                exact, tried = exact + torch.equal(again.x, image), tried + 1
    return exact, tried, refused


def problems_table(device: str, quick: bool) -> str:
    """The table of round trips that were exact to the bit, for each denoiser."""
    rows = []
    for problem in EXACT_PROBLEMS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exact, tried, refused = exact_cases(problem, device, quick)
        rows.append([problem.name, str(tried), str(exact), str(refused)])
    return table(["denoiser", "round trips", "exact", "refused"], rows, words=range(4))


def number(error: float) -> str:
    return "overflow" if math.isinf(error) else f"{error:.0e}"


def plot_bits(trips: Sequence[RoundTrip], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    steps = sorted({trip.steps for trip in trips})
    axes.plot(steps, [32 * n for n in steps], "k--", label="the trajectory in float32")
    for i, gamma in enumerate(GAMMAS):
        mine = [trip for trip in trips if trip.gamma == gamma]
        name = f"γ = {gamma}" if gamma[0] in "01" else gamma
        axes.plot(steps, [trip.bound for trip in mine], color=f"C{i}", linewidth=1)
        axes.plot(steps, [trip.bits for trip in mine], "o", color=f"C{i}", label=name)
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(-0.2, 1e5)
    axes.set_xlabel("steps")
    axes.set_ylabel("bits stored for each element")
    axes.set_title("Side information (dots) and what a contraction destroys (lines)", fontsize=10)
    axes.legend(fontsize=8, ncols=2, loc="upper left")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_errors(trips: Sequence[RoundTrip], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(GAMMAS), figsize=(11, 3.2), sharey=True, layout="constrained"
    )
    top, floor = 1e12, 1e-19
    for axes, gamma in zip(panels, GAMMAS, strict=True):
        mine = [trip for trip in trips if trip.gamma == gamma]
        steps = [trip.steps for trip in mine]
        for name, color in (("float32", "C1"), ("float64", "C0")):
            errors = [min(getattr(trip, name), 10 * top) for trip in mine]
            axes.plot(steps, errors, ".-", color=color, label=name)
        exact = [floor if trip.exact else math.nan for trip in mine]
        axes.plot(steps, exact, "s-", color="C2", markersize=4, label="fixed point", clip_on=False)
        axes.axhline(1, color="k", linewidth=0.6, linestyle=":")
        axes.set_title(f"γ = {gamma}" if gamma[0] in "01" else gamma, fontsize=10)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(floor, top)
        axes.set_xlabel("steps")
        axes.grid(alpha=0.3)
    panels[0].set_yticks(
        [floor, 1e-15, 1e-10, 1e-5, 1, 1e5, 1e10],
        ["0", "$10^{-15}$", "$10^{-10}$", "$10^{-5}$", "1", "$10^{5}$", "$10^{10}$"],
    )
    panels[0].set_ylabel("relative round-trip error")
    panels[0].legend(fontsize=8, loc="upper left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps and repeats, no plots")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=Path, default=IMAGES)
    parser.add_argument("--tables", type=Path, default=TABLES)
    parser.add_argument("--problems", action="store_true", help="only the table of denoisers")
    options = parser.parse_args()
    if options.problems:
        problems = problems_table(options.device, options.quick)
        print(problems)
        if not options.quick:
            (options.tables / "exactness_problems.md").write_text(problems + "\n")
        return
    quick, device = options.quick, options.device
    repeats = 1 if quick else 7
    text: list[str] = []

    def show(part: str) -> None:
        text.append(part)
        print(part + "\n", flush=True)

    chip = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    threads = torch.get_num_threads()
    version = torch.__version__.split("+")[0]
    show(f"Measured with torch {version} on {device} ({chip}, {threads} threads).")

    trips = [
        round_trip(steps, gamma, device)
        for steps in ((5, 18) if quick else PLOT_STEPS)
        for gamma in GAMMAS
    ]
    rows: list[list[str]] = []
    fastest: list[float] = []
    medians: list[float] = []
    for trip in trips:
        if trip.steps in TABLE_STEPS:
            times = measure_times((1, 4, 64, 64), trip.gamma, trip.steps, repeats, device, 10)
            fastest.append(times.ratio(min))
            medians.append(times.ratio(statistics.median))
            rows.append(
                [
                    str(trip.steps),
                    trip.gamma,
                    number(trip.float32),
                    number(trip.float64),
                    str(trip.exact),
                    str(trip.bits),
                    f"{trip.bound:.1f}",
                    f"{fastest[-1]:.3f}",
                    f"{medians[-1]:.3f}",
                ]
            )
    errors = ["float32 error", "float64 error", "exact"]
    show(
        table(
            ["steps", "gamma", *errors, "bits per element", "bound", "time", "median"],
            rows,
            words=range(9),
        )
    )
    excess = max(trip.bits - trip.bound for trip in trips)
    show(
        f"Exact in {sum(trip.exact for trip in trips)} of {len(trips)} runs, of these and of the plots; "
        f"at most {excess:.1f} bits above the bound; the time of fixed point over floating point is "
        f"{statistics.median(fastest):.3f} in the middle of the table and {max(fastest):.3f} at most."
    )

    rows = []
    for batch in (1, 4) if quick else (1, 4, 16):
        for gamma in ("1", "0.5", "0.96"):
            shape = (batch, 4, 64, 64)
            none, ten, thirty = (
                measure_times(shape, gamma, 50, repeats, device, ms) for ms in (0, 10, 30)
            )
            costs = [statistics.median(t) / none.calls for t in (none.plain, none.fixed)]
            ratios = [times.ratio(min) for times in (ten, thirty)]
            rows.append(
                [
                    str(shape),
                    gamma,
                    *(f"{cost * 1e3:.2f}" for cost in costs),
                    *(f"{ratio:.3f}" for ratio in ratios),
                ]
            )
    header = [
        "floating point, ms a step",
        "fixed point, ms a step",
        "time at 10 ms a call",
        "at 30 ms",
    ]
    show(table(["state", "gamma", *header], rows, words=range(6)))

    problems = problems_table(device, quick)
    print(problems)
    if not quick:
        options.images.mkdir(parents=True, exist_ok=True)
        plot_bits(trips, options.images / "exact_bits.png")
        plot_errors(trips, options.images / "exact_errors.png")
        options.tables.mkdir(parents=True, exist_ok=True)
        (options.tables / "exactness.md").write_text("\n\n".join(text) + "\n")
        (options.tables / "exactness_problems.md").write_text(problems + "\n")


if __name__ == "__main__":
    main()
