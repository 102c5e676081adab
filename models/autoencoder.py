"""The autoencoders of latent diffusion models: images to latents and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def encode(vae: Any, image: Tensor, factor: int) -> Tensor:
    """The mode of the posterior of images in [-1, 1], normalised for the network.

    Args:
        vae: an autoencoder of diffusers, such as `AutoencoderKL` or `AutoencoderTiny`.
        image: floating point ``(B, C, H, W)``.
        factor: the side of the square of pixels that becomes one latent.

    Raises:
        FloatingPointError: if the VAE overflows.
        ValueError: if the shape, dtype or range of `image` is wrong.
    """
    channels = vae.config.in_channels
    if image.ndim != 4 or image.shape[1] != channels or any(n % factor for n in image.shape[2:]):
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
    encoded = _call(vae, "encode", image)
    latents: Tensor = (  # an `AutoencoderTiny` has no posterior
        encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    )
    _check_finite(latents, "encode")
    mean, std = _statistics(vae.config, latents)
    return ((latents - mean) / std).to(image.dtype)


def decode(vae: Any, latents: Tensor) -> Tensor:
    """The images of normalised latents ``(B, C, H, W)``.

    Raises:
        FloatingPointError: if the VAE overflows.
        ValueError: if the shape of `latents` is wrong, or they are not finite.
    """
    channels = vae.config.latent_channels
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise ValueError(
            f"latents must have shape (B, {channels}, H, W), got {tuple(latents.shape)}"
        )
    if not bool(latents.isfinite().all()):
        raise ValueError("latents must be finite, got NaN or infinity")
    mean, std = _statistics(vae.config, latents)
    image: Tensor = _call(vae, "decode", latents * std + mean).sample
    _check_finite(image, "decode")
    return image.to(latents.dtype)


def _call(vae: Any, method: str, x: Tensor) -> Any:
    """Call a method of the VAE in its own dtype, or in float32 if it requires this.

    A VAE with `force_upcast` overflows in float16. Its weights are then converted for this call alone,
    as the pipelines of diffusers do, and an outer `torch.autocast` is switched off.
    """
    dtype = vae.dtype
    if not getattr(vae.config, "force_upcast", False):
        return getattr(vae, method)(x.to(dtype))
    with torch.autocast(x.device.type, enabled=False):
        if dtype != torch.float16:
            return getattr(vae, method)(x.to(dtype))
        if any(hasattr(module, "_hf_hook") for module in vae.modules()):  # offloaded by accelerate
            vae.to(torch.float32)
            try:
                return getattr(vae, method)(x.float())
            finally:
                vae.to(dtype)
        wide = {
            f"vae.{name}": value.float() if value.is_floating_point() else value
            for name, value in (*vae.named_parameters(), *vae.named_buffers())
        }
        return torch.func.functional_call(_Method(vae, method), wide, (x.float(),))


class _Method(nn.Module):
    """A method of a module as the forward call of another."""

    def __init__(self, vae: nn.Module, method: str) -> None:
        super().__init__()
        self.vae = vae
        self.method = method

    def forward(self, x: Tensor) -> Any:
        return getattr(self.vae, self.method)(x)


def _check_finite(output: Tensor, method: str) -> None:
    """Raise an error for an output that would become a black picture."""
    if not bool(output.isfinite().all()):
        raise FloatingPointError(
            f"the VAE's {method} returned NaN or infinity in {output.dtype}, as half precision does "
            "where activations overflow: convert it with vae.to(torch.float32)"
        )


def _statistics(config: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and standard deviation for normalising latents."""
    factor = 1 / config.scaling_factor
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or std is None:
        return like.new_zeros(()), like.new_tensor(factor)
    form = (1, -1, 1, 1)
    return like.new_tensor(mean).reshape(form), like.new_tensor(std).reshape(form) * factor
