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

Pair: TypeAlias = "tuple[Tensor | None, Tensor | None]"
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
def modes(differentiable: object, *functions: Any) -> Iterator[list[Any]]:
    """The modes of torch in a run; yields `functions` put back in the caller's."""
    if differentiable is not False:
        check_differentiable(differentiable)
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
        denoiser, x, sigmas, extra_args, callback, differentiable: see `Solver.sample`.
        index: the place on the grid of an `x` that is a tensor.

    Attributes:
        grid: the noise levels.
        state: `x` as a checked and stored state.
        plan: the steps of the solver down the grid, numbered.
        sampling_error: the expected relative error of samples, see `stability_report`.
        dtype: that of the states that the denoiser sees.
        nfe: denoiser calls so far.
        convergence: the outcomes of iterations so far.
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
        differentiable: Differentiable = False,
    ) -> None:
        if not callable(denoiser) or not (extra_args is None or isinstance(extra_args, Mapping)):
            refuse_call(denoiser, extra_args)
        self.solver, self.arithmetic, self.denoiser = solver, solver.arithmetic, denoiser
        self.extra_args, self.callback = dict(extra_args or {}), callback
        if isinstance(x, Solution):
            x = x.state
        self.grid, self.up = _grid(x, sigmas), index is None
        if differentiable is True and self.arithmetic.exact:
            raise ValueError(
                f"autograd has no gradient of a run in {self.arithmetic}, which rounds every state: use "
                "differentiable='reversible', or arithmetic=FloatingPoint()"
            )
        if differentiable == "reversible" and solver.states == 1:
            raise ValueError(
                f"differentiable='reversible' undoes the run, and {solver} has no exact inverse: use "
                "BDIA over its method, or record every call with differentiable=True"
            )
        self.name, *classes = identity(solver)
        self.state, self.dtype = self._stored(
            x, len(self.grid.levels) - 1 if index is None else index
        )
        dtype = level_dtype(self.dtype)
        key = self.name, *classes, self.grid.levels, dtype

        def planned() -> tuple[Plan, float]:
            plan = solver.plan(self.grid)
            check_coefficients(plan, self.grid, dtype)
            return plan, expected_sampling_error(solver, plan, self.grid, dtype)

        self.plan, self.sampling_error = once(key, planned)
        self._levels = self.state.current.new_empty(0, dtype=dtype)
        self._twice = self.arithmetic.check_determinism
        self._last: tuple[Tensor, Call, Tensor, int] | None = None
        self._reported = -1
        self.memory: Any = None
        self.nfe, self.convergence = 0, list[Convergence]()
        self.check = self.arithmetic.exact
        """Whether every output is checked for values that are not finite, at once."""

    def _stored(self, x: Tensor | State, index: int) -> tuple[State, torch.dtype]:
        """`x` as a checked and stored state, and the dtype of its values."""
        current: Any = x
        partner, side = None, None
        if isinstance(x, State):
            check_origin(x, self.grid, self.solver, self.name)
            current, partner, index, side = x.current, x.partner, x.index, x.side
        if self.solver.states == 1:
            partner = None
        if self.arithmetic.exact:
            self.arithmetic.check(self.grid)
        if side is None:  # in storage of its own: the caller, or the denoiser, may write to `x`
            given = (current,) if partner is None else (current, partner)
            kept = {id(x): self.arithmetic.store(check_start(x).clone()) for x in given}
            dtype, current, partner = current.dtype, kept[id(current)], kept.get(id(partner))
        else:
            dtype = side.dtype
        if self.solver.coupled and partner is None:
            partner = current
        args = self.grid.levels, self.name, side, self.solver.coupled
        return State(current, partner, index, *args), dtype

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
        index, pair, finite = self._through(walk, bar, origin)
        if not finite:
            # What is not finite stays so: it is found at the end, and named by a second run.
            self.check, self.callback = True, None
            *_, finite = self._through(walk, steps, origin)
            raise FloatingPointError(
                "the run ended with a state that is not finite, and made again it did not: the "
                "denoiser does not return the same output for the same input"
                if finite
                else f"the final state is not finite; {OVERFLOW}"
            )
        state = self._state(index, pair, self.memory)
        x = state.current if index == stop else state.partner
        assert x is not None
        # The caller may write to it.
        x = x.clone() if state.side is None else self.arithmetic.load(x, self.dtype)
        return Solution(x, state, self.nfe, tuple(self.convergence))

    def _through(
        self, walk: Callable[[Steps, Pair], Pair], steps: Steps, origin: int
    ) -> tuple[int, Pair, bool]:
        """The index and the pair that `steps` lead to, and whether it is finite.

        An exception on the way carries the last whole state.
        """
        state, exact = self.state, self.arithmetic.exact
        self.memory = self.arithmetic.open(state, origin, self.dtype) if exact else None
        start = self.turned(state.current, state.partner)
        self.reach(state.index, start)
        try:
            pair = walk(steps, start)
            return self._reached[0], pair, all(map(is_finite, pair))  # waits
        except BaseException as error:
            with suppress(Exception):
                index, pair, versions, memory = self._reached
                same = versions == [x._version for x in pair if x is not None]
                if same and all(map(is_finite, pair)):
                    error.state = self._state(index, pair, memory)  # type: ignore[attr-defined]
                    if index != state.index and hasattr(error, "add_note"):
                        error.add_note(
                            f"error.state is the state at level {index} of the grid, from which the "
                            "run can go on: pass it in place of x"
                        )
            raise

    def reach(self, index: int, pair: Pair) -> None:
        """Notes that a step is done: `pair` stands at `index`."""
        self._reached = index, pair, [x._version for x in pair if x is not None], copy(self.memory)

    def turned(self, one: Any, other: Any) -> Any:
        """The current state and its partner as the far and the near one of the walk, or back."""
        straight = self.up != self.solver.coupled and one is not None and other is not None
        return (one, other) if straight else (other, one)

    def _state(self, index: int, pair: Pair, memory: Any) -> State:
        """The pair at `index`, as it is given to the caller."""
        if not torch.is_grad_enabled():  # a denoiser may have asked for a gradient
            a, b = (x.detach() if x is not None and x.requires_grad else x for x in pair)
            pair = a, b
        current, partner = self.turned(*pair)
        if self.solver.states == 1:
            current, partner = pair[1], None
        side = None
        if memory is not None and partner is None:
            current = self.arithmetic.load(current, self.dtype)
        elif memory is not None:
            side = self.arithmetic.close(memory, current, partner, index)
        return State(
            current, partner, index, self.grid.levels, self.name, side, self.solver.coupled
        )

    def walk(self, steps: Steps, pair: Pair) -> Pair:
        """The pair (far, near) that `steps` lead to."""
        for k, shears, undo in steps:
            pair = self.step(k, shears, pair, undo)
            self.reach(k + (not self.up), pair)
        return pair

    def step(self, k: int, shears: tuple[Shear, ...], pair: Pair, undo: bool = False) -> Pair:
        """`walk` of the one step `k`.

        A shear maps (a, b) to (b, c) with c = gain · a + rest(b), where b is the near state. To undo it,
        from (c, b) to (b, a), the denoiser is called at b as well.
        """
        apply: Any = self.arithmetic.inverse if undo else self.arithmetic.forward
        far, near = pair
        assert near is not None
        for shear in shears:
            if shear.exchanges:
                far, near = near, far
            else:
                used = [near] if far is None or not shear.gain else [near, far]
                before = [x._version for x in used]
                rest = self.rest(shear, near, k)
                if before != [x._version for x in used]:
                    refuse_written("input", self.grid.levels[k], k)
                new = apply(shear.gain, far, rest, self.memory)
                if new.dtype is not near.dtype:  # half precision is summed in float32
                    new = new.to(near.dtype)
                far, near = near, new
        return far, near

    def rest(self, shear: Shear, stored: Tensor, k: int, x: Tensor | None = None) -> Tensor:
        """``rest(b)`` for the stored state b, in new storage; `k` is the number of the step.

        `x` is b as the denoiser sees it, where a gradient with respect to it is wanted.

        Raises:
            TypeError, ValueError, FloatingPointError: for an output of the denoiser that cannot be
                used, naming the noise level, and what to do.
        """
        if self.memory is not None:
            self.memory.sigma = self.grid.levels[k]
        last, self._last = self._last if x is None else None, None  # a graph is used once
        x = self.arithmetic.load(stored, self.dtype) if x is None else x
        values, versions = [x], list[int]()
        if last is not None and shear.calls and last[0] is stored and last[1] == shear.calls[0]:
            values.append(last[2])
            versions.append(last[3])
        del last  # an output less while the next is made
        for point, sigma in shear.calls[len(values) - 1 :]:
            y = x if point.terms == {0: 1.0} else point.of(values).to(x.dtype)
            before = version(y)
            level = self._levels.new_full(x.shape[:1], sigma)
            output = self.denoiser(y, level, **self.extra_args)
            self.nfe += 1
            check_output(output, y, before, values[1:], sigma, k, finite=self.check)
            if self._twice:  # of the first shear that calls at all
                first, self.nfe = output.clone(), self.nfe + 1
                check_same(first, self.denoiser(y, level, **self.extra_args), sigma, k)
            if output.is_inference() and len(shear.calls) > 1:
                output = output.clone()  # what the denoiser writes to later is not this
            values.append(output)
            versions.append(_version(output))
        if len(values) > 2 and [_version(value) for value in values[1:]] != versions:
            refuse_written("output", self.grid.levels[k], k)
        if len(values) > 1:
            self._twice = False
            if self.solver.coupled:  # the next shear may call at the same point and level
                self._last = stored, shear.calls[0], values[1], versions[0]
            if self.callback is not None and k != self._reported:
                point, sigma = shear.calls[0]
                self._reported, level = k, self._levels.new_full((), sigma)
                y = x.clone() if point.terms == {0: 1.0} else point.of(values).to(x.dtype)
                shown = {"x": y, "denoised": values[1].clone()}  # it may write to them
                self.callback({**shown, "i": k, "sigma": level, "sigma_hat": level.clone()})
        return shear.rest.of(values)


def _version(output: Tensor) -> int:
    """A number that a write changes; -1 where others change it too, or none does."""
    base = output._base
    part = base is not None and base.numel() > output.numel()
    return -1 if part or output.is_inference() else output._version


def _grid(x: object, sigmas: Sigmas | None) -> Grid:
    """The grid of a run; a state's own, where `sigmas` is left out or is a float32 copy of it."""
    own = Grid(x.sigmas) if isinstance(x, State) else None
    grid = own if sigmas is None else Grid.of(sigmas)
    if grid is None:
        raise TypeError("sigmas, the grid of noise levels, is needed: only a State has its own")
    if own is not None and len(own.levels) == len(grid.levels) and grid != own:
        a, b = (torch.tensor(g.levels, dtype=torch.float32) for g in (own, grid))
        return own if torch.equal(a, b) else grid
    return grid
