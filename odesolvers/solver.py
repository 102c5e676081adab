"""The public face of every solver: `sample`, and for some `invert`."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, TypeAlias, final

import torch
from torch import Tensor

from .arithmetic import Arithmetic, FloatingPoint
from .execution import Execution
from .grids import Grid, Sigmas
from .integrate import Pair, Run, ascend, descend
from .route import Steps
from .state import Convergence, Solution, State
from .step import Step
from .trust import InversionWarning


class Denoiser(Protocol):
    """``denoiser(x, sigma, **extra_args) -> E[x0 | x]``, the contract of k-diffusion's wrappers.

    `x` has shape ``(B, ...)``; `sigma` has shape ``(B,)``, is float64 where `x` is and float32
    otherwise, and lives on the device of `x`. The result has the shape, dtype and device of `x`, in
    storage that no later call of the same step writes to; `x` and `sigma` are left as they are. A
    denoiser that keeps `x` beyond the call keeps a copy: the run writes to it later.
    """

    def __call__(self, x: Tensor, sigma: Tensor, /, **extra_args: Any) -> Tensor: ...


Callback: TypeAlias = Callable[[dict[str, Any]], object]


class Solver(ABC):
    """Walks a state down a grid of noise levels.

    A solver holds settings only and is never changed by a run: the same object serves any number of
    runs, grids and threads.

    Attributes:
        states: how many states a run carries from step to step, 1 or 2.
        coupled: of two, whether both stand at the same level, see `CoupledSolver`; else they are
            neighbours on the grid.
    """

    states: ClassVar[int] = 2
    coupled: ClassVar[bool] = False

    def __repr__(self) -> str:
        """By which a state knows its solver: the class and its settings, of dataclasses or not."""
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"

    @property
    def arithmetic(self) -> Arithmetic:
        """How states are stored and combined."""
        return FloatingPoint()

    @property
    def stacks(self) -> bool:
        """Whether evaluations that do not need each other's outputs are made in one call."""
        return False

    @property
    def two_step(self) -> bool:
        """Whether a run carries the states at two neighbouring levels."""
        return self.states == 2 and not self.coupled

    def known_encoding_error(self, grid: Grid) -> float | None:
        """What is known by measurement of the relative error of codes on `grid`; None for nothing."""
        del grid
        return None

    @abstractmethod
    def start(self, sigma: float, target: float) -> Step:
        """The step, in either direction, of a run that has one state only."""

    @abstractmethod
    def steps(self, grid: Grid) -> list[tuple[Step, ...]]:
        """All steps down `grid`, as their stages; step k leads from level k to level k + 1.

        A stage maps a pair of states ``(a, b) -> (b, gain · a + rest(b))``. A two-step solver has one
        stage a step, on the states at the levels k - 1 and k. A coupled solver has several, on
        (state, companion), and returns them in that order.
        """

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
        execution: Execution | None = None,
    ) -> Solution:
        """Go down the grid, from noise to data.

        Args:
            denoiser: see `Denoiser`; any of k-diffusion's wrappers is one.
            x: floating point tensor ``(B, ...)`` at level ``sigmas[0]``, not modified; or the state
                of an earlier run, which is continued from where it stands.
            sigmas: strictly decreasing noise levels, see `odesolvers.grids`.
            extra_args: keyword arguments for every call of the denoiser.
            callback: called once a step with k-diffusion's dictionary: ``i``, the number of the step;
                ``x``, the state that the step first evaluates the denoiser at; ``sigma`` and
                ``sigma_hat``, the level of that, ``sigmas[i]``; ``denoised``, the output. Not to be
                written to.
            progress: show a progress bar (needs tqdm).
            stop: the level to stop at, an index into `sigmas`; the last by default.
            differentiable: record gradients, of all that the run does, with memory for every call of
                the denoiser. By default it runs under `torch.no_grad`.
            execution: record the whole run, and replay it when it comes again with other tensors:
                `CUDAGraph` or `Compiled`. By default the denoiser is called step by step.

        Returns:
            The state at level `stop`, what is needed to go on or back, and the evaluations spent.

        Raises:
            TypeError: if `x` or an output of the denoiser is not a floating point tensor.
            ValueError: if the grid, the state or an output of the denoiser has the wrong form, or the
                state comes from another grid or solver.
            FloatingPointError: if the state or an output of the denoiser is not finite; names the
                step and the noise level.
        """
        grid = Grid.of(sigmas)
        run = Run(self, denoiser, grid, extra_args, callback, progress, differentiable, execution)
        with torch.set_grad_enabled(differentiable):
            return descend(run, run.state(x, index=0), grid.steps if stop is None else stop)


