"""Refusals of input that runs cannot use: the received value, the place, and the remedy."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Set
from functools import partial
from types import ModuleType, UnionType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .grids import Grid
from .settings import attributes
from .values import number, refuse_gradient, shown


class NotFinite(FloatingPointError, ValueError):
    """A state to start from that is not finite: bad input, and a floating point error."""


OVERFLOW = (
    "look for an overflow in the denoiser, a sigma outside its range, or an inversion whose weights "
    "multiply up (it divides by g at every step)"
)


def describe(x: object) -> str:
    """Dtype, shape and device in words; the type of anything but a tensor."""
    if not isinstance(x, Tensor):
        return type(x).__name__
    return f"{x.dtype} {tuple(x.shape)} on {x.device}"


def is_finite(x: Tensor | None) -> bool:
    """Whether all elements are finite. Waits for the device."""
    if x is None or not x.is_floating_point():
        return True
    # A sum is one pass over memory; that of finite values may overflow.
    total = x.sum(dtype=torch.float32) if x.element_size() < 4 else x.sum()
    return math.isfinite(total.item()) or bool(torch.isfinite(x).all())


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype have an element of one storage in common."""
    try:
        if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
            return False
    except NotImplementedError:  # a tensor under a transform of torch.func
        return False
    spans = [
        (t.storage_offset(), sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)))
        for t in (a, b)
    ]
    (i, m), (j, n) = spans
    if i + m < j or j + n < i:
        return False
    # Parts may be interleaved, as the halves of the channels of a batch are.
    low = min(i, j)
    places = torch.arange(max(i + m, j + n) - low + 1, device="cpu")
    first, second = (
        places.as_strided(t.shape, t.stride(), t.storage_offset() - low).flatten() for t in (a, b)
    )
    return bool(torch.isin(first, second).any())


def version(x: Tensor) -> int:
    """A number that a write to `x` changes; of what was made in inference mode none is kept."""
    return -1 if x.is_inference() else x._version


def place(sigma: float, k: int) -> str:
    """A level of the grid in words."""
    return f"at level {k} of the grid, sigma = {sigma:.6g}"


def refuse_call(denoiser: object, extra_args: object) -> NoReturn:
    """A TypeError for a denoiser that is not callable, or extra_args that are no mapping."""
    if not callable(denoiser):
        raise TypeError(
            f"the denoiser must be callable as denoiser(x, sigma), got {type(denoiser).__name__}"
        )
    raise TypeError(
        "extra_args must be a mapping of keyword arguments for the denoiser, got "
        f"{type(extra_args).__name__}"
    )


def check_differentiable(differentiable: object, solver: Any, sigmas: object) -> None:
    """True or "reversible", where gradients of a run of `solver` can be recorded; or an error."""
    with torch.enable_grad():
        refuse_gradient("sigmas", sigmas)
        _refuse_settings(solver, "the solver", set())
    if differentiable is not True and differentiable != "reversible":
        raise TypeError(
            f"differentiable must be True, False or 'reversible', got {differentiable!r}"
        )
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"differentiable={differentiable!r} records nothing under torch.inference_mode(): call it "
            "outside"
        )
    if differentiable is True and solver.arithmetic.exact:
        raise ValueError(
            f"autograd has no gradient of a run in {solver.arithmetic}, which rounds every state: use "
            "differentiable='reversible', or arithmetic=FloatingPoint()"
        )
    if differentiable == "reversible" and solver.states == 1:
        raise ValueError(
            f"differentiable='reversible' undoes the run, and {solver} has no exact inverse: use "
            "BDIA over its method, or record every call with differentiable=True"
        )


