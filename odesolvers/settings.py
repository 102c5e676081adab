"""Objects known by their settings: compared, hashed, cached and written in files by them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Set
from enum import Enum
from functools import partial
from numbers import Integral, Real
from pathlib import PurePath
from types import NoneType
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


def identity(value: object) -> tuple[str, ...]:
    """The settings of an object as an expression, followed by the classes of all objects in it.

    The expression alone tells settings apart in another process; the classes tell apart two of one name
    in this process.

    Raises:
        ValueError: if a setting contains itself.
    """
    classes: list[Any] = []
    try:
        return _expression(value, classes), *classes
    except RecursionError:
        raise ValueError(
            f"the settings of {type(value).__name__} contain themselves, or are nested too deeply to be "
            "written as an expression"
        ) from None


def _expression(value: Any, classes: list[Any]) -> str:
    """A setting as a Python expression; the classes of the objects in it are appended to `classes`."""
    cls = type(value)
    fields = getattr(cls, "__dataclass_fields__", None)
    if fields is None and not isinstance(value, Settings):
        if cls in _LITERALS or isinstance(value, PurePath):
            return repr(value)
        if cls is float:
            whole = abs(value) < 2**53 and value.is_integer()
            return repr(int(value) if whole else value)
        if isinstance(value, Enum):
            classes.append(cls)
            return f"{cls.__name__}.{value.name}"
        if isinstance(value, str | bytes | complex):  # of a subclass
            classes.append(cls)
            kind = next(kind for kind in (str, bytes, complex) if isinstance(value, kind))
            return f"{cls.__name__}({kind.__repr__(value)})"
        if isinstance(value, Real):
            return _expression(int(value) if isinstance(value, Integral) else float(value), classes)
        if isinstance(value, np.ndarray | np.generic | torch.Tensor):
            return _expression(value.tolist(), classes)
        if isinstance(value, list | tuple):
            items = [_expression(item, classes) for item in value]
            return f"({', '.join(items)}{',' * (len(items) == 1)})"
        if isinstance(value, Mapping):
            items = [
                f"{_expression(k, classes)}: {_expression(v, classes)}" for k, v in value.items()
            ]
            return f"{{{', '.join(sorted(items))}}}"
        if isinstance(value, Set):
            items = [f"{_expression(item, classes)}," for item in value]
            return f"{cls.__name__}(({' '.join(sorted(items))}))"
        if isinstance(value, torch.nn.Module):  # with the versions of its weights
            weights = (*value.parameters(), *value.buffers())
            versions = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in weights]
            return f"<{_unique(value)} {versions}>"
        if inspect.isroutine(value) or isinstance(value, type | partial):
            return _unique(value)
        if not hasattr(value, "__dict__") and not _slots(cls):  # written in C
            shown = any("__repr__" in vars(base) for base in cls.__mro__[:-1])
            return repr(value) if shown else _unique(value)
    classes.append(cls)
    arguments = []
    if fields is not None:  # the first setting by place, those that have their defaults not at all
        for name, field in fields.items():
            setting, default = getattr(value, name), field.default
            if not field.compare or setting is default:
                continue
            inner: list[Any] = []
            usual: list[Any] = []
            text = _expression(setting, inner)
            if default is dataclasses.MISSING or (text, inner) != (
                _expression(default, usual),
                usual,
            ):
                arguments.append(text if name == next(iter(fields)) else f"{name}={text}")
                classes += inner
    if "__dataclass_fields__" not in vars(cls):  # a plain class, maybe of a dataclass: by name
        arguments += [
            f"{name}={_expression(setting, classes)}"
            for name, setting in sorted(attributes(value).items())
            if name not in (fields or {})
        ]
    return f"{cls.__name__}({', '.join(arguments)})"


_LITERALS = (int, bool, str, bytes, complex, NoneType, torch.dtype, torch.device)


def attributes(value: object) -> dict[str, Any]:
    """What an object holds by name, in its dictionary and in slots that have a value."""
    slots = (name for name in sorted(_slots(type(value))) if hasattr(value, name))
    return {**getattr(value, "__dict__", {}), **{name: getattr(value, name) for name in slots}}


def _slots(cls: type) -> set[str]:
    """The attributes that a class and its bases declare as slots."""
    found: set[str] = set()
    for base in cls.__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            private = name.startswith("__") and not name.endswith("__")
            found.add(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    return found - {"__dict__", "__weakref__"}


_names: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def _unique(function: Any) -> str:
    """A name for a function as a setting, which no other object and no other process has."""
    if function not in _names:
        _names[function] = uuid4().hex
    return f"<{getattr(function, '__qualname__', 'function')} {_names[function]}>"


_kept: dict[Any, Any] = {}


def once(key: Any, make: Callable[[], T]) -> T:
    """``make()``, kept for the next call with the same key; up to 256 values."""
    value = _kept.get(key)
    if value is None:
        if len(_kept) >= 256:
            _kept.clear()
        value = _kept[key] = make()
    found: T = value
    return found
