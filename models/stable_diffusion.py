"""Stable Diffusion 1.x, 2.x and XL as denoisers on latents, through diffusers."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from odesolvers.grids import ddim_timesteps, sigmas_from_alphas_cumprod

from .base import append_dims, values_readable

_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


class StableDiffusion(nn.Module):
    """A Stable Diffusion pipeline as ``denoiser(x, sigma, encoder_hidden_states=...)`` on latents.

    The network is trained in the variance-preserving state ``z = x / sqrt(1 + σ²)`` at integer
    timesteps t with ``σ_t = sqrt((1 - ᾱ_t) / ᾱ_t)``. From its output ``f(z, t)``

    - epsilon: ``D = x - σ f``;
    - v prediction (Salimans and Ho 2022, arXiv 2202.00512): ``D = (z - σ f) / sqrt(1 + σ²)``;
    - sample: ``D = f``.

    At the levels of the schedule t is that integer; between two of them, where multi-stage methods
    evaluate, it is interpolated in log σ, as k-diffusion does. Scaling and combining take place in the
    dtype of the state, the network runs in its own. A schedule with zero terminal SNR, whose last level
    is infinite, ends at 2^20.

    Args:
        pipeline: a `diffusers.StableDiffusionPipeline` or `StableDiffusionXLPipeline`, for text to
            image. Its models are used, not copied: they are frozen and set to evaluation. Gradients of
            the inputs flow through all of it.
        prediction_type: "epsilon", "v_prediction" or "sample"; by default what the pipeline's
            scheduler says.
        autocast: run the network under `torch.autocast` in this dtype, its weights as they are.
        channels_last: keep the network and its inputs in that memory format, which convolutions
            in half precision on a GPU prefer.

    Raises:
        TypeError: if `pipeline` is another kind of pipeline.
        ValueError: if its prediction type is unknown.
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
        if kind not in _PIPELINES:
            raise TypeError(f"pipeline must be a {' or '.join(_PIPELINES)}, got {kind}")
        # Whatever sampler is published with the model, its DDIM form says where the levels are.
        scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
        self.schedule = scheduler.config
        self.prediction_type = prediction_type or self.schedule.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(
                "prediction_type must be 'epsilon', 'v_prediction' or 'sample', got "
                f"{self.prediction_type!r}"
            )
        self.pipeline = pipeline  # not a module
        self.unet = pipeline.unet
        self.vae = pipeline.vae
        self.text_encoder = pipeline.text_encoder
        self.text_encoder_2 = getattr(pipeline, "text_encoder_2", None)
        self.autocast = autocast
        self.channels_last = channels_last
        if channels_last:
            self.unet.to(memory_format=torch.channels_last)
        # A schedule with zero terminal SNR ends at ᾱ = 0, σ = ∞: the level 2^20 stands for it.
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
        """``E[x0 | x, prompt]`` for latents.

        Args:
            x: noisy latents ``(B, C, H, W)``.
            sigma: their noise levels ``(B,)``, within the training levels. Elsewhere it is an error;
                on a GPU, whose values cannot be looked at without waiting for them, the output is
                NaN, which the solvers report with the level.
            encoder_hidden_states: from `encode_prompt`, of B prompts or 1.
            added_cond_kwargs: likewise; XL only.

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
        """The timestep of each noise level, float32 ``(B,)``, whole at the training levels.

        Raises:
            ValueError: if a level lies outside the training levels; on a GPU its timestep is NaN.
        """
        table = self.log_sigmas
        if table.dtype != torch.float64:
            raise TypeError(
                "the noise levels were converted with the model: choose the network's precision "
                "with load_stable_diffusion(..., dtype=...) or model.unet.to(dtype)"
            )
        log = sigma.double().log()
        tolerance = 1e-6  # float32 levels are off by 1e-7; neighbours differ by 1e-3 and more
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
        """The `n` levels that diffusers' `DDIMScheduler` visits on this model, and the last.

        Args:
            n: number of steps.
            spacing: how the timesteps are spread, by default as the pipeline's scheduler is set.
            final: the level to end at, 0 or that of timestep 0; by default likewise.

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
        """``(C, H, W)`` of the latents of an image, by default of the size the model is made for."""
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
        """The conditions of both branches of `ClassifierFreeGuidance`.

        ``encode_prompt(...)`` is the `extra_args` of the guided denoiser; its ``["positive"]`` alone
        is that of the unguided one.

        Args:
            prompt: one prompt for all images, or one for each.
            negative_prompt: what to guide away from; by default the empty prompt (XL: zeros, where
                its configuration says so).
            size: height and width of the images in pixels that XL is told; by default its own.

        Returns:
            ``{"positive": ..., "negative": ...}``, each with ``encoder_hidden_states`` of shape
            ``(prompts, tokens, features)`` and, for XL, ``added_cond_kwargs``.

        Raises:
            TypeError: if the prompt is missing or not text.
            ValueError: if the numbers of prompts disagree.
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
            # The size of the original, the corner of the crop, and the size to make.
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
        """Latents of images: the mode of the VAE's posterior, scaled as the network expects.

        Not a draw from it: encoding the same image twice gives the same latents.

        Args:
            image: ``(B, 3, H, W)`` in [-1, 1], with sides that the VAE's factor (8 mostly) divides.

        Returns:
            ``(B, C, H / 8, W / 8)`` in the dtype of `image`.

        Raises:
            ValueError: if `image` has another form or range.
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
        """Images ``(B, 3, 8 H, 8 W)`` of latents, about [-1, 1] and not clipped, in their dtype."""
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
        """A condition for every state of the batch, in the dtype of the network."""
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
        """Mean and standard deviation that the VAE's latents are normalised with."""
        config = self.vae.config
        factor = 1 / config.scaling_factor
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or std is None:
            return like.new_zeros(()), like.new_tensor(factor)
        form = (1, -1, 1, 1)
        return like.new_tensor(mean).reshape(form), like.new_tensor(std).reshape(form) * factor


