"""The one loop: a pair of states, shear by shear, down the grid or up it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from .checks import (
    OVERFLOW,
    check_coefficients,
    check_differentiable,
    check_origin,
    check_output,
    check_same,
    check_start,
    is_finite,
    refuse_call,
    refuse_written,
    version,
)
from .formula import Call, Shear
from .grids import Grid, Sigmas, level_dtype
from .progress import progress_bar
from .propagation import Plan
from .settings import identity, once
from .state import Convergence, Solution, State
from .trust import expected_sampling_error

Pair: TypeAlias = "tuple[Tensor | None, Tensor]"
"""Two stored states: the far one, which a shear replaces, and the near one, at which it calls."""

Steps: TypeAlias = "Iterable[tuple[int, tuple[Shear, ...], bool]]"
"""Steps in the order of a run: number, shears, and whether they are undone."""

Callback: TypeAlias = Callable[[dict[str, Any]], object]

Differentiable: TypeAlias = "bool | Literal['reversible']"
"""Whether a run has a gradient; "reversible" by undoing it, see `odesolvers.gradients`."""


class Denoiser(Protocol):
    """``denoiser(x, sigma, **extra_args) -> E[x0 | x]``, the contract of k-diffusion's wrappers.

    `x` has shape ``(B, ...)``; `sigma` has shape ``(B,)``, is float64 where `x` is and float32
    otherwise, and lives on the device of `x`. The result has the shape, dtype and device of `x`, in
    storage that no later call of the same step writes to; `x` is left as it is.
    """

    def __call__(self, x: Tensor, sigma: Tensor, /, **extra_args: Any) -> Tensor: ...


@contextmanager
def modes(
    differentiable: object, *functions: Any, solver: Any = None, sigmas: object = None
) -> Iterator[list[Any]]:
    """The modes of torch in a run; yields `functions` put back in the caller's."""
    if differentiable is not False:
        check_differentiable(differentiable, solver, sigmas)
    if torch.is_inference_mode_enabled():
        functions = tuple(torch.inference_mode()(f) if callable(f) else f for f in functions)
    # What is made in inference mode has no version, by which a write to it would be noticed.
    with torch.inference_mode(False), torch.set_grad_enabled(differentiable is True):
        yield list(functions)


