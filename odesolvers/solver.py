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
    check_call,
    check_gains,
    check_origin,
    check_tensor,
    checked_stop,
    is_finite,
)
from .formula import Shear
from .grids import Grid, Sigmas
from .progress import progress_bar
from .propagation import LinearRun
from .run import Callback, Denoiser, Pair, Run, Steps
from .settings import Settings, identity, once
from .state import Solution, State
from .trust import expected_error, warn_of_encoding, warn_of_round_trip


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
    def start(self, sigma: float, target: float) -> Shear:
        """The step, in either direction, of a run that has one state only. Not used if coupled."""

    @abstractmethod
    def steps(self, grid: Grid) -> list[tuple[Shear, ...]]:
        """The shears of each step down `grid`; step k leads from level k to level k + 1.

        A two-step solver has one shear a step, of the states at the levels k - 1 and k; its first has
        the gain 0. A coupled solver has several, of (state, companion), and returns them in that order.
        """

    def encoding_error(self, grid: Grid) -> float | None:
        """Measured relative error of codes on `grid`, or None."""
        del grid
        return None

    def undo(self, run: Run, steps: Steps, pair: Pair) -> Pair:
        """The pair (a, b) from which `steps`, here in reverse, led to `pair`."""
        return run.walk(steps, pair[::-1], undo=True)[::-1]

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
            state, run = self._begin(denoiser, x, grid, 0, extra_args, callback, differentiable)
            first, lone = state.index, state.partner is None and self.states == 2
            stop = checked_stop(stop, first, grid.steps)
            steps = [*enumerate(planned(self, grid))][first:stop]
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
            state, run = self._begin(
                denoiser, x, grid, grid.steps, extra_args, callback, differentiable
            )
            last, lone = state.index, state.partner is None and self.states == 2
            stop = checked_stop(stop, last, 0)
            end = stop if self.coupled or self.states == 1 else stop + 1  # of two levels the lower
            planned_ = planned(self, grid)
            steps = [(k, planned_[k][::-1]) for k in reversed(range(end, last))]
            if self.iterative:
                run.check = True
            else:
                check_gains(self, grid, steps)
                self._warn(grid, state, stop, run.dtype)

            def walk(steps: Steps, pair: Pair) -> Pair:
                steps = iter(steps)
                if lone:  # the first of them leads up and supplies the neighbour
                    pair = run.walk([next(steps)], pair)[::-1]
                return self.undo(run, steps, pair)

            if lone:
                steps.insert(0, (last, (self.start(grid.levels[last], grid.levels[last - 1]),)))
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
    ) -> tuple[State, Run]:
        """The checked and stored state to start from, and a run; a lone tensor stands at `index`."""
        check_call(denoiser, extra_args)
        self.arithmetic.check(grid)
        if differentiable and self.arithmetic.exact:
            raise ValueError(
                f"a run in {self.arithmetic} has no gradient, for it rounds every state: use "
                "arithmetic=FloatingPoint() with differentiable=True"
            )
        if isinstance(x, State):
            check_origin(x, grid, self)
            current, partner, index, side = x.current, x.partner, x.index, x.side
        else:
            check_tensor(x)
            current, partner, side = x.clone(), None, None  # the caller may write to x later
        dtype = current.dtype if side is None else side.dtype
        if side is None:
            for tensor in (current, partner):
                if tensor is not None:
                    check_tensor(tensor)
            current = self.arithmetic.store(current)
            partner = None if partner is None else self.arithmetic.store(partner)
        if self.coupled and partner is None:
            partner = current
        state = State(current, partner, index, grid.levels, repr(self), side, self.coupled)
        arguments = dict(extra_args or {})
        return state, Run(denoiser, self.arithmetic, grid, dtype, arguments, callback, self.coupled)

    def _finish(
        self,
        run: Run,
        state: State,
        steps: list[tuple[int, tuple[Shear, ...]]],
        walk: Callable[[Steps, Pair], Pair],
        progress: bool,
        origin: int,
        index: int,
        stop: int,
    ) -> Solution:
        """Walks `steps` from `state`; the solution at level `stop`, of a pair that stands at `index`."""
        start: Pair = (state.partner, state.current)[:: -1 if self.coupled else 1]
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
        assert current is not None
        stored = current if index == stop else partner
        assert stored is not None
        side = self.arithmetic.close(run.memory, current, partner, index)
        x = self.arithmetic.load(stored, run.dtype)
        x = x.clone() if x is stored else x  # the caller may write to it
        state = State(current, partner, index, state.sigmas, state.solver, side, self.coupled)
        return Solution(x, state, run.nfe, tuple(run.convergence))

    def linear(self, grid: Grid, last: int, data_std: float = 0.5) -> LinearRun:
        """The steps down to level `last` over Gaussian data, see `odesolvers.propagation`."""
        lone = None
        if self.states == 2 and not self.coupled:
            lone = self.start(grid.levels[last], grid.levels[last - 1])
        return LinearRun.of(planned(self, grid)[:last], grid, data_std, lone)

    def _warn(self, grid: Grid, state: State, stop: int, dtype: torch.dtype) -> None:
        """Warns before an inversion that is not expected to give what is hoped for, see `invert`."""
        last, steps = state.index, state.index - stop
        lone = state.partner is None or (self.coupled and state.partner is state.current)
        if not lone and self.arithmetic.exact:
            return
        whole = lone and steps == grid.steps
        error = self.encoding_error(grid) if whole else None
        if error is None:
            error = once(
                ("expected", identity(self), grid.levels, last, stop, lone),
                lambda: expected_error(self.linear(grid, last), last, stop, lone=lone),
            )
        if lone:
            warn_of_encoding(error, self, steps, coupled=self.coupled)
        else:
            warn_of_round_trip(error, self, steps, dtype)


def planned(solver: Solver, grid: Grid) -> list[tuple[Shear, ...]]:
    """``solver.steps(grid)``, worked out once for equal settings.

    Raises:
        ValueError: if they are not as many as the grid has.
    """
    steps = once((identity(solver), grid.levels), lambda: solver.steps(grid))
    if len(steps) != grid.steps:
        raise ValueError(
            f"{solver}.steps must return one tuple of shears for each of the {grid.steps} steps of the "
            f"grid, got {len(steps)}"
        )
    return steps