def _refuse_settings(thing: Any, name: str, seen: set[int], depth: int = 9) -> None:
    """Raises a ValueError if a setting requires a gradient, for coefficients are numbers.

    Looks into what settings are made of, as `identity` does, and into what functions among them use.
    """
    if isinstance(thing, nn.Module):
        return refuse_gradient(name, list(thing.parameters()))
    refuse_gradient(name, thing)
    closed = Tensor | ModuleType | type | str | int | float | None
    if isinstance(thing, closed) or id(thing) in seen or not depth:
        return None
    seen.add(id(thing))
    if isinstance(thing, Mapping):
        parts = [(name, value) for value in thing.values()]
    elif isinstance(thing, list | tuple | Set):
        parts = [(name, value) for value in thing]
    elif isinstance(thing, partial):
        parts = [(name, value) for value in (thing.func, thing.args, thing.keywords)]
    elif inspect.isfunction(thing):
        used = inspect.getclosurevars(thing)
        things = used.nonlocals, used.globals, thing.__defaults__, thing.__kwdefaults__
        parts = [(name, value) for value in things]
    else:
        kind = type(thing).__name__
        parts = [(f"{key} of {kind}", value) for key, value in attributes(thing).items()]
    for part, value in parts:
        _refuse_settings(value, part, seen, depth - 1)
    return None


def refuse_pair(a: object, b: object) -> NoReturn:
    """A TypeError or ValueError for two states that cannot stand beside each other."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        raise ValueError(
            f"the two states of a pair must agree, got {describe(b)} and {describe(a)}"
        )
    raise TypeError(f"a state is made of tensors, got {describe(a)} and {describe(b)}")


def check_start(x: object) -> Tensor:
    """A finite floating point tensor ``(B, ...)`` to start from, or an error."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor or a State, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating point tensor, got {x.dtype}: convert with x.float()")
    if x.ndim == 0 or x.numel() == 0:
        raise ValueError(f"x must have shape (B, ...) with B >= 1, got {tuple(x.shape)}")
    if not is_finite(x):
        raise NotFinite(f"the state to start from is not finite: {describe(x)}")
    return x


def check_origin(state: Any, grid: Grid, solver: Any, name: str) -> None:
    """A state of the same grid, solver and kind of pair, or a ValueError with the first difference."""
    if state.sigmas != grid.levels:
        pairs = zip(state.sigmas, grid.levels, strict=False)
        k = next((k for k, (a, b) in enumerate(pairs) if a != b), None)
        found = (
            f"it has {len(state.sigmas)} levels, sigmas has {len(grid.levels)}"
            if k is None
            else f"level {k} is {state.sigmas[k]!r} there and {grid.levels[k]!r} in sigmas"
        )
        raise ValueError(
            f"the state comes from another grid: {found}; pass the grid that made the state"
        )
    if state.solver != name:
        # What differs is shown, however long both are.
        letters = enumerate(zip(state.solver, name, strict=False))
        same = next(
            (n for n, (one, two) in letters if one != two), min(len(state.solver), len(name))
        )
        start = same - 100 if same > 150 else 0
        made, this = ("..." * (start > 0) + text[start:] for text in (state.solver, name))
        raise ValueError(
            f"the state comes from another solver: it was made by {shown(made)}, this is "
            f"{shown(this)}; a step is undone only by the solver that took it"
        )
    if state.partner is not None and state.coupled != solver.coupled:
        raise ValueError(
            f"the partner of a state of {solver} stands "
            f"{'at the same level' if solver.coupled else 'one level up'}, got a State with "
            f"coupled={state.coupled}"
        )


def refuse_stop(stop: object, nearest: int, end: int) -> NoReturn:
    """An error for a level that a run towards `end` does not reach; `nearest` is the first it does."""
    raise ValueError(
        f"{'sampling goes down' if end > 0 else 'inverting goes up'} the grid: it can stop at {nearest} "
        f"to {end}, got stop = {stop}"
    )


def refuse_gain(solver: Any, grid: Grid, k: int) -> NoReturn:
    """A ValueError for step `k`, which has the gain 0 and cannot be undone."""
    remedy = (
        f"wrap it as BDIA({solver})"
        if solver.states == 1
        else "inversion needs gamma in (0, 1] and a state scale that is finite at every level"
    )
    raise ValueError(
        f"{solver} cannot be inverted: its step from sigmas[{k}] = {grid.levels[k]:.6g} to "
        f"sigmas[{k + 1}] = {grid.levels[k + 1]:.6g} has the weight g = 0 and keeps nothing of the "
        f"state before; {remedy}"
    )


