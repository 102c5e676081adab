"""Stable Diffusion 1.x, 2.x and XL of diffusers as denoisers on latents."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from odesolvers.grids import ddim_timesteps, sigmas_from_alphas_cumprod

from .base import append_dims, values_readable

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
"""The supported pipeline classes of diffusers."""


class StableDiffusion(nn.Module):
    """Converts a Stable Diffusion pipeline to a denoiser on latents.

    The network is trained in the variance-preserving state ``z = x / sqrt(1 + σ²)`` at integer
    timesteps t with ``σ_t = sqrt((1 - ᾱ_t) / ᾱ_t)``. The denoiser is computed from its output
    ``f(z, t)`` according to the prediction type:

    - epsilon: ``D = x - σ f``;
    - v prediction (Salimans and Ho 2022, arXiv 2202.00512): ``D = (z - σ f) / sqrt(1 + σ²)``;
    - sample: ``D = f``.

    At the training levels t is that integer. Between them, where multi-stage methods evaluate, t is
    interpolated in log σ, as in k-diffusion. The network computes in its own dtype, everything else in
    the dtype of the state. A schedule with zero terminal SNR, whose last level is infinite, ends at
    2^20.

    Args:
        pipeline: a `diffusers.StableDiffusionPipeline` or `StableDiffusionXLPipeline`, for text to
            image. Its models are not copied; they are frozen and set to evaluation mode. Gradients
            with respect to the inputs are available.
        prediction_type: "epsilon", "v_prediction" or "sample"; by default that of the pipeline's
            scheduler.
        autocast: dtype for running the network under `torch.autocast`, without converting its weights.
        channels_last: whether to store the network and its inputs in the channels-last memory format,
            which is faster for convolutions in half precision on a GPU.

    Raises:
        ImportError: if diffusers or transformers is not installed.
        TypeError: if `pipeline` is another kind of pipeline.
        ValueError: if the prediction type is unknown.
    """

    log_sigmas: Tensor

    def __init__(
        self,
        pipeline: Any,
        *,
        prediction_type: str | None = None,
        autocast: torch.dtype | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        diffusers = import_diffusers()
        kind = type(pipeline).__name__
        if kind not in PIPELINES:
            raise TypeError(f"pipeline must be a {' or '.join(PIPELINES)}, got {kind}")
        # The DDIM form of the published scheduler, of any kind, defines the noise levels.
        scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
        self.schedule = scheduler.config
        self.prediction_type = prediction_type or self.schedule.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(
                "prediction_type must be 'epsilon', 'v_prediction' or 'sample', got "
                f"{self.prediction_type!r}"
            )
        self.pipeline = pipeline  # not a submodule: its models are registered below
        self.unet = pipeline.unet
        self.vae = pipeline.vae
        self.text_encoder = pipeline.text_encoder
        self.text_encoder_2 = getattr(pipeline, "text_encoder_2", None)
        self.autocast = autocast
        self.channels_last = channels_last
        if channels_last:
            self.unet.to(memory_format=torch.channels_last)
        # A schedule with zero terminal SNR ends at ᾱ = 0, σ = ∞, which the level 2^20 represents.
        self.alphas_cumprod = scheduler.alphas_cumprod.double().clamp(min=2.0**-40)
        levels = torch.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod)
        self.register_buffer("log_sigmas", levels.log())
        self.sigma_min = float(levels[0])
        """The lowest training level."""
        self.sigma_max = float(levels[-1])
        """The highest training level."""
        self.eval().requires_grad_(False)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        *,
        encoder_hidden_states: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The posterior mean ``E[x0 | x, prompt]`` of latents.

        Args:
            x: noisy latents ``(B, C, H, W)``.
            sigma: their noise levels ``(B,)``, within the range of the training levels. On a GPU they
                cannot be checked without a synchronisation: a level out of range gives NaN, which the
                solvers report with the level.
            encoder_hidden_states: prompt embeddings from `encode_prompt`, of B prompts or 1.
            added_cond_kwargs: added conditions from `encode_prompt`, for XL only.

        Returns:
            Denoised latents with the shape and dtype of `x`.

        Raises:
            ValueError: if the prompt is missing or an input does not fit the network.
        """
        channels = self.unet.config.in_channels
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(
                f"this network takes latents of shape (B, {channels}, H, W), got {tuple(x.shape)}; "
                "encode(image) makes latents of images"
            )
        if x.device != self.unet.device:
            raise ValueError(
                f"the state is on {x.device} and the network on {self.unet.device}: move one of them"
            )
        if encoder_hidden_states is None or (added_cond_kwargs is None and self._is_xl):
            raise ValueError(
                "the prompt is missing: pass extra_args=model.encode_prompt('...')['positive'] ('' "
                "for none), or all of encode_prompt's result under ClassifierFreeGuidance"
            )
        s = append_dims(sigma, x)
        root = torch.sqrt(1 + s**2)
        z = (x / root).to(self.unet.dtype)
        if self.channels_last:
            z = z.contiguous(memory_format=torch.channels_last)
        added = {k: self._condition(v, x, k) for k, v in (added_cond_kwargs or {}).items()}
        with self._autocast(x.device.type):
            output: Tensor = self.unet(
                z,
                self.timestep(sigma),
                encoder_hidden_states=self._condition(encoder_hidden_states, x, "the prompt"),
                added_cond_kwargs=added or None,
                return_dict=False,
            )[0]
        output = output.to(torch.promote_types(x.dtype, s.dtype))
        if self.prediction_type == "epsilon":
            denoised = x - s * output
        elif self.prediction_type == "v_prediction":
            denoised = (x / root - s * output) / root
        else:
            denoised = output
        return denoised.to(x.dtype)

    def timestep(self, sigma: Tensor) -> Tensor:
        """The timestep of each noise level, float32 ``(B,)``, an integer at the training levels.

        Raises:
            TypeError: if the table of noise levels was converted to another dtype than float64.
            ValueError: if a level is outside the range of the training levels; on a GPU its timestep
                is NaN instead.
        """
        table = self.log_sigmas
        if table.dtype != torch.float64:
            raise TypeError(
                "the noise levels were converted with the model: choose the network's precision "
                "with load_stable_diffusion(..., dtype=...) or model.unet.to(dtype)"
            )
        log = sigma.double().log()
        tolerance = (
            1e-6  # errors of float32 levels are about 1e-7, distances between levels at least 1e-3
        )
        inside = (log > table[0] - tolerance) & (log < table[-1] + tolerance)
        if values_readable(sigma) and not bool(inside.all()):
            raise ValueError(
                f"sigma must lie within the model's training levels, {self.sigma_min:.6g} to "
                f"{self.sigma_max:.6g}, got {sigma[~inside][0].item():.6g}; model.sigmas(n) is a "
                "grid that does, karras_sigmas(n, model.sigma_min, model.sigma_max) another"
            )
        log = torch.where(inside, log, table[0])
        above = torch.searchsorted(table, log).clamp(1, len(table) - 1)
        low, high = table[above - 1], table[above]
        t = above - 1 + ((log - low) / (high - low)).clamp(0, 1)
        whole = t.round()
        t = torch.where((table[whole.long()] - log).abs() < tolerance, whole, t)
        return torch.where(inside, t, torch.nan).float()

    def sigmas(
        self,
        n: int,
        *,
        spacing: Literal["leading", "trailing", "linspace"] | None = None,
        final: Literal["zero", "first"] | None = None,
    ) -> Tensor:
        """The noise level grid of diffusers' `DDIMScheduler` for `n` steps.

        Args:
            n: number of steps.
            spacing: spacing of the timesteps; by default that of the pipeline's scheduler.
            final: the last level, 0 or that of timestep 0; by default that of the pipeline's scheduler.

        Returns:
            float64 tensor of shape ``(n + 1,)``; see `odesolvers.sigmas_from_alphas_cumprod`.
        """
        steps = ddim_timesteps(
            n,
            len(self.log_sigmas),
            spacing=spacing or self.schedule.timestep_spacing,
            offset=self.schedule.steps_offset,
        )
        end: Literal["zero", "first"] = "zero" if self.schedule.set_alpha_to_one else "first"
        return sigmas_from_alphas_cumprod(self.alphas_cumprod, steps, final=final or end)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """The shape ``(C, H, W)`` of the latents of an image; its default size is the model's own."""
        factor, own = self.pipeline.vae_scale_factor, self.unet.config.sample_size
        rows, columns = (own if size is None else size // factor for size in (height, width))
        return int(self.unet.config.in_channels), int(rows), int(columns)

    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        size: tuple[int, int] | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Encode prompts as the conditions of both branches of `ClassifierFreeGuidance`.

        The result is the `extra_args` of the guided denoiser; its item ``"positive"`` alone is that of
        the unguided denoiser.

        Args:
            prompt: one prompt for all images, or one for each.
            negative_prompt: the prompt, or one for each image, to guide away from; by default the
                empty prompt (XL: zeros, if its configuration requires this).
            size: height and width in pixels on which XL is conditioned; by default its own image size.

        Returns:
            ``{"positive": ..., "negative": ...}``, each with ``encoder_hidden_states`` of shape
            ``(prompts, tokens, features)`` and, for XL, ``added_cond_kwargs``.

        Raises:
            TypeError: if a prompt is missing or not text.
            ValueError: if the numbers of prompts disagree, or if `size` is given for another model
                than XL.
        """
        prompts = _texts(prompt, "prompt")
        negatives = None if negative_prompt is None else _texts(negative_prompt, "negative_prompt")
        if negatives is not None and len(negatives) == 1:
            negatives = negatives * len(prompts)
        if negatives is not None and len(negatives) != len(prompts):
            raise ValueError(
                f"got {len(prompts)} prompts and {len(negatives)} negative prompts: give one, or one "
                "for each"
            )
        encoded = self.pipeline.encode_prompt(
            prompts,
            device=self.unet.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            negative_prompt=negatives,
        )
        branches = {
            "positive": {"encoder_hidden_states": encoded[0]},
            "negative": {"encoder_hidden_states": encoded[1]},
        }
        if self._is_xl:
            factor = self.pipeline.vae_scale_factor
            height, width = size or (factor * n for n in self.latent_shape()[1:])
            # Original size, top left corner of the crop, and target size.
            ids = torch.tensor([[height, width, 0, 0, height, width]] * len(prompts))
            for name, pooled in zip(branches, encoded[2:], strict=True):
                branches[name]["added_cond_kwargs"] = {
                    "text_embeds": pooled,
                    "time_ids": ids.to(pooled),
                }
        elif size is not None:
            raise ValueError("size is a condition of Stable Diffusion XL; this model takes none")
        return branches

    def encode(self, image: Tensor) -> Tensor:
        """Encode images as the mode of the VAE's posterior, scaled for the network.

        Encoding is deterministic, because the mode is used rather than a sample.

        Args:
            image: floating point ``(B, 3, H, W)`` in [-1, 1]; H and W are divisible by the VAE's factor
                (usually 8).

        Returns:
            Latents ``(B, C, H / 8, W / 8)`` in the dtype of `image`.

        Raises:
            ValueError: if the shape, dtype or range of `image` is wrong.
        """
        factor, channels = self.pipeline.vae_scale_factor, self.vae.config.in_channels
        if (
            image.ndim != 4
            or image.shape[1] != channels
            or any(n % factor for n in image.shape[2:])
        ):
            raise ValueError(
                f"image must have shape (B, {channels}, H, W) with sides divisible by {factor}, got "
                f"{tuple(image.shape)}"
            )
        if not image.is_floating_point() or not bool((image.abs() <= 1 + 1e-3).all()):
            raise ValueError(
                f"image must be floating point in [-1, 1], got {image.dtype} from "
                f"{image.min().item():.4g} to {image.max().item():.4g}: image.float() / 127.5 - 1 "
                "for bytes"
            )
        latents: Tensor = self.vae.encode(image.to(self.vae.dtype)).latent_dist.mode()
        mean, std = self._latent_statistics(latents)
        return ((latents - mean) / std).to(image.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents ``(B, C, H, W)`` to images ``(B, 3, 8 H, 8 W)`` in the dtype of `latents`.

        Values are approximately in [-1, 1]; they are not clipped.

        Raises:
            ValueError: if the shape of `latents` is wrong.
        """
        if latents.ndim != 4 or latents.shape[1] != self.vae.config.latent_channels:
            raise ValueError(
                f"latents must have shape (B, {self.vae.config.latent_channels}, H, W), got "
                f"{tuple(latents.shape)}"
            )
        mean, std = self._latent_statistics(latents)
        image: Tensor = self.vae.decode(
            (latents * std + mean).to(self.vae.dtype), return_dict=False
        )[0]
        return image.to(latents.dtype)

    @property
    def _is_xl(self) -> bool:
        return self.text_encoder_2 is not None

    def _autocast(self, device: str) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device, dtype=self.autocast)

    def _condition(self, value: Tensor, x: Tensor, name: str) -> Tensor:
        """Expand a condition to the batch of `x`, in the dtype of the network."""
        n = x.shape[0]
        if value.shape[0] not in (1, n):
            raise ValueError(
                f"{name} is given for {value.shape[0]} images and the state holds {n}: encode one "
                "prompt, or one for each image"
            )
        if value.device != x.device:
            raise ValueError(f"{name} is on {value.device} and the state on {x.device}")
        return value.expand(n, *value.shape[1:]).to(self.unet.dtype)

    def _latent_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and standard deviation for normalising the VAE's latents."""
        config = self.vae.config
        factor = 1 / config.scaling_factor
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or std is None:
            return like.new_zeros(()), like.new_tensor(factor)
        form = (1, -1, 1, 1)
        return like.new_tensor(mean).reshape(form), like.new_tensor(std).reshape(form) * factor


def import_diffusers() -> Any:
    """Import and return the package `diffusers`.

    Raises:
        ImportError: if it or transformers is not installed, with the command to install them.
    """
    try:
        import diffusers
        import transformers  # noqa: F401  # diffusers needs it for Stable Diffusion
    except ImportError as error:
        raise ImportError(
            f"Stable Diffusion needs diffusers and transformers ({error}): "
            "pip install 'odesolvers[stable-diffusion]'",
            name=error.name,
        ) from error
    return diffusers


def _texts(prompt: Any, name: str) -> list[str]:
    """Check a prompt, or a sequence of prompts, and return it as a list."""
    texts = [prompt] if isinstance(prompt, str) else prompt
    if (
        not isinstance(texts, Sequence)
        or not texts
        or not all(isinstance(text, str) for text in texts)
    ):
        raise TypeError(f"{name} must be text or a sequence of texts ('' for none), got {prompt!r}")
    return list(texts)
