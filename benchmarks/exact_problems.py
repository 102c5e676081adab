"""Denoisers on which exact inversion is tested and measured: add an entry to `PROBLEMS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from odesolvers.models import (
    ClassifierFreeGuidance,
    Gaussian,
    GaussianMixture,
    IdealDenoiser,
    load_digits,
    load_letters,
    load_stable_diffusion,
    save_tiny_stable_diffusion,
)
from odesolvers.models.edm import EDMPrecond, SongConfig, SongUNet

Denoiser = Callable[..., Tensor]


@dataclass(frozen=True)
class Problem:
    """A denoiser, the shape (B, ...) of its states, and the arguments it is called with.

    `build` takes a device and returns the denoiser, so that nothing heavy is imported or made
    before it is used.
    """

    name: str
    build: Callable[[torch.device], Denoiser]
    shape: tuple[int, ...]
    extra_args: Mapping[str, Tensor] = field(default_factory=dict)
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def noise(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        return (noise * self.sigma_max).to(device, dtype)

    def arguments(self, device: str = "cpu") -> dict[str, Tensor]:
        return {name: value.to(device) for name, value in self.extra_args.items()}


def gaussian(device: torch.device) -> Denoiser:
    return Gaussian(mean=0.3, std=0.7).to(device)


def mixture(device: torch.device) -> Denoiser:
    means = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return GaussianMixture(means, stds=0.3).to(device)


def digits(device: torch.device) -> Denoiser:
    return IdealDenoiser(*load_digits()).to(device)


class EpsilonDenoiser(nn.Module):
    """``D(x, σ) = x - σ ε(x / sqrt(1 + σ²), c(σ))`` with c(σ) from 0 to 1, for random networks."""

    def __init__(self, epsilon: Callable[..., Tensor]) -> None:
        super().__init__()
        self.epsilon = epsilon

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        s = sigma.to(torch.float32).reshape(-1, *[1] * (x.ndim - 1))
        level = torch.atan(sigma.to(torch.float32)) * (2 / torch.pi)
        scaled = x.to(torch.float32) / torch.sqrt(1 + s * s)
        dtype = next((p.dtype for p in self.parameters()), torch.float32)
        epsilon = self.epsilon(scaled.to(dtype), level.to(dtype), **extra_args)
        return (x - s * epsilon).to(x.dtype)


class Convolutions(nn.Module):
    """Three convolutions with random weights, and group norm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(4, 16, 3, padding=1),
            nn.GroupNorm(4, 16),
            nn.SiLU(),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.GroupNorm(4, 16),
            nn.SiLU(),
            nn.Conv2d(16, 3, 3, padding=1),
        )

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        plane = level.reshape(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        return self.body(torch.cat([x, plane], dim=1))


def convolutions(device: torch.device) -> Denoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return EpsilonDenoiser(Convolutions()).eval().to(device)


def stable_diffusion(device: torch.device) -> Denoiser:
    """A tiny Stable Diffusion pipeline with random weights, loaded as a real one, and guided."""
    with TemporaryDirectory() as folder:
        save_tiny_stable_diffusion(folder, seed=3)
        model = load_stable_diffusion(folder, device=device)
    guided = ClassifierFreeGuidance(model, 5.0)
    conditions = model.encode_prompt("a letter", "blurry")
    return lambda x, sigma: guided(x, sigma, **conditions)


def letters(device: torch.device) -> Denoiser:
    """The trained network that ships, under classifier-free guidance."""
    guided = ClassifierFreeGuidance(load_letters(device=device), 3.0)

    def denoiser(x: Tensor, sigma: Tensor, class_labels: Tensor) -> Tensor:
        none = torch.full_like(class_labels, -1)
        positive, negative = {"class_labels": class_labels}, {"class_labels": none}
        return guided(x, sigma, positive=positive, negative=negative)

    return denoiser


def edm(device: torch.device) -> Denoiser:
    """A DDPM++ of EDM with random weights, a few channels wide."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        config = SongConfig(img_resolution=16, in_channels=3, out_channels=3, label_dim=0)
        network = SongUNet(replace(config, model_channels=16, num_blocks=1, attn_resolutions=(8,)))
        for parameter in network.parameters():  # some layers start at 0, and would do nothing
            torch.nn.init.normal_(parameter, std=0.1)
    return EDMPrecond(network).eval().to(device)


PROBLEMS = (
    Problem("Gaussian", gaussian, (2, 3, 8, 8)),
    Problem("mixture of Gaussians", mixture, (16, 8)),
    Problem("digits", digits, (16, 1, 8, 8), {"class_labels": torch.arange(16) % 10}),
    Problem("random convolutions", convolutions, (2, 3, 16, 16)),
    Problem("letters, guided", letters, (2, 3, 32, 32), {"class_labels": torch.tensor([0, 25])}),
    Problem("EDM DDPM++, random", edm, (2, 3, 16, 16)),
    Problem("tiny Stable Diffusion, guided", stable_diffusion, (2, 4, 8, 8), {}, 0.03, 14.6),
)
