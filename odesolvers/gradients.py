"""Gradients at constant memory: a backward pass that undoes the run, one denoiser call at a time."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .checks import describe, refuse_gain, version
from .formula import Shear
from .run import Denoiser, Run, Steps
from .state import Solution, State
from .trust import ROUND_TRIP_LIMIT, InversionWarning


def check_undoable(run: Run, steps: Steps, x: object) -> None:
    """Checks, before `run` goes through `steps` from `x`, that a backward pass can undo it.

    Raises:
        ValueError: if a step has no inverse, or if a gradient would be lost.
    """
    if isinstance(x, Solution) and x.state.side is not None and x.x.requires_grad:
        raise ValueError(
            f"states of {run.arithmetic} are integers, through which no gradient leads back to an "
            "earlier run: make one run of it, or detach with solution.state"
        )
    if run.arithmetic.exact:
        given = [x.x if isinstance(x, Solution) else getattr(x, "current", x), run.extra_args]
        if any(isinstance(t, Tensor) and _has_tangent(t) for t in tree_leaves(given)):
            raise ValueError(
                f"forward derivatives, such as those of torch.func.jvp, are lost in {run.arithmetic}: "
                "use arithmetic=FloatingPoint()"
            )
    lone = run.state.partner is None  # its first shear has nothing to lose
    moves = [(k, shear) for k, shears, _ in steps for shear in shears]
    for k, shear in moves[lone:]:
        if shear.gain == 0.0:
            refuse_gain(run.solver, run.grid, k)
    leaves = tree_leaves(run.extra_args)
    tensors = *_start(x), *leaves, *_parameters(run.denoiser, leaves)
    if not any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
        run.denoiser = _constant(run.denoiser)


def _constant(denoiser: Denoiser) -> Denoiser:
    """`denoiser`, of whose tensors none is known to require a gradient, and none may."""

    def watched(x: Tensor, sigma: Tensor, /, **conditions: Any) -> Tensor:
        with torch.enable_grad():  # without such a tensor no graph is made
            output = denoiser(x, sigma, **conditions)
        if not getattr(output, "requires_grad", False):
            return output
        _check_leaves(output, set())
        return output.detach()

    return watched


def attach(run: Run, steps: Steps, solution: Solution, x: object, stop: int) -> Solution:
    """`solution` with its states as the outputs of one autograd node.

    Its backward pass goes through the shears in reverse. The arithmetic of the solver undoes each shear
    ``c = g a + rest(b)``, and the gradients of its pair and of the parameters θ are

        ā = g c̄,    b̄ += (∂rest/∂b)ᵀ c̄,    θ̄ += (∂rest/∂θ)ᵀ c̄,

    with the vector-Jacobian products by autograd, from the evaluation that undoing needs anyway. In
    fixed point the rounding of a state counts as the identity.

    Args:
        run: the run that led to `solution`.
        solution: its result, without gradients.
        steps: those of the run, in order.
        x: what it was given to start from.
        stop: the level of ``solution.x``.

    Raises:
        ValueError: if a gradient would be lost.
    """
    moves = [(k, shear, undo) for k, shears, undo in steps for shear in shears]
    if not moves:  # the run stayed where it was
        assert isinstance(x, State | Solution)
        state = x.state if isinstance(x, Solution) else x
        return replace(solution, x=solution.x if state.side else _at(state, stop), state=state)
    node = _Node(run, moves, solution.state, x)
    if not any(tensor.requires_grad for tensor in node.inputs):
        return solution
    if any(map(_has_tangent, node.pair)):
        raise ValueError(
            "differentiable='reversible' has no forward derivatives of what requires a gradient, which "
            "are of second order: detach it, or use differentiable=True"
        )
    try:
        with torch.enable_grad():
            current, partner = _Undone.apply(node, *node.inputs)
    except RuntimeError as error:
        if "functorch" not in str(error):
            raise
        raise RuntimeError(
            "differentiable='reversible' has no transforms of torch.func, which ask for second "
            "derivatives: use torch.autograd, or differentiable=True"
        ) from error
    state = replace(solution.state, current=current, partner=partner, side=None)
    return replace(
        solution, x=_at(state, stop), state=solution.state if run.arithmetic.exact else state
    )


def _at(state: State, level: int) -> Tensor:
    found = state.current if state.index == level else state.partner
    assert found is not None
    with torch.enable_grad():
        return found.clone()  # the caller may write to it


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
        node = ctx.node
        # Hooks are of whole gradients; torch.autograd.grad would call them once a step.
        hooks = [(p, p._backward_hooks) for p in node.parameters]
        for p, _ in hooks:
            p._backward_hooks = None
        try:
            return None, *node.pull(*gradients)
        finally:
            for p, hook in hooks:
                p._backward_hooks = hook


class _Node:
    """What the backward pass needs: the final pair, the shears, and the inputs of the run."""

    def __init__(
        self, run: Run, moves: list[tuple[int, Shear, bool]], state: State, x: object
    ) -> None:
        assert state.partner is not None
        self.run, self.moves, self.state = run, moves, state
        self.pair = state.current, state.partner
        self.start = _start(x)
        self.leaves, self.tree = tree_flatten(run.extra_args)
        self.places = [
            k
            for k, leaf in enumerate(self.leaves)
            if isinstance(leaf, Tensor) and leaf.requires_grad
        ]
        found = _parameters(run.denoiser, self.leaves)
        self.parameters = [p for p in found if p.requires_grad]
        self.inputs = [*self.start, *(self.leaves[k] for k in self.places), *self.parameters]
        self.found = list(found)
        self.watched = [x for x in (*self.leaves, *found) if isinstance(x, Tensor)]
        self.versions = [version(x) for x in self.watched]
        self.autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in sorted({"cpu", state.current.device.type})
        ]

    def again(self, leaves: Sequence[Any]) -> Run:
        """The run that continues from the final pair, with `leaves` in its conditions."""
        self.graphs = False

        def denoiser(x: Tensor, sigma: Tensor, /, **conditions: Any) -> Tensor:
            output = self.run.denoiser(x, sigma, **conditions)
            self.graphs |= getattr(output, "requires_grad", False)
            return output

        conditions = tree_unflatten(leaves, self.tree)
        return Run(self.run.solver, denoiser, self.state, None, extra_args=conditions)

    def pull(self, current: Tensor, partner: Tensor) -> list[Tensor | None]:
        """The gradients of the inputs, from those of the final pair."""
        for x, before in zip(self.watched, self.versions, strict=True):
            if version(x) != before:
                raise RuntimeError(
                    f"{describe(x)}, a parameter or a tensor in extra_args, was written to between the "
                    "run and its backward pass: call backward before optimizer.step(), or pass a clone"
                )
        leaves = list(self.leaves)
        for k in self.places:
            leaves[k] = leaves[k].detach().requires_grad_()
        run = self.again(leaves)
        if run.arithmetic.exact:
            run.memory = run.arithmetic.open(run.state, run.state.index, run.dtype)
        wanted = [*(leaves[k] for k in self.places), *self.parameters]
        sums: list[Tensor | None] = [None] * len(wanted)
        asked = [i for i, x in enumerate(wanted) if x.requires_grad]  # some may be frozen by now
        known = {*wanted, *self.found}
        far, near = self.run.turned(*self.pair)
        far_bar, near_bar = self.run.turned(current, partner)
        for k, shear, undone in reversed(self.moves):
            # The run went from (a, b) to (b, c) here; where it undid the shear, from (c, b) to (b, a).
            b, new, b_bar, new_bar = far, near, far_bar, near_bar
            scale = 1 / shear.gain if undone else shear.gain
            if shear.exchanges:
                far, near = new, b
            else:
                leaf = run.arithmetic.load(b, run.dtype).detach().requires_grad_()
                with torch.enable_grad(), self._as_before():
                    rest = run.rest(shear, b, k, leaf)
                if rest.requires_grad:
                    _check_leaves(rest, {leaf, *known})
                    cotangent = (new_bar * -scale if undone else new_bar).to(rest.dtype)
                    inputs = [leaf, *(wanted[i] for i in asked)]
                    first, *parts = _pulled(rest, inputs, cotangent)
                    if first is not None:
                        b_bar = b_bar + first
                    for i, part in zip(asked, parts, strict=True):
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
        bars = self.run.turned(far_bar, near_bar)
        return [*(bars if len(self.start) != 1 else [bars[0] + bars[1]])[: len(self.start)], *sums]

    def _as_before(self) -> ExitStack:
        """The autocast modes of the run; a cache would keep graphs from one call to the next."""
        stack = ExitStack()
        for kind, dtype, enabled in self.autocast:
            stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
        return stack

    def _check_start(self, found: Sequence[Tensor]) -> None:
        """Compares the states that the walk back ended at with those that the run started from."""
        state = self.run.state
        if not self.graphs:
            warnings.warn(
                "no output of the denoiser has a gradient, and it counted as a constant: is it under "
                "torch.no_grad(), or does it detach its input?",
                stacklevel=2,
            )
        if self.run.arithmetic.exact:
            if not all(map(torch.equal, found, self._start())):
                raise RuntimeError(
                    "the backward pass undid the run and did not find its start: the denoiser did not "
                    "return the same bits for the same input, or its weights have changed since"
                )
            return
        for one, other in zip(found, self._start(), strict=True):
            size = _norm(other) or _norm(self.pair[0])  # a start of zeros has no size
            miss = _norm(one - other) / size if size else 0.0
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
            else self.run.turned(state.current, state.partner)
        )


def _has_tangent(x: Tensor) -> bool:
    return unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)))


def _start(x: object) -> list[Tensor]:
    """The tensors with a gradient that a run starts from; integers have none."""
    start = x.state if isinstance(x, Solution) else x
    pair = (start.current, start.partner) if isinstance(start, State) else (start,)
    integers = isinstance(start, State) and start.side is not None
    return [] if integers else [t for t in pair if isinstance(t, Tensor)]


def _parameters(*things: Any) -> list[nn.Parameter]:
    """Those of all networks in `things`, once each."""
    return list(dict.fromkeys(p for module in _modules(things) for p in module.parameters()))


def _modules(thing: Any, depth: int = 5) -> Iterator[nn.Module]:
    """The networks that a denoiser or a condition is, holds, or is a function of."""
    if isinstance(thing, nn.Module):
        yield thing
    elif depth:
        for part in _parts(thing):
            yield from _modules(part, depth - 1)


def _parts(thing: Any) -> Iterable[Any]:
    """What a container holds, what an object has as attributes, and what a function uses."""
    if isinstance(thing, type | ModuleType | str | Tensor):
        return ()
    if isinstance(thing, Mapping):
        return thing.values()
    if isinstance(thing, list | tuple | set):
        return thing
    if isinstance(thing, partial):
        return thing.func, thing.args, thing.keywords
    if inspect.ismethod(thing):
        return thing.__self__, thing.__func__
    if not inspect.isfunction(thing):
        return getattr(thing, "__dict__", {}), type(thing).__call__ if callable(thing) else None
    parts = [thing.__globals__.get(name) for name in _names(thing.__code__)]
    parts += [thing.__defaults__, thing.__kwdefaults__]
    for cell in thing.__closure__ or ():
        with suppress(ValueError):  # of a name without a value yet
            parts.append(cell.cell_contents)
    return parts


def _names(code: CodeType) -> Iterator[str]:
    """The global names of a function and of the functions in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _pulled(rest: Tensor, inputs: Sequence[Tensor], cotangent: Tensor) -> tuple[Any, ...]:
    """The vector-Jacobian products of one step."""
    try:
        return torch.autograd.grad(rest, inputs, cotangent, allow_unused=True)
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise RuntimeError(
            "the denoiser depends on a tensor that was computed before the run from what requires a "
            "gradient, and whose graph is needed at every step: pass that tensor in extra_args"
        ) from error


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
                "holds or is a function of, and the tensors and networks in extra_args. Pass it in "
                "extra_args, or freeze it with requires_grad_(False)"
            )
