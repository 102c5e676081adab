"""Problems with solutions that this project did not compute: closed forms, and scipy's solver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from odesolvers.extend import Call, Combination, Denoise, trace
from odesolvers.models import Gaussian, GaussianMixture


def gaussian() -> Gaussian:
    """Five dimensions of different width; its flow is `Gaussian.flow`."""
    return Gaussian(mean=torch.linspace(-0.5, 0.5, 5), std=torch.linspace(0.3, 1.5, 5))


def mixture() -> GaussianMixture:
    """Three overlapping components in three dimensions: smooth, not linear."""
    means = torch.tensor([[1.0, 0.0, -0.5], [-1.0, 0.5, 0.0], [0.2, -1.0, 1.0]])
    return GaussianMixture(means, stds=torch.tensor([0.6, 0.8, 1.0]))


def smooth(x: Tensor, sigma: Tensor) -> Tensor:
    """A denoiser that is not linear."""
    s = sigma.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    return torch.tanh(x / (1 + s * s)) * 0.8


def noise(*shape: int, sigma: float = 1.0, seed: int = 0, dtype: Any = torch.float64) -> Tensor:
    """`sigma` times a reproducible normal draw."""
    generator = torch.Generator().manual_seed(seed)
    return (sigma * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def reference(denoiser: Callable[..., Tensor], x: Tensor, sigma: float, target: float) -> Tensor:
    """The probability-flow ODE solved by scipy's eighth-order method to 13 digits."""

    def slope(level: float, flat: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        state = torch.from_numpy(flat.reshape(x.shape))
        levels = torch.full(x.shape[:1], level, dtype=torch.float64)
        return ((state - denoiser(state, levels)) / level).numpy().ravel()

    run = solve_ivp(slope, (sigma, target), x.numpy().ravel(), "DOP853", rtol=1e-13, atol=1e-13)
    return torch.from_numpy(run.y[:, -1].reshape(x.shape))


def moved(
    denoiser: Callable[..., Tensor], calls: Sequence[Call], x: Tensor, result: Combination
) -> Tensor:
    """The combination `result` of `x` and of the outputs of `calls`, as a tensor."""
    values = [x]
    for point, sigma in calls:
        y = sum(c * values[k] for k, c in point.terms.items())
        values.append(denoiser(y, torch.full(x.shape[:1], sigma, dtype=x.dtype)))
    return sum((c * values[k] for k, c in result.terms.items()), torch.zeros_like(x))


def increment(
    method: Any, denoiser: Callable[..., Tensor], x: Tensor, sigma: float, target: float
) -> Tensor:
    """``Δ(σ → τ | x)`` of a one-step method, as a tensor."""

    def formula(x: Combination, D: Denoise) -> Combination:
        found: Combination = method.increment_to(x, sigma, target, D)
        return found

    calls, result = trace(formula)
    return moved(denoiser, calls, x, result)


def both_increments(
    method: Any,
    denoiser: Callable[..., Tensor],
    x: Tensor,
    sigma: float,
    ahead: float,
    behind: float,
) -> tuple[Tensor, Tensor]:
    """The two increments that a step of `BDIA` is made of, as tensors."""

    def formula(x: Combination, D: Denoise) -> tuple[Combination, Combination]:
        found: tuple[Combination, Combination] = method.both_increments(x, sigma, ahead, behind, D)
        return found

    calls, (to_ahead, to_behind) = trace(formula)
    return moved(denoiser, calls, x, to_ahead), moved(denoiser, calls, x, to_behind)


@dataclass
class Recorder:
    """Passes calls on to a denoiser and keeps where they were made."""

    denoiser: Callable[..., Tensor]

    def __post_init__(self) -> None:
        self.points: list[Tensor] = []
        self.sigmas: list[float] = []
        self.extra_args: list[dict[str, Any]] = []

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        assert sigma.shape == x.shape[:1]
        assert bool((sigma == sigma[0]).all())
        self.points.append(x.clone())
        self.sigmas.append(sigma[0].item())
        self.extra_args.append(extra_args)
        return self.denoiser(x, sigma, **extra_args)


def relative_error(x: Tensor, y: Tensor) -> float:
    """``|x - y| / |y|`` over all elements, in float64."""
    return float((x.double() - y.double()).norm() / y.double().norm())
