"""What the models share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

DenoiserFunction: TypeAlias = Callable[..., Tensor]
"""``denoiser(x, sigma, **extra_args)``; see `odesolvers.Denoiser`."""


def append_dims(v: Tensor, like: Tensor) -> Tensor:
    """`v` of shape (B,) as (B, 1, ..., 1), to multiply tensors of the form of `like`."""
    return v.reshape(v.shape[0], *([1] * (like.ndim - 1)))


def can_look_at(x: Tensor) -> bool:
    """Whether values can be read without waiting for a device, or breaking a graph that is traced."""
    return x.device.type == "cpu" and not (torch.compiler.is_compiling() or get_proxy_mode())


def check_device(x: Tensor, of_model: Tensor, **others: Tensor | None) -> None:
    """Refuse a state, or conditions, on another device than the model's.

    Raises:
        ValueError: naming both devices.
    """
    for name, tensor in {"x": x, **others}.items():
        if tensor is not None and tensor.device != of_model.device:
            raise ValueError(
                f"{name} is on {tensor.device}, the model on {of_model.device}: move one of them with "
                ".to(device)"
            )
