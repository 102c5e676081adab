"""The loop of the project, down the grid and up it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .arithmetic import FloatingPoint
from .arithmetic.floating import move
from .batching import join
from .execution import Execution
from .grids import Grid
from .levels import Levels, level_tensors
from .progress import progress_bar
from .route import Route, Steps, route_down, route_up
from .stability import warn_before_inverting
from .state import Convergence, Solution, State, check_pair, describe
from .step import Evaluation, Step

if TYPE_CHECKING:
    from .arithmetic.stack import Stack
    from .solver import Denoiser, InvertibleSolver, Solver


Pair: TypeAlias = "tuple[Tensor | None, Tensor]"
"""Two stored states as a stage takes them, ``(a, b)`` of ``(a, b) -> (b, gain · a + rest(b))``."""


Walk: TypeAlias = "Callable[[Pair], Pair]"
"""From the pair at the start of a run to that at its end."""


def descend(run: Run, state: State, stop: int) -> Solution:
    """Sample: from where `state` stands, step by step down to level `stop`."""
    _check_stop(stop)
    solver, first = run.solver, state.index
    if not first < stop <= run.grid.steps:
        raise ValueError(
            f"sampling goes down the grid: from level {first} it can stop at {first + 1} to "
            f"{run.grid.steps}, got stop = {stop}"
            if first < run.grid.steps
            else f"the state stands at the last level already (index {first}): nothing to sample"
        )
    alone = solver.two_step and state.partner is None
    route = route_down(solver, run.grid, first, stop, alone)

    def walk(pair: Pair) -> Pair:
        return run.take(run.track(route), *pair)

    return run.go(walk, route, state, first + 1 if alone else first, stop, stop)


def ascend(run: Run, solver: InvertibleSolver, state: State, stop: int) -> Solution:
    """Invert: undo the steps from where `state` stands, one by one up to level `stop`."""
    _check_stop(stop)
    last = state.index
    if not 0 <= stop < last:
        raise ValueError(
            f"inverting goes up the grid: from level {last} it can stop at {last - 1} to 0, got "
            f"stop = {stop}"
            if last > 0
            else "the state stands at the first level already (index 0): nothing to invert"
        )
    # The pair of a two-step solver reaches one level up.
    end = stop + 1 if solver.two_step else stop
    alone = solver.two_step and state.partner is None
    route = route_up(solver, run.grid, last, end, alone)
    if solver.exact:
        lone = state.partner is None or (state.coupled and state.partner is state.current)
        warn_before_inverting(solver, run.grid, last, stop, lone=lone, dtype=run.dtype)

    def walk(pair: Pair) -> Pair:
        steps = iter(run.track(route))
        if alone:
            current, neighbour = run.take(islice(steps, 1), *pair)
            pair = neighbour, current
        return solver.undo(run, steps, pair)

    return run.go(walk, route, state, last, end, stop, look=not solver.exact)


class Run:
    """One run of a solver: what it calls, reports and counts on its way along the grid.

    The states of a run take turns in two tensors of its own, and what a step adds up in a third: a
    stage overwrites the state that no later one needs. Tensors of the caller are not written to, and
    neither is a state that a callback was shown or that a gradient may need.
    """

    def __init__(
        self,
        solver: Solver,
        denoiser: Denoiser,
        grid: Grid,
        extra_args: Mapping[str, Any] | None,
        callback: Callable[[dict[str, Any]], object] | None,
        progress: bool,
        differentiable: bool = False,
        execution: Execution | None = None,
    ) -> None:
        if not callable(denoiser):
            raise TypeError(
                f"the denoiser must be callable as denoiser(x, sigma), got {type(denoiser).__name__}"
            )
        if extra_args is not None and not isinstance(extra_args, Mapping):
            raise TypeError(
                "extra_args must be a mapping of keyword arguments for the denoiser, got "
                f"{type(extra_args).__name__}"
            )
        if execution is not None and not isinstance(execution, Execution):
            raise TypeError(
                f"execution must be an instance such as CUDAGraph() or Compiled(), got {execution!r}"
            )
        if differentiable and solver.arithmetic.exact:
            raise ValueError(
                f"a run in {solver.arithmetic} has no gradient, for it rounds every state: use "
                "arithmetic=FloatingPoint() with differentiable=True"
            )
        self.solver = solver
        self.arithmetic = solver.arithmetic
        self._name = repr(solver)
        self.grid = grid
        self.differentiable = differentiable
        self.dtype = torch.float32
        self.nfe = 0
        self.convergence: list[Convergence] = []
        self._denoiser = denoiser
        self._extra_args = dict(extra_args or {})
        self._stacks = solver.stacks
        self._execution = execution
        self._sigmas: dict[Levels, Tensor] = {}
        self._callback = callback
        self._progress = progress
        self._keeps = callback is not None or differentiable

    def _begin(self, look: bool) -> None:
        """Forget an earlier attempt at the run; `look` at every value on the way."""
        self.nfe = 0
        self.convergence.clear()
        self._looks = look
        self._probes: list[tuple[str, Tensor]] = []
        self._twice = self.arithmetic.check_determinism
        self._stack: Stack | None = None
        self._last: tuple[Tensor, float, Tensor] | None = None
        self._reported: int | None = None
        self._joined: dict[int, dict[str, Any]] = {}
        self._scratch: Tensor | None = None
        self._rooms: dict[int, tuple[Tensor, Sequence[Tensor]]] = {}

    def state(self, x: Tensor | State, index: int) -> State:
        """`x` as a checked state, stored as the arithmetic has it; a lone tensor stands at `index`."""
        self.arithmetic.check(self.grid)
        solver = self.solver
        if not isinstance(x, State):
            _check_tensor(x)
            current, partner = x if self.differentiable else x.detach(), None
        else:
            x.check(self.grid, self._name)
            check_pair(x)
            if x.partner is not None and x.coupled != solver.coupled:
                raise ValueError(
                    f"the partner of a state of {solver} stands "
                    f"{'at the same level' if solver.coupled else 'one level up'}, got a State with "
                    f"coupled={x.coupled}"
                )
            if x.side is not None:
                self.dtype = x.side.dtype
                return x
            for tensor in (x.current, x.partner):
                if tensor is not None:
                    _check_tensor(tensor)
            current, partner, index = x.current, x.partner, x.index
        self.dtype = current.dtype
        current = self.arithmetic.store(current)
        if solver.states == 2 and partner is not None:
            partner = self.arithmetic.store(partner)
        else:  # of a coupled solver a lone state is its own companion
            partner = current if solver.coupled else None
        levels, coupled = self.grid.levels, solver.coupled
        return State(current, partner, index, levels, self._name, coupled=coupled)

    def go(
        self,
        walk: Walk,
        route: Route,
        state: State,
        origin: int,
        index: int,
        stop: int,
        look: bool = False,
    ) -> Solution:
        """`walk` from `state`, and the solution at level `stop`, which is known to be finite.

        What is not finite stays so, see `Step.forgets`, and so it is enough to look at the end. Only if
        that finds something is the run made again, with a look at every value, for an error that names
        the step. With `look`, and in an arithmetic that hides it, each value is looked at at once.
        """
        self._begin(look or not self.arithmetic.keeps_nan)
        self._sigmas = level_tensors(route, state.current, self.dtype)
        if self._execution is None:
            pair = walk(self.prepare(state, origin))
        else:
            pair = self._replay(self._execution, walk, route, state, origin)
        seen = [*(x for x in pair if x is not None), *(probe for _, probe in self._probes)]
        if not self._looks and not all(map(_is_finite, seen)):
            self._callback, self._progress = None, False
            self._begin(look=True)
            self.finish(walk(self.prepare(state, origin)), index, stop)
            raise FloatingPointError(
                "the run ended with a state that is not finite, and made again it did not: the denoiser "
                "does not return the same output for the same input"
            )
        return self.finish(pair, index, stop)

    def _replay(
        self, execution: Execution, walk: Walk, route: Route, state: State, origin: int
    ) -> Pair:
        """`walk` from `state`, recorded if it is not yet: the pair, and the probes of the run."""
        if self._callback is not None or self._progress or self.differentiable or self._looks:
            raise ValueError(
                f"{type(execution).__name__} replays a whole run, which leaves no place for a callback, "
                "a progress bar, gradients, FixedPoint or an iteration that stops by itself: leave out "
                "these, or the execution"
            )
        leaves, tree = tree_flatten(self._extra_args)
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        fixed = tuple(None if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves)
        lone = state.partner is None or state.partner is state.current
        own = [state.current] if state.partner is None or lone else [state.current, state.partner]

        def program(*inputs: Tensor) -> tuple[Tensor, ...]:
            states, tensors = inputs[: len(own)], iter(inputs[len(own) :])
            partner = None if state.partner is None else states[-1]
            filled = [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            self._begin(look=False)
            self._extra_args = tree_unflatten(filled, tree)
            started = replace(state, current=states[0], partner=partner)
            a, b = walk(self.prepare(started, origin))
            self._extra_args = tree_unflatten(leaves, tree)
            assert a is not None
            return a, b, *(probe for _, probe in self._probes)

        key = (
            self.solver,
            self._name,
            self.grid,
            walk.__qualname__,
            tuple(k for k, _ in route.steps),
            origin,
            lone,
            fixed,
            str(tree),
        )
        try:
            hash(key)
        except TypeError as error:
            raise ValueError(
                f"{type(execution).__name__} tells runs apart by the settings of the solver and by what "
                f"in extra_args is not a tensor, which must have a hash: {error}"
            ) from error
        recording = execution.find(key, self._denoiser, program, [*own, *given], self)
        self._begin(look=False)
        self.nfe = recording.nfe
        a, b, *probes = recording.replay(*own, *given)
        self._probes = [("", probe) for probe in probes]
        return a, b

    def prepare(self, state: State, origin: int) -> Pair:
        """The working memory, and copies of the states as a pair."""
        # Copies, for the caller may write to x, and this run does.
        current, partner = state.current.clone(), state.partner
        if partner is not None:
            shared = self.solver.coupled and partner is state.current
            partner = current if shared else partner.clone()
        self._scratch = self._room(current)
        self._shape, self._device = current.shape, current.device
        self._stack = self.arithmetic.open(current, partner, state.side, origin)
        self._versioned = not current.is_inference()
        self._direct = (
            type(self.arithmetic) is FloatingPoint
            and self.dtype in (torch.float32, torch.float64)  # half precision adds in another order
            and not (self.solver.coupled or self._keeps)
        )
        if self.solver.coupled:
            assert partner is not None
            return current, partner
        return partner, current

    def track(self, route: Route) -> Steps:
        """The steps of `route`, with a progress bar where one was asked for."""
        if not self._progress:
            return route.steps
        bar: Steps = progress_bar(route.steps, desc=type(self.solver).__name__)
        return bar

    def take(
        self, steps: Steps, far: Tensor | None, near: Tensor, *, undo: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Where `steps` lead from two states: each stage replaces the far one, and they change places.

        What replaces it is made of it and of what the denoiser says at the near one. The pair
        (far, near) goes ``(a, b) -> (b, c)``, with ``c = gain · a + rest(b)``. To `undo` that it is
        turned round and goes ``(c, b) -> (b, a)``. `far` is None at the start of a run that has one
        state only.
        """
        shear: Callable[..., Tensor]
        shear = self.arithmetic.inverse if undo else self.arithmetic.forward
        direct, keeps, stack = self._direct, self._keeps, self._stack
        for k, stages in steps:
            for stage in stages:
                if direct and far is not None:
                    # What follows below, in fewer lines, for each costs time.
                    how = stage.unmove if undo else stage.move
                    if how is not None:
                        denoised = self._denoise(near, how.levels, k)
                        move(how, far, near, denoised, self._scratch)
                        del denoised
                        far, near = near, far
                        continue
                if stage.exchanges and far is not None:
                    far, near = near, far
                    continue
                values = self.evaluate(stage, near, k)
                # Over the far one, unless somebody may still look at that.
                out = None if far is near or keeps else far
                if self._last is not None and self._last[0] is out:
                    self._last = None
                far, near = near, shear(stage, far, values, stack, out, self._scratch)
                del values  # the outputs, before the next are made
        assert far is not None
        return far, near

    def _room(self, x: Tensor) -> Tensor | None:
        """Working memory for the sums of a step, in the form of the state `x`."""
        return None if self.differentiable else torch.empty_like(x, dtype=self.dtype)

    def evaluate(self, stage: Step, stored: Tensor, k: int) -> list[Tensor]:
        """A state and the outputs of the denoiser calls of `stage`, in order.

        What the last stage learnt at the same state and level is not asked for again.
        """
        x = self.arithmetic.load(stored, self.dtype)
        if self._stack is not None:
            self._stack.sigma = self.grid.levels[k]
        if not stage.evaluations:
            return [x]
        first = stage.evaluations[0]
        values, last, self._last = [x], self._last, None
        if last is not None and first.here and last[0] is stored and last[1] == first.sigma:
            values.append(last[2])
        del last  # an output less, while the next is made
        if self._stacks and len(stage.evaluations) > 1:
            self._evaluate_stacked(stage, values, k)
        else:
            for call in stage.evaluations[len(values) - 1 :]:
                values.append(self._output(call, values, k))
        if self._twice:
            self._twice = False
            before = [value.clone() for value in values]  # outputs may be one buffer, used again
            _check_same(before, self.evaluate(stage, stored, k), k, self.grid.levels[k])
        if not self._looks:
            for term in stage.forgets:
                self._probes.append(("", torch.linalg.vector_norm(values[term], math.inf)))
        if first.here and self.solver.coupled:
            self._last = stored, first.sigma, values[1]
        if self._callback is not None and self._reported != k:
            self._reported = k
            level = self._sigmas[first.sigma,][0]
            self._callback(
                {"x": x, "i": k, "sigma": level, "sigma_hat": level, "denoised": values[1]}
            )
        return values

    def _output(self, call: Evaluation, values: list[Tensor], k: int) -> Tensor:
        """The output of `call`, from the state and the outputs before it."""
        if call.here:
            denoised = self._denoise(values[0], call.levels, k)
        else:
            point = self.arithmetic.combine(call.point, values, self._scratch)
            denoised = self._denoise(point, call.levels, k)
            if _share_storage(denoised, point):
                self._scratch = self._room(values[0])  # the output lies in the old one
        if len(values) > 1:
            _check_new(denoised, values[1:], call.levels, k)
        return denoised

    def _evaluate_stacked(self, stage: Step, values: list[Tensor], k: int) -> None:
        """Append to `values` the outputs of `stage`, those of a round in one call of the denoiser."""
        x, known = values[0], len(values) - 1
        values += [x] * (len(stage.evaluations) - known)  # in their places as they come
        for numbers in stage.rounds:
            numbers = tuple(number for number in numbers if number > known)
            calls = tuple(stage.evaluations[number - 1] for number in numbers)
            if len(calls) <= 1:
                for number in numbers:
                    values[number] = self._output(calls[0], values[:number], k)
                continue
            stack, places = self._room_for(x, len(calls))
            points = [
                self.arithmetic.combine(call.point, values, place)
                for call, place in zip(calls, places, strict=True)
            ]
            stack = torch.cat(points) if stack is None else stack
            levels = tuple(call.sigma for call in calls)
            denoised = self._denoise(stack, levels, k)
            if _share_storage(denoised, stack):
                self._rooms.clear()
            _check_new(denoised, [values[n] for n in range(1, numbers[0])], levels, k)
            for number, output in zip(numbers, denoised.chunk(len(calls)), strict=True):
                values[number] = output

    def _room_for(self, x: Tensor, n: int) -> tuple[Tensor | None, Sequence[Tensor | None]]:
        """Working memory for a stack of `n` points, and the places of these in it."""
        if self.differentiable:
            return None, [None] * n
        if n not in self._rooms:
            stack = x.new_empty((n * x.shape[0], *x.shape[1:]))
            self._rooms[n] = stack, stack.chunk(n)
        return self._rooms[n]

    def finish(self, pair: Pair, index: int, stop: int) -> Solution:
        """The solution at level `stop`, once every value that was met is known to be finite."""
        solver = self.solver
        self._scratch, self._last = None, None
        self._rooms.clear()
        current, partner = pair if solver.coupled else pair[::-1]
        assert current is not None
        stored = current if index == stop else partner
        assert stored is not None
        x = self.arithmetic.load(stored, self.dtype)
        if self._looks:
            for value in (x, current, partner):
                if value is not None and value.is_floating_point():
                    self._probe(value, f"the final state is not finite; {_OVERFLOW}")
            for message, probe in self._probes:
                _check_probe(probe, message)
        partner = partner if solver.states == 2 else None
        side = self.arithmetic.close(self._stack, current, partner, index, self.dtype)
        x = x.clone() if x is stored else x  # the caller may write to it, not to the state
        levels = self.grid.levels
        state = State(current, partner, index, levels, self._name, side, solver.coupled)
        return Solution(x, state, self.nfe, tuple(self.convergence))

    def _denoise(self, x: Tensor, levels: Levels, k: int) -> Tensor:
        """The denoiser's outputs at `levels` for the states `x`, which are stacked along the batch."""
        n = len(levels)
        before = x._version if self._versioned else 0
        sigma = self._sigmas[levels]
        arguments = self._extra_args if n == 1 else self._joined_args(n, x)
        denoised = self._denoiser(x, sigma, **arguments)
        self.nfe += n
        if self._versioned and (x._version != before or sigma._version != 0):
            raise ValueError(
                f"the denoiser wrote to its input {_at(levels, k)}: work on copies, x.clone() and "
                "sigma.clone()"
            )
        if (
            not isinstance(denoised, Tensor)
            or denoised.shape != (self._shape if n == 1 else x.shape)
            or denoised.dtype is not self.dtype
            or denoised.device != self._device
        ):
            raise _wrong_output(denoised, x, self.dtype, _at(levels, k))
        if self._looks:
            message = f"the denoiser's output is not finite {_at(levels, k)}; {_OVERFLOW}"
            self._probe(denoised, message, at=x)
        return denoised

    def _joined_args(self, n: int, x: Tensor) -> dict[str, Any]:
        """The keyword arguments of a call that stacks `n` states for each of the batch."""
        if n not in self._joined:
            self._joined[n] = join([self._extra_args] * n, x.shape[0] // n, "extra_args")
        return self._joined[n]

    def _probe(self, x: Tensor, message: str, at: Tensor | None = None) -> None:
        """Check that `x` is finite: on the CPU now, elsewhere at the end, without waiting for it."""
        if x.device.type != "cpu":
            # The largest absolute value; unlike a sum it overflows with an element only.
            self._probes.append((message, torch.linalg.vector_norm(x, math.inf)))
        elif not _is_finite(x):
            if at is not None:
                _check_probe(at, f"the state handed to the denoiser is not finite: {message}")
            _check_probe(x, message)


_OVERFLOW = (
    "look for an overflow in the denoiser, a sigma outside its range, or an inversion whose weights "
    "multiply up (it divides by g at every step)"
)


def _at(levels: Levels, k: int) -> str:
    sigmas = " and ".join(f"{sigma:.6g}" for sigma in levels)
    return f"at level {k} of the grid, sigma = {sigmas}"


def _wrong_output(denoised: object, x: Tensor, dtype: torch.dtype, at: str) -> Exception:
    """What to say of an output without the form of the state `x`, or the dtype of the run."""
    if not isinstance(denoised, Tensor):
        return TypeError(f"the denoiser must return a tensor, got {type(denoised).__name__} {at}")
    if denoised.shape != x.shape or denoised.device != x.device:
        return ValueError(
            f"the denoiser must return the form of its input, {describe(x)}, got "
            f"{describe(denoised)} {at}"
        )
    return TypeError(
        f"the denoiser returned {denoised.dtype} for a state in {dtype} {at}: dtypes are never mixed "
        f"silently; wrap it as odesolvers.models.InDtype(denoiser, {denoised.dtype}) to keep the "
        "network in that dtype and the state in its own, or convert x"
    )


def _check_new(denoised: Tensor, outputs: list[Tensor], levels: Levels, k: int) -> None:
    if any(_share_storage(denoised, output) for output in outputs):
        raise ValueError(
            f"the denoiser returned the storage of an earlier output again, {_at(levels, k)}: a step "
            "needs several outputs at once; return a new tensor, such as output.clone()"
        )


def _is_finite(x: Tensor) -> bool:
    """Whether all elements are. Waits for the device."""
    # A sum is one pass over memory; that of finite values may overflow.
    total = x.sum(dtype=torch.float32) if x.element_size() < 4 else x.sum()
    return math.isfinite(total.item()) or bool(torch.isfinite(x).all())


def _check_probe(probe: Tensor, message: str) -> None:
    if not bool(torch.isfinite(probe).all()):
        raise FloatingPointError(message)


def _share_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _check_stop(stop: object) -> None:
    if isinstance(stop, bool) or not isinstance(stop, int):
        raise TypeError(f"stop must be an integer, an index into sigmas, got {stop!r}")


def _check_same(values: list[Tensor], again: list[Tensor], k: int, sigma: float) -> None:
    for call, (a, b) in enumerate(zip(values, again, strict=True)):
        if not torch.equal(a, b):
            raise RuntimeError(
                f"the denoiser is not deterministic: call {call} of the step from level {k} of the "
                f"grid, sigma = {sigma:.6g}, was made twice with the same input and "
                f"{int((a != b).sum())} of {a.numel()} elements differ, by up to "
                f"{float((a - b).abs().max()):.3g}; put the network in eval mode, and see "
                "torch.use_deterministic_algorithms and torch.backends.cudnn.benchmark"
            )


def _check_tensor(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor or a State, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating point tensor, got {x.dtype}: convert with x.float()")
    if x.ndim == 0 or x.numel() == 0:
        raise ValueError(f"x must have shape (B, ...) with B >= 1, got {tuple(x.shape)}")
    if not _is_finite(x):
        raise FloatingPointError(f"the state to start from is not finite: {describe(x)}")
