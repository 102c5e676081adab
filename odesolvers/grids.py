"""Grids of noise levels: built once, walked both ways, never recomputed.

The functions return 1-D float64 tensors on the CPU, decreasing, in k-diffusion's convention:
``n`` noise levels and then 0, so that ``n`` is the number of steps. Levels of a model with a
discrete schedule come from `sigmas_from_alphas_cumprod`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .values import count, number, row

Sigmas: TypeAlias = "Grid | Tensor | Sequence[float]"
"""The types that `Grid.of` reads; numpy arrays are among them."""


@dataclass(frozen=True)
class Grid:
    """A validated grid: finite, strictly decreasing noise levels, the last of them 0 or more.

    Level ``k`` is ``levels[k]``, as in k-diffusion: sampling runs from level 0, the noisiest, to
    level ``n``. Step ``k`` leads from level ``k`` to level ``k + 1``.
    """

    levels: tuple[float, ...]

    def __post_init__(self) -> None:
        if type(self.levels) is not tuple or any(type(s) is not float for s in self.levels):
            object.__setattr__(self, "levels", _levels(self.levels))
        s = self.levels
        if len(s) >= 2 and s[0] < math.inf and s[-1] >= 0 and all(map(operator.gt, s, s[1:])):
            return
        if len(self.levels) < 2:
            raise ValueError(
                f"a grid needs at least two noise levels (one step), got {len(self.levels)}"
            )
        for k, sigma in enumerate(self.levels):
            if not math.isfinite(sigma) or sigma < 0:
                raise ValueError(
                    f"sigmas must be finite and not negative, got sigmas[{k}] = {sigma}"
                )
        for k, (sigma, target) in enumerate(self.intervals()):
            if sigma <= target:
                raise ValueError(
                    "sigmas must decrease strictly, from noise to data, got "
                    f"sigmas[{k}] = {sigma:.6g} and sigmas[{k + 1}] = {target:.6g}"
                    + ("; flip it with sigmas.flip(0)" if self.levels[0] < self.levels[-1] else "")
                )

    @classmethod
    def of(cls, sigmas: Sigmas | None, own: tuple[float, ...] | None = None) -> Grid:
        """Reads a grid given as a tensor, an array or a sequence of numbers.

        `own` are the levels of a state. They stand for `sigmas` that are left out, or are a copy of
        them in float32.
        """
        if isinstance(sigmas, Grid) and own is None:
            return sigmas
        if sigmas is None and own is None:
            raise TypeError("sigmas, the grid of noise levels, is needed: only a State has its own")
        given: Any = (
            own if sigmas is None else sigmas.levels if isinstance(sigmas, Grid) else sigmas
        )
        levels = _levels(given)
        if own is not None and len(own) == len(levels) and own != levels:
            a, b = (np.array(numbers, np.float32) for numbers in (own, levels))
            levels = own if np.array_equal(a, b) else levels
        return cls(levels)

    @property
    def steps(self) -> int:
        """The number of steps, one less than the number of levels."""
        return len(self.levels) - 1

    def intervals(self) -> Iterator[tuple[float, float]]:
        """The pairs (σ_k, σ_{k+1}) in sampling order."""
        return pairwise(self.levels)


def karras_sigmas(
    n: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    *,
    append_zero: bool = True,
) -> Tensor:
    """Levels evenly spaced in ``sigma^(1/rho)`` (Karras et al. 2022, equation 5).

    Equal to k-diffusion's `get_sigmas_karras` and to NVlabs' `t_steps`, in float64.

    Args:
        n: noise levels above 0.
        sigma_min: the lowest of them.
        sigma_max: the highest.
        rho: how strongly the levels crowd towards `sigma_min`; 1 is evenly spaced.
        append_zero: end with the level 0.

    Returns:
        float64 tensor of shape ``(n + 1,)``, or ``(n,)`` without the zero.

    Raises:
        ValueError: if `n`, the range or `rho` is not usable.
    """
    n, sigma_min, sigma_max, rho = _checked_range(n, sigma_min, sigma_max, rho)
    try:
        top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    except OverflowError:
        top = bottom = math.inf
    levels = (top + _ramp(n) * (bottom - top)) ** rho
    if not (top > bottom and abs(levels[-1].item() - sigma_min) < 1e-3 * sigma_min):
        raise ValueError(
            f"rho = {rho} is out of range: levels to the power of 1 / rho, {bottom:.3g} to {top:.3g}, "
            "are beyond the precision of float64"
        )
    return _finish(levels, append_zero)


def exponential_sigmas(
    n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, *, append_zero: bool = True
) -> Tensor:
    """Levels evenly spaced in ``log sigma``; k-diffusion's `get_sigmas_exponential`.

    Arguments, result and errors as for `karras_sigmas`.
    """
    return polyexponential_sigmas(n, sigma_min, sigma_max, rho=1.0, append_zero=append_zero)


def polyexponential_sigmas(
    n: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 1.0,
    *,
    append_zero: bool = True,
) -> Tensor:
    """Levels polynomial in ``log sigma``; k-diffusion's `get_sigmas_polyexponential`.

    ``rho > 1`` crowds the levels towards `sigma_min`. Arguments, result and errors as for
    `karras_sigmas`.
    """
    n, sigma_min, sigma_max, rho = _checked_range(n, sigma_min, sigma_max, rho)
    top, bottom = math.log(sigma_max), math.log(sigma_min)
    return _finish(torch.exp((1 - _ramp(n)) ** rho * (top - bottom) + bottom), append_zero)


def vp_sigmas(
    n: int,
    beta_d: float = 19.9,
    beta_min: float = 0.1,
    eps_s: float = 1e-3,
    *,
    append_zero: bool = True,
) -> Tensor:
    """Levels of the continuous variance-preserving schedule; k-diffusion's `get_sigmas_vp`.

    ``sigma(t)^2 = exp(beta_d t^2 / 2 + beta_min t) - 1`` at ``n`` times evenly spaced from 1 to
    `eps_s` (Song et al. 2021, in the form of Karras et al. 2022, table 1).

    Result and errors as for `karras_sigmas`.
    """
    n, eps_s = count("n", n), number("eps_s", eps_s)
    beta_d, beta_min = number("beta_d", beta_d), number("beta_min", beta_min)
    if n < 2 or not 0 < eps_s < 1:
        raise ValueError(f"needs n >= 2 levels and 0 < eps_s < 1, got n = {n}, eps_s = {eps_s}")
    t = 1 + _ramp(n) * (eps_s - 1)
    return _finish(torch.sqrt(torch.expm1(beta_d * t**2 / 2 + beta_min * t)), append_zero)


def ddim_timesteps(
    n: int,
    num_train_timesteps: int = 1000,
    *,
    spacing: Literal["leading", "trailing", "linspace"] = "leading",
    offset: int = 0,
) -> Tensor:
    """The ``n`` timesteps at which diffusers' `DDIMScheduler` evaluates, in decreasing order.

    Args:
        n: number of steps.
        num_train_timesteps: length of the model's schedule.
        spacing: `timestep_spacing` of the scheduler; how published pipelines choose among
            them is in Lin et al. 2023 (arXiv 2305.08891), table 2.
        offset: `steps_offset` of the scheduler, added under "leading" only; 1 for Stable Diffusion.

    Returns:
        int64 tensor of shape ``(n,)``.

    Raises:
        ValueError: if `n` does not fit the schedule or `spacing` is unknown.
    """
    n, num_train_timesteps = count("n", n), count("num_train_timesteps", num_train_timesteps)
    offset = count("offset", offset)
    if not 1 <= n <= num_train_timesteps:
        raise ValueError(
            f"n must be between 1 and num_train_timesteps = {num_train_timesteps}, got {n}"
        )
    steps: npt.NDArray[np.generic]
    if spacing == "leading":
        steps = np.arange(n)[::-1] * (num_train_timesteps // n) + offset
    elif spacing == "trailing":
        steps = np.round(np.arange(num_train_timesteps, 0, -num_train_timesteps / n))[:n] - 1
    elif spacing == "linspace":
        steps = np.linspace(0, num_train_timesteps - 1, n).round()[::-1]
    else:
        raise ValueError(f"spacing must be 'leading', 'trailing' or 'linspace', got {spacing!r}")
    return torch.from_numpy(steps.astype(np.int64))


def sigmas_from_alphas_cumprod(
    alphas_cumprod: Tensor | Sequence[float],
    timesteps: Tensor | Sequence[int],
    *,
    final: Literal["zero", "first"] = "zero",
) -> Tensor:
    """The levels ``sqrt((1 - ᾱ_t) / ᾱ_t)`` of a discrete schedule at chosen timesteps.

    With `ddim_timesteps` each step starts at a timestep of diffusers' `DDIMScheduler` and ends where the
    next one starts. `DDIMScheduler` itself ends each step ``T // n`` timesteps lower, which is another
    level where the spacing is "trailing" or "linspace" and n does not divide T.

    Args:
        alphas_cumprod: ᾱ of every training timestep, shape ``(T,)``, in (0, 1].
        timesteps: decreasing integers in [0, T), one for each step.
        final: the level after the last step: 0 (`set_alpha_to_one=True`) or that of timestep 0
            (`set_alpha_to_one=False`, as Stable Diffusion has it).

    Returns:
        float64 tensor of shape ``(len(timesteps) + 1,)``.

    Raises:
        ValueError: if a timestep is outside the schedule, the timesteps do not decrease, or the
            last is 0 under ``final="first"`` (a step of length zero: drop that timestep).
    """
    alphas = row("alphas_cumprod", alphas_cumprod, torch.float64)
    steps = row("timesteps", timesteps)
    if alphas.ndim != 1 or not bool(((alphas > 0) & (alphas <= 1)).all()):
        raise ValueError("alphas_cumprod must be one row of numbers in (0, 1]")
    if steps.is_floating_point() or steps.ndim != 1 or len(steps) == 0:
        raise ValueError(
            f"timesteps must be one row of integers, got {steps.dtype} of shape "
            f"{tuple(steps.shape)}"
        )
    steps = steps.long()  # 8 bits would be read as a mask
    low, high = int(steps.min()), int(steps.max())
    if low < 0 or high >= len(alphas):
        raise ValueError(
            f"timesteps must lie in [0, {len(alphas)}), got {low} to {high}; where an offset leads past "
            "the last, take fewer steps or spacing='trailing'"
        )
    if final not in ("zero", "first"):
        raise ValueError(f"final must be 'zero' or 'first', got {final!r}")
    if final == "first" and int(steps[-1]) == 0:
        raise ValueError(
            "the last timestep is 0 and final='first' ends there too, a step of length zero: "
            "leave out the last timestep, or use ddim_timesteps(..., offset=1)"
        )
    levels = torch.sqrt((1 - alphas) / alphas)
    sigmas = torch.cat([levels[steps], levels[:1] if final == "first" else levels.new_zeros(1)])
    Grid.of(sigmas)
    return sigmas


def midpoint_sigmas(sigmas: Sigmas) -> Tensor:
    """The first level, the midpoints of all steps, and the last: the grid of `MALI`.

    Args:
        sigmas: a grid of n steps.

    Returns:
        float64 tensor of shape ``(n + 2,)``.

    Raises:
        ValueError: if `sigmas` is no grid.
    """
    grid = Grid.of(sigmas)
    middles = ((sigma + target) / 2 for sigma, target in grid.intervals())
    return row("sigmas", [grid.levels[0], *middles, grid.levels[-1]], torch.float64)


def level_dtype(state: torch.dtype) -> torch.dtype:
    """The dtype of noise levels beside a state: half precision would not resolve them."""
    return torch.float64 if state == torch.float64 else torch.float32


def _levels(given: Sigmas) -> tuple[float, ...]:
    """Noise levels of any kind as numbers of Python, or an error."""
    line = row("sigmas", given, torch.float64)
    if line.ndim != 1:
        raise ValueError(f"sigmas must be one row of noise levels, got shape {tuple(line.shape)}")
    return tuple(line.tolist())


def _ramp(n: int) -> Tensor:
    """0 to 1 in `n` numbers."""
    return torch.linspace(0, 1, n, dtype=torch.float64, device="cpu")


def _finish(sigmas: Tensor, append_zero: bool) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)]) if append_zero else sigmas


def _checked_range(
    n: int, sigma_min: float, sigma_max: float, rho: float
) -> tuple[int, float, float, float]:
    """The arguments of a grid as numbers of Python, or an error."""
    n, rho = count("n", n), number("rho", rho)
    sigma_min, sigma_max = number("sigma_min", sigma_min), number("sigma_max", sigma_max)
    if not 0 < rho < math.inf:
        raise ValueError(f"rho must be positive, got {rho}")
    if n < 2:
        raise ValueError(f"needs n >= 2 noise levels above 0, got {n}")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"needs 0 < sigma_min < sigma_max, got sigma_min = {sigma_min}, sigma_max = {sigma_max}"
        )
    return n, sigma_min, sigma_max, rho
