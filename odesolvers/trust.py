"""Warnings before runs whose result is not expected to be what is hoped for."""

from __future__ import annotations

import warnings
from typing import Any, Final

import torch

from .grids import Grid
from .propagation import LinearRun, Plan
from .settings import identity, once
from .state import State

ROUND_TRIP_LIMIT: Final = 1e-2
"""Relative error of the noise above which a round trip is called lost."""
SAMPLING_LIMIT: Final = 1.0
"""Relative error of a sample above which a run is said to leave the flow."""
ENCODING_LIMIT: Final = 0.3
"""Relative error of a code above which it is no longer called noise."""


class StabilityWarning(UserWarning):
    """The result of a run is not expected to be what is hoped for."""


class InversionWarning(StabilityWarning):
    """The result of an inversion is not expected to be what is hoped for."""


def roundoff(dtype: torch.dtype) -> float:
    """Unit roundoff of a floating point type, or a TypeError."""
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(
            f"dtype must be a floating point dtype such as torch.float32, got {dtype!r}"
        )
    return torch.finfo(dtype).eps / 2


def expected_sampling_error(
    solver: Any, plan: Plan, grid: Grid, dtype: torch.dtype = torch.float64
) -> float:
    """The relative error of samples, if the data are Gaussian of standard deviation 0.5.

    That of rounding in `dtype` is in it: a step after levels that nearly coincide amplifies it.
    0 of a solver of one state: nothing carries the errors of its steps further than its flow does.
    """
    if solver.states == 1:
        return 0.0
    return LinearRun.of(solver, plan, grid, grid.steps).sampling_error(roundoff(dtype))


def warn_of_samples(solver: Any, error: float, steps: int) -> None:
    """Warns that samples are expected to be off by `error`, above `SAMPLING_LIMIT`."""
    rule = "another rule: StepRatio(1), over two-stage methods HeunStepRatio()"
    other = "" if _is_plain(solver) else f", or {'BDIA' if solver.coupled else rule}"
    _warn(
        f"samples are expected to be off by {error:.2g} times the size of the data, by errors that "
        f"{solver!s:.80} amplifies over the {steps} steps down this grid. Leave out levels that nearly "
        f"coincide, if there are; use more and shorter steps{other}",
        StabilityWarning,
    )


def warn_before_inverting(
    solver: Any, plan: Plan, grid: Grid, state: State, stop: int, dtype: torch.dtype
) -> None:
    """Warns if inverting from `state` up to `stop` is not expected to give what is hoped for.

    From the pair of an earlier run that is the state this run came from, within `ROUND_TRIP_LIMIT`;
    from a lone image its code, within `ENCODING_LIMIT`. The data are taken to have a standard
    deviation of 0.5. Costs some ten microseconds a step, the first time on a grid.
    """
    last, steps = state.index, state.index - stop
    lone = state.partner is None or (solver.coupled and state.partner is state.current)
    if not lone and solver.arithmetic.exact:
        return

    def expected() -> float:
        run = LinearRun.of(solver, plan, grid, last)
        return run.encoding_error(last, stop) if lone else run.round_trip_error(last, stop)

    error = solver.encoding_error(grid) if lone and steps == len(grid.levels) - 1 else None
    if error is None:
        error = once(("expected", *identity(solver), grid.levels, last, stop, lone), expected)
    over = f"over the {steps} steps up this grid"
    if lone and not error <= ENCODING_LIMIT:
        remedy = (
            "more and shorter steps, a grid that ends above 0, or BDIA with StepRatio(1)"
            if solver.coupled
            else "more and shorter steps, or a grid that ends above 0"
            if _is_plain(solver)
            else "StepRatio(1), a gamma nearer to 1 or more even steps"
        )
        _warn(
            f"the code of a lone image is expected to be off by {error:.2g} times its true size, by "
            f"truncation errors that {solver!s:.80} amplifies {over}: it will not look like noise, in "
            f"any arithmetic. Use {remedy}"
        )
    rounded = error * roundoff(dtype)
    if not lone and not rounded <= ROUND_TRIP_LIMIT:
        double = error * roundoff(torch.float64)
        remedy = "a float64 state or " if double <= ROUND_TRIP_LIMIT else ""
        rule = "" if _is_plain(solver) else ", or StepRatio(1) or a gamma nearer to 1"
        _warn(
            f"this inversion is expected to be off by {rounded:.2g} times the size of the state it came "
            f"from: {solver!s:.80} amplifies the rounding of {dtype} {over}. Use {remedy}"
            f"arithmetic=FixedPoint(){rule}"
        )


def _is_plain(solver: Any) -> bool:
    """Whether the weights are those of StepRatio(1), which cannot be recommended to it."""
    return repr(getattr(solver, "gamma", None)) == "StepRatio()"


def _warn(text: str, kind: type[Warning] = InversionWarning) -> None:
    # Past this function, its caller, and `sample` or `invert`.
    warnings.warn(text + "; see odesolvers.stability_report", kind, stacklevel=4)