def load_stable_diffusion(
    path_or_id: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    channels_last: bool = False,
    autocast: torch.dtype | None = None,
    prediction_type: str | None = None,
    variant: str | None = None,
    config: str | Path | None = None,
) -> StableDiffusion:
    """Stable Diffusion 1.x, 2.x or XL from a directory, the Hugging Face hub or a single file.

    Args:
        path_or_id: a directory in diffusers' layout; a hub id such as
            ``"stabilityai/stable-diffusion-xl-base-1.0"``; or a ``.safetensors`` or ``.ckpt`` file in
            the original layout.
        dtype: of the network and the text encoders. The VAE computes in float32, since that of XL
            overflows in half precision, and solver states keep the dtype they come in.
        device: where to put all of it.
        channels_last: see `StableDiffusion`.
        autocast: see `StableDiffusion`.
        prediction_type: see `StableDiffusion`; a single file cannot always tell.
        variant: the weight files to take from a directory or the hub, such as ``"fp16"``.
        config: the directory or hub id with the configuration of a single file; by default diffusers
            recognises the model and fetches it from the hub.

    Raises:
        ImportError: where diffusers or transformers is not installed.
        FileNotFoundError: if `path_or_id` is neither there nor on the hub.
        ValueError: if what is there is damaged, or no Stable Diffusion for text to image.
    """
    diffusers = import_diffusers()
    path = Path(path_or_id)
    source = str(path_or_id)
    if path.suffix in (".safetensors", ".ckpt") and not path.is_file():
        raise FileNotFoundError(f"there is no file {source}")
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise ValueError(
            f"{source} holds no model_index.json, so it is no directory that a diffusers pipeline "
            "was saved to; give the directory above unet/ and vae/, or a single-file checkpoint"
        )
    try:
        if path.is_file():
            pipeline = _from_single_file(diffusers, path, dtype, config)
        else:
            pipeline = _from_pretrained(diffusers, source, dtype, variant)
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module):
                _refuse_missing(name, [k for k, p in part.named_parameters() if p.is_meta])
    except Exception as error:  # of many kinds, from three libraries and the network
        if path.exists():
            raise ValueError(
                f"{source} could not be read as a Stable Diffusion checkpoint: {error}"
            ) from error
        raise FileNotFoundError(
            f"{source} is no local path, and the Hugging Face hub did not provide it: {error}"
        ) from error
    pipeline.vae.float()
    model = StableDiffusion(
        pipeline, prediction_type=prediction_type, autocast=autocast, channels_last=channels_last
    )
    return model.to(device)


