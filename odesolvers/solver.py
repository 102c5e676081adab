"""The public face of every solver: `sample` and `invert`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from .arithmetic import Arithmetic, FloatingPoint
from .checks import (
    OVERFLOW,
    check_origin,
    is_finite,
    refuse_call,
    refuse_gain,
    refuse_start,
    refuse_stop,
)
from .formula import Shear
from .grids import Grid, Sigmas
from .progress import progress_bar
from .propagation import Plan
from .run import Callback, Denoiser, Pair, Run, Steps
from .settings import Settings, expression, once
from .state import Solution, State
from .trust import warn_before_inverting


class Solver(Settings, ABC):
    """A list of shears for each step of a grid, see `Shear`. Holds settings and is changed by no run.

    Attributes:
        states: how many states a run carries from step to step, 1 or 2.
        coupled: of two, whether both stand at the same level; else they are neighbours on the grid.
        iterative: whether steps are undone by an iteration, and not by the algebra of their shears.
        arithmetic: the representation of states.
    """

    states: ClassVar[int] = 2
    coupled: ClassVar[bool] = False
    iterative: ClassVar[bool] = False
    arithmetic: Arithmetic = FloatingPoint()

    @abstractmethod
    def steps(self, grid: Grid) -> list[tuple[Shear, ...]]:
        """The shears of each step down `grid`; step k leads from level k to level k + 1.

        A two-step solver has one shear a step, of the states at the levels k - 1 and k; its first has
        the gain 0. A coupled solver has several, of (state, companion), and returns them in that order.
        """

    @abstractmethod
    def start(self, sigma: float, target: float) -> Shear:
        """The step, in either direction, of a run that has one state only. Not used if coupled."""

    def undo(self, run: Run, steps: Steps, pair: Pair) -> Pair:
        """The pair (a, b) from which `steps`, here in reverse, led to `pair`."""
        return run.walk(steps, pair[::-1], undo=True)[::-1]

    def encoding_error(self, grid: Grid) -> float | None:
        """Measured relative error of codes on `grid`, or None."""
        del grid
        return None

    @final
    def sample(
        self,
        denoiser: Denoiser,
        x: Tensor | State,
        sigmas: Sigmas,
        *,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callback | None = None,
        progress: bool = False,
        stop: int | None = None,
        differentiable: bool = False,
    ) -> Solution:
        """Goes down the grid, from noise to data.

        Args:
            denoiser: see `Denoiser`; any of k-diffusion's wrappers is one.
            x: floating point tensor ``(B, ...)`` at level ``sigmas[0]``, not modified; or the state
                of an earlier run, which is continued.
            sigmas: strictly decreasing noise levels, see `odesolvers.grids`.
            extra_args: keyword arguments for every call of the denoiser.
            callback: called once a step with k-diffusion's dictionary: ``i``, the number of the step;
                ``x``, the state at which the step first evaluates the denoiser; ``sigma`` and
                ``sigma_hat``, its level, ``sigmas[i]``; ``denoised``, the output. Read only.
            progress: show a progress bar (needs tqdm).
            stop: the level to stop at, an index into `sigmas`; the last by default.
            differentiable: record gradients, with memory for every call of the denoiser. By default
                the run is under `torch.no_grad`.

        Returns:
            The state at level `stop`, what is needed to continue or go back, and the evaluations spent.

        Raises:
            TypeError: if `x` or an output of the denoiser is not a floating point tensor.
            ValueError: if the grid, the state or an output of the denoiser has the wrong form, or the
                state comes from another grid or solver.
            FloatingPointError: if the state or an output of the denoiser is not finite; names the
                step and the noise level.
        """
        grid = Grid.of(sigmas)
        with torch.set_grad_enabled(differentiable):
            state, run, plan = self._begin(
                denoiser, x, grid, 0, extra_args, callback, differentiable
            )
            first, end = state.index, len(grid.levels) - 1
            stop = end if stop is None else stop
            if type(stop) is not int or not first < stop <= end:
                refuse_stop(stop, first, end)
            lone = self.states == 2 and state.partner is None
            steps = plan[first:stop]
            if lone and first > 0:
                steps[0] = first, (self.start(*grid.levels[first : first + 2]),)
            return self._finish(run, state, steps, run.walk, progress, first + lone, stop, stop)

    @final
    def invert(
        self,
        denoiser: Denoiser,
        x: Tensor | State,
        sigmas: Sigmas,
        *,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callback | None = None,
        progress: bool = False,
        stop: int | None = None,
        differentiable: bool = False,
    ) -> Solution:
        """Goes up the grid, from data to noise: the exact inverse of `sample`, unless `iterative`.

        From a state of `sample` every step is undone, by the same evaluations at the same states. A
        lone tensor has no neighbour; one step up by the underlying method supplies it, for its
        evaluations, and the run is exact from there on: `sample` from the returned state ends at that
        tensor, if it went up by more than one step. In a coupled solver a lone tensor is its own
        companion, for no evaluation.

        Args:
            denoiser: as for `sample`.
            x: the state of an earlier run, at any level; or a floating point tensor ``(B, ...)`` at
                level ``sigmas[-1]``, not modified.
            sigmas: the grid the state comes from, in the same decreasing order.
            extra_args: as for `sample`; the same values, if the run is to be undone.
            callback: as for `sample`; ``i`` falls. In a two-step solver ``i`` and ``sigma`` are
                those of the step that was evaluated at ``x``. A lone tensor's own step comes first;
                where it stands at level 0, ``sigma`` and ``denoised`` are those of the level above. In a
                coupled solver ``i`` is the step that is undone, and ``sigma`` may be ``sigmas[i + 1]``,
                for the last shear is undone first.
            progress: show a progress bar (needs tqdm).
            stop: the level to stop at, an index into `sigmas`; 0 by default.
            differentiable: as for `sample`.

        Returns:
            The state at level `stop`, what is needed to sample again, and the evaluations spent.

        Warns:
            InversionWarning: if the state this run came from is expected back only with a relative
                error above 0.01 in its dtype, or the code of a lone image is expected to be off by more
                than 0.3 of its size. See `stability_report`.

        Raises:
            TypeError, FloatingPointError: as for `sample`.
            ValueError: as for `sample`; and if a step on the way has the gain 0, which nothing undoes.
        """
        grid = Grid.of(sigmas)
        with torch.set_grad_enabled(differentiable):
            state, run, plan = self._begin(
                denoiser, x, grid, grid.steps, extra_args, callback, differentiable
            )
            last, stop = state.index, 0 if stop is None else stop
            if type(stop) is not int or not 0 <= stop < last:
                refuse_stop(stop, last, 0)
            lone = self.states == 2 and state.partner is None
            end = stop if self.coupled or self.states == 1 else stop + 1  # the lower of two levels
            steps = [(k, shears[::-1]) for k, shears in plan[end:last][::-1]]
            if not self.iterative:
                for k, shears in steps:
                    if 0.0 in [shear.gain for shear in shears]:
                        refuse_gain(self, grid, k)
                warn_before_inverting(self, plan, grid, state, stop, run.dtype)
            if lone:  # one step up supplies the neighbour
                steps.insert(0, (last, (self.start(grid.levels[last], grid.levels[last - 1]),)))
            run.check |= self.iterative

            def walk(steps: Steps, pair: Pair) -> Pair:
                steps = iter(steps)
                if lone:
                    pair = run.walk([next(steps)], pair)[::-1]
                return self.undo(run, steps, pair)

            return self._finish(run, state, steps, walk, progress, last, end, stop)

    def _begin(
        self,
        denoiser: Denoiser,
        x: Tensor | State,
        grid: Grid,
        index: int,
        extra_args: Mapping[str, Any] | None,
        callback: Callback | None,
        differentiable: bool,
    ) -> tuple[State, Run, Plan]:
        """The checked, stored state to start from, a run and the plan; a tensor stands at `index`."""
        arithmetic, partner, side = self.arithmetic, None, None
        if not callable(denoiser) or not (extra_args is None or isinstance(extra_args, Mapping)):
            refuse_call(denoiser, extra_args)
        if differentiable and arithmetic.exact:
            raise ValueError(
                f"a run in {arithmetic} has no gradient, for it rounds every state: use "
                "arithmetic=FloatingPoint() with differentiable=True"
            )
        classes: list[Any] = []
        name = expression(self, classes)
        if isinstance(x, State):
            check_origin(x, grid, self, name)
            current, partner, index, side = x.current, x.partner, x.index, x.side
        else:
            current = x
        if side is None:
            for tensor in (current,) if partner is None else (current, partner):
                if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                    refuse_start(tensor)
                if not (tensor.ndim and tensor.numel() and is_finite(tensor)):
                    refuse_start(tensor)
        dtype = current.dtype if side is None else side.dtype
        if current is x:
            current = current.clone()  # the caller may write to it later
        if arithmetic.exact:
            arithmetic.check(grid)
            if side is None:
                current = arithmetic.store(current)
                partner = None if partner is None else arithmetic.store(partner)
        if self.coupled and partner is None:
            partner = current
        state = State(current, partner, index, grid.levels, name, side, self.coupled)
        plan = once((name, *classes, grid.levels), lambda: planned(self, grid))
        args = dict(extra_args or {})
        run = Run(denoiser, arithmetic, grid, current, dtype, args, callback, self.coupled)
        return state, run, plan

    def _finish(
        self,
        run: Run,
        state: State,
        steps: Plan,
        walk: Callable[[Steps, Pair], Pair],
        progress: bool,
        origin: int,
        index: int,
        stop: int,
    ) -> Solution:
        """Walks `steps` from `state`; the solution at level `stop`, of a pair that stands at `index`."""
        start: Pair = (state.partner, state.current)
        if self.coupled:
            start = start[::-1]
        run.memory = self.arithmetic.open(state, origin, run.dtype)
        bar = progress_bar(steps, desc=type(self).__name__) if progress else steps
        a, b = walk(bar, start)
        if not (is_finite(a) and is_finite(b)):
            # What is not finite stays so: it is found at the end, and named by a second run.
            run.memory, run.check, run.callback = (
                self.arithmetic.open(state, origin, run.dtype),
                True,
                None,
            )
            a, b = walk(steps, start)
            raise FloatingPointError(
                "the run ended with a state that is not finite, and made again it did not: the "
                "denoiser does not return the same output for the same input"
                if is_finite(a) and is_finite(b)
                else f"the final state is not finite; {OVERFLOW}"
            )
        current, partner = (a, b) if self.coupled else (b, a if self.states == 2 else None)
        x, side = current if index == stop else partner, None
        assert current is not None
        assert x is not None
        if run.memory is None:
            x = x.clone()  # the caller may write to it
        else:
            side = self.arithmetic.close(run.memory, current, partner, index)
            x = self.arithmetic.load(x, run.dtype)
        state = State(current, partner, index, state.sigmas, state.solver, side, self.coupled)
        return Solution(x, state, run.nfe, tuple(run.convergence))


def planned(solver: Solver, grid: Grid) -> Plan:
    """The numbered steps of a solver.

    Raises:
        ValueError: if they are not as many as the grid has.
    """
    steps = solver.steps(grid)
    if len(steps) != grid.steps:
        raise ValueError(
            f"{solver}.steps must return one tuple of shears for each of the {grid.steps} steps of the "
            f"grid, got {len(steps)}"
        )
    return list(enumerate(steps))
