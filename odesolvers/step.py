"""What a solver hands to the loops: denoiser calls, and linear maps of a pair of states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

from .combination import HERE, NOTHING, STATE, Combination

if TYPE_CHECKING:
    from .grids import Grid
    from .solver import Solver


@dataclass(frozen=True)
class Evaluation:
    """One call of the denoiser: at the state `point` (of earlier outputs alone), at level `sigma`."""

    point: Combination
    sigma: float

    @cached_property
    def here(self) -> bool:
        """Whether `point` is the state itself."""
        return self.point == HERE


@dataclass(frozen=True)
class Step:
    """A shear of a pair of states, ``(a, b) -> (b, gain · a + rest(b))``, and so its own inverse.

    `rest` combines b, the state that the shear leaves as it is, with the outputs of `evaluations`.
    Since it does not depend on a, the shear is invertible wherever ``gain != 0``:
    ``(b, c) -> ((c - rest(b)) / gain, b)``. A one-step method has ``gain = 0``.

    The step of a two-step solver is one of them, with the states at three levels in turn: ``a`` is the
    older state, b the current one and c the newer. That of a coupled solver is several stages, on two
    states that leave one level together and arrive at the next together.
    """

    evaluations: tuple[Evaluation, ...]
    rest: Combination
    gain: float = 0.0

    @cached_property
    def exchanges(self) -> bool:
        """Whether it does no more than put the pair in the other order."""
        return self.gain == 1.0 and self.rest == NOTHING

    @cached_property
    def rounds(self) -> tuple[tuple[int, ...], ...]:
        """The outputs, by number, that need nothing but outputs of earlier rounds; the first is 1."""
        depth = [0]
        for call in self.evaluations:
            depth.append(1 + max((depth[k] for k, _ in call.point), default=0))
        numbers = range(1, len(depth))
        return tuple(tuple(k for k in numbers if depth[k] == d) for d in range(1, max(depth) + 1))

    @cached_property
    def forgets(self) -> tuple[int, ...]:
        """The terms, of b and all outputs, that `rest` has not.

        A value that is not finite makes a state that is not finite, and so do all states after it,
        unless its coefficient is 0.
        """
        terms = range(STATE, len(self.evaluations) + 1)
        return () if self.exchanges else tuple(k for k in terms if self.rest[k] == 0.0)


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
    """``solver.steps(grid)``, worked out once."""
    return tuple(solver.steps(grid))


@once_per_grid
def planned_start(solver: Solver, grid: Grid, k: int, target: int) -> tuple[Step]:
    """``solver.start`` from one level of the grid to another, worked out once."""
    return (solver.start(grid.levels[k], grid.levels[target]),)
