"""Noise levels of the schedulers of diffusers, and the evaluations of a network at them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from odesolvers.models.schedules import (
    DiscreteSchedule,
    FlowSchedule,
    SampledSchedule,
    Schedule,
    levels_visited,
    warn_of_first,
)

from ..approximators import DDIM, FlowEuler
from ..grids import Grid, sigmas_from_alphas_cumprod
from ..values import count, row


class Call(NamedTuple):
    """One evaluation of the network, at a noise level σ.

    Latents are ``z = scale · x``, the network gets ``input · z``, and with its output F the denoised
    state is ``D = skip · x + out · F``.
    """

    sigma: float
    timestep: float
    scale: float
    input: float
    skip: float
    out: float


def latent_scale(schedule: Schedule, sigma: float) -> float:
    """The factor s(σ) of latents, ``z = s(σ) x``: 1 at the level 0."""
    return (FlowEuler() if isinstance(schedule, FlowSchedule) else DDIM()).scale(sigma)


def calls_at(
    schedule: Schedule, sigmas: Sequence[float], timesteps: Mapping[float, float]
) -> tuple[Call, ...]:
    """The evaluations at some levels, with the timesteps of those for which they are given.

    Raises:
        ValueError: if a level is outside of the training levels.
    """
    sigma = torch.tensor(sigmas, dtype=torch.float64)
    one, inputs = sigma.new_ones(len(sigma), 1), list[Tensor]()

    def zero(z: Tensor, t: Tensor) -> Tensor:
        inputs.append(z)
        return torch.zeros_like(z)

    # The denoised state is affine in x and F: two values tell the coefficients.
    skip = schedule.denoise(zero, one, sigma)
    out = schedule.denoise(lambda z, t: torch.ones_like(z), torch.zeros_like(one), sigma)
    columns = (
        column.flatten().tolist() for column in (schedule.timestep(sigma), *inputs, skip, out)
    )
    return tuple(
        Call(level, timesteps.get(level, t), scale, z / scale, c_skip, c_out)
        for level, t, z, c_skip, c_out in zip(sigmas, *columns, strict=True)
        for scale in [latent_scale(schedule, level)]
    )


def grid_of(
    base: Any,
    schedule: Schedule,
    n: int | None,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
    mu: float | None,
) -> tuple[Grid, dict[float, float]]:
    """The grid of a scheduler of diffusers, and the timesteps that it has for levels of the grid.

    Args:
        base: the scheduler; its timesteps are set.
        schedule: the schedule that it describes.
        n: number of steps; None where levels are given.
        timesteps: as for the scheduler, or whole training timesteps for one that has no `sigmas`, such
            as `DDIMScheduler`.
        sigmas: as for the scheduler, or noise levels with the last one of the run.
        mu: as for the scheduler.

    Raises:
        TypeError: if `n`, or a timestep for a scheduler without `sigmas`, is not an integer.
        ValueError: if the levels do not decrease, are fewer than `n` or outside of the training levels.
    """
    listed = timesteps is not None or sigmas is not None
    if n is not None or not listed:
        n = count("num_inference_steps", n)
        if n < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {n}")
    if not hasattr(base, "sigmas"):
        assert isinstance(schedule, DiscreteSchedule)
        if sigmas is not None:
            return Grid.of(sigmas), {}
        if timesteps is not None:
            whole = [count("a timestep", t) for t in timesteps]
            alphas, end = schedule.alphas_cumprod, schedule.final
            return Grid.of(sigmas_from_alphas_cumprod(alphas, whole, final=end)), {}
        return Grid.of(schedule.sigmas(count("num_inference_steps", n), None, None)), {}
    given = {"timesteps": timesteps, "sigmas": sigmas, "mu": mu}
    _check_list("timesteps", timesteps, schedule)
    _check_list("sigmas", sigmas, schedule)
    base.set_timesteps(n, device="cpu", **{k: v for k, v in given.items() if v is not None})
    levels, repeated = levels_visited(base.sigmas)
    if n is not None and len(levels) - 1 < n - repeated:
        raise ValueError(
            f"{type(base).__name__} has {len(levels)} different levels for num_inference_steps = {n}: "
            "take fewer steps"
        )
    if n is not None and not listed and isinstance(schedule, DiscreteSchedule):
        warn_of_first(n, int(schedule.timestep(levels[:1])), len(schedule.alphas_cumprod))
    if isinstance(schedule, SampledSchedule):
        levels = schedule.levels(levels)
    times = torch.unique_consecutive(base.timesteps).tolist()
    if not len(levels) - 1 <= len(times) <= len(levels):  # there are others in between
        times = []
    return Grid.of(levels), dict(zip(levels.tolist(), times, strict=False))


def _check_list(name: str, values: Sequence[float] | None, schedule: Schedule) -> None:
    """Raises a ValueError for timesteps or sigmas that diffusers would clamp or merge."""
    if values is None:
        return
    listed = row(name, values, torch.float64)
    if not bool((listed[1:] < listed[:-1]).all()):
        raise ValueError(f"{name} must decrease, got {listed.tolist()}")
    last = None
    if isinstance(schedule, DiscreteSchedule):
        last = len(schedule.alphas_cumprod) - 1
    elif isinstance(schedule, FlowSchedule):
        last = schedule.steps
    if (
        name == "timesteps"
        and last is not None
        and not bool(((listed >= 0) & (listed <= last)).all())
    ):
        raise ValueError(f"timesteps must be between 0 and {last}, got {listed.tolist()}")
