"""Helpers shared by the models."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

DenoiserFunction: TypeAlias = Callable[..., Tensor]
"""A callable ``denoiser(x, sigma, **extra_args)``; see `odesolvers.Denoiser`."""


def append_dims(v: Tensor, like: Tensor) -> Tensor:
    """Reshape `v` from (B,) to (B, 1, ..., 1), to broadcast against `like` of shape (B, ...)."""
    return v.reshape(v.shape[0], *([1] * (like.ndim - 1)))


def values_readable(x: Tensor) -> bool:
    """Whether the values of `x` can be read without a device synchronisation or a graph break.

    On a GPU and under `torch.compile` they cannot; denoisers then return NaN for invalid values
    instead of raising an error.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def check_levels(sigma: Tensor, low: float, high: float) -> Tensor:
    """Whether each level lies from `low` to `high`, (B,).

    Raises:
        ValueError: if the values are readable and one does not.
    """
    slack = 1e-2  # published levels are rounded, such as 0.029 for 0.02917
    inside = (sigma >= low * (1 - slack)) & (sigma <= high * (1 + slack))
    if values_readable(sigma) and not bool(inside.all()):
        raise ValueError(
            f"sigma must lie within the model's training levels, {low:.6g} to {high:.6g}, got "
            f"{sigma[~inside][0].item():.6g}; model.sigmas(n) is a grid that does, "
            f"karras_sigmas(n, {low:.6g}, {high:.6g}) another"
        )
    return inside


def check_device(x: Tensor, of_model: Tensor, **others: Tensor | None) -> None:
    """Check that a state and its conditions are on the same device as `of_model`.

    Raises:
        ValueError: naming both devices.
    """
    for name, tensor in {"x": x, **others}.items():
        if tensor is not None and tensor.device != of_model.device:
            raise ValueError(
                f"{name} is on {tensor.device}, the model on {of_model.device}: move one of them with "
                ".to(device)"
            )


def check_floating_dtype(dtype: object) -> None:
    """Check that a network can compute in `dtype`.

    Raises:
        TypeError: if `dtype` is not a floating point dtype.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating point dtype, got {dtype!r}")
