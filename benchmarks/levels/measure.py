"""The measurements: BDIA and other samplers with given and with learned levels, on noise held out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from odesolvers import (
    BDIA,
    DDIM,
    RK4,
    Calibrated,
    Euler,
    HeunEDM,
    calibrate,
    exponential_sigmas,
    vp_sigmas,
)

from ..common import Kept, Problem, Reference, reference, relative_errors
from ..suite.peers import Diffusers, KDiffusion
from .search import learned_levels

STATES = 16
FINE = 128
PEERS: dict[str, tuple[Any, int]] = {
    "DDIM": (DDIM(), 1),
    "DPM-Solver++(2M)": (KDiffusion("sample_dpmpp_2m"), 1),
    "DPM-Solver++(3M)": (
        Diffusers("DPMSolverMultistepScheduler", (("solver_order", 3),)),
        1,
    ),
    "UniPC": (Diffusers("UniPCMultistepScheduler"), 1),
    "EDM's Heun": (HeunEDM(), 2),
}
"""Samplers without inverse, and their evaluations a step."""


def training(problem: Problem, states: int = STATES) -> tuple[Tensor, dict[str, Tensor]]:
    """The noise that is learned on, at most so many states, and its arguments."""
    x = problem.calibration_noise()[:states]
    return x, {name: value[: len(x)] for name, value in problem.arguments().items()}


def limits(problem: Problem) -> dict[str, int]:
    """The limits of a calibration: its own; networks, whose calls are dear, get a coarser reference."""
    return {"reference_steps": FINE if problem.dtype == torch.float64 else FINE // 2}


def geometric(errors: Tensor) -> float:
    """The geometric mean, infinite where a state is lost."""
    mean = float(errors.clamp_min(1e-12).log().mean().exp())
    return mean if math.isfinite(mean) else math.inf


def errors_of(
    solver: Any, problem: Problem, sigmas: Tensor, truth: Reference, encode: bool = True
) -> list[float]:
    """Sampling and encoding error, geometric means over the states of a fine solution."""

    def error(run: Any, start: Tensor, end: Tensor) -> float:
        x, args = start.to(problem.dtype), problem.arguments()
        try:
            return geometric(
                relative_errors(run(problem.denoiser, x, sigmas, extra_args=args).x, end)
            )
        except FloatingPointError:
            return math.inf

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about inversions that amplify errors
        found = [error(solver.sample, truth.noise, truth.clean)]
        return [*found, error(solver.invert, truth.clean, truth.noise)] if encode else found


def learned(
    problem: Problem,
    steps: int,
    *,
    levels: bool,
    states: int = STATES,
    kept: Kept,
) -> Calibrated | None:
    """The rule of `calibrate`, kept as its numbers and its cost."""
    key = rule_key(problem, steps, states, levels)

    def make() -> dict[str, Any]:
        x, args = training(problem, states)
        rule = calibrate(
            problem.denoiser,
            x,
            problem.sigmas(steps),
            levels=levels,
            extra_args=args,
            **limits(problem),
        )
        report = rule.report
        assert report is not None
        return {
            "levels": rule.levels,
            "values": rule.values,
            "runs": report.runs,
            "evaluations": report.evaluations,
            "errors": [report.sampling[1], report.encoding[1]],
        }

    found = kept(key, make)
    if found is None:
        return None
    return Calibrated(
        "Euler()", tuple(found["levels"]), tuple(found["values"]), levels_learned=levels
    )


def rule_key(problem: Problem, steps: int, states: int, levels: bool) -> str:
    """The key of a rule that was learned."""
    what = "weights and levels" if levels else "weights alone"
    return f"{problem.name} v{problem.version}: Euler(), {steps} steps, {states} states, {what}"


def published(problem: Problem, steps: int) -> dict[str, Tensor]:
    """Grids that samplers are published with, in the range of the problem."""
    low, high = problem.bottom, problem.top
    vp = vp_sigmas(1000, append_zero=False)
    inside = vp[(vp > low) & (vp < high)]
    at = torch.linspace(0, len(inside) - 1, steps + 1, dtype=torch.float64).round().long()
    timesteps = inside[at]
    timesteps[0], timesteps[-1] = high, low
    return {
        "Karras": problem.sigmas(steps),
        "even in log SNR": exponential_sigmas(steps + 1, low, high, append_zero=False),
        "even in VP time": timesteps,
    }


def measure(problem: Problem, budget: int, seeds: int, kept: Kept, peers: bool) -> None:
    """All rows of one problem and budget."""
    for levels in (False, True):
        rule = learned(problem, budget, levels=levels, kept=kept)
        if rule is None:
            continue
        solver = BDIA(Euler(), rule)
        what = "weights and levels" if levels else "weights alone"
        for seed in range(seeds):
            kept(
                row(problem, budget, "BDIA", what, seed),
                lambda solver=solver, rule=rule, seed=seed: errors_of(
                    solver, problem, rule.sigmas, reference(problem, seed)
                ),
            )
    if peers:
        for name in PEERS:
            measure_peer(problem, budget, name, seeds, kept)


def measure_peer(problem: Problem, budget: int, name: str, seeds: int, kept: Kept) -> None:
    """One sampler on the published grids, and on levels that were searched for at the same cost."""
    sampler, each = PEERS[name]
    steps = budget // each
    if steps < 2:
        return

    def search() -> dict[str, Any]:
        x, args = training(problem)
        fine = problem.sigmas(FINE)  # as `calibrate` computes it
        target = RK4().sample(problem.denoiser, x, fine, extra_args=args).x
        cost = min(30 * budget + 60, 600)  # runs of `calibrate`, both ways
        levels, runs = learned_levels(sampler, problem, x, target, steps, 2 * cost)
        return {"levels": levels, "runs": runs}

    grids: Mapping[str, Tensor] = published(problem, steps)
    found = kept(f"{problem.name} v{problem.version}: {name}, {steps} steps, levels", search)
    if found is not None:
        grids = {**grids, "learned": torch.tensor(found["levels"], dtype=torch.float64)}
    for grid, sigmas in grids.items():
        for seed in range(seeds):
            kept(
                row(problem, budget, name, grid, seed),
                lambda sigmas=sigmas, seed=seed: errors_of(
                    sampler, problem, sigmas, reference(problem, seed), encode=False
                ),
            )


def row(problem: Problem, budget: int, solver: str, grid: str, seed: int) -> str:
    """The key of a row."""
    return f"{problem.name}, {problem.setting}: {solver}, {budget} evaluations, {grid}, seed {seed}"
