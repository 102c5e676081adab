"""Warnings before runs whose result is not expected to be what is hoped for."""

from __future__ import annotations

import warnings
from typing import Final

import torch

from .propagation import LinearRun

ROUND_TRIP_LIMIT: Final = 1e-2
"""Relative error of the noise above which a round trip is called lost."""
ENCODING_LIMIT: Final = 0.3
"""Relative error of a code above which it is no longer called noise."""


class InversionWarning(UserWarning):
    """The result of an inversion is not expected to be what is hoped for."""


def roundoff(dtype: torch.dtype) -> float:
    """Unit roundoff of a floating point type, or a TypeError."""
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(
            f"dtype must be a floating point dtype such as torch.float32, got {dtype!r}"
        )
    return torch.finfo(dtype).eps / 2


def warn_of_encoding(error: float, solver: object, steps: int, *, coupled: bool) -> None:
    """Warns if the code of a lone image is expected to be off by `error` times its size."""
    if error <= ENCODING_LIMIT:
        return
    remedy = (
        "more and shorter steps, a grid that ends above 0, or BDIA with StepRatio(1)"
        if coupled
        else "StepRatio(1), a gamma nearer to 1 or more even steps"
    )
    _warn(
        f"the code of a lone image is expected to be off by {error:.2g} times its true size, by "
        f"truncation errors that {solver} amplifies over the {steps} steps up this grid: it will not "
        f"look like noise, in any arithmetic. Use {remedy}"
    )


def warn_of_round_trip(error: float, solver: object, steps: int, dtype: torch.dtype) -> None:
    """Warns if the state that a run came from is expected back only to `error` roundoffs."""
    rounded = error * roundoff(dtype)
    if rounded <= ROUND_TRIP_LIMIT:
        return
    remedy = "a float64 state or " if error * roundoff(torch.float64) <= ROUND_TRIP_LIMIT else ""
    _warn(
        f"this inversion is expected to be off by {rounded:.2g} times the size of the state it came "
        f"from: {solver} amplifies the rounding of {dtype} over the {steps} steps up this grid. Use "
        f"{remedy}arithmetic=FixedPoint(), or StepRatio(1) or a gamma nearer to 1"
    )


def expected_error(run: LinearRun, last: int, stop: int, *, lone: bool) -> float:
    """Of a lone image's code, relative; of a state that is recovered, in roundoffs."""
    return run.encoding_error(last, stop) if lone else run.round_trip_error(last, stop)


def _warn(text: str) -> None:
    # Past this function, its caller, `Solver._warn` and `invert`.
    warnings.warn(text + "; see odesolvers.stability_report", InversionWarning, stacklevel=5)
