"""What an inversion amplifies, known from the grid and the weights before anything is run.

On data that is Gaussian the denoiser is linear, ``D = v x / (v + σ²)`` for the variance v, so every
step of every solver is a known linear map of a pair of states, and the flow is known too:
``x(σ) ∝ sqrt(v + σ²)``. An error made at one step is carried to the end of the run by the product of
the maps after it. Here the errors of all steps are taken to be independent, and the covariance of
those of a pair is carried along: a few multiplications a step, in double precision on the host.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import TYPE_CHECKING, Final, final

import torch

from .arithmetic import side_information_bound
from .grids import Grid, Sigmas
from .route import once_per_grid, planned_steps
from .step import Step
from .trust import InversionWarning

if TYPE_CHECKING:
    from .solver import InvertibleSolver, Solver

ROUND_TRIP_LIMIT: Final = 1e-2
"""Relative error of the noise above which a round trip is called lost."""
ENCODING_LIMIT: Final = 0.3
"""Relative error of a code above which it is no longer called noise."""

STD_LIMIT: Final = 0.1
"""How far from 1 the standard deviation of a code may be, over the true one's."""

_DATA_STD: Final = 0.5
_ROUNDING: Final = 0.4
"""Root mean square error of rounding, over unit roundoff and the root mean square of what is rounded."""


@final
@dataclass(frozen=True)
class StabilityReport:
    """What to expect of a solver on a grid; `print` it for the same in words. See `stability_report`.

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
        return self.rounding * _unit_roundoff(dtype)

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


def stability_report(
    solver: InvertibleSolver, sigmas: Sigmas, *, data_std: float = _DATA_STD
) -> StabilityReport:
    """What inverting `solver` on `sigmas` amplifies, and what that leaves of a round trip and of a code.

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
    if not (math.isfinite(data_std) and data_std > 0):
        raise ValueError(f"data_std must be a positive number, got {data_std}")
    if not hasattr(solver, "exact"):
        raise TypeError(f"stability_report is for solvers that can be inverted, got {solver!r}")
    if not solver.exact:
        raise ValueError(
            f"{solver} does not undo its steps exactly, and what comes of it is known from a run alone: "
            "see solution.convergence of those that iterate"
        )
    steps = planned_steps(solver, grid)
    for k, step in enumerate(steps[1:], start=1):
        if any(stage.gain == 0.0 for stage in step):
            raise ValueError(
                f"{solver} cannot be inverted: its step from sigmas[{k}] = {grid.levels[k]:.6g} has "
                "the weight g = 0; stability_report is for gamma in (0, 1] or a rule such as "
                "StepRatio(1)"
            )
    model = _Model.of(steps, grid, data_std)
    undone = model.path(grid.steps, 0)
    top, bottom = model.size(0), model.size(grid.steps)
    exact, known = solver.arithmetic.exact, solver.known_encoding_error(grid)
    return StabilityReport(
        solver=repr(solver),
        steps=grid.steps,
        sigmas=(grid.levels[0], grid.levels[-1]),
        data_std=float(data_std),
        amplification_sampling=largest_product(_down(step, 0.0) for step in model.steps),
        amplification_inverting=largest_product(
            _up(step, 0.0) for step in reversed(model.undoable)
        ),
        amplification_sampling_vp=largest_product(_down(step, 1.0) for step in model.steps),
        amplification_inverting_vp=largest_product(
            _up(step, 1.0) for step in reversed(model.undoable)
        ),
        rounding=0.0 if exact else _undo(undone, _rounded) / top,
        sampling_error=model.sampling_error(),
        encoding_error=model.encoding_error(solver, grid.steps, 0) if known is None else known,
        code_std=_encode(undone, model.lone(solver, grid.steps), bottom) / top,
        side_information=side_information_bound(solver, grid),
        exact=exact,
    )


def warn_before_inverting(
    solver: Solver, grid: Grid, last: int, stop: int, *, lone: bool, dtype: torch.dtype
) -> None:
    """Warn where inverting from level `last` up to `stop` is not expected to give what is hoped for.

    From the pair of an earlier run that is the state this run came from, within `ROUND_TRIP_LIMIT`;
    from a lone image its code, within `ENCODING_LIMIT`. The data are taken to have a standard
    deviation of 0.5. Costs some ten microseconds a step, the first time on a grid. Code that
    `torch.compile` traces is not warned.
    """
    if torch.compiler.is_compiling() or (not lone and solver.arithmetic.exact):
        return
    whole = (last, stop) == (grid.steps, 0)
    known = solver.known_encoding_error(grid) if lone and whole else None
    error = _expected_error(solver, grid, last, stop, lone) if known is None else known
    if lone:
        if not error <= ENCODING_LIMIT:
            remedy = (
                "StepRatio(1), a gamma nearer to 1 or more even steps"
                if solver.two_step
                else "more and shorter steps, a grid that ends above 0, or BDIA with StepRatio(1)"
            )
            _warn(
                f"the code of a lone image is expected to be off by {_times(error)} its true size, by "
                f"truncation errors that {solver} amplifies over the {last - stop} steps up this grid: "
                f"it will not look like noise, in any arithmetic. Use {remedy}"
            )
        return
    rounded = error * _unit_roundoff(dtype)
    if not rounded <= ROUND_TRIP_LIMIT:
        double = error * _unit_roundoff(torch.float64)
        remedy = "a float64 state or " if double <= ROUND_TRIP_LIMIT else ""
        _warn(
            f"this inversion is expected to be off by {_times(rounded)} the size of the state it came "
            f"from: {solver} amplifies the rounding of {dtype} over the {last - stop} steps up this "
            f"grid. Use {remedy}arithmetic=FixedPoint(), or StepRatio(1) or a gamma nearer to 1"
        )


