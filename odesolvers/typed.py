"""JSON of files, read as the types it must have."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from reprlib import repr as short
from typing import Any, TypeAlias

Form: TypeAlias = Any
"""The form of a value of JSON: a type; ``[form]`` for a list of any length; a tuple of forms for a list
of that length; a dictionary of forms for an object that has these names and no others; or a function
that returns what is read, or raises a ValueError. Lists are read as tuples."""


def parsed(text: str | bytes, form: Form) -> Any:
    """The content of a JSON text that has the `form`.

    >>> parsed('{"n": 3, "levels": ["0x1p+1", "0x0p+0"]}', {"n": whole(0), "levels": [hexadecimal]})
    {'n': 3, 'levels': (2.0, 0.0)}

    Raises:
        ValueError: if the text is no JSON, or has another form; says where.
    """
    try:
        return read(json.loads(text), form)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read(value: Any, form: Form) -> Any:
    """A value of JSON that has the `form`, or a ValueError."""
    if isinstance(form, dict):
        if not isinstance(value, dict) or value.keys() != form.keys():
            raise ValueError(f"must have the names {', '.join(form)}, got {short(value)}")
        return {name: _within(name, value[name], form[name]) for name in form}
    if isinstance(form, list):
        return tuple(read(item, form[0]) for item in read(value, list))
    if isinstance(form, tuple):
        if len(read(value, list)) != len(form):
            raise ValueError(f"must be {len(form)} values, got {short(value)}")
        return tuple(map(read, value, form))
    if not isinstance(form, type):
        return form(value)
    if type(value) is not form:
        raise ValueError(f"must be of type {form.__name__}, got {short(value)}")
    return value


def optional(form: Form) -> Form:
    """The form of null, read as None, or of another form."""
    return lambda value: None if value is None else read(value, form)


def each(form: Form) -> Form:
    """The form of an object of any names, whose values have one form."""
    return lambda value: {k: _within(k, v, form) for k, v in read(value, dict).items()}


def whole(least: int, most: int = 2**63 - 1) -> Callable[[Any], int]:
    """The form of an integer from `least` to `most`."""

    def form(value: Any) -> int:
        if type(value) is int and least <= value <= most:
            return value
        raise ValueError(f"must be an integer from {least} to {most}, got {short(value)}")

    return form


def printable(value: Any) -> str:
    """The form of a string without control characters, which is safe to show in a terminal."""
    if type(value) is str and value.isprintable():
        return value
    raise ValueError(f"must be a string of printable characters, got {short(value)}")


def hexadecimal(value: Any) -> float:
    """The form of a finite number written by `float.hex`, which keeps every bit."""
    try:
        number = float.fromhex(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isfinite(number):
        return number
    raise ValueError(f"must be a finite number as float.hex writes it, got {short(value)}")


def _within(name: str, value: Any, form: Form) -> Any:
    try:
        return read(value, form)
    except ValueError as error:
        raise ValueError(f"{short(name)[1:-1]}: {error}") from None
