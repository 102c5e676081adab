"""Runs whose caller evaluates the network, as pipelines of diffusers do.

A `Run` calls the denoiser. A `Route` is the same run as a list of legs: `Route.advance` returns the next
point to evaluate, and is called again with the output. States are passed, and none is held.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .checks import refuse_gain
from .formula import Shear
from .grids import Grid
from .solver import Solver
from .state import State

Outputs: TypeAlias = "tuple[Tensor, ...]"


@dataclass(frozen=True)
class Leg:
    """One step of a run, down the grid or up it.

    Attributes:
        shears: in the order of the run, each with a flag: whether its first output is that of the last
            shear that called, which was at the same state and level. A leg without any evaluates at the
            state and leaves it.
        undo: whether the shears are undone.
        index: the place on the grid of the state that the leg leads to.
        sigmas: the levels of the outputs that it asks for.
        carries: whether the next leg begins with an output of this one.
    """

    shears: tuple[tuple[Shear, bool], ...]
    undo: bool
    index: int
    sigmas: tuple[float, ...]
    carries: bool = False


@dataclass(frozen=True)
class Route:
    """The legs of a run from a tensor at one level of a grid to the last level, or up to the first.

    The first leg makes the pair that the others go on from. In a two-step solver it is a step of the
    underlying method. A coupled solver needs none, but evaluates at the tensor, since its first shear
    may call elsewhere. A caller that has the pair puts it in place of the result of the first leg, so
    that a run from a pair evaluates at the same levels as one from a lone tensor.
    """

    solver: Solver
    grid: Grid
    index: int
    up: bool
    legs: tuple[Leg, ...]

    @classmethod
    def of(cls, solver: Solver, grid: Grid, index: int, *, up: bool) -> Route:
        """The route from level `index` of `grid`.

        Raises:
            ValueError: up the grid, if the solver cannot be inverted, or only by an iteration.
        """
        levels, plan, coupled = grid.levels, solver.plan(grid), solver.coupled
        steps = plan[:index][::-1] if up else plan[index:]
        legs = []
        if coupled:
            legs.append(Leg((), False, index, (levels[index] or levels[index - 1],)))
        elif up:
            check_invertible(solver)
            lead = solver.start(levels[index], levels[index - 1])
            legs.append(Leg(((lead, False),), False, index, levels_of(lead)))
            steps.pop()
        elif solver.states == 2 and index > 0:
            steps[0] = index, (solver.start(levels[index], levels[index + 1]),)
        # Objects stand for the two states, and for the last call with the state it was made at.
        far, near, last = object(), object(), None
        for k, shears in steps:
            marked: list[tuple[Shear, bool]] = []
            sigmas: tuple[float, ...] = ()
            for shear in shears[::-1] if up else shears:
                if up and shear.gain == 0.0:
                    refuse_gain(solver, grid, k)
                again = coupled and bool(shear.calls) and last == (near, shear.calls[0])
                if shear.calls:
                    last = near, shear.calls[0]
                marked.append((shear, again))
                sigmas += levels_of(shear)[again:]
                far, near = near, far if shear.exchanges else object()
            legs.append(Leg(tuple(marked), up, k if up else k + 1, sigmas))
            if len(legs) > 1 and next((again for shear, again in marked if shear.calls), False):
                legs[-2] = replace(legs[-2], carries=True)
        return cls(solver, grid, index, up, tuple(legs))

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The levels of all outputs, in order."""
        return tuple(sigma for leg in self.legs for sigma in leg.sigmas)

    def later(self, output: int) -> Route | None:
        """The route down the grid that begins at a later output, with a lone tensor; None for none."""
        levels, rest = self.grid.levels, self.sigmas[output:]
        if self.up or not rest or rest[0] not in levels:
            return None
        route = Route.of(self.solver, self.grid, levels.index(rest[0]), up=False)
        return route if route.sigmas == rest else None

    @property
    def end(self) -> float:
        """The level at which the run ends."""
        return self.grid.levels[0 if self.up else -1]

    def last(self, state: State) -> Tensor:
        """The stored tensor at the last level, of the state at the end of the run."""
        last = state.partner if self.up and not self.solver.coupled else state.current
        assert last is not None
        return last

    def advance(
        self, leg: Leg, state: State, outputs: Outputs, dtype: torch.dtype
    ) -> Tensor | tuple[State, Outputs]:
        """One more point to evaluate, or the end of the leg.

        Args:
            leg: the leg.
            state: the checked and stored state at its beginning, as a `Run` has it.
            outputs: the outputs of the leg so far, after those that the previous leg handed on.
            dtype: of points and outputs.

        Returns:
            The next point, not to be written to; or the state that the leg leads to, and the outputs to
            hand on to the next leg.
        """
        arithmetic, coupled = self.solver.arithmetic, self.solver.coupled
        if not leg.shears:
            return (state, ()) if outputs else arithmetic.load(state.current, dtype)
        apply: Any = arithmetic.inverse if leg.undo else arithmetic.forward
        given, first, memory = iter(outputs), None, None
        pair = state.partner, state.current
        far, near = pair[::-1] if leg.undo != coupled else pair
        for shear, again in leg.shears:
            if shear.exchanges:
                far, near = near, far
                continue
            assert near is not None
            values = [arithmetic.load(near, dtype)]
            for k, (point, _) in enumerate(shear.calls):
                output = first if k == 0 and again and first is not None else next(given, None)
                if output is None:
                    whole = point.terms == {0: 1.0}
                    return values[0] if whole else point.of(values).to(dtype)
                if k == 0:
                    first = output
                values.append(output)
            if memory is None and arithmetic.exact:
                origin = leg.index if state.partner is None else state.index
                memory = arithmetic.open(state, origin, dtype)
                memory.sigma = self.grid.levels[leg.index - (not self.up)]
            far, near = near, apply(shear.gain, far, shear.rest.of(values), memory)
        current, partner = (far, near) if self.up != coupled else (near, far)
        assert current is not None
        if self.solver.states == 1:
            partner = None
        side = state.side
        if memory is not None:
            side = arithmetic.close(memory, current, partner, leg.index)
        sigmas: Any = self.grid  # checked
        end = State(current, partner, leg.index, sigmas, state.solver, side, coupled)
        return end, (first,) if leg.carries and first is not None else ()


def levels_of(shear: Shear) -> tuple[float, ...]:
    """The levels at which a shear calls."""
    return tuple(call.sigma for call in shear.calls)


def check_invertible(solver: Solver) -> None:
    """Raises a ValueError for a solver whose steps no list of evaluations undoes."""
    if solver.iterative:
        raise ValueError(
            f"{solver} undoes a step by iteration, and its evaluations cannot be listed beforehand: use "
            "an exact solver such as BDIA(DDIM(), gamma=DampedStepRatio()), or solver.invert"
        )
    if solver.states == 1:
        raise ValueError(
            f"{solver} keeps nothing of the state before a step, and cannot be inverted: wrap it as "
            f"BDIA({solver})"
        )
