"""Stable Diffusion 1.x, 2.x and XL of diffusers as denoisers on latents."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import autoencoder
from .configurations import check_scheduler
from .folders import PIPELINES
from .networks import (
    check_betas,
    check_conditions,
    check_network,
    check_stated,
    check_tokenizers,
    execution_device,
    expand,
)
from .schedules import schedule_of


class StableDiffusion(nn.Module):
    """Converts a Stable Diffusion pipeline to a denoiser on latents.

    The scheduler that the pipeline has at construction defines how the network is read, by the formulas
    of:

    - variance-preserving schedules at integer timesteps t (DDPM, DDIM, Euler and the like), where the
      network sees ``z = x / sqrt(1 + σ²)`` and t, with ``σ_t = sqrt((1 - ᾱ_t) / ᾱ_t)``. Its output f
      gives ``D = x - σ f`` (epsilon), ``D = (z - σ f) / sqrt(1 + σ²)`` (v prediction; Salimans and Ho
      2022, arXiv 2202.00512) or ``D = f`` (sample). Between training levels, where multi-stage methods
      evaluate, t is interpolated in log σ, as in k-diffusion. A schedule with zero terminal SNR, whose
      last level is infinite, ends at 2^20;
    - the preconditioning of Karras et al. 2022 (EDM schedulers: Playground v2.5, CosXL);
    - flow matching, as in `FlowDenoiser`, with times up to 1000.

    Other schedulers are refused. The network computes in its own dtype, everything else in the dtype of
    the state. Models that are offloaded to the CPU by diffusers or accelerate run on their device.

    Args:
        pipeline: a `diffusers.StableDiffusionPipeline` or `StableDiffusionXLPipeline`, for text to
            image. Its models are not copied; they are frozen and set to evaluation mode. Gradients
            with respect to the inputs are available.
        prediction_type: "epsilon", "v_prediction", "sample" or "flow_prediction"; by default that of the
            pipeline's scheduler.
        autocast: dtype for running the network under `torch.autocast`, without converting its weights.
        channels_last: whether to store the network and its inputs in the channels-last memory format,
            which is faster for convolutions in half precision on a GPU.

    Raises:
        ImportError: if diffusers or transformers is not installed.
        TypeError: if `pipeline` is another kind of pipeline.
        ValueError: if the prediction type is unknown, the scheduler does not say how the network is
            trained, or the network takes other inputs than latents, noise level and prompt.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        prediction_type: str | None = None,
        autocast: torch.dtype | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        import_diffusers()
        kind = type(pipeline).__name__
        if kind not in PIPELINES:
            raise TypeError(f"pipeline must be a {' or '.join(PIPELINES)}, got {kind}")
        check_network(pipeline, is_xl=kind == PIPELINES[1])
        check_scheduler(pipeline.scheduler)
        self.schedule = schedule_of(pipeline.scheduler, prediction_type)
        check_betas(pipeline.scheduler)
        if prediction_type is None:
            check_stated(pipeline)
        self.prediction_type = self.schedule.prediction_type
        self.pipeline = pipeline  # not a submodule: its models are registered below
        self.unet = pipeline.unet
        self.vae = pipeline.vae
        self.text_encoder = pipeline.text_encoder
        self.text_encoder_2 = getattr(pipeline, "text_encoder_2", None)
        self.autocast = autocast
        self.channels_last = channels_last
        if channels_last:
            self.unet.to(memory_format=torch.channels_last)
        self.sigma_min = self.schedule.sigma_min
        """The lowest noise level."""
        self.sigma_max = self.schedule.sigma_max
        """The highest noise level."""
        self.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """The device on which the network runs, even while it is offloaded from it."""
        return execution_device(self.unet)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        *,
        encoder_hidden_states: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        """The posterior mean ``E[x0 | x, prompt]`` of latents.

        Args:
            x: noisy latents ``(B, C, H, W)``.
            sigma: their noise levels ``(B,)``, within the range of the training levels. On a GPU they
                cannot be checked without a synchronisation: a level out of range gives NaN, which the
                solvers report with the level.
            encoder_hidden_states: prompt embeddings from `encode_prompt`, of B prompts or 1.
            added_cond_kwargs: added conditions from `encode_prompt`, for XL only.
            timestep_cond: embedding of the guidance scale from `encode_prompt`, for networks distilled
                under guidance (LCM) only.

        Returns:
            Denoised latents with the shape and dtype of `x`.

        Raises:
            TypeError: if a condition is not a tensor.
            ValueError: if the prompt is missing or an input does not fit the network.
        """
        channels = self.unet.config.in_channels
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(
                f"this network takes latents of shape (B, {channels}, H, W), got {tuple(x.shape)}; "
                "encode(image) makes latents of images"
            )
        device = self.device
        if x.device.type != device.type or device.index not in (None, x.device.index):
            raise ValueError(
                f"the state is on {x.device} and the network on {device}: move one of them"
            )
        added = added_cond_kwargs or {}
        check_conditions(self.unet.config, encoder_hidden_states, added, timestep_cond)
        dtype = self.unet.dtype
        conditions = {
            "encoder_hidden_states": expand(encoder_hidden_states, x, "the prompt", dtype),
            "added_cond_kwargs": {k: expand(v, x, k, dtype) for k, v in added.items()} or None,
            "timestep_cond": expand(timestep_cond, x, "timestep_cond", dtype),
        }

        def network(z: Tensor, t: Tensor) -> Tensor:
            z = z.to(dtype)
            if self.channels_last:
                z = z.contiguous(memory_format=torch.channels_last)
            with self._autocast(x.device.type):
                output: Tensor = self.unet(z, t.float(), return_dict=False, **conditions)[0]
            return output.to(torch.promote_types(x.dtype, sigma.dtype))

        return self.schedule.denoise(network, x, sigma).to(x.dtype)

    def timestep(self, sigma: Tensor) -> Tensor:
        """The noise input of the network at each noise level, ``(B,)``.

        For schedules of timesteps it is an integer at the training levels, in the dtype of `sigma`.

        Raises:
            ValueError: if a level is outside the range of the training levels; on a GPU its timestep
                is NaN instead.
        """
        return self.schedule.timestep(sigma)

    def sigmas(
        self,
        n: int,
        *,
        spacing: Literal["leading", "trailing", "linspace"] | None = None,
        final: Literal["zero", "first"] | None = None,
    ) -> Tensor:
        """A noise level grid for `n` steps, with the spacing, offset and last level of the scheduler.

        For schedules of timesteps, steps start at the timesteps of diffusers' `DDIMScheduler`, and each
        ends where the next one starts. (`DDIMScheduler` itself assumes steps of ``T // n`` timesteps,
        which differ under "trailing" and "linspace" spacing.) A last step from timestep 0 to the level
        of timestep 0, which "linspace" spacing has under ``final="first"``, is left out. Under LCM
        and TCD they are the timesteps of the distillation. For other schedules it is the scheduler's own
        grid.

        Args:
            n: number of steps.
            spacing: spacing of the timesteps; by default that of the pipeline's scheduler.
            final: the last level, 0 or that of timestep 0; by default that of the pipeline's scheduler.

        Returns:
            float64 tensor of shape ``(n + 1,)``, or ``(n,)`` if the last step is left out.

        Raises:
            ValueError: if `n` or `spacing` does not fit the schedule.
        """
        return self.schedule.sigmas(n, spacing, final)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """The shape ``(C, H, W)`` of the latents of an image; its default size is the model's own."""
        factor, own = self.pipeline.vae_scale_factor, self.unet.config.sample_size
        sides = own if isinstance(own, (list, tuple)) else (own, own)
        rows, columns = (
            side if size is None else size // factor
            for side, size in zip(sides, (height, width), strict=True)
        )
        return int(self.unet.config.in_channels), int(rows), int(columns)

    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        size: tuple[int, int] | None = None,
        guidance_scale: float | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Encode prompts as the conditions of both branches of `ClassifierFreeGuidance`.

        The result is the `extra_args` of the guided denoiser; its item ``"positive"`` alone is that of
        the unguided denoiser.

        Args:
            prompt: one prompt for all images, or one for each.
            negative_prompt: the prompt, or one for each image, to guide away from; by default the
                empty prompt (XL: zeros, if its configuration requires this).
            size: height and width in pixels on which XL is conditioned; by default its own image size.
            guidance_scale: the scale of guidance as a condition of networks distilled under guidance
                (LCM), which are then not to be guided once more.

        Returns:
            ``{"positive": ..., "negative": ...}``, each with ``encoder_hidden_states`` of shape
            ``(prompts, tokens, features)``, for XL also ``added_cond_kwargs``, and with a guidance scale
            ``timestep_cond``.

        Raises:
            TypeError: if a prompt is missing or not text.
            ValueError: if the numbers of prompts disagree, the pipeline has no text encoder, its
                tokenizer has other tokens than that, or `size` or `guidance_scale` is given for a model
                that takes none.
        """
        for name in ("text_encoder", "text_encoder_2")[: 1 + self._is_xl]:
            if getattr(self, name) is None:
                raise ValueError(
                    f"the pipeline has no {name}, so prompts cannot be encoded: give it one, or pass "
                    "embeddings of your own as encoder_hidden_states"
                )
        width = self.unet.config.time_cond_proj_dim
        if guidance_scale is not None and width is None:
            raise ValueError(
                "this network takes no guidance scale as a condition (its time_cond_proj_dim is None): "
                f"use ClassifierFreeGuidance(model, scale={guidance_scale})"
            )
        prompts = _texts(prompt, "prompt")
        negatives = None if negative_prompt is None else _texts(negative_prompt, "negative_prompt")
        if negatives is not None and len(negatives) == 1:
            negatives = negatives * len(prompts)
        if negatives is not None and len(negatives) != len(prompts):
            raise ValueError(
                f"got {len(prompts)} prompts and {len(negatives)} negative prompts: give one, or one "
                "for each"
            )
        check_tokenizers(self.pipeline)  # tokens may have been added since
        encoded = self.pipeline.encode_prompt(
            prompts,
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            negative_prompt=negatives,
        )
        branches: dict[str, dict[str, Any]] = {
            "positive": {"encoder_hidden_states": encoded[0]},
            "negative": {"encoder_hidden_states": encoded[1]},
        }
        if guidance_scale is not None:
            embedded = self.pipeline.get_guidance_scale_embedding(
                torch.tensor([guidance_scale - 1.0]), embedding_dim=width
            )
            for branch in branches.values():
                branch["timestep_cond"] = embedded.to(encoded[0])
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

        Encoding is deterministic, because the mode is used rather than a sample. A VAE in float16 that
        overflows there (`force_upcast` in its configuration) is evaluated in float32.

        Args:
            image: floating point ``(B, 3, H, W)`` in [-1, 1]; H and W are divisible by the VAE's factor
                (usually 8).

        Returns:
            Latents ``(B, C, H / 8, W / 8)`` in the dtype of `image`.

        Raises:
            FloatingPointError: if the VAE overflows.
            ValueError: if the shape, dtype or range of `image` is wrong.
        """
        return autoencoder.encode(self.vae, image, self.pipeline.vae_scale_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents ``(B, C, H, W)`` to images ``(B, 3, 8 H, 8 W)`` in the dtype of `latents`.

        Values are approximately in [-1, 1]; they are not clipped. For float16 see `encode`.

        Raises:
            FloatingPointError: if the VAE overflows.
            ValueError: if the shape of `latents` is wrong, or they are not finite.
        """
        return autoencoder.decode(self.vae, latents)

    @property
    def _is_xl(self) -> bool:
        return type(self.pipeline).__name__ == PIPELINES[1]

    def _autocast(self, device: str) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device, dtype=self.autocast)


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
            "pip install diffusers transformers accelerate",
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
