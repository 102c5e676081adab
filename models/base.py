"""What the models share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

DenoiserFunction: TypeAlias = Callable[..., Tensor]
"""``denoiser(x, sigma, **extra_args)``; see `odesolvers.Denoiser`."""


def append_dims(v: Tensor, like: Tensor) -> Tensor:
    """`v` of shape (B,) as (B, 1, ..., 1), to multiply tensors of the form of `like`."""
    return v.reshape(v.shape[0], *([1] * (like.ndim - 1)))
