"""Gradients at constant memory: a backward pass that undoes the run, one denoiser call at a time."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .checks import describe, refuse_gain
from .formula import Shear
from .run import Run
from .state import Solution, State
from .trust import ROUND_TRIP_LIMIT, InversionWarning

Move = tuple[int, Shear, bool]
"""The number of a step, one of its shears, and whether the run undid it."""


def attach(
    run: Run, moves: list[Move], solution: Solution, x: object, stop: int, *, up: bool
) -> Solution:
    """`solution` with its states as the outputs of one autograd node.

    Its backward pass goes through `moves` in reverse. The arithmetic of the solver undoes each shear
    ``c = g a + rest(b)``, and the gradients of its pair and of the parameters θ are

        ā = g c̄,    b̄ += (∂rest/∂b)ᵀ c̄,    θ̄ += (∂rest/∂θ)ᵀ c̄,

    with the vector-Jacobian products by autograd, from the evaluation that undoing needs anyway. In
    fixed point the rounding of a state counts as the identity.

    Args:
        run: the run that led to `solution`.
        solution: its result, without gradients.
        moves: its shears, in order.
        x: what it was given to start from.
        stop: the level of ``solution.x``.
        up: whether it went up the grid.

    Raises:
        ValueError: if a step of this run has no inverse.
    """
    if not moves:  # the run stayed where it was
        assert isinstance(x, State | Solution)
        state = x.state if isinstance(x, Solution) else x
        return replace(solution, x=solution.x if state.side else _at(state, stop), state=state)
    node = _Node(run, moves, solution.state, x, up)
    for k, shear, _ in moves[node.lone :]:
        if shear.gain == 0.0:
            refuse_gain(run.solver, run.grid, k)
    if not any(tensor.requires_grad for tensor in node.inputs):
        return solution
    with torch.enable_grad():
        current, partner = _Undone.apply(node, *node.inputs)
    state = replace(solution.state, current=current, partner=partner, side=None)
    return replace(
        solution, x=_at(state, stop), state=solution.state if run.arithmetic.exact else state
    )


def _at(state: State, level: int) -> Tensor:
    found = state.current if state.index == level else state.partner
    assert found is not None
    return found


class _Undone(torch.autograd.Function):
    """The pair that a run led to, as a function of its start, its conditions and its parameters."""

    @staticmethod
    def forward(ctx: Any, node: _Node, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.node = node
        arithmetic, dtype = node.run.arithmetic, node.run.dtype
        return tuple(arithmetic.load(stored, dtype).clone() for stored in node.pair)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "differentiable='reversible' has no second derivatives, which create_graph=True asks "
                "for: use differentiable=True"
            )
        return None, *ctx.node.pull(*gradients)


class _Node:
    """What the backward pass needs: the final pair, the shears, and the inputs of the run."""

    def __init__(self, run: Run, moves: list[Move], state: State, x: object, up: bool) -> None:
        assert state.partner is not None
        self.run, self.moves, self.state, self.up = run, moves, state, up
        self.pair = state.current, state.partner
        self.lone = run.state.partner is None
        start = x.state if isinstance(x, Solution) else x
        tensors = (start.current, start.partner) if isinstance(start, State) else (start,)
        integers = isinstance(start, State) and start.side is not None
        self.start = [] if integers else [t for t in tensors if isinstance(t, Tensor)]
        self.leaves, self.tree = tree_flatten(run.extra_args)
        self.places = [
            k
            for k, leaf in enumerate(self.leaves)
            if isinstance(leaf, Tensor) and leaf.requires_grad
        ]
        found = dict.fromkeys(p for m in _modules(run.denoiser) for p in m.parameters())
        self.parameters = [p for p in found if p.requires_grad]
        self.inputs = [*self.start, *(self.leaves[k] for k in self.places), *self.parameters]
        self.autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in sorted({"cpu", state.current.device.type})
        ]

    def pull(self, current: Tensor, partner: Tensor) -> list[Tensor | None]:
        """The gradients of the inputs, from those of the final pair."""
        leaves = list(self.leaves)
        for k in self.places:
            leaves[k] = leaves[k].detach().requires_grad_()
        run = Run(
            self.run.solver,
            self.run.denoiser,
            self.state,
            None,
            extra_args=tree_unflatten(leaves, self.tree),
        )
        if run.arithmetic.exact:
            run.memory = run.arithmetic.open(run.state, run.state.index, run.dtype)
        wanted = [*(leaves[k] for k in self.places), *self.parameters]
        sums: list[Tensor | None] = [None] * len(wanted)
        checked = False
        far, near = self._oriented(*self.pair)
        far_bar, near_bar = self._oriented(current, partner)
        for k, shear, undone in reversed(self.moves):
            # The run went from (a, b) to (b, c) here; where it undid the shear, from (c, b) to (b, a).
            b, new, b_bar, new_bar = far, near, far_bar, near_bar
            scale = 1 / shear.gain if undone else shear.gain
            if shear.gain == 1.0 and not shear.rest.terms:
                far, near = new, b
            else:
                leaf = run.arithmetic.load(b, run.dtype).detach().requires_grad_()
                run.forget()  # an output that two steps share would need its graph twice
                with torch.enable_grad(), self._as_before():
                    rest = run.rest(shear, b, k, leaf)
                if shear.calls and not checked:
                    _check_leaves(rest, {leaf, *wanted})
                    checked = True
                cotangent = (new_bar * -scale if undone else new_bar).to(rest.dtype)
                parts = torch.autograd.grad(rest, [leaf, *wanted], cotangent, allow_unused=True)
                if parts[0] is not None:
                    b_bar = b_bar + parts[0]
                for i, part in enumerate(parts[1:]):
                    if part is not None:
                        total = sums[i]
                        sums[i] = part.clone() if total is None else total.add_(part)
                if shear.gain == 0.0:  # the first step of a lone state
                    self._check_start([b])
                    return [b_bar, *sums]
                undo = run.arithmetic.forward if undone else run.arithmetic.inverse
                far, near = undo(shear.gain, new, rest.detach(), run.memory).to(new.dtype), b
            far_bar, near_bar = new_bar * scale, b_bar
        self._check_start((far, near))
        bars = self._oriented(far_bar, near_bar)
        return [*(bars if len(self.start) != 1 else [bars[0] + bars[1]])[: len(self.start)], *sums]

    def _oriented(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """The current state and its partner as the far and the near one of the walk, or back."""
        return (one, other) if self.up != self.run.solver.coupled else (other, one)

    def _as_before(self) -> ExitStack:
        """The autocast modes of the run; a cache would keep graphs from one call to the next."""
        stack = ExitStack()
        for kind, dtype, enabled in self.autocast:
            stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
        return stack

    def _check_start(self, found: Sequence[Tensor]) -> None:
        """Compares the states that the walk back ended at with those that the run started from."""
        state = self.run.state
        if self.run.arithmetic.exact:
            if not all(map(torch.equal, found, self._start())):
                raise RuntimeError(
                    "the backward pass undid the run and did not find its start: the denoiser did not "
                    "return the same bits for the same input, or its weights have changed since"
                )
            return
        for one, other in zip(found, self._start(), strict=True):
            miss = float(torch.linalg.vector_norm(one - other) / torch.linalg.vector_norm(other))
            if not miss <= ROUND_TRIP_LIMIT:
                warnings.warn(
                    f"the backward pass undid the run and missed its start by {miss:.2g} of its size, "
                    f"so that the gradient is of other states: {self.run.solver} amplifies the rounding "
                    f"of {state.current.dtype}, or the denoiser is not deterministic or has changed. "
                    "Use a float64 state, arithmetic=FixedPoint(), or StepRatio(1)",
                    InversionWarning,
                    stacklevel=2,
                )
                return

    def _start(self) -> Sequence[Tensor]:
        state = self.run.state
        return (
            [state.current]
            if state.partner is None
            else self._oriented(state.current, state.partner)
        )


def _modules(denoiser: Any, depth: int = 4) -> Iterator[nn.Module]:
    """The networks that a denoiser is, holds, or is a function of."""
    if isinstance(denoiser, nn.Module):
        yield denoiser
    elif depth == 0 or isinstance(denoiser, type | ModuleType | str | Tensor):
        return
    elif isinstance(denoiser, partial):
        for part in (denoiser.func, *denoiser.args, *denoiser.keywords.values()):
            yield from _modules(part, depth - 1)
    elif inspect.ismethod(denoiser):
        yield from _modules(denoiser.__self__, depth - 1)
    elif inspect.isfunction(denoiser):
        held = inspect.getclosurevars(denoiser)
        for part in (*held.nonlocals.values(), *held.globals.values()):
            yield from _modules(part, depth - 1)
    else:
        for part in getattr(denoiser, "__dict__", {}).values():
            yield from _modules(part, depth - 1)


def _check_leaves(rest: Tensor, known: set[Tensor]) -> None:
    """Checks that a step depends on no tensor that requires a gradient but on those `known`.

    Raises:
        ValueError: naming the shape of another one, whose gradient would be lost.
    """
    seen, waiting = set(), [rest.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        leaf = getattr(node, "variable", None)
        if leaf is not None and leaf not in known:
            raise ValueError(
                f"the denoiser depends on {describe(leaf)} that requires a gradient and was not found: "
                "differentiable='reversible' knows the parameters of networks that the denoiser is, "
                "holds or is a function of, and the tensors in extra_args. Pass it in extra_args"
            )
