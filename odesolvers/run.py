"""The one loop: a pair of states, shear by shear, down the grid or up it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from .checks import (
    OVERFLOW,
    check_origin,
    check_same,
    is_finite,
    place,
    refuse_call,
    refuse_output,
    refuse_start,
)
from .formula import Call, Shear
from .grids import Grid, Sigmas, level_dtype
from .progress import progress_bar
from .propagation import Plan
from .settings import identity, once
from .state import Convergence, Solution, State
from .trust import expected_sampling_error

Pair: TypeAlias = "tuple[Tensor | None, Tensor | None]"
"""Two stored states, the a and b of ``(a, b) -> (b, gain · a + rest(b))``."""

Steps: TypeAlias = "Iterable[tuple[int, tuple[Shear, ...]]]"
"""Steps in the order of a run, each with its number and its shears."""

Callback: TypeAlias = Callable[[dict[str, Any]], object]


class Denoiser(Protocol):
    """``denoiser(x, sigma, **extra_args) -> E[x0 | x]``, the contract of k-diffusion's wrappers.

    `x` has shape ``(B, ...)``; `sigma` has shape ``(B,)``, is float64 where `x` is and float32
    otherwise, and lives on the device of `x`. The result has the shape, dtype and device of `x`, in
    storage that no later call of the same step writes to; `x` is left as it is.
    """

    def __call__(self, x: Tensor, sigma: Tensor, /, **extra_args: Any) -> Tensor: ...


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
        x: Tensor | State,
        sigmas: Sigmas,
        index: int | None = 0,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callback | None = None,
        differentiable: bool = False,
    ) -> None:
        if not callable(denoiser) or not (extra_args is None or isinstance(extra_args, Mapping)):
            refuse_call(denoiser, extra_args)
        self.solver, self.arithmetic, self.denoiser = solver, solver.arithmetic, denoiser
        self.extra_args, self.callback, self.grid = (
            dict(extra_args or {}),
            callback,
            Grid.of(sigmas),
        )
        if differentiable and self.arithmetic.exact:
            raise ValueError(
                f"a run in {self.arithmetic} has no gradient, for it rounds every state: use "
                "arithmetic=FloatingPoint() with differentiable=True"
            )
        self.name, *classes = identity(solver)
        self.state, self.dtype = self._stored(
            x, len(self.grid.levels) - 1 if index is None else index
        )
        key = self.name, *classes, self.grid.levels

        def planned() -> tuple[Plan, float]:
            plan = solver.plan(self.grid)
            return plan, expected_sampling_error(solver, plan, self.grid)

        self.plan, self.sampling_error = once(key, planned)
        self._levels = self.state.current.new_empty(0, dtype=level_dtype(self.dtype))
        self._twice = self.arithmetic.check_determinism
        self._last: tuple[Tensor, Call, Tensor] | None = None
        self._reported = -1
        self.memory: Any = None
        self.nfe, self.convergence = 0, list[Convergence]()
        self.check = self.arithmetic.exact
        """Whether every output is checked for values that are not finite, at once."""

    def _stored(self, x: Tensor | State, index: int) -> tuple[State, torch.dtype]:
        """`x` as a checked and stored state, and the dtype of its values."""
        arithmetic, coupled, partner, side = self.arithmetic, self.solver.coupled, None, None
        if isinstance(x, State):
            check_origin(x, self.grid, self.solver, self.name)
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
        if side is None:  # the caller, or the denoiser, may write to them
            same, current = partner is current, current.clone()
            if partner is not None:
                partner = current if same else partner.clone()
        if arithmetic.exact:
            arithmetic.check(self.grid)
            if side is None:
                current = arithmetic.store(current)
                partner = None if partner is None else arithmetic.store(partner)
        if coupled and partner is None:
            partner = current
        return State(current, partner, index, self.grid.levels, self.name, side, coupled), dtype

    def finish(
        self,
        steps: Plan,
        walk: Callable[[Steps, Pair], Pair],
        progress: bool,
        origin: int,
        index: int,
        stop: int,
    ) -> Solution:
        """Walks `steps` from the state; the solution at level `stop`, of a pair that stands at `index`.

        `origin` is the index of the first pair of the run, see `Arithmetic.open`.
        """
        state, coupled = self.state, self.solver.coupled
        start: Pair = (state.partner, state.current)
        if coupled:
            start = start[::-1]
        if self.arithmetic.exact:
            self.memory = self.arithmetic.open(state, origin, self.dtype)
        bar = progress_bar(steps, desc=type(self.solver).__name__) if progress else steps
        a, b = walk(bar, start)
        if not (is_finite(a) and is_finite(b)):
            # What is not finite stays so: it is found at the end, and named by a second run.
            if self.arithmetic.exact:
                self.memory = self.arithmetic.open(state, origin, self.dtype)
            self.check, self.callback = True, None
            a, b = walk(steps, start)
            raise FloatingPointError(
                "the run ended with a state that is not finite, and made again it did not: the "
                "denoiser does not return the same output for the same input"
                if is_finite(a) and is_finite(b)
                else f"the final state is not finite; {OVERFLOW}"
            )
        current, partner = (a, b) if coupled else (b, a if self.solver.states == 2 else None)
        x, side = current if index == stop else partner, None
        assert current is not None
        assert x is not None
        if self.memory is None:
            x = x.clone()  # the caller may write to it
        else:
            side = self.arithmetic.close(self.memory, current, partner, index)
            x = self.arithmetic.load(x, self.dtype)
        state = State(current, partner, index, state.sigmas, state.solver, side, coupled)
        return Solution(x, state, self.nfe, tuple(self.convergence))

    def walk(self, steps: Steps, pair: Pair, *, undo: bool = False) -> Pair:
        """Applies `steps` to the pair (a, b).

        A shear maps (a, b) to (b, c) with c = gain · a + rest(b). To undo it the pair comes in reverse,
        and goes from (c, b) to (b, a): the denoiser is called at b either way.
        """
        apply: Any = self.arithmetic.inverse if undo else self.arithmetic.forward
        far, near = pair
        assert near is not None
        for k, shears in steps:
            for shear in shears:
                if shear.gain == 1.0 and not shear.rest.terms:  # only exchanges the two
                    far, near = near, far
                else:
                    new = apply(shear.gain, far, self.rest(shear, near, k), self.memory)
                    if new.dtype is not near.dtype:  # half precision is summed in float32
                        new = new.to(near.dtype)
                    far, near = near, new
        return far, near

    def rest(self, shear: Shear, stored: Tensor, k: int) -> Tensor:
        """``rest(b)`` for the stored state b, in new storage; `k` is the number of the step.

        Raises:
            TypeError, ValueError, FloatingPointError: for an output of the denoiser that cannot be
                used, naming the noise level, and what to do.
        """
        x = stored
        if self.memory is not None:
            self.memory.sigma, x = self.grid.levels[k], self.arithmetic.load(stored, self.dtype)
        values, last, self._last = [x], self._last, None
        pointers: list[int] = []
        if last is not None and shear.calls and last[0] is stored and last[1] == shear.calls[0]:
            values.append(last[2])
            pointers.append(last[2].untyped_storage().data_ptr())
        del last  # an output less while the next is made
        for point, sigma in shear.calls[len(values) - 1 :]:
            y = x if point.terms == {0: 1.0} else point.of(values).to(x.dtype)
            version = -1 if y.is_inference() else y._version  # inference tensors have none
            level = self._levels.new_full(x.shape[:1], sigma)
            output = self.denoiser(y, level, **self.extra_args)
            self.nfe += 1
            if version >= 0 and y._version != version:
                raise ValueError(
                    f"the denoiser wrote to its input {place(sigma, k)}: work on a copy, x.clone()"
                )
            if (
                not isinstance(output, Tensor)
                or output.shape != x.shape
                or output.dtype is not x.dtype
                or output.device != x.device
                or (pointer := output.untyped_storage().data_ptr()) in pointers
            ):
                refuse_output(output, y, sigma, k)
            if self.check and not is_finite(output):
                what = (
                    "the denoiser's output" if is_finite(y) else "the state handed to the denoiser"
                )
                raise FloatingPointError(f"{what} is not finite {place(sigma, k)}; {OVERFLOW}")
            if self._twice:  # of the first shear that calls at all
                before, self.nfe = output.clone(), self.nfe + 1
                check_same(before, self.denoiser(y, level, **self.extra_args), sigma, k)
            values.append(output)
            pointers.append(pointer)
        if len(values) > 1:
            self._twice = False
            if self.solver.coupled:  # the next shear may call at the same point and level
                self._last = stored, shear.calls[0], values[1]
            if self.callback is not None and k != self._reported:
                point, sigma = shear.calls[0]
                self._reported, level = k, self._levels.new_full((), sigma)
                y = x.clone() if point.terms == {0: 1.0} else point.of(values).to(x.dtype)
                shown = {"x": y, "denoised": values[1].clone()}  # it may write to them
                self.callback({**shown, "i": k, "sigma": level, "sigma_hat": level.clone()})
        return shear.rest.of(values)
