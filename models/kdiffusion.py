"""Noise level grids for the wrappers of k-diffusion, which are denoisers as they are."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch import Tensor

from odesolvers.grids import karras_sigmas

from .wrappers import cosine_sigmas


def import_k_diffusion() -> Any:
    """Import and return the package `k_diffusion`.

    It is imported only on first use, because this takes seconds and also imports CLIP and clean-fid.
    Warnings raised during the import are suppressed.

    Raises:
        ImportError: if it, or a package that it needs, is not installed, with the command to install
            it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import k_diffusion
    except ImportError as error:
        if sys.version_info >= (3, 13):
            raise ImportError(
                f"k-diffusion could not be imported ({error}); on Python 3.13 and later it cannot be "
                "installed, because its dependency dctorch needs numpy<2, which was not built for "
                "them: use Python 3.10 to 3.12",
                name=error.name,
            ) from error
        if error.name == "pkg_resources":
            raise ImportError(
                "k-diffusion is installed but imports pkg_resources, which setuptools dropped in "
                "version 82: pip install 'setuptools<82'",
                name=error.name,
            ) from error
        raise ImportError(
            f"k-diffusion could not be imported ({error}): pip install k-diffusion 'setuptools<82'",
            name=error.name,
        ) from error
    return k_diffusion


def wrapper_sigmas(
    wrapper: Any,
    n: int | None = None,
    *,
    quantize: bool | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Tensor:
    """The noise level grid of a wrapper of k-diffusion.

    - Wrappers of discrete schedules (`DiscreteEpsDDPMDenoiser`, `DiscreteVDDPMDenoiser`,
      `CompVisDenoiser`, `CompVisVDenoiser`, `OpenAIDenoiser`): `n` times evenly spaced over the
      training timesteps. Between timesteps log σ is interpolated, as in the wrapper's own
      ``get_sigmas(n)``. With `quantize`, each time is rounded to the nearest timestep, so that the
      network was trained at every level. If `n` is None, the grid consists of all training levels.
    - `VDenoiser`: `n` times evenly spaced in t, with ``σ = tan(π t / 2)``.
    - `layers.Denoiser`, which defines no time: `karras_sigmas`.

    Args:
        wrapper: an instance of one of these classes.
        n: number of noise levels above 0, which is the number of steps.
        quantize: whether to use training levels only; by default the wrapper's own setting. For
            discrete schedules only.
        sigma_min: the lowest level above 0, for continuous wrappers only; 0.002 by default.
        sigma_max: the highest level, for continuous wrappers only; 80 by default.

    Returns:
        float64 tensor of shape ``(n + 1,)`` on the CPU, decreasing to 0.

    Raises:
        TypeError: if `wrapper` is not one of these classes.
        ValueError: if `n` does not fit the schedule, or an argument does not apply to the wrapper.
    """
    K = import_k_diffusion()
    if isinstance(wrapper, K.external.DiscreteSchedule):
        if sigma_min is not None or sigma_max is not None:
            raise ValueError(
                f"the range of a {type(wrapper).__name__} is that of its training levels, "
                f"{float(wrapper.sigma_min):.6g} to {float(wrapper.sigma_max):.6g}: leave out "
                "sigma_min and sigma_max"
            )
        return _discrete(wrapper, n, wrapper.quantize if quantize is None else quantize)
    if not isinstance(wrapper, K.external.VDenoiser | K.layers.Denoiser):
        raise TypeError(f"wrapper must be one of k-diffusion's, got {type(wrapper).__name__}")
    if n is None or quantize:
        raise ValueError(
            f"a {type(wrapper).__name__} has no training timesteps: give n, and leave out quantize"
        )
    bottom = 0.002 if sigma_min is None else sigma_min
    top = 80.0 if sigma_max is None else sigma_max
    if isinstance(wrapper, K.layers.Denoiser):
        return karras_sigmas(n, bottom, top)
    return cosine_sigmas(n, bottom, top)


def _discrete(wrapper: Any, n: int | None, quantize: bool) -> Tensor:
    count = len(wrapper.sigmas)
    if not bool(wrapper.sigmas.isfinite().all()):
        raise ValueError(
            "the schedule has zero terminal SNR, whose first level is infinite: make the wrapper with "
            "alphas_cumprod.clamp(min=2**-40), or take DiscreteDenoiser, which does so"
        )
    if n is None:
        return _append_zero(wrapper.sigmas.flip(0))
    if not 1 <= n <= count:
        raise ValueError(f"n must be between 1 and the {count} training timesteps, got {n}")
    # Float32 on the wrapper's device, to match its get_sigmas bit for bit.
    t = torch.linspace(count - 1, 0, n, device=wrapper.sigmas.device)
    return _append_zero(wrapper.sigmas[t.round().long()] if quantize else wrapper.t_to_sigma(t))


def _append_zero(sigmas: Tensor) -> Tensor:
    sigmas = sigmas.detach().to("cpu", torch.float64)
    return torch.cat([sigmas, sigmas.new_zeros(1)])
