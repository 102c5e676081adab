"""Grids chosen by the error of a step, to be walked both ways by any solver."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from .approximators import Dopri5, Exponential
from .checks import check_is, check_output, check_start, refuse_call, version
from .formula import trace
from .grids import level_dtype
from .run import Denoiser, modes
from .values import count, number, row

SAFETY: Final = 0.9
SHRINK, GROW = 0.2, 10.0
"""The least and the most that one step is of the one before it."""


def adaptive_sigmas(
    denoiser: Denoiser,
    x: Tensor,
    sigma: float,
    target: float,
    *,
    approximator: Dopri5 | Exponential = Dopri5(),
    rtol: float = 1e-3,
    atol: float = 1e-3,
    first_step: float | None = None,
    beta: float = 0.04,
    max_steps: int = 1000,
    extra_args: Mapping[str, Any] | None = None,
) -> Tensor:
    """The noise levels at which `approximator` solves the flow from `sigma` to `target` to a tolerance.

    Each step estimates its error by the embedded method of order 4, and is taken if the root mean square
    of ``error / (atol + rtol max(|x|, |x'|))`` is at most 1 for every element of the batch; the worst is
    r. The next step is ``0.9 r^{-(1/5 - 3/4 beta)} r_before^beta`` as long, within 0.2 and 10: the
    proportional-integral controller of Hairer and Wanner (1996, IV.2). ``beta = 0`` is scipy's `RK45`.

    A step that depended on the state could not be undone, as the way back would choose another. So the
    grid is chosen first, on states like those of the run, and is then the same both ways, for
    ``McCallumFoster(Dopri5())``, ``Rex(Dopri5())`` or any other solver.

    Args:
        denoiser: as for `Solver.sample`.
        x: floating point tensor ``(B, ...)`` at level `sigma`, not modified; a few states are enough.
        sigma: the level to start from, above 0.
        target: the level to end at, above 0: lower to go down, or higher to go up.
        approximator: ``Dopri5()``, with steps in σ, or ``Exponential(Dopri5())``, as in `Rex`, in 1/σ.
        rtol: the relative tolerance of a step.
        atol: the absolute tolerance of a step, in the units of x.
        first_step: the length of the first step, in σ or 1/σ; by default a hundredth of the way.
        beta: how much the error of the step before counts; 0.04 to 0.08 avoids rejected steps.
        max_steps: the most steps to try.
        extra_args: keyword arguments for every call of the denoiser.

    Returns:
        float64 tensor of decreasing levels, from the higher of `sigma` and `target` to the lower one.
        Each step that is tried costs six evaluations, and the run one more.

    Raises:
        TypeError, ValueError, FloatingPointError: as `Solver.sample`; ValueError also if an argument is
            not usable, or the target is not reached in `max_steps`.
    """
    if not isinstance(approximator, Exponential):
        check_is(approximator, Dopri5, "the approximator must be Dopri5() or Exponential(Dopri5())")
    if not callable(denoiser) or not (extra_args is None or isinstance(extra_args, Mapping)):
        refuse_call(denoiser, extra_args)
    start, end = number("sigma", sigma), number("target", target)
    rtol, atol, beta = number("rtol", rtol), number("atol", atol), number("beta", beta)
    if not (0 < start < math.inf and 0 < end < math.inf and start != end):
        raise ValueError(
            f"sigma and target must be two levels above 0, got {start} and {end}: append the level 0"
        )
    if not (0 <= rtol < math.inf and 0 <= atol < math.inf and rtol + atol > 0 and 0 <= beta <= 0.2):
        raise ValueError(
            "needs tolerances that are not both 0, and beta in [0, 0.2], got "
            f"rtol = {rtol}, atol = {atol}, beta = {beta}"
        )

    def time(level: float) -> float:
        """The variable of the approximator, or back."""
        return 1 / level if isinstance(approximator, Exponential) else level

    t, last = time(start), time(end)
    whole = abs(last - t)
    h = whole / 100 if first_step is None else number("first_step", first_step)
    if not h > 0:
        raise ValueError(f"first_step must be above 0, got {h}")
    levels, before, rejected = [start], 1e-4, False
    x = check_start(x).detach().clone()
    with modes(False, denoiser) as (denoiser,):
        output: Tensor | None = None
        for _ in range(count("max_steps", max_steps)):
            h = min(h, abs(last - t))
            ends = h == abs(last - t)
            there = last if ends else t + math.copysign(h, last - t)
            level = end if ends else time(there)
            reached, error, outputs = _attempt(
                approximator, denoiser, x, levels, level, output, extra_args
            )
            output = outputs[0]  # a step that is tried again begins with the same evaluation
            scale = atol + rtol * torch.maximum(x.abs(), reached.abs())
            r = float((error / scale).flatten(1).square().mean(1).amax().sqrt())
            if r <= 1:
                x, output, t = reached, outputs[-1], there
                levels.append(level)
                if ends:
                    return row("sigmas", sorted(levels, reverse=True), torch.float64)
            factor = (
                SAFETY * max(r, 1e-10) ** -(0.2 - 0.75 * beta) * (before**beta if r <= 1 else 1)
            )
            factor = min(max(factor, SHRINK), 1.0 if rejected or r > 1 else GROW)
            h, before, rejected = h * factor, max(r, 1e-4) if r <= 1 else before, not r <= 1
    raise ValueError(
        f"{max_steps} steps of {approximator} led from sigma = {start:.6g} to {levels[-1]:.6g} only: "
        "raise the tolerance, max_steps or the lower level"
    )


def _attempt(
    approximator: Dopri5 | Exponential,
    denoiser: Denoiser,
    x: Tensor,
    levels: list[float],
    target: float,
    first: Tensor | None,
    extra_args: Mapping[str, Any] | None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """One step from the last of `levels`: its end, the estimate of its error, and all outputs.

    `first` is the first of the outputs, if it is known. The last is that at the end of the step.
    """
    k, sigma = len(levels) - 1, levels[-1]
    calls, (_, error) = trace(lambda z, D: approximator.embedded(z, sigma, target, D))
    values, point = [x], x
    for call in calls:
        point = call.point.of(values).to(x.dtype) if len(values) > 1 else x
        if len(values) == 1 and first is not None:
            values.append(first)
            continue
        before = version(point)
        level = torch.full(x.shape[:1], call.sigma, dtype=level_dtype(x.dtype), device=x.device)
        output = denoiser(point, level, **(extra_args or {}))
        check_output(output, point, before, values[1:], call.sigma, k, finite=True)
        values.append(output)
    return point, error.of(values), values[1:]
