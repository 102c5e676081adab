"""Applications of exact inversion: edits, interpolations, and watermarks in the noise.

Everything takes a solver, a denoiser and a grid, as `Solver.sample` does. In place of the denoiser it
takes a pipeline of diffusers too, which is then wrapped as `odesolvers.pipelines.PipelineDenoiser`;
pictures are latents then, and the arguments of a run are those of a call of the pipeline.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .checks import check_is
from .grids import Grid, Sigmas
from .models.guidance import ClassifierFreeGuidance
from .progress import progress_bar
from .run import Denoiser, Run
from .solver import Solver
from .state import Solution, State
from .trust import InversionWarning, warn_before_inverting
from .values import count, number, widened

Arguments: TypeAlias = "Mapping[str, Any] | None"


@dataclass(frozen=True, eq=False)
class Edit:
    """The result of `edit`.

    Attributes:
        x: the edited picture, shape and dtype of the picture.
        state: the pair at the end. It leads back to the noise, under the arguments of the edit, if there
            was no mask.
        code: the inversion of the picture, from which more edits can be sampled.
        nfe: evaluations of the denoiser, of both runs.
    """

    x: Tensor
    state: State
    code: Solution
    nfe: int


@torch.no_grad()
def edit(
    solver: Solver,
    denoiser: Denoiser,
    picture: Tensor,
    sigmas: Sigmas,
    *,
    source: Arguments = None,
    target: Arguments = None,
    guidance: float = 1.0,
    negative: Arguments = None,
    mask: Tensor | None = None,
    strength: float = 1.0,
    progress: bool = False,
) -> Edit:
    """Inverts a picture under one condition and samples its code under another.

    With a mask, both states of the pair are blended after each step down with those that the inversion
    passed at the same levels, so that the picture outside of the mask is returned exactly, in every
    arithmetic. What is inside sees what is outside at its own noise level all along.

    Args:
        solver: a solver with an exact inverse, such as `BDIA`.
        denoiser: the denoiser, or a pipeline of diffusers.
        picture: at the last level of the grid, shape ``(B, ...)``.
        sigmas: the grid.
        source: arguments of the denoiser that describe the picture; it is inverted under them, unguided.
        target: arguments that describe the edit.
        guidance: scale of classifier-free guidance from `negative` to `target`.
        negative: arguments to guide away from; `source` by default.
        mask: 1 where the picture is edited, 0 where it is kept, in between for soft edges; broadcast
            against `picture`.
        strength: the share of the grid that is inverted and sampled again, from 0, no step, to 1, all
            steps. The smaller it is, the more of the picture is kept.
        progress: show progress bars (needs tqdm).

    Raises:
        TypeError, ValueError: as by `Solver.invert`; and for a mask or a strength that cannot be used.
    """
    check_is(solver, Solver, "solver must be one such as BDIA(Euler())")
    if solver.states == 1 and not solver.iterative:
        raise ValueError(f"an edit inverts the picture, and {solver} cannot: use BDIA({solver})")
    grid, denoiser = Grid.of(sigmas), as_denoiser(denoiser)
    stop = first_level(solver, grid.steps, strength)
    guided, condition = guide(denoiser, guidance, target, source if negative is None else negative)
    up: Any = {"extra_args": source, "progress": progress and mask is None}
    down: Any = {"extra_args": condition, "progress": progress and mask is None}
    if mask is None:
        code = solver.invert(denoiser, picture, grid, stop=stop, **up)
        run = solver.sample(guided, code.state.fork(), grid, **down)
        return Edit(run.x, run.state, code, code.nfe + run.nfe)
    mask = _checked_mask(mask, picture)
    total = 2 * (grid.steps - stop)
    tick = progress_bar(total=total, desc="masked edit").update if progress else lambda: None
    code, passed = _inverted_step_by_step(solver, denoiser, picture, grid, stop, up, tick)
    state, nfe, x = code.state.fork(), code.nfe, picture
    for index in range(state.index + 1, grid.steps + 1):
        run = solver.sample(guided, state, grid, stop=index, **down)
        pair = zip(passed[index], (run.state.current, run.state.partner), strict=True)
        current, partner = (_blended(outside, inside, mask) for outside, inside in pair)
        assert current is not None
        state = replace(run.state, current=current, partner=partner).fork()
        nfe, x = nfe + run.nfe, run.x
        tick()
    return Edit(solver.arithmetic.load(state.current, x.dtype).clone(), state, code, nfe)


@torch.no_grad()
def interpolate(
    solver: Solver,
    denoiser: Denoiser,
    first: Tensor,
    second: Tensor,
    sigmas: Sigmas,
    *,
    frames: int = 9,
    source: Arguments = None,
    target: Arguments = None,
    progress: bool = False,
) -> tuple[Solution, ...]:
    """Samples between two pictures: both are inverted, and the pairs of states are mixed by `slerp`.

    The first and the last frame are the pictures, as exactly as the solver inverts, for their pairs are
    undone as they are. Frames are sampled one at a time, so that memory does not grow with their number.

    Args:
        solver: a solver with an exact inverse, such as `BDIA`.
        denoiser: the denoiser, or a pipeline of diffusers.
        first: a picture at the last level of the grid, shape ``(B, ...)``.
        second: another one, of the same shape.
        sigmas: the grid.
        frames: number of frames, 2 or more.
        source: arguments of the denoiser, for both inversions and all frames.
        target: others for the second picture. The denoiser of a frame is then the mixture of both, in
            the proportions of the frame, for twice the evaluations of the network in between.
        progress: show a progress bar (needs tqdm).

    Raises:
        TypeError, ValueError: as by `Solver.invert`; and if the pictures or `frames` do not fit.
    """
    if count("frames", frames) < 2:
        raise ValueError(f"frames must be 2 or more, the pictures among them, got {frames}")
    if first.shape != second.shape:
        shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
        raise ValueError(f"pictures of one shape are interpolated, got {shapes}")
    denoiser, grid = as_denoiser(denoiser), Grid.of(sigmas)
    both = source or {}, (source if target is None else target) or {}

    def run(walk: Any, x: Tensor | State, t: float) -> Any:
        def mixed(x: Tensor, sigma: Tensor) -> Tensor:
            one, two = (denoiser(x, sigma, **extra) for extra in both)
            return torch.lerp(one, two, t)

        alone = target is None or t in (0.0, 1.0)
        return walk(denoiser if alone else mixed, x, grid, extra_args=both[int(t)] if alone else {})

    a, b = (run(solver.invert, x, t).state for x, t in ((first, 0.0), (second, 1.0)))
    places = [k / (frames - 1) for k in range(frames)]
    bar = progress_bar(places, desc="frames") if progress else places
    return tuple(run(solver.sample, slerp(a, b, t), t) for t in bar)


def slerp(first: State, second: State, t: float) -> State:
    """The pair between two pairs of one solver and grid, spherically: `first` at 0, `second` at 1.

        sin((1 - t) ω) / sin ω · first + sin(t ω) / sin ω · second

    (Shoemake 1985). ω is the angle between the two noisier states, for each element of the batch, and
    both states of the pair get the same weights. A mixture of noise keeps the size of noise.

    Raises:
        TypeError, ValueError: if the states are not of one run's form, or t is not from 0 to 1.
    """
    for state in (first, second):
        check_is(state, State, "slerp mixes states, such as solver.invert(...).state")
    a, b, t = first, second, number("t", t)
    forms = [(s.solver, s.sigmas, s.index, s.current.shape) for s in (a, b)]
    if forms[0] != forms[1]:
        raise ValueError(f"states of one solver, grid, level and shape are mixed, got {a} and {b}")
    if not 0 <= t <= 1:
        raise ValueError(f"t must be from 0 to 1, got {t}")
    if t in (0.0, 1.0):
        return (a, b)[int(t)].fork()
    noisier = [s.current if s.partner is None else s.partner for s in (a, b)]
    one, two = (widened(x).flatten(1) for x in noisier)
    cosine = torch.nn.functional.cosine_similarity(one, two, dim=1).clamp(-1, 1)
    angle = cosine.acos()
    straight = angle.sin() < 1e-6  # parallel, or opposite: there the sphere has no shortest way
    safe = torch.where(straight, torch.ones_like(angle), angle)
    weights = [
        torch.where(straight, share, torch.sin(share * safe) / torch.sin(safe))
        for share in (1 - t, t)
    ]

    def mixed(x: Tensor | None, y: Tensor | None) -> Tensor | None:
        if x is None or y is None:
            return None
        form = (-1, *[1] * (x.ndim - 1))
        one, two = (w.reshape(form) * widened(z) for w, z in zip(weights, (x, y), strict=True))
        mixture = one + two
        return (mixture if x.is_floating_point() else mixture.round()).to(x)

    current = mixed(a.current, b.current)
    assert current is not None
    return replace(a, current=current, partner=mixed(a.partner, b.partner)).fork()


@dataclass(frozen=True, eq=False)
class Detection:
    """The result of `detect`, for each picture of the batch.

    Attributes:
        agreeing: elements of the code that have the sign of the key, int64 ``(B,)``.
        elements: elements of a code.
        p_value: the probability that a picture made without the key has as many or more, float64
            ``(B,)``; 0 below 1e-308.
        log10_p_value: its decimal logarithm, float64 ``(B,)``.
        code: the inversion of the pictures; None if `matches` compared codes alone.
    """

    agreeing: Tensor
    elements: int
    p_value: Tensor
    log10_p_value: Tensor
    code: Solution | None = None


def key_signs(key: str | bytes, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """The signs of a key, -1 and 1, float64 of `shape`: the bits of SHAKE-256 of its bytes.

    They are the same on every machine, and look random to everybody who does not have the key.
    """
    if not isinstance(key, str | bytes) or not key:
        raise TypeError(f"key must be text or bytes, and not empty, got {type(key).__name__}")
    data, n = key.encode() if isinstance(key, str) else key, math.prod(shape)
    stream = np.frombuffer(hashlib.shake_256(data).digest(-(-n // 8)), np.uint8)
    bits = torch.from_numpy(np.unpackbits(stream)[:n].astype(np.float64))
    return (2 * bits - 1).reshape(tuple(shape))


def mark(noise: Tensor, key: str | bytes) -> Tensor:
    """`noise` (B, ...) with the signs of a key: standard normal noise is so still, over all keys.

    As in Gaussian Shading (Yang et al. 2024, arXiv 2404.04956) the mark costs no quality: the size of
    each element is drawn, and its sign is a bit that nobody without the key can tell from a drawn one.
    All pictures of one key share the signs, and so their rough layout; use a key for each picture, or a
    few, where that matters.
    """
    return noise.abs() * key_signs(key, noise.shape[1:]).to(noise)


def matches(code: Tensor, key: str | bytes) -> Detection:
    """Compares the signs of codes (B, ...) with those of a key.

    Of a picture that does not depend on the key each sign agrees with probability 1/2, whatever the
    picture, since the signs of the key are independent of it: the number that agree is binomial, and the
    p-value is its tail.
    """
    signs = key_signs(key, code.shape[1:]).flatten()
    found = (code.detach().cpu().double().flatten(1) >= 0) == (signs > 0)
    agreeing, n = found.sum(1), signs.numel()
    logs = torch.stack([_log_tail(int(k), n) for k in agreeing])
    return Detection(agreeing, n, logs.exp(), logs / math.log(10))


def embed(
    solver: Solver,
    denoiser: Denoiser,
    noise: Tensor,
    sigmas: Sigmas,
    key: str | bytes,
    *,
    source: Arguments = None,
    progress: bool = False,
) -> Solution:
    """Samples pictures that carry a watermark: noise (B, ...) of the first level, by `mark`.

    `detect` finds it in the picture with the same denoiser and grid, if the solver's codes are near the
    noise they came from; the arguments `source` need not be known exactly. A photo cannot be marked in
    this way, for its code is what it is.
    """
    options: Any = {"extra_args": source, "progress": progress}
    return solver.sample(as_denoiser(denoiser), mark(noise, key), Grid.of(sigmas), **options)


def detect(
    solver: Solver,
    denoiser: Denoiser,
    picture: Tensor,
    sigmas: Sigmas,
    key: str | bytes,
    *,
    source: Arguments = None,
    progress: bool = False,
) -> Detection:
    """Inverts pictures (B, ...) at the last level, and compares their codes with a key by `matches`."""
    options: Any = {"extra_args": source, "progress": progress}
    code = solver.invert(as_denoiser(denoiser), picture, Grid.of(sigmas), **options)
    return replace(matches(code.x, key), code=code)


def as_denoiser(denoiser: Any) -> Any:
    """A pipeline of diffusers as a denoiser, and anything else as it is."""
    if hasattr(denoiser, "scheduler") and hasattr(denoiser, "components"):
        from .pipelines import PipelineDenoiser

        return PipelineDenoiser(denoiser)
    return denoiser


def guide(denoiser: Any, scale: float, target: Arguments, negative: Arguments) -> tuple[Any, Any]:
    """The denoiser under guidance, and its arguments."""
    if number("guidance", scale) == 1.0:
        return denoiser, target
    own = getattr(denoiser, "guided", None)
    if own is not None:  # a pipeline guides itself
        return denoiser, own(scale, target, negative)
    return ClassifierFreeGuidance(denoiser, scale), {
        "positive": target or {},
        "negative": negative or {},
    }


def first_level(solver: Solver, steps: int, strength: float) -> int:
    """The index of the level from which an edit of that strength is sampled, or a ValueError."""
    least = 1 if solver.coupled or solver.states == 1 else 2  # a pair of two levels is kept
    taken = round(number("strength", strength) * steps) if 0 < strength <= 1 else 0
    if taken < least:
        raise ValueError(
            f"strength must be from {min(1.0, least / steps):.3g} to 1 on this grid of {steps} steps, "
            f"of which an edit by {solver!s:.80} takes {least} at least, got {strength}"
        )
    return steps - taken


def _checked_mask(mask: Tensor, picture: Tensor) -> Tensor:
    """The mask in float64, on the device of the picture."""
    check_is(mask, Tensor, "mask must be a tensor of numbers from 0 to 1")
    try:
        mask.expand(picture.shape)
    except RuntimeError:
        raise ValueError(
            f"the mask has the shape {tuple(mask.shape)}, which does not fit the picture, "
            f"{tuple(picture.shape)}: latents need a mask of their own size"
        ) from None
    wide = torch.float32 if picture.device.type == "mps" else torch.float64
    mask = mask.to(picture.device, wide)
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise ValueError("the mask must hold numbers from 0, keep, to 1, edit")
    return mask


def _inverted_step_by_step(
    solver: Solver, denoiser: Any, picture: Tensor, grid: Grid, stop: int, options: Any, tick: Any
) -> tuple[Solution, dict[int, tuple[Tensor, Tensor | None]]]:
    """The inversion up to level `stop`, and the stored pairs that it passes, by index."""
    last, nfe = grid.steps, 0
    run = Run(solver, denoiser, picture, grid, None)
    warn_before_inverting(solver, run.plan, grid, run.state, stop, run.dtype)
    start = run.state.current
    passed: dict[int, tuple[Tensor, Tensor | None]] = {
        last: (start, start if solver.coupled else None)
    }
    solution: Any = picture
    for level in range(last - 1, stop - 1, -1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InversionWarning)  # that of the whole run was given
            solution = solver.invert(denoiser, solution, grid, stop=level, **options)
        state, nfe = solution.state, nfe + solution.nfe
        passed[state.index] = state.current, state.partner
        tick()
    return replace(solution, nfe=nfe), passed


def _blended(outside: Tensor | None, inside: Tensor | None, mask: Tensor) -> Tensor | None:
    """Stored states: `outside` to the bit where the mask is 0, `inside` where it is 1."""
    if outside is None or inside is None:
        return inside
    if inside.is_floating_point():
        return torch.lerp(outside, inside, mask.to(inside.dtype).expand_as(inside))
    return outside + ((inside - outside) * mask).round().to(inside.dtype)


def _log_tail(least: int, n: int) -> Tensor:
    """The natural logarithm of ``P(K >= least)`` for K binomial of n coins, float64."""
    k = torch.arange(least, n + 1, dtype=torch.float64)
    logs = math.lgamma(n + 1) - (k + 1).lgamma() - (n - k + 1).lgamma() - n * math.log(2)
    return logs.logsumexp(0).clamp(max=0.0)
