"""Networks in one precision under states in another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from odesolvers.grids import level_dtype

from .base import DenoiserFunction, check_floating_dtype


class InDtype(nn.Module):
    """Runs a denoiser in `dtype` and returns the dtype of the state.

    The state of a solver keeps its precision whatever the network computes in. Given the same bits a
    network rounds the same way, in half precision too. But where a state comes back off by its last
    bit, some of the network's many roundings fall on the other side of a boundary and the output is
    off by units of `dtype`: met in nearly every run in a float32 state, all but impossible in a
    float64 one.

    Args:
        denoiser: called with `x` in `dtype` and sigma in what the contract gives a state of that
            dtype: float64 for float64, else float32, which resolves the lowest levels. `extra_args`
            stay as they are. A network inside a wrapper of k-diffusion may also be wrapped itself:
            ``wrapper.inner_model = InDtype(network, torch.float16)``.
        dtype: a floating point dtype such as ``torch.bfloat16``.
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
