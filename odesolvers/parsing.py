"""Solvers by name: reads back the expression that `repr` of a solver is, without `eval`."""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NoReturn

from .approximators import (
    DDIM,
    EES25,
    RK3,
    RK4,
    Dopri5,
    DPMSolverPP2S,
    Euler,
    Exponential,
    FlowEuler,
    HeunEDM,
    Midpoint,
)
from .arithmetic import FixedPoint, FloatingPoint
from .bdia import BDIA
from .calibration import Calibrated
from .coupled import EDICT, McCallumFoster, ReversibleHeun
from .gamma import (
    ConstantGamma,
    DampedStepRatio,
    HeunStepRatio,
    PerStep,
    SmoothedOutput,
    StepRatio,
    order_gaining,
)
from .iterative import DDIMInversion, FixedPointInversion, ReverseStepInversion
from .named import BELM, MALI, Rex

_RUNGE_KUTTA = (Dopri5, EES25, HeunEDM, Midpoint, RK3, RK4)
_METHODS = (*_RUNGE_KUTTA, DDIM, DPMSolverPP2S, Euler, Exponential, FlowEuler)
_SOLVERS = (BDIA, BELM, EDICT, MALI, McCallumFoster, ReversibleHeun, Rex)
_ITERATIVE = (DDIMInversion, FixedPointInversion, ReverseStepInversion)
_STEP_RATIOS = (DampedStepRatio, HeunStepRatio, StepRatio, order_gaining)
_RULES = (*_STEP_RATIOS, Calibrated, ConstantGamma, PerStep, SmoothedOutput)
_KINDS = {
    "solvers": (*_SOLVERS, *_ITERATIVE),
    "one-step methods": _METHODS,
    "rules for weights": _RULES,
    "arithmetics": (FixedPoint, FloatingPoint),
}
KINDS: Final[Mapping[str, tuple[str, ...]]] = {
    kind: tuple(make.__name__ for make in made) for kind, made in _KINDS.items()
}
"""The names that `parse` knows, by what they make."""
CONSTRUCTORS: Final[Mapping[str, Callable[..., Any]]] = {
    make.__name__: make for made in _KINDS.values() for make in made
}
LONGEST: Final = 1_000_000
"""Characters; the weights that are calibrated for 1000 steps have 40,000."""


def parse(text: str, known: Mapping[str, Callable[..., Any]] | None = None) -> Any:
    """The solver, rule or arithmetic that an expression such as ``"BDIA(Euler(), gamma=0.9)"`` names.

    Only literals and calls of public constructors are read, nothing else is run.
    ``parse(repr(solver)) == solver`` for every solver of this package.

    Args:
        text: the expression; at most 1,000,000 characters.
        known: more constructors by name, such as rules of your own.

    Raises:
        TypeError: if `text` is not a string.
        ValueError: if it is no such expression, names something unknown, or is refused by a
            constructor.

    >>> from odesolvers import parse
    >>> parse("BDIA(HeunEDM(), gamma=StepRatio(2))")
    BDIA(HeunEDM(), gamma=StepRatio(2))
    """
    if not isinstance(text, str):
        raise TypeError(f"a solver is named by a string, got {type(text).__name__}")
    if len(text) > LONGEST:
        raise ValueError(f"a solver is named by at most {LONGEST} characters, got {len(text)}")
    constructors = {**CONSTRUCTORS, **(known or {})}
    try:
        found = _read(ast.parse(text.strip(), mode="eval").body, constructors)
    except (SyntaxError, UnicodeError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"{_short(text)!r} is not an expression such as 'BDIA(HeunEDM(), gamma=StepRatio(2))'"
        ) from error
    if found is None or isinstance(found, int | float | str | tuple):
        raise ValueError(f"{_short(text)!r} is a value and names no solver, rule or arithmetic")
    return found


def _read(node: ast.expr, known: Mapping[str, Callable[..., Any]]) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str | None):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _read(node.operand, known)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return -value
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(_read(item, known) for item in node.elts)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        name = node.func.id
        if name not in known:
            _refuse("there is no", name, "to name a solver by", known)
        args = [_read(arg, known) for arg in node.args]
        options = {k.arg: _read(k.value, known) for k in node.keywords if k.arg is not None}
        if len(options) == len(node.keywords):
            _check_settings(name, known[name], options)
            try:
                return known[name](*args, **options)
            except (TypeError, ValueError, OverflowError) as error:
                call, reason = _short(ast.unparse(node)), _short(str(error), 400)
                raise ValueError(f"{call!r} is refused: {reason}") from error
    if isinstance(node, ast.Name) and node.id not in known:
        _refuse("there is no", node.id, "to name a solver by", known)
    found = _short(ast.unparse(node))
    hint = f": write {found}()" if isinstance(node, ast.Name) else ""
    raise ValueError(
        f"{found!r} is neither a number, a string, a tuple nor a call of a constructor{hint}"
    )


def _check_settings(name: str, constructor: Callable[..., Any], options: Iterable[str]) -> None:
    """A ValueError for the name of a setting that a constructor does not have."""
    try:
        parameters = inspect.signature(constructor).parameters
    except (TypeError, ValueError):  # one without a signature refuses for itself
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for option in options:
        if option not in parameters:
            _refuse(f"{name} has no setting", option, "", parameters)


def _refuse(before: str, word: str, after: str, known: Iterable[str]) -> NoReturn:
    """A ValueError that names an unknown word, the one most like it, and the known ones."""
    near = difflib.get_close_matches(word[:80], list(known), n=1)
    guess = f"; did you mean {near[0]!r}?" if near else "."
    words = " ".join(filter(None, (before, repr(_short(word)), after)))
    raise ValueError(f"{words}{guess} Known: {', '.join(sorted(known)) or 'none'}")


def _short(text: str, most: int = 80) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