@once_per_grid
def _expected_error(solver: Solver, grid: Grid, last: int, stop: int, lone: bool) -> float:
    """Relative error of a lone image's code; or of a state that is recovered, in roundoffs."""
    model = _Model.of(planned_steps(solver, grid)[:last], grid, _DATA_STD)
    if lone:
        return model.encoding_error(solver, last, stop)
    return _undo(model.path(last, stop), _rounded) / model.size(stop)


def _warn(text: str) -> None:
    # Past this function, its caller, the loop, and `invert`.
    warnings.warn(text + "; see odesolvers.stability_report", InversionWarning, stacklevel=5)


def _times(error: float) -> str:
    return f"{error:.2g} times"


def _unit_roundoff(dtype: torch.dtype) -> float:
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(
            f"dtype must be a floating point dtype such as torch.float32, got {dtype!r}"
        )
    return torch.finfo(dtype).eps / 2


@dataclass(frozen=True)
class _Stage:
    """One stage over Gaussian data: ``newer = gain · older + slope · here``.

    `older`, `here` and `newer` are the levels of the three states, `spread` the sum of squares of the
    terms that `slope` is added up from. `blended` says whether it is formed as a mean, see `Step.blend`.
    """

    gain: float
    slope: float
    spread: float
    older: float
    here: float
    newer: float
    data_std: float
    blended: bool

    @property
    def sizes(self) -> tuple[float, float, float]:
        """Root mean squares of the three states on the exact flow."""
        v = self.data_std
        return math.hypot(v, self.older), math.hypot(v, self.here), math.hypot(v, self.newer)


@dataclass(frozen=True)
class _Model:
    """The steps of a solver over Gaussian data, as linear maps of a pair of numbers."""

    steps: list[list[_Stage]]
    grid: Grid
    data_std: float

    @classmethod
    def of(cls, steps: Sequence[tuple[Step, ...]], grid: Grid, data_std: float) -> _Model:
        linear, older, here = [], grid.levels[0], grid.levels[0]
        for step, newer in zip(steps, grid.levels[1:], strict=False):
            stages = []
            for stage in step:
                slope, spread = _slope(stage, data_std)
                blended = stage.blend is not None
                stages.append(
                    _Stage(stage.gain, slope, spread, older, here, newer, data_std, blended)
                )
                older, here = here, newer
            linear.append(stages)
        return cls(linear, grid, data_std)

    @property
    def undoable(self) -> list[list[_Stage]]:
        """All steps but, of a two-step solver, the first: it begins from one state, not from a pair."""
        return self.steps[1:] if self.two_step else self.steps

    @property
    def two_step(self) -> bool:
        return self.steps[0][0].gain == 0.0

    def path(self, last: int, stop: int) -> list[_Stage]:
        """The stages that lead from level `last` up to `stop`, in the order of their undoing."""
        first = stop + 1 if self.two_step else stop
        return [stage for step in reversed(self.steps[first:last]) for stage in reversed(step)]

    def size(self, k: int) -> float:
        """The root mean square of the state at level `k` on the exact flow."""
        return math.hypot(self.data_std, self.grid.levels[k])

    def lone(self, solver: Solver, last: int) -> float:
        """The state that a lone image at level `last` is paired with."""
        if not self.two_step:
            return self.size(last)  # the pair of a coupled solver begins as the image twice
        s = self.grid.levels
        return _slope(solver.start(s[last], s[last - 1]), self.data_std)[0] * self.size(last)

    def encoding_error(self, solver: Solver, last: int, stop: int) -> float:
        """Of a lone image at level `last`, encoded up to level `stop`.

        The stages of a coupled solver pass through states that are not of the flow: their errors are
        no sum of independent ones, and those of whole runs are taken.
        """
        path, size, lone = self.path(last, stop), self.size(stop), self.lone(solver, last)
        if self.two_step:
            return _undo(path, _truncated, lone - self.size(last - 1)) / size
        return abs(_encode(path, lone, self.size(last)) - size) / size

    def sampling_error(self) -> float:
        """Of a whole run down the grid."""
        path, size = [stage for step in self.steps for stage in step], self.size(self.grid.steps)
        if self.two_step:
            return _do(path) / size
        first = second = self.size(0)
        for stage in path:
            first, second = second, stage.gain * first + stage.slope * second
        return abs(first - size) / size


