"""Flow-matching models (velocity prediction, as in SD3 and FLUX) as denoisers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from odesolvers.grids import Grid
from odesolvers.values import count, number, row

from .base import append_dims, check_floating_dtype, values_readable
from .formulas import evaluate

FLOW_SIGMA_MAX = 2.0**20
"""The finite noise level that represents flow time t = 1, where σ is infinite."""


class FlowDenoiser(nn.Module):
    """Converts a velocity network to a denoiser ``denoiser(x, sigma, **extra_args)``.

    A flow-matching model (Liu et al. 2022, arXiv 2209.03003; Esser et al. 2024, arXiv 2403.03206)
    is trained on ``z = (1 - t) x0 + t noise`` to predict ``v = noise - x0``. With::

        x = z / (1 - t),   σ = t / (1 - t),   t = σ / (1 + σ),   z = x / (1 + σ)

    this is ``x = x0 + σ noise``, and ``D(x, σ) = z - t v(z, t)``. An Euler step in x then equals the
    model's own step ``z' = z + (t' - t) v``. `odesolvers.FlowEuler` is the recommended method: with its
    state scale ``s = 1 / (1 + σ)``, `BDIA` applies γ to z.

    Sampling starts at t = 1, where σ is infinite and z is pure noise. `FLOW_SIGMA_MAX`, 2^20,
    represents this level: the network is evaluated at t = 1, ``x = (1 + σ) z`` preserves all digits of
    z, and the error of the first step is 2^-20 of the velocity, comparable to the float32 rounding
    errors of a run::

        sigmas = flow_sigmas(flow_times(28, shift=3.0))
        x = torch.randn(1, 16, 64, 64) * (1 + sigmas[0])
        solution = BDIA(FlowEuler()).sample(FlowDenoiser(velocity), x, sigmas)

    Networks with ``noise_at=0`` count time from noise to data (Lipman et al. 2023, arXiv 2210.02747;
    torchcfm, flow_matching, SiT): trained on ``z = τ x0 + (1 - τ) noise`` to predict ``x0 - noise``,
    they see τ = 1 - t, and v is minus their output. Levels, grids and solvers are the same.

    Args:
        velocity: ``velocity(z, t, **extra_args) -> dz/dt`` with `z` of shape ``(B, ...)`` and `t` in
            [0, 1] of shape ``(B,)``. The SD3 transformer of diffusers expects times from 0 to 1000:
            ``lambda z, t, **args: net(z, timestep=1000 * t, return_dict=False, **args)[0]``. A network
            that predicts minus dz/dt of its own time is ``lambda z, t: -net(z, t)``.
        dtype: the dtype of `z` in calls of the network; by default that of the state. Times are
            float64 beside float64 and float32 otherwise.
        noise_at: the network's own time of pure noise, 1 or 0.

    Raises:
        TypeError: if `velocity` is not callable or `dtype` is not a floating point dtype.
        ValueError: if `noise_at` is neither 1 nor 0.
    """

    prediction = "flow_prediction"
    sigma_min, sigma_max = 0.0, FLOW_SIGMA_MAX

    def __init__(
        self,
        velocity: Callable[..., Any],
        dtype: torch.dtype | None = None,
        *,
        noise_at: Literal[0, 1] = 1,
    ) -> None:
        super().__init__()
        if not callable(velocity):
            raise TypeError(f"velocity must be callable, got {type(velocity).__name__}")
        if dtype is not None:
            check_floating_dtype(dtype)
        if noise_at not in (0, 1):
            raise ValueError(f"noise_at must be 1 or 0, the time of pure noise, got {noise_at!r}")
        self.velocity = velocity
        self.dtype = dtype
        self.noise_at = noise_at

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        """The posterior mean ``E[x0 | x]``.

        Args:
            x: noisy states ``(B, ...)``.
            sigma: their noise levels ``(B,)``, from 0 to `FLOW_SIGMA_MAX`. On a GPU they cannot be
                checked without a synchronisation: a level out of range gives NaN, which the solvers
                report with the level.
            extra_args: further arguments of the network.

        Returns:
            Denoised states with the shape and dtype of `x`.

        Raises:
            TypeError: if the network does not return a tensor.
            ValueError: if (on the CPU) a level is out of range, or if the shape of the velocity is not
                that of z.
        """
        inside = (sigma >= 0) & (sigma <= FLOW_SIGMA_MAX)
        if values_readable(sigma) and not bool(inside.all()):
            raise ValueError(
                f"sigma must lie between 0 and FLOW_SIGMA_MAX = {FLOW_SIGMA_MAX:.0f}, which stands "
                f"for t = 1, got {sigma[~inside][0].item():.6g}; flow_sigmas makes levels of times"
            )
        t = torch.where(inside, flow_times_of(sigma), torch.nan)
        z = x / append_dims(1 + sigma, x)
        flipped = self.noise_at == 0
        velocity = evaluate(
            self.velocity, z, 1 - t if flipped else t, self.dtype or x.dtype, extra_args
        )
        return (z - append_dims(-t if flipped else t, x) * velocity).to(x.dtype)

    def sigmas(self, n: int, *, shift: float = 1.0) -> Tensor:
        """A grid of `n` steps from t = 1 to 0, ``flow_sigmas(flow_times(n, shift=shift))``."""
        return flow_sigmas(flow_times(n, shift=shift))


def flow_sigmas(times: Tensor | Sequence[float]) -> Tensor:
    """The noise levels ``σ = t / (1 - t)`` of flow times.

    After ``scheduler.set_timesteps(...)``, ``flow_sigmas(scheduler.sigmas)`` is the grid of diffusers'
    `FlowMatchEulerDiscreteScheduler`, whose `sigmas` are flow times.

    Args:
        times: strictly decreasing, in [0, 1].

    Returns:
        float64 tensor with the shape of `times` on the CPU; t = 1 becomes `FLOW_SIGMA_MAX`.

    Raises:
        ValueError: if the times do not decrease strictly or lie outside [0, 1].
    """
    t = row("times", times, torch.float64)
    if len(t) > 1 and bool((t.diff() > 0).all()):
        raise ValueError(
            f"flow times must fall from 1, noise, to 0, and these rise from {t[0]:.6g}: of a scheduler "
            "with invert_sigmas=True take flow_sigmas(1 - scheduler.sigmas), with the network in "
            "FlowDenoiser(..., noise_at=0)"
        )
    Grid.of(t)
    if t[0] > 1:
        raise ValueError(f"flow times must lie in [0, 1], got {t[0].item():.6g}; 1 is noise")
    return (t / (1 - t)).clamp(max=FLOW_SIGMA_MAX)


def flow_times_of(sigmas: Tensor) -> Tensor:
    """The flow times ``t = σ / (1 + σ)`` of noise levels; `FLOW_SIGMA_MAX` becomes t = 1."""
    return torch.where(sigmas < FLOW_SIGMA_MAX, sigmas / (1 + sigmas), 1.0)


def flow_times(
    n: int, *, shift: float = 1.0, start: float = 1.0, num_train_timesteps: int = 1000
) -> Tensor:
    """The times of diffusers' `FlowMatchEulerDiscreteScheduler` for `n` steps, including the final 0.

    They are evenly spaced before the shift ``t → shift t / (1 + (shift - 1) t)`` (Esser et al. 2024,
    arXiv 2403.03206, section 5.3.2). Like the scheduler, this function shifts the lowest training time
    twice.

    Args:
        n: number of steps.
        shift: shift of the model; 3 for SD3, 1 for none. If it depends on the image size (FLUX), pass
            ``exp(mu)`` or use the scheduler's own times.
        start: the first time. 1 suits `FlowEuler`, `DDIM` and other methods whose state scale
            decreases as 1 / σ. Methods in the unscaled state (`HeunEDM`, `Midpoint`, the Runge-Kutta
            methods) are inaccurate in the step from σ = 2^20: start them at about 0.99.
        num_train_timesteps: length of the training schedule.

    Returns:
        float64 tensor of shape ``(n + 1,)``, decreasing.

    Raises:
        ValueError: if an argument is out of range.
    """
    n, shift, start = count("n", n), number("shift", shift), number("start", start)
    if n < 1 or not 0 < start <= 1 or not (shift > 0 and math.isfinite(shift)):
        raise ValueError(
            f"needs n >= 1, 0 < start <= 1 and shift > 0, got n = {n}, start = {start}, shift = {shift}"
        )

    def shifted(t: Tensor) -> Tensor:
        return shift * t / (1 + (shift - 1) * t)

    lowest = shifted(torch.tensor(1 / num_train_timesteps, dtype=torch.float64, device="cpu"))
    first = start / (shift - (shift - 1) * start)  # the shift maps it to `start`
    if n > 1 and lowest.item() >= first:
        raise ValueError(
            f"start = {start} is not above the lowest time, {shifted(lowest).item():.6g}"
        )
    t = shifted(torch.linspace(first, lowest.item(), n, dtype=torch.float64, device="cpu"))
    return torch.cat([t, t.new_zeros(1)])
