"""A report on what an inversion amplifies, known from the grid and the weights before a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from textwrap import wrap
from typing import Final, final

import torch

from .checks import check_is
from .grids import Grid, Sigmas
from .propagation import LinearRun
from .solver import Solver
from .trust import ENCODING_LIMIT, ROUND_TRIP_LIMIT, roundoff
from .values import number

STD_LIMIT: Final = 0.1
"""The largest deviation from 1 of a code's standard deviation, relative to that of the true code."""


@final
@dataclass(frozen=True)
class StabilityReport:
    """The expected behaviour of a solver on a grid; `print` gives it in words. See `stability_report`.

    Attributes:
        solver: its `repr`.
        steps: the number of steps of the grid.
        sigmas: its highest and its lowest level.
        data_std: the standard deviation of the data that the figures are for.
        amplification_sampling: the largest factor by which consecutive steps down the grid multiply
            the alternating solution, in x; never below 1.
        amplification_inverting: the same of steps up the grid.
        amplification_sampling_vp, amplification_inverting_vp: the same of the variance-preserving
            state ``x / sqrt(1 + σ²)``.
        rounding: the expected relative error of the noise after a round trip, in units of the
            roundoff of the states (2^-24 for float32); 0 in an exact arithmetic.
        sampling_error: the expected relative error of a sample: of each step the error that it makes
            from exact states, as if independent of the others, carried to the end. Of a coupled
            solver, the error of the run itself.
        encoding_error: likewise of the code of a lone image, relative to its true code. Of calibrated
            weights on their own grid, what the calibration measured.
        code_std: the standard deviation of that code over that of the true one, by the exact
            recurrence.
        side_information: bits for each element that sampling destroys, see
            `side_information_bound`.
        exact: whether the arithmetic of the solver inverts to the bit.
    """

    solver: str
    steps: int
    sigmas: tuple[float, float]
    data_std: float
    amplification_sampling: float
    amplification_inverting: float
    amplification_sampling_vp: float
    amplification_inverting_vp: float
    rounding: float
    sampling_error: float
    encoding_error: float
    code_std: float
    side_information: float
    exact: bool

    def round_trip_error(self, dtype: torch.dtype) -> float:
        """The expected relative error of the noise, root mean square, with states of `dtype`.

        Raises:
            TypeError: if `dtype` is not a floating point type.
        """
        return self.rounding * roundoff(dtype)

    @property
    def round_trip(self) -> str:
        """The verdict on `sample` and then `invert` from its state."""
        if self.exact:
            return "inverts to the bit"
        if self.round_trip_error(torch.float32) <= ROUND_TRIP_LIMIT:
            return "inverts in float32"
        if self.round_trip_error(torch.float64) <= ROUND_TRIP_LIMIT:
            return "inverts in float64 or FixedPoint only"
        return "inverts in FixedPoint only"

    @property
    def encoding(self) -> str:
        """The verdict on `invert` from a lone image."""
        if self.encoding_error <= ENCODING_LIMIT and abs(self.code_std - 1) <= STD_LIMIT:
            return "encodes lone images to noise"
        return "does not encode lone images to noise"

    def __str__(self) -> str:
        top, bottom = self.sigmas
        error = {dtype: self.round_trip_error(dtype) for dtype in (torch.float32, torch.float64)}
        advice = []
        if self.exact:
            trip = (
                "Its states are integers, and a round trip loses nothing; each keeps "
                f"{self.side_information:.3g} bits for each element beside it."
            )
        else:
            trip = (
                "A round trip is expected to bring the noise back to a relative error of "
                f"{error[torch.float32]:.0e} in float32 and {error[torch.float64]:.0e} in float64."
            )
            if error[torch.float32] > ROUND_TRIP_LIMIT:
                single = "" if error[torch.float64] > ROUND_TRIP_LIMIT else "a float64 state or "
                advice.append(f"to go back from a sample use {single}arithmetic=FixedPoint()")
        code = (
            "The code of a lone image is expected to have a relative error of "
            f"{self.encoding_error:.0e}."
        )
        if not self.encoding.startswith("encodes"):
            advice.append(
                "to encode images use StepRatio(1), or a gamma nearer to 1, in any arithmetic"
            )
        text = f"{self.solver} {self.round_trip} and {self.encoding}. {trip} {code}"
        if advice:
            text += f" Instead: {'; '.join(advice)}."
        rows = [
            ("", "sampling", "inverting"),
            ("amplification, x", self.amplification_sampling, self.amplification_inverting),
            (
                "amplification, x / sqrt(1 + σ²)",
                self.amplification_sampling_vp,
                self.amplification_inverting_vp,
            ),
            ("truncation error", self.sampling_error, self.encoding_error),
            ("round trip, float32", "", error[torch.float32]),
            ("round trip, float64", "", error[torch.float64]),
            ("code std / true std", "", self.code_std),
            ("side information, bits", self.side_information, ""),
        ]
        cells = [[c if isinstance(c, str) else f"{c:.2g}" for c in row] for row in rows]
        lines = [f"{name:<33}{down:>10}{up:>11}".rstrip() for name, down, up in cells]
        title = (
            f"{self.steps} steps from {top:.6g} to {bottom:.6g}, data of std {self.data_std:.6g}"
        )
        return "\n".join([*wrap(text, 88, break_on_hyphens=False), "", title, *lines])


