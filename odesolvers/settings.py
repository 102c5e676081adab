"""Objects known by their settings: compared, hashed, cached and written in files by them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from uuid import uuid4
from weakref import WeakKeyDictionary

import numpy as np
import torch

T = TypeVar("T")


class Settings:
    """Base of solvers, rules and arithmetics, whether dataclasses or plain classes.

    `repr` is a Python expression that makes the object again, see `odesolvers.parse`. It leaves out
    settings that have their default, so that a new default is a new version of the file format. Numbers
    are written by value: 1 and 1.0 are one setting.
    """

    def __repr__(self) -> str:
        return identity(self)[0]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Settings):
            return NotImplemented
        return identity(self) == identity(other)

    def __hash__(self) -> int:
        return hash(identity(self))


def identity(value: object) -> tuple[str, tuple[type, ...]]:
    """The settings of an object as an expression, and the classes of all objects in it, in order.

    The expression alone tells settings apart in another process; together with the classes, also two
    classes of one name in this process.
    """
    classes: list[type] = []
    return _expression(value, classes), tuple(classes)


_kept: dict[Any, Any] = {}
_names: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def once(key: Any, make: Callable[[], T]) -> T:
    """``make()``, kept for the next call with the same key; up to 256 values."""
    value = _kept.get(key)
    if value is None:
        if len(_kept) >= 256:
            _kept.clear()
        value = _kept[key] = make()
    found: T = value
    return found


def _expression(value: Any, classes: list[type]) -> str:
    if isinstance(value, float):
        return repr(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(float(value))
    if value is None or isinstance(value, bool | str):
        return repr(value)
    if isinstance(value, int):
        return repr(int(value))
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        return _expression(value.tolist(), classes)
    if isinstance(value, list | tuple):
        items = [_expression(item, classes) for item in value]
        return f"({', '.join(items)}{',' * (len(items) == 1)})"
    if isinstance(value, Mapping):
        pairs = [f"{_expression(k, classes)}: {_expression(v, classes)}" for k, v in value.items()]
        return f"{{{', '.join(sorted(pairs))}}}"
    if isinstance(value, torch.dtype | torch.device):
        return repr(value)
    if callable(value) and not isinstance(value, Settings):
        return _unique(value)
    classes.append(type(value))
    arguments = []
    for number, (name, setting, default) in enumerate(_settings(value)):
        text = _expression(setting, classes)
        if default is dataclasses.MISSING or text != _expression(default, []):
            arguments.append(text if number == 0 and default is not None else f"{name}={text}")
    return f"{type(value).__name__}({', '.join(arguments)})"


def _settings(value: Any) -> list[tuple[str, Any, Any]]:
    """Name, value and default of every setting; those of a plain class are passed by name."""
    if dataclasses.is_dataclass(value):
        return [
            (f.name, getattr(value, f.name), f.default)
            for f in dataclasses.fields(value)
            if f.compare
        ]
    slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
    names = sorted({*getattr(value, "__dict__", {}), *slots} - {"__dict__", "__weakref__"})
    return [(name, getattr(value, name), None) for name in names if hasattr(value, name)]


def _unique(function: Any) -> str:
    """A name for a function as a setting, which no other object and no other process has."""
    if function not in _names:
        _names[function] = uuid4().hex
    return f"<{getattr(function, '__qualname__', 'function')} {_names[function]}>"