def import_diffusers() -> Any:
    """The package `diffusers`, imported on first use.

    Raises:
        ImportError: where it or transformers is not installed; says what to install.
    """
    try:
        import diffusers
        import transformers  # noqa: F401  # diffusers has no Stable Diffusion without it
    except ImportError as error:
        raise ImportError(
            f"Stable Diffusion needs diffusers and transformers ({error}): "
            "pip install 'odesolvers[stable-diffusion]'",
            name=error.name,
        ) from error
    return diffusers


def _from_pretrained(diffusers: Any, source: str, dtype: torch.dtype, variant: str | None) -> Any:
    """A pipeline from a directory in diffusers' layout or from the hub."""
    import transformers

    index = diffusers.DiffusionPipeline.load_config(source)
    kind = index["_class_name"]
    if kind not in _PIPELINES:
        raise ValueError(f"it is a {kind}; supported are {' and '.join(_PIPELINES)}")
    parts: dict[str, Any] = {"variant": variant}
    if kind == _PIPELINES[0]:
        parts |= {"safety_checker": None, "requires_safety_checker": False}
    with _quiet_about_torch_dtype():
        for name in ("text_encoder", "text_encoder_2"):
            if name in index:
                # Left to the pipeline, weights that are missing would be made up at random.
                parts[name], report = getattr(transformers, index[name][1]).from_pretrained(
                    source,
                    subfolder=name,
                    torch_dtype=dtype,
                    variant=variant,
                    output_loading_info=True,
                )
                _refuse_missing(name, report["missing_keys"])
        return getattr(diffusers, kind).from_pretrained(source, torch_dtype=dtype, **parts)


def _from_single_file(
    diffusers: Any, path: Path, dtype: torch.dtype, config: str | Path | None
) -> Any:
    """A pipeline from one file in the original layout."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
    else:
        content = torch.load(path, map_location="meta", weights_only=True)
        keys = list(content.get("state_dict", content))
    if not any(key.startswith("model.diffusion_model.") for key in keys):
        raise ValueError("it has no model.diffusion_model, so no network in the original layout")
    is_xl = any(key.startswith("conditioner.") for key in keys)
    options = {} if config is None else {"config": str(config)}
    with _quiet_about_torch_dtype():
        return getattr(diffusers, _PIPELINES[is_xl]).from_single_file(
            str(path), torch_dtype=dtype, **options
        )


def _refuse_missing(part: str, names: Iterable[str]) -> None:
    missing = sorted(names)
    if missing:
        raise ValueError(
            f"weights of the {part} are missing: {', '.join(missing[:3])}"
            + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        )


@contextlib.contextmanager
def _quiet_about_torch_dtype() -> Iterator[None]:
    """`torch_dtype` is called `dtype` in newer versions; the old name works in all of them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")
        yield


def _texts(prompt: Any, name: str) -> list[str]:
    texts = [prompt] if isinstance(prompt, str) else prompt
    if (
        not isinstance(texts, Sequence)
        or not texts
        or not all(isinstance(text, str) for text in texts)
    ):
        raise TypeError(f"{name} must be text or a sequence of texts ('' for none), got {prompt!r}")
    return list(texts)