def check_coefficients(plan: Any, grid: Grid, dtype: torch.dtype) -> None:
    """Levels and coefficients that `dtype`, in which steps are summed, can hold, or a ValueError."""
    for k, shears in plan:
        for shear in shears:
            sums = [shear.rest, *(call.point for call in shear.calls)]
            numbers = [grid.levels[k], shear.gain, *(c for s in sums for c in s.terms.values())]
            largest = max(map(abs, numbers))
            if not largest <= torch.finfo(dtype).max:
                raise ValueError(
                    f"the step from sigmas[{k}] = {grid.levels[k]:.6g} to sigmas[{k + 1}] = "
                    f"{grid.levels[k + 1]:.6g} has the coefficient {largest:.3g}, which {dtype} does "
                    "not hold: leave out levels that nearly coincide or are nearly 0, or use float64"
                )


def check_output(
    output: object,
    x: Tensor,
    before: int,
    earlier: list[Tensor],
    sigma: float,
    k: int,
    *,
    finite: bool,
) -> None:
    """An output like its input `x`, which was left at version `before`, in storage of its own."""
    if version(x) != before:
        raise ValueError(
            f"the denoiser wrote to its input {place(sigma, k)}: work on a copy, x.clone()"
        )
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the denoiser must return a tensor, got {type(output).__name__} {place(sigma, k)}"
        )
    if output.shape != x.shape or output.device != x.device:
        raise ValueError(
            f"the denoiser must return the form of its input, {describe(x)}, got "
            f"{describe(output)} {place(sigma, k)}"
        )
    if output.dtype is not x.dtype:
        raise TypeError(
            f"the denoiser returned {output.dtype} for a state in {x.dtype} {place(sigma, k)}: dtypes "
            "are never mixed silently; wrap it as "
            f"odesolvers.models.InDtype(denoiser, {output.dtype}) to keep the network in that dtype and "
            "the state in its own, or convert x"
        )
    for value in earlier:
        if overlap(output, value):
            raise ValueError(
                f"the denoiser returned the storage of an earlier output again, {place(sigma, k)}: a "
                "step needs several outputs at once; return a new tensor, such as output.clone()"
            )
    if finite and not is_finite(output):
        what = "the denoiser's output" if is_finite(x) else "the state handed to the denoiser"
        raise FloatingPointError(f"{what} is not finite {place(sigma, k)}; {OVERFLOW}")


def refuse_written(what: str, sigma: float, k: int) -> NoReturn:
    """An error for a write to an earlier input or output of the denoiser that is still in use."""
    raise ValueError(
        f"the denoiser wrote to an earlier {what} {place(sigma, k)}, which is still in use: what it "
        "keeps from one call to the next must be a copy, .clone()"
    )


def check_same(a: Tensor, b: Tensor, sigma: float, k: int) -> None:
    """Outputs of one call that was made twice, equal to the bit, or a RuntimeError."""
    if not torch.equal(a, b):
        raise RuntimeError(
            f"the denoiser is not deterministic: called twice with the same input {place(sigma, k)}, "
            f"{int((a != b).sum())} of {a.numel()} elements differ, by up to "
            f"{float((a - b).abs().max()):.3g}; put the network in eval mode, and see "
            "torch.use_deterministic_algorithms and torch.backends.cudnn.benchmark"
        )


def checked_share(name: str, value: object) -> float:
    """A number in (0, 1] as a float, or a TypeError or ValueError."""
    share = number(name, value)
    if not 0 < share <= 1:
        raise ValueError(
            f"{name} must be in (0, 1], got {value}"
            + (
                ": a step keeps nothing of the state before, and has no inverse"
                if share == 0
                else ""
            )
        )
    return share


def check_is(value: object, kind: type | UnionType, what: str) -> None:
    """An instance of `kind`, or a TypeError; `what` is the place it was given in, with an example."""
    if not isinstance(value, kind):
        raise TypeError(f"{what}, got {value!r}")


def check_choice(name: str, value: object, *choices: str) -> None:
    """One of `choices`, or a ValueError."""
    if value not in choices:
        known = ", ".join(map(repr, choices[:-1]))
        raise ValueError(f"{name} must be {known} or {choices[-1]!r}, got {value!r}")
