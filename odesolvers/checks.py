"""Refuses settings that solvers cannot use, in the same words for all."""

from __future__ import annotations

from numbers import Real

from .approximators.base import IntegrationApproximator
from .arithmetic import Arithmetic


def check_approximator(solver: object, approximator: object) -> None:
    """An instance of `IntegrationApproximator`, or a TypeError."""
    if not isinstance(approximator, IntegrationApproximator):
        raise TypeError(
            f"{type(solver).__name__} wraps an IntegrationApproximator instance such as HeunEDM(), got "
            f"{approximator!r}"
        )


def check_arithmetic(arithmetic: object) -> None:
    """An instance of `Arithmetic`, or a TypeError."""
    if not isinstance(arithmetic, Arithmetic):
        raise TypeError(
            f"arithmetic must be an instance such as FloatingPoint(), got {arithmetic!r}"
        )


def checked_share(name: str, value: object) -> float:
    """A number in (0, 1] as a float, or a TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number in (0, 1], got {value!r}")
    if not 0 < float(value) <= 1:
        raise ValueError(
            f"{name} must be in (0, 1], got {value}: at 0 a step keeps nothing of the state before and "
            "has no inverse"
        )
    return float(value)
