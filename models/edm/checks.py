"""Checks of settings, which may come from files of strangers."""

from __future__ import annotations

import math
from typing import Any, Final

TINY: Final = 1e-30
HUGE: Final = 1e30
"""Settings between the two have squares in the range of float64."""


def brief(value: object) -> str:
    """A value for a message: short whatever it is, because only scalars are printed."""
    if isinstance(value, str):
        return ascii(value if len(value) <= 60 else f"{value[:57]}...")
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 100:
        return "a number of very many digits"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    return f"a {type(value).__name__}"


def check_numbers(low: float = 0.0, high: float = math.inf, /, **values: Any) -> None:
    """Check that settings are numbers from `low` to `high`.

    Raises:
        ValueError: naming the setting.
    """
    for name, value in values.items():
        if type(value) not in (int, float) or not low <= value <= high:
            raise ValueError(
                f"{name} must be a number from {low:g} to {high:g}, got {brief(value)}"
            )