def stability_report(solver: Solver, sigmas: Sigmas, *, data_std: float = 0.5) -> StabilityReport:
    """The amplification of an inversion, and the round trip and the codes that it leaves to expect.

    The figures are exact statements, or expectations over independent roundings and truncation errors,
    for Gaussian data of one width. No denoiser is called. Data that is not Gaussian has a flow that
    amplifies errors by itself: the documentation has measurements beside the expectations.

    Args:
        solver: any invertible solver.
        sigmas: the grid it is to run on.
        data_std: standard deviation of the data, above 0; 0.5 as in EDM.

    Raises:
        ValueError: if `data_std` or the grid is not usable, or a step of the solver cannot be undone.
    """
    grid = Grid.of(sigmas)
    data_std = number("data_std", data_std)
    if not (math.isfinite(data_std) and data_std > 0):
        raise ValueError(f"data_std must be a positive number, got {data_std}")
    check_is(solver, Solver, "stability_report is for solvers that can be inverted")
    if solver.iterative:
        raise ValueError(
            f"{solver} does not undo its steps exactly, and the result is known from a run alone: "
            "see solution.convergence of those that iterate"
        )
    plan = solver.plan(grid)
    for k, shears in plan[1:]:
        if any(shear.gain == 0.0 for shear in shears):
            raise ValueError(
                f"{solver} cannot be inverted: its step from sigmas[{k}] = {grid.levels[k]:.6g} has "
                "the weight g = 0; stability_report is for gamma in (0, 1] or a rule such as "
                "StepRatio(1)"
            )
    run = LinearRun.of(solver, plan, grid, grid.steps, data_std)
    exact, known = solver.arithmetic.exact, solver.encoding_error(grid)
    return StabilityReport(
        solver=repr(solver),
        steps=grid.steps,
        sigmas=(grid.levels[0], grid.levels[-1]),
        data_std=data_std,
        amplification_sampling=run.amplification_down(0.0),
        amplification_inverting=run.amplification_up(0.0),
        amplification_sampling_vp=run.amplification_down(1.0),
        amplification_inverting_vp=run.amplification_up(1.0),
        rounding=0.0 if exact else run.round_trip_error(grid.steps, 0),
        sampling_error=run.sampling_error(),
        encoding_error=run.encoding_error(grid.steps, 0) if known is None else known,
        code_std=run.code_size(grid.steps, 0) / run.size(0),
        side_information=side_information_bound(solver, grid),
        exact=exact,
    )


def side_information_bound(solver: Solver, sigmas: Sigmas) -> float:
    """Bits for each element that sampling down `sigmas` destroys, and any exact inverse must store.

    The sum of ``log2(1 / |g_i|)`` over all shears of all steps, for one stack serves both states of a
    coupled solver; where weights above 1 come first, which give room that nothing before them can
    use, the largest sum over the last steps of the run. Infinite where a step has the gain 0 and
    discards a state, as every step of a one-step method does; the first step of a two-step solver does
    not, for it has none to forget.
    """
    grid, bits = Grid.of(sigmas), 0.0
    pairs = solver.states == 2 and not solver.coupled
    for _, shears in solver.plan(grid)[1 if pairs else 0 :]:
        for shear in shears:
            if shear.gain == 0.0:
                return math.inf
            bits = max(0.0, bits - math.log2(abs(shear.gain)))
    return bits