class Run:
    """One run of a solver: its state to start from, and the denoiser calls, checked and counted.

    States are never written to.

    Args:
        solver: for its arithmetic, its kind of pair, and its steps, worked out once for equal settings.
        denoiser, x, sigmas, extra_args, callback: see `Solver.sample`.
        index: the place on the grid of an `x` that is a tensor; None for the end, and a run up the grid.

    Attributes:
        grid: the noise levels.
        state: `x` as a checked and stored state.
        plan: the steps of the solver down the grid, numbered.
        sampling_error: the expected relative error of samples, see `stability_report`.
        dtype: that of the states that the denoiser sees.
        memory: the working memory of an exact arithmetic.
        nfe: denoiser calls so far.
        convergence: the outcomes of iterations so far.
        check: whether every output is checked for values that are not finite, at once.
    """

    def __init__(
        self,
        solver: Any,
        denoiser: Denoiser,
        x: Tensor | State | Solution,
        sigmas: Sigmas | None,
        index: int | None = 0,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callback | None = None,
    ) -> None:
        if not callable(denoiser) or not (extra_args is None or isinstance(extra_args, Mapping)):
            refuse_call(denoiser, extra_args)
        self.solver, self.arithmetic, self.denoiser = solver, solver.arithmetic, denoiser
        self.extra_args, self.callback = dict(extra_args or {}), callback
        self.up, self.exact = index is None, self.arithmetic.exact
        given: Any = x.state if isinstance(x, Solution) else x
        self.grid = Grid.of(sigmas, given.sigmas if isinstance(given, State) else None)
        self.name, *classes = identity(solver)
        self.state = self._stored(given, self.grid.steps if index is None else index)
        current = self.state.current
        self._level, self._batch = (
            current.new_empty(0, dtype=level_dtype(self.dtype)),
            current.shape[:1],
        )
        key = self.name, *classes, self.grid.levels, self._level.dtype
        self.plan, self.sampling_error = once(key, self._planned)
        self.memory: Any = None
        self.reached: tuple[int, Pair, tuple[int, int], Any]
        self.nfe, self.convergence, self.check = 0, list[Convergence](), self.exact
        self._twice, self._reported = self.arithmetic.check_determinism, -1
        self._last: tuple[Tensor, Call, Tensor, int] | None = None

    def _planned(self) -> tuple[Plan, float]:
        plan, dtype = self.solver.plan(self.grid), self._level.dtype
        check_coefficients(plan, self.grid, dtype)
        return plan, expected_sampling_error(self.solver, plan, self.grid, dtype)

    def _stored(self, x: Any, index: int) -> State:
        """`x` as a checked and stored state, in storage of its own: who has `x` may write to it."""
        current, partner, side = x, None, None
        if isinstance(x, State):
            check_origin(x, self.grid, self.solver, self.name)
            current, index, side = x.current, x.index, x.side
            partner = x.partner if self.solver.states == 2 else None
        if self.exact:
            self.arithmetic.check(self.grid)
        if side is None:
            own = check_start(current).clone()
            self.dtype, own = own.dtype, self.arithmetic.store(own) if self.exact else own
            if partner is not None and partner is not current:
                partner = self.arithmetic.store(check_start(partner).clone())
            current, partner = own, own if partner is current else partner
        else:
            self.dtype = side.dtype
        if self.solver.coupled and partner is None:
            partner = current
        sigmas: Any = self.grid  # checked
        return State(current, partner, index, sigmas, self.name, side, self.solver.coupled)

    def finish(
        self,
        steps: Sequence[tuple[int, tuple[Shear, ...], bool]],
        walk: Callable[[Steps, Pair], Pair],
        progress: bool,
        origin: int,
        stop: int,
    ) -> Solution:
        """Walks `steps` from the state; the solution at level `stop`.

        `origin` is the index of the first pair of the run, see `Arithmetic.open`.
        """
        bar = progress_bar(steps, desc=type(self.solver).__name__) if progress else steps
        if not self._through(walk, bar, origin):
            # What is not finite stays so: it is found at the end, and named by a second run.
            self.check, self.callback = True, None
            raise FloatingPointError(
                "the run ended with a state that is not finite, and made again it did not: the "
                "denoiser does not return the same output for the same input"
                if self._through(walk, steps, origin)
                else f"the final state is not finite; {OVERFLOW}"
            )
        state = self._state()
        x = state.current if state.index == stop else state.partner
        assert x is not None
        # The caller may write to it.
        x = x.clone() if state.side is None else self.arithmetic.load(x, self.dtype)
        return Solution(x, state, self.nfe, tuple(self.convergence))

    def _through(self, walk: Callable[[Steps, Pair], Pair], steps: Steps, origin: int) -> bool:
        """Whether `steps` lead to a finite pair; an exception carries the last whole state."""
        state = self.state
        self.memory = self.arithmetic.open(state, origin, self.dtype) if self.exact else None
        self.reach(state.index, self.turned(state.current, state.partner))
        try:
            pair = walk(steps, self.reached[1])
            self.reached = self.reached[0], pair, *self.reached[2:]
            return all(map(is_finite, pair))  # waits
        except BaseException as error:
            with suppress(Exception):
                index, pair, versions, _ = self.reached
                if versions == _versions(*pair) and all(map(is_finite, pair)):
                    error.state = self._state()  # type: ignore[attr-defined]
                    if index != state.index and hasattr(error, "add_note"):
                        error.add_note(
                            f"error.state is the state at level {index} of the grid, from which the "
                            "run can go on: pass it in place of x"
                        )
            raise

    def reach(self, index: int, pair: Pair) -> None:
        """Notes that a step is done: `pair` stands at `index`."""
        self.reached = index, pair, _versions(*pair), copy(self.memory) if self.exact else None

    def turned(self, one: Any, other: Any) -> Any:
        """The current state and its partner as the far and the near one of the walk, or back."""
        straight = self.up != self.solver.coupled and one is not None and other is not None
        return (one, other) if straight else (other, one)

    def _state(self) -> State:
        """The pair that was reached, as it is given to the caller."""
        index, (far, near), _, memory = self.reached
        if not torch.is_grad_enabled():  # a denoiser may have asked for a gradient
            far = far.detach() if far is not None and far.requires_grad else far
            near = near.detach() if near.requires_grad else near
        current, partner = self.turned(far, near) if self.solver.states == 2 else (near, None)
        side = None
        if self.exact and partner is None:
            current = self.arithmetic.load(current, self.dtype)
        elif self.exact:
            side = self.arithmetic.close(memory, current, partner, index)
        sigmas: Any = self.grid  # checked
        return State(current, partner, index, sigmas, self.name, side, self.solver.coupled)

    def walk(self, steps: Steps, pair: Pair) -> Pair:
        """The pair (far, near) that `steps` lead to.

        A shear maps (a, b) to (b, c) with c = gain · a + rest(b), where b is the near state. To undo it,
        from (c, b) to (b, a), the denoiser is called at b as well.
        """
        far, near = pair
        for k, shears, undo in steps:
            apply: Any = self.arithmetic.inverse if undo else self.arithmetic.forward
            for shear in shears:
                if shear.exchanges:
                    assert far is not None
                    far, near = near, far
                    continue
                rest = self.rest(shear, near, k, far=far if shear.gain else None)
                new = apply(shear.gain, far, rest, self.memory)
                if new.dtype is not near.dtype:  # half precision is summed in float32
                    new = new.to(near.dtype)
                far, near = near, new
            self.reach(k + (not self.up), (far, near))
        return far, near

    def rest(
        self,
        shear: Shear,
        stored: Tensor,
        k: int,
        x: Tensor | None = None,
        far: Tensor | None = None,
    ) -> Tensor:
        """``rest(b)`` for the stored state b, in new storage; `k` is the number of the step.

        `x` is b as the denoiser sees it, where a gradient with respect to it is wanted; `far` is the
        state a, which must be left as it is too.

        Raises:
            TypeError, ValueError, FloatingPointError: for an output of the denoiser that cannot be
                used, naming the noise level, and what to do.
        """
        if self.memory is not None:
            self.memory.sigma = self.grid.levels[k]
        before = _versions(far, stored)
        last, self._last = self._last if x is None else None, None  # a graph is used once
        if x is None:
            x = self.arithmetic.load(stored, self.dtype) if self.exact else stored
        values, versions, own = [x], list[int](), version(x)
        if last is not None and shear.calls and last[0] is stored and last[1] == shear.calls[0]:
            values.append(last[2])
            versions.append(last[3])
        del last  # an output less while the next is made
        for point, sigma in shear.calls[len(values) - 1 :]:
            y = x if point.terms == {0: 1.0} else point.of(values).to(x.dtype)
            left = version(y)
            level = self._level.new_full(self._batch, sigma)
            output = self.denoiser(y, level, **self.extra_args)
            self.nfe += 1
            check_output(output, y, left, values[1:], sigma, k, finite=self.check)
            if self._twice:  # of the first shear that calls at all
                first, self.nfe = output.clone(), self.nfe + 1
                check_same(first, self.denoiser(y, level, **self.extra_args), sigma, k)
            if output.is_inference() and len(shear.calls) > 1:
                output = output.clone()  # what the denoiser writes to later is not this
            values.append(output)
            versions.append(_version(output))
        if len(values) > 2 and list(map(_version, values[1:])) != versions:
            refuse_written("output", self.grid.levels[k], k)
        if before != _versions(far, stored) or own != version(x):
            refuse_written("input", self.grid.levels[k], k)
        if len(values) > 1:
            self._twice = False
            if self.solver.coupled:  # the next shear may call at the same point and level
                self._last = stored, shear.calls[0], values[1], versions[0]
            if self.callback is not None and k != self._reported:
                self._reported = k
                self._report(shear.calls[0], values, k)
        return shear.rest.of(values)

    def _report(self, call: Call, values: list[Tensor], k: int) -> None:
        """Calls the callback with copies, to which it may write."""
        assert self.callback is not None
        sigma = self._level.new_full((), call.sigma)
        x = values[0].clone() if call.point.terms == {0: 1.0} else call.point.of(values)
        shown = {"x": x.to(values[0].dtype), "denoised": values[1].clone()}
        self.callback({**shown, "i": k, "sigma": sigma, "sigma_hat": sigma.clone()})


def _versions(far: Tensor | None, near: Tensor) -> tuple[int, int]:
    """Numbers that a write to one of a pair changes."""
    return -1 if far is None else version(far), version(near)


def _version(output: Tensor) -> int:
    """A number that a write changes; -1 where others change it too, or none does."""
    base = output._base
    part = base is not None and base.numel() > output.numel()
    return -1 if part or output.is_inference() else output._version
