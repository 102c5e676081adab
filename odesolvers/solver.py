"""The public face of every solver: `sample` and `invert`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, final

from torch import Tensor

from .arithmetic import Arithmetic, FloatingPoint
from .checks import refuse_gain, refuse_stop
from .formula import Shear
from .gradients import attach, check_undoable
from .grids import Grid, Sigmas
from .propagation import Plan
from .run import Callback, Denoiser, Differentiable, Pair, Run, Steps, modes
from .settings import Settings
from .state import Solution, State
from .trust import SAMPLING_LIMIT, warn_before_inverting, warn_of_samples
from .values import count


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
        """The pair that `steps` up the grid lead to; notes each finished step by `run.reach`."""
        return run.walk(steps, pair)

    def encoding_error(self, grid: Grid) -> float | None:
        """Measured relative error of codes on `grid`, or None."""
        del grid
        return None

    @final
    def sample(
        self,
        denoiser: Denoiser,
        x: Tensor | State | Solution,
        sigmas: Sigmas | None = None,
        *,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callback | None = None,
        progress: bool = False,
        stop: int | None = None,
        differentiable: Differentiable = False,
    ) -> Solution:
        """Goes down the grid, from noise to data.

        Args:
            denoiser: see `Denoiser`; any of k-diffusion's wrappers is one.
            x: floating point tensor ``(B, ...)`` at level ``sigmas[0]``, not modified; or the state
                of an earlier run, or its solution, which is continued.
            sigmas: strictly decreasing noise levels, see `odesolvers.grids`. A state has its own, and
                they may be left out; a copy of them in float32 stands for them.
            extra_args: keyword arguments for every call of the denoiser.
            callback: called once a step with k-diffusion's dictionary: ``i``, the number of the step;
                ``x``, the state at which the step first evaluates the denoiser; ``sigma`` and
                ``sigma_hat``, its level, ``sigmas[i]``; ``denoised``, the output. All are copies.
            progress: show a progress bar (needs tqdm).
            stop: the level to stop at, an index into `sigmas`; the last by default.
            differentiable: True to record gradients, with memory for every call of the denoiser;
                "reversible" for the memory of one call, by a backward pass that undoes the run with as
                many calls again: of first order, with respect to `x`, tensors in `extra_args` and the
                parameters of the denoiser's networks. By default the run is under `torch.no_grad`.

        Returns:
            The state at level `stop`, what is needed to continue or go back, and the evaluations spent.

        Warns:
            StabilityWarning: if samples are expected to be off by more than the size of the data,
                because the solver amplifies its truncation errors on this grid. See `stability_report`.

        Raises:
            TypeError: if `x` or an output of the denoiser is not a floating point tensor.
            ValueError: if the grid, the state or an output of the denoiser has the wrong form, or the
                state comes from another grid or solver.
            FloatingPointError: if the state or an output of the denoiser is not finite; names the
                step and the noise level.

        An exception of any kind on the way, an interrupt by the keyboard too, has the last whole state
        in its attribute ``state``, from which the run goes on to the same bits. It has none if the
        denoiser wrote to that state, or it is not finite.
        """
        reversible = differentiable == "reversible"
        within = modes(differentiable, denoiser, callback, solver=self, sigmas=sigmas)
        with within as (denoiser, callback):
            run = Run(self, denoiser, x, sigmas, 0, extra_args, callback)
            levels, first, end = run.grid.levels, run.state.index, len(run.plan)
            stop = end if stop is None else count("stop", stop)
            nearest = first + isinstance(x, Tensor)  # a state may stay where it is
            if not nearest <= stop <= end:
                refuse_stop(stop, nearest, end)
            if stop == end and not run.sampling_error <= SAMPLING_LIMIT:
                warn_of_samples(self, run.sampling_error, end)
            lone = self.states == 2 and run.state.partner is None
            steps = [(k, shears, False) for k, shears in run.plan[first:stop]]
            if lone and 0 < first < stop:
                steps[0] = first, (self.start(levels[first], levels[first + 1]),), False
            if reversible:
                check_undoable(run, steps, x)
            solution = run.finish(steps, run.walk, progress, first + lone, stop)
            return attach(run, steps, solution, x, stop) if reversible else solution

    @final
    def invert(
        self,
        denoiser: Denoiser,
        x: Tensor | State | Solution,
        sigmas: Sigmas | None = None,
        *,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callback | None = None,
        progress: bool = False,
        stop: int | None = None,
        differentiable: Differentiable = False,
    ) -> Solution:
        """Goes up the grid, from data to noise: the exact inverse of `sample`, unless `iterative`.

        From a state of `sample` every step is undone, by the same evaluations at the same states. A
        lone tensor has no neighbour; one step up by the underlying method supplies it, for its
        evaluations, and the run is exact from there on: `sample` from the returned state ends at that
        tensor. In a coupled solver a lone tensor is its own companion, for no evaluation.

        Args:
            denoiser: as for `sample`; if a run is to be undone the same one, with the same weights and
                settings such as a guidance scale: a state records none of them.
            x: the state of an earlier run, at any level, or its solution; or a floating point tensor
                ``(B, ...)`` at level ``sigmas[-1]``, not modified.
            sigmas: the grid the state comes from, in the same decreasing order; as for `sample`.
            extra_args: as for `sample`; the same values, if the run is to be undone.
            callback: as for `sample`; ``i`` falls. In a two-step solver ``i`` and ``sigma`` are
                those of the step that was evaluated at ``x``. A lone tensor's own step comes first;
                where it stands at level 0, ``sigma`` and ``denoised`` are those of the level above. In a
                coupled solver ``i`` is the step that is undone, and ``sigma`` may be ``sigmas[i + 1]``,
                for the last shear is undone first.
            progress: as for `sample`.
            stop: the level to stop at, an index into `sigmas`; 0 by default.
            differentiable: as for `sample`.

        Returns:
            The state at level `stop`, what is needed to sample again, and the evaluations spent.

        Warns:
            InversionWarning: if the state this run came from is expected back only with a relative
                error above 0.01 in its dtype, or the code of a lone image is expected to be off by more
                than 0.3 of its size. See `stability_report`.

        Raises:
            TypeError, FloatingPointError, ValueError: as for `sample`; a ValueError too if a step on the
                way has the gain 0, which nothing undoes.
        """
        reversible = differentiable == "reversible"
        within = modes(differentiable, denoiser, callback, solver=self, sigmas=sigmas)
        with within as (denoiser, callback):
            run = Run(self, denoiser, x, sigmas, None, extra_args, callback)
            levels, last = run.grid.levels, run.state.index
            stop = 0 if stop is None else count("stop", stop)
            nearest = last - isinstance(x, Tensor)
            if not 0 <= stop <= nearest:
                refuse_stop(stop, nearest, 0)
            lone = self.states == 2 and run.state.partner is None
            end = stop if self.coupled or self.states == 1 else stop + 1  # the lower of two levels
            undone = run.plan[end:last][::-1]
            if not self.iterative:
                for k, shears in undone:
                    if 0.0 in [shear.gain for shear in shears]:
                        refuse_gain(self, run.grid, k)
                warn_before_inverting(self, run.plan, run.grid, run.state, stop, run.dtype)
            steps = [(k, shears[::-1], True) for k, shears in undone]
            if lone and stop < last:  # one step up supplies the neighbour
                steps.insert(0, (last, (self.start(levels[last], levels[last - 1]),), False))
            if reversible:
                check_undoable(run, steps, x)
            run.check |= self.iterative
            solution = run.finish(steps, partial(self.undo, run), progress, last, stop)
            return attach(run, steps, solution, x, stop) if reversible else solution

    @final
    def plan(self, grid: Grid) -> Plan:
        """The numbered steps.

        Raises:
            ValueError: if they are not as many as the grid has.
        """
        steps = self.steps(grid)
        if len(steps) != grid.steps:
            raise ValueError(
                f"{self}.steps must return one tuple of shears for each of the {grid.steps} steps of "
                f"the grid, got {len(steps)}"
            )
        return list(enumerate(steps))