class InvertibleSolver(Solver):
    """A solver whose steps can be undone, wherever their gains are not 0.

    Attributes:
        exact: whether that is by algebra, by the same evaluations at the same states.
    """

    exact: ClassVar[bool] = True

    def undo(self, run: Run, steps: Steps, pair: Pair) -> Pair:
        """The pair that a run came from; `steps` are its steps and their stages, the last first."""
        older, newer = pair
        assert older is not None
        newer, older = run.take(steps, newer, older, undo=True)
        return older, newer

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
        execution: Execution | None = None,
    ) -> Solution:
        """Go up the grid, from data to noise: the exact inverse of `sample`, if `exact`.

        From a state of `sample` every step is undone, by the same evaluations at the same states. A
        lone tensor has no neighbour to go back with; one step up by the underlying method supplies it,
        for its evaluations, and the run is exact from there on: `sample` from the returned state ends
        at that tensor, if it went up by more than one step. In a coupled solver a lone tensor is its
        own companion, for no evaluation.

        Args:
            denoiser: as for `sample`.
            x: the state of an earlier run, in any place; or a floating point tensor ``(B, ...)`` at
                level ``sigmas[-1]``, not modified.
            sigmas: the grid the state comes from, in the same decreasing order.
            extra_args: as for `sample`; the same values, if the run is to be undone.
            callback: as for `sample`; ``i`` falls. In a two-step solver ``i`` and ``sigma`` are
                those of the step that was evaluated at ``x``. A lone tensor's own step comes first;
                where it stands at level 0, ``sigma`` and ``denoised`` are those of the level above. In a
                coupled solver ``i`` is the step that is undone, and ``sigma`` may be ``sigmas[i + 1]``,
                for the last stage is undone first.
            progress: show a progress bar (needs tqdm).
            stop: the level to stop at, an index into `sigmas`; 0 by default.
            differentiable: as for `sample`.
            execution: as for `sample`.

        Returns:
            The state at level `stop`, what is needed to sample again, and the evaluations spent.

        Warns:
            InversionWarning: where the state this run came from is expected back only with a relative
                error above 0.01 in its dtype, or the code of a lone image is expected to be off by more
                than 0.3 of its size. See `stability_report`.

        Raises:
            TypeError, FloatingPointError: as for `sample`.
            ValueError: as for `sample`; and if a step in the way has the gain 0, which no solver can
                undo.
        """
        grid = Grid.of(sigmas)
        run = Run(self, denoiser, grid, extra_args, callback, progress, differentiable, execution)
        with torch.set_grad_enabled(differentiable):
            start = run.state(x, index=grid.steps)
            solution = ascend(run, self, start, 0 if stop is None else stop)
        levels = [grid.levels[start.index - 1 - i] for i in range(len(solution.convergence))]
        _warn_unless_converged(levels, solution.convergence)
        return solution


class CoupledSolver(InvertibleSolver):
    """A solver that takes two states down the grid together, each updated with the help of the other.

    The pair is (state, companion), both at one level, and begins as the same tensor twice: a run from
    a lone tensor, at either end, costs no evaluation to start. What is sampled is the first of them.
    """

    coupled: ClassVar[bool] = True

    @final
    def start(self, sigma: float, target: float) -> Step:
        """Not used: a lone state is its own companion, and every step is one of `steps`."""
        raise TypeError(
            f"{self} begins with two copies of a lone state, not with a step of its own"
        )


def _warn_unless_converged(levels: list[float], outcomes: tuple[Convergence, ...]) -> None:
    failed = [
        (float(outcome.residual.max()), sigma)
        for sigma, outcome in zip(levels, outcomes, strict=True)
        if not bool(outcome.converged.all())
    ]
    if failed:
        worst, sigma = max(failed)
        warnings.warn(
            f"{len(failed)} of {len(outcomes)} steps were not undone to the tolerance; the worst is "
            f"that from sigma = {sigma:.6g}, with a relative residual of {worst:.3g}: take shorter "
            "steps, more iterations, or a solver that is exact; see solution.convergence",
            InversionWarning,
            stacklevel=3,
        )
