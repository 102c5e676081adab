"""Evaluation of networks in another precision than that of the solver's state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from odesolvers.grids import level_dtype

from .base import DenoiserFunction, check_floating_dtype


class InDtype(nn.Module):
    """Evaluates a denoiser in `dtype` and converts its output to the dtype of the state.

    The precision of the solver's state does not depend on that of the network. Equal inputs give equal
    outputs, also in half precision. If an inverted state differs in its last bit, however, some of the
    network's intermediate results can round in the other direction, and its output then differs by
    units of `dtype`. With a float32 state this happens in nearly every run, with a float64 state
    almost never.

    Args:
        denoiser: called with `x` in `dtype`, and with sigma in float64 if `dtype` is float64 and in
            float32 otherwise, which resolves the lowest levels. `extra_args` are passed unchanged. In
            a wrapper of k-diffusion the network itself can be wrapped instead:
            ``wrapper.inner_model = InDtype(network, torch.float16)``.
        dtype: a floating point dtype such as ``torch.bfloat16``.

    Raises:
        TypeError: if `dtype` is not a floating point dtype.
    """

    def __init__(self, denoiser: DenoiserFunction, dtype: torch.dtype) -> None:
        super().__init__()
        check_floating_dtype(dtype)
        self.denoiser = denoiser
        self.dtype = dtype

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        """The output of the denoiser at ``x.to(dtype)``, in the dtype of `x`."""
        sigma = sigma.to(level_dtype(self.dtype))
        return self.denoiser(x.to(self.dtype), sigma, **extra_args).to(x.dtype)

    @property
    def sigma_min(self) -> float:
        """The lowest noise level of the denoiser; 0 if it has none."""
        return float(getattr(self.denoiser, "sigma_min", 0.0))