def _slope(step: Step, data_std: float) -> tuple[float, float]:
    """How `rest` depends on the current state, and the sum of squares of its terms."""
    v = data_std * data_std
    values = [1.0]
    for call in step.evaluations:
        point = sum(c * values[k] for k, c in call.point)
        values.append(v / (v + call.sigma * call.sigma) * point)
    terms = [c * values[k] for k, c in step.rest]
    return sum(terms), sum(term * term for term in terms)


def _rounded(stage: _Stage, variance: float) -> float:
    """Variance of what rounding adds to `older` between a stage and its undoing, in squared roundoffs.

    Both ways one product and one sum are rounded, or, of a mean, one difference, one product and one
    sum. Where the weight is 1 or near it, the roundings back undo most of those on the way, and this is
    too high by a factor of 3 or more. `rest` is the same to the bit both ways where `here` is: its
    rounding counts in the share of elements that are off by a bit or more.
    """
    older, here, newer = stage.sizes
    g = stage.gain
    share = min(1.0, variance / (_ROUNDING * here) ** 2)
    rest = 2.0 * share * stage.spread * here**2
    if stage.blended:  # as torch.lerp does it, from the end that the result is nearer to
        mean = (newer - g * older) / (1.0 - g)
        ahead = newer - (older if abs(1.0 - g) < 0.5 else mean)
        back = older - (newer if abs(1.0 - 1.0 / g) < 0.5 else mean)
        there, again = newer**2 + 2.0 * ahead**2, older**2 + 2.0 * back**2
    else:
        inexact = 0.0 if abs(math.frexp(g)[0]) == 0.5 else 1.0  # a power of two multiplies exactly
        there, again = newer**2 + (1.0 + inexact) * (g * older) ** 2, inexact * older**2
    return _ROUNDING**2 * ((there + rest) / (g * g) + again)


def _truncated(stage: _Stage, variance: float) -> float:
    """The squared error of `older`, where it is found from exact states."""
    del variance
    older, here, newer = stage.sizes
    error = (newer - stage.slope * here) / stage.gain - older
    return error * error


def _undo(
    path: Iterable[_Stage], local: Callable[[_Stage, float], float], start: float = 0.0
) -> float:
    """Standard deviation of the error of the last state found, where `here` begins off by `start`.

    Each stage adds an independent error of variance ``local(stage, variance of here)``:

        older = (newer - slope · here) / gain
    """
    hh, hn, nn = start * start, 0.0, 0.0
    for stage in path:
        r, g = stage.slope, stage.gain
        oo = (nn - 2.0 * r * hn + r * r * hh) / (g * g)
        oh = (hn - r * hh) / g
        hh, hn, nn = max(oo, 0.0) + local(stage, hh), oh, hh
    return math.sqrt(hh) if hh < math.inf else math.inf


def _do(path: Iterable[_Stage]) -> float:
    """The same down the grid, ``newer = gain · older + slope · here``, for truncation errors."""
    oo, oh, hh = 0.0, 0.0, 0.0
    for stage in path:
        older, here, newer = stage.sizes
        r, g = stage.slope, stage.gain
        local = g * older + r * here - newer
        nn = g * g * oo + 2.0 * g * r * oh + r * r * hh
        oo, oh, hh = hh, g * oh + r * hh, max(nn, 0.0) + local * local
    return math.sqrt(hh) if hh < math.inf else math.inf


def _encode(path: Iterable[_Stage], here: float, newer: float) -> float:
    """The size of the code of an image of size `newer` that is paired with `here`."""
    for stage in path:
        here, newer = (newer - stage.slope * here) / stage.gain, here
    return abs(here) if math.isfinite(here) else math.inf


def _down(step: Iterable[_Stage], unit: float) -> float:
    """The factor of the alternating solution in a step down, in x / sqrt(1 + unit² σ²)."""
    return math.prod(abs(s.gain) * _scale(s.here, s.newer, unit) for s in step)


def _up(step: Iterable[_Stage], unit: float) -> float:
    """The same in a step up."""
    return math.prod(_scale(s.here, s.older, unit) / abs(s.gain) for s in step)


def _scale(sigma: float, target: float, unit: float) -> float:
    return math.hypot(1.0, unit * sigma) / math.hypot(1.0, unit * target)


def largest_product(factors: Iterable[float]) -> float:
    """The largest product of consecutive factors, 1 for none."""
    worst = product = 1.0
    for factor in factors:
        product = max(product, 1.0) * factor
        worst = max(worst, product)
    return worst
