"""Samplers of k-diffusion and diffusers, driven over given noise levels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Protocol

import torch
from torch import Tensor

from odesolvers import Denoiser
from odesolvers.models import import_k_diffusion
from odesolvers.models.stable_diffusion import import_diffusers


class Sampled(Protocol):
    """The result of sampling, such as `odesolvers.Solution`."""

    @property
    def x(self) -> Tensor: ...


class Sampler(Protocol):
    """A solver to measure. An invertible one also has `invert`, as in `odesolvers`."""

    def sample(
        self,
        denoiser: Denoiser,
        x: Tensor,
        sigmas: Tensor,
        *,
        extra_args: Mapping[str, Any] | None = None,
    ) -> Sampled: ...


@dataclass(frozen=True)
class Sample:
    """The result of sampling with a peer."""

    x: Tensor


@dataclass(frozen=True)
class KDiffusion:
    """A sampler of k-diffusion as installed."""

    sampler: str
    release: str = field(default_factory=lambda: version("k-diffusion"))

    def sample(
        self,
        denoiser: Denoiser,
        x: Tensor,
        sigmas: Tensor,
        *,
        extra_args: Mapping[str, Any] | None = None,
    ) -> Sample:
        function = getattr(import_k_diffusion().sampling, self.sampler)
        args = dict(extra_args or {})
        return Sample(function(denoiser, x, sigmas.to(x.dtype), extra_args=args, disable=True))


@dataclass(frozen=True)
class Diffusers:
    """A scheduler of diffusers, driven over given levels with the data prediction D.

    Its state is ``z = x / sqrt(1 + σ²)``, and it finds levels by their place in a table. For
    `DDIMScheduler` the table ``ᾱ`` is replaced by one of the levels, one training timestep each; for the
    multistep schedulers `sigmas` is replaced after `set_timesteps`. They end above the level 0
    (``final_sigmas_type="sigma_min"``) and keep their defaults otherwise: solver order 2, and a last
    step of order 1 (`lower_order_final`: below 15 steps in `DPMSolverMultistepScheduler`, always in
    `UniPCMultistepScheduler`). `DPMSolverMultistepScheduler` rounds its state to float32 in every step.
    """

    scheduler: str
    settings: tuple[tuple[str, Any], ...] = ()
    release: str = field(default_factory=lambda: version("diffusers"))

    @torch.no_grad()
    def sample(
        self,
        denoiser: Denoiser,
        x: Tensor,
        sigmas: Tensor,
        *,
        extra_args: Mapping[str, Any] | None = None,
    ) -> Sample:
        scheduler = self._on(sigmas)
        roots = torch.sqrt(1 + sigmas**2).tolist()
        z = x / roots[0]
        for sigma, root, t in zip(sigmas, roots, scheduler.timesteps, strict=False):
            levels = sigma.to(x.dtype).expand(x.shape[0])
            denoised = denoiser(z * root, levels, **(extra_args or {}))
            z = scheduler.step(denoised, t, z).prev_sample
        return Sample(z * roots[-1])

    def _on(self, sigmas: Tensor) -> Any:
        """A new scheduler with these levels."""
        steps, kind = len(sigmas) - 1, getattr(import_diffusers(), self.scheduler)
        settings = {"prediction_type": "sample", **dict(self.settings)}
        if self.scheduler == "DDIMScheduler":
            scheduler = kind(
                num_train_timesteps=len(sigmas), clip_sample=False, steps_offset=1, **settings
            )
            scheduler.alphas_cumprod = 1 / (1 + sigmas.flip(0) ** 2)
            scheduler.set_timesteps(steps)
        else:
            scheduler = kind(final_sigmas_type="sigma_min", **settings)
            scheduler.set_timesteps(steps)
            scheduler.sigmas = sigmas
        return scheduler
