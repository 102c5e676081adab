"""What is worked out before a run, once for a solver and a grid: the steps, in the order of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache, wraps
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt

from .levels import Levels
from .step import Step

if TYPE_CHECKING:
    from .grids import Grid
    from .solver import InvertibleSolver, Solver

Steps: TypeAlias = "Iterable[tuple[int, tuple[Step, ...]]]"
"""Steps in the order of a run, each with its number and its stages."""

Function = TypeVar("Function", bound=Callable[..., Any])


def once_per_grid(function: Function) -> Function:
    """Keeps what a function of a solver, a grid and other settings has returned."""

    @lru_cache(maxsize=128)
    def kept(name: str, *args: Any) -> Any:
        del name
        return function(*args)

    @wraps(function)
    def wrapper(solver: Solver, grid: Grid, *settings: Any) -> Any:
        try:
            hash(solver)
        except TypeError:  # a setting is of a class that has no hash
            return function(solver, grid, *settings)
        # The description tells settings apart where a class compares by identity.
        return kept(repr(solver), solver, grid, *settings)

    return cast(Function, wrapper)


@once_per_grid
def planned_steps(solver: Solver, grid: Grid) -> tuple[tuple[Step, ...], ...]:
    """``solver.steps(grid)``, worked out once.

    Raises:
        ValueError: if they are not as many as the grid has.
    """
    steps = tuple(solver.steps(grid))
    if len(steps) != grid.steps:
        raise ValueError(
            f"{solver}.steps must return one tuple of stages for each of the {grid.steps} steps of the "
            f"grid, got {len(steps)}"
        )
    return steps


@once_per_grid
def planned_start(solver: Solver, grid: Grid, k: int, target: int) -> tuple[Step]:
    """``solver.start`` from one level of the grid to another, worked out once."""
    return (solver.start(grid.levels[k], grid.levels[target]),)


@dataclass(frozen=True)
class Route:
    """The steps of a run.

    Attributes:
        steps: their stages in the order of the run, each step with its number.
        calls: the noise levels of every call of the denoiser, each once.
    """

    steps: tuple[tuple[int, tuple[Step, ...]], ...]
    calls: tuple[Levels, ...]

    @cached_property
    def levels(self) -> npt.NDArray[np.float64]:
        """Those of all calls in one row."""
        return np.fromiter(chain.from_iterable(self.calls), np.float64)

    @classmethod
    def of(cls, solver: Solver, *steps: tuple[int, tuple[Step, ...]]) -> Route:
        """The route of a solver that makes its calls one by one, or several at a time."""
        stages = [stage for _, stages in steps for stage in stages]
        calls: list[Levels] = [call.levels for stage in stages for call in stage.evaluations]
        if solver.stacks:
            for stage in stages:
                levels = [call.sigma for call in stage.evaluations]
                calls += [tuple([levels[n - 1] for n in numbers]) for numbers in stage.rounds]
        return cls(steps, tuple(dict.fromkeys(calls)))


@once_per_grid
def route_down(solver: Solver, grid: Grid, first: int, stop: int, alone: bool) -> Route:
    """From level `first` to `stop`; `alone`, with a first step that has one state to start from."""
    steps = list(enumerate(planned_steps(solver, grid)))[first:stop]
    if alone:
        steps[0] = first, planned_start(solver, grid, first, first + 1)
    return Route.of(solver, *steps)


@once_per_grid
def route_up(solver: InvertibleSolver, grid: Grid, last: int, end: int, alone: bool) -> Route:
    """From level `last` to `end`; `alone`, after a step that supplies the state at the level above.

    Raises:
        ValueError: if the steps are undone by algebra, see `InvertibleSolver.exact`, and one cannot be.
    """
    planned = planned_steps(solver, grid)
    steps = [(k, planned[k][::-1]) for k in reversed(range(end, last))]
    for k, stages in steps:
        if solver.exact and any(stage.gain == 0.0 for stage in stages):
            raise ValueError(
                f"{solver} cannot be inverted: its step from sigmas[{k}] = {grid.levels[k]:.6g} to "
                f"sigmas[{k + 1}] = {grid.levels[k + 1]:.6g} has the weight g = 0 and keeps nothing of "
                "the state before; inversion needs gamma in (0, 1] and a state scale that is finite "
                "at every level"
            )
    if alone:
        steps.insert(0, (last, planned_start(solver, grid, last, last - 1)))
    return Route.of(solver, *steps)
