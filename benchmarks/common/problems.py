"""The problems that solvers are measured on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from tempfile import TemporaryDirectory
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from odesolvers import karras_sigmas
from odesolvers.models import (
    ClassifierFreeGuidance,
    Gaussian,
    GaussianMixture,
    IdealDenoiser,
    load_digits,
    load_stable_diffusion,
    save_tiny_stable_diffusion,
)
from odesolvers.models.edm import EDMPrecond, SongConfig, SongUNet
from odesolvers.models.emoji import emoji_drawings, load_emoji
from odesolvers.models.emoji.network import WEIGHTS

CALIBRATION_SEED = 2000
"""The seed of the noise that solvers may be fitted to; no error is measured on it."""

Denoiser = Callable[..., Tensor]


@dataclass(frozen=True)
class Problem:
    """A denoiser and its flow from noise at the level `top` to nearly clean data at `bottom`.

    Attributes:
        name: in tables and files.
        build: the denoiser on a device; called once, when it is first needed.
        shape: of one state.
        states: the number of states in a batch.
        labels: the class labels of a batch of that many states, if the denoiser takes any.
        dtype: of the states that are measured; fine solutions are computed in float64.
        bottom, top: the last and the first noise level.
        data: draws a number of data points, for Fréchet distances; None without such data.
        frechet_states: how many samples are compared with data.
        budgets: numbers of denoiser evaluations to compare solvers at.
        dear: those of them at which round trips and Fréchet distances are measured.
        seeds: the number of repeats, each with its own noise.
        fine: steps of the fine solution.
        calibration_runs: the limit of `calibrate`'s runs.
        learned_steps: the longest grid to fit weights on. A longer one gets the best of the starting
            rules, among them the weights of this one. Levels are fitted on grids of up to half of it.
        version: raised when anything else about the problem changes, so that it is measured again;
            0 for a toy, whose results are not kept.
    """

    name: str
    build: Callable[[torch.device], Denoiser]
    shape: tuple[int, ...]
    states: int
    labels: Callable[[int], Tensor] | None = None
    dtype: torch.dtype = torch.float64
    bottom: float = 0.02
    top: float = 80.0
    data: Callable[[int], Tensor] | None = None
    frechet_states: int = 0
    budgets: tuple[int, ...] = (5, 6, 8, 10, 15, 20, 40, 80)
    dear: tuple[int, ...] = (10, 20, 40)
    seeds: int = 3
    fine: int = 1000
    calibration_runs: int = 80
    learned_steps: int = 20
    version: int = 1

    @cached_property
    def denoiser(self) -> Denoiser:
        """The denoiser on the CPU."""
        return self.build(torch.device("cpu"))

    @property
    def setting(self) -> str:
        """Identifies the problem's settings in measured rows."""
        return (
            f"version {self.version}, {self.states} states, {self.fine} fine steps, "
            f"{self.frechet_states} Fréchet states"
        )

    def arguments(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The ``extra_args`` of a batch of `states`."""
        return {} if self.labels is None else {"class_labels": self.labels(self.states).to(device)}

    def sigmas(self, steps: int) -> Tensor:
        """A Karras grid of `steps` steps that ends at `bottom`: above 0 the flow is invertible."""
        return karras_sigmas(steps + 1, self.bottom, self.top, append_zero=False)

    def noise(self, seed: int = 0, states: int | None = None) -> Tensor:
        """Noise at the level `top`, in float64."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.states if states is None else states, *self.shape)
        return self.top * torch.randn(shape, generator=generator, dtype=torch.float64)

    def calibration_noise(self) -> Tensor:
        """Noise to fit solvers to, on which nothing is measured."""
        return self.noise(CALIBRATION_SEED).to(self.dtype)


def mixture(device: torch.device) -> GaussianMixture:
    """Five Gaussians in eight dimensions."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    stds = 0.2 + 0.3 * torch.rand(5, generator=generator, dtype=torch.float64)
    return GaussianMixture(means, stds).to(device)


def mixture_data(n: int) -> Tensor:
    return mixture(torch.device("cpu")).sample(n, torch.Generator().manual_seed(998))


def digits(device: torch.device) -> Denoiser:
    """The posterior mean over scikit-learn's digits."""
    return IdealDenoiser(*load_digits()).to(device)


def digits_data(n: int) -> Tensor:
    return load_digits()[0][:n]


def drawings(device: torch.device) -> Denoiser:
    """The posterior mean over 96 drawings of emoji in colour."""
    return IdealDenoiser(emoji_drawings().images.double()).to(device)


def emoji(device: torch.device) -> Denoiser:
    """The trained network that ships with the package, in float32."""
    return load_emoji(device)


def guided_emoji(device: torch.device) -> Denoiser:
    """The same network under classifier-free guidance from no label."""
    guided = ClassifierFreeGuidance(load_emoji(device), 3.0)

    def denoiser(x: Tensor, sigma: Tensor, class_labels: Tensor) -> Tensor:
        return guided(x, sigma, **towards(class_labels))

    return denoiser


def towards(labels: Tensor) -> dict[str, dict[str, Tensor]]:
    """The branches of `ClassifierFreeGuidance` from no label, which is zeros, to `labels`."""
    return {
        "positive": {"class_labels": labels},
        "negative": {"class_labels": torch.zeros_like(labels)},
    }


def stable_diffusion(device: torch.device) -> Denoiser:
    """A tiny Stable Diffusion pipeline with random weights, loaded as a real one, and guided."""
    with TemporaryDirectory() as folder:
        save_tiny_stable_diffusion(folder, seed=3)
        model = load_stable_diffusion(folder, device=device)
    guided = ClassifierFreeGuidance(model, 5.0)
    conditions = model.encode_prompt("a letter", "blurry")
    return lambda x, sigma: guided(x, sigma, **conditions)


class Convolutions(nn.Module):
    """Random convolutions ε with group norm, as ``D(x, σ) = x - σ ε(x / sqrt(1 + σ²), atan σ)``."""

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

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        dtype = next(self.parameters()).dtype
        s = sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        level = (torch.atan(s) * (2 / torch.pi)).to(dtype).expand(-1, 1, *x.shape[2:])
        scaled = (x.to(torch.float32) / torch.sqrt(1 + s * s)).to(dtype)
        return (x - s * self.body(torch.cat([scaled, level], dim=1))).to(x.dtype)


def convolutions(device: torch.device) -> Convolutions:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return Convolutions().eval().to(device)


def edm(device: torch.device) -> Denoiser:
    """A DDPM++ of EDM with random weights, a few channels wide."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        config = SongConfig(img_resolution=16, in_channels=3, out_channels=3, label_dim=0)
        network = SongUNet(replace(config, model_channels=16, num_blocks=1, attn_resolutions=(8,)))
        for parameter in network.parameters():  # some layers start at 0 and would do nothing
            nn.init.normal_(parameter, std=0.1)
    return EDMPrecond(network).eval().to(device)


def spread_labels(n: int) -> Tensor:
    """Labels of drawings far apart in the set, so of other subgroups, in both styles by turns."""
    labels = emoji_drawings().labels
    return labels[37 * torch.arange(n) % len(labels)]


# Of networks a few states are too few for a Fréchet distance, and random weights have no data.
NETWORK: dict[str, Any] = {
    "dtype": torch.float32,
    "seeds": 2,
    "fine": 300,
    "dear": (20,),
    "calibration_runs": 40,
}
"""Settings that calls of tens of milliseconds allow."""
MIXTURE = Problem(
    "mixture", mixture, (8,), 256, data=mixture_data, frechet_states=2048, learned_steps=40
)
DIGITS = Problem(
    "digits", digits, (1, 8, 8), 64, data=digits_data, frechet_states=512, learned_steps=40
)
DRAWINGS = Problem("drawings of emoji", drawings, (3, 32, 32), 32)
TRAINED: dict[str, Any] = {
    **NETWORK,
    "labels": spread_labels,
    "budgets": (5, 10, 20),
    "fine": 100,
    "calibration_runs": 30,
    "version": crc32(WEIGHTS.read_bytes()),
}
"""Settings that calls of a tenth of a second allow; other weights are measured again."""
EMOJI = Problem("emoji", emoji, (3, 32, 32), 4, **TRAINED)
GUIDED_EMOJI = Problem("guided emoji", guided_emoji, (3, 32, 32), 2, **TRAINED)
TINY_STABLE_DIFFUSION = Problem(
    "tiny Stable Diffusion",
    stable_diffusion,
    (4, 8, 8),
    4,
    bottom=0.03,
    top=14.6,
    learned_steps=40,
    **NETWORK,
)
PROBLEMS = (MIXTURE, DIGITS, EMOJI, GUIDED_EMOJI, TINY_STABLE_DIFFUSION)
"""The problems of the suite."""

EXACT_PROBLEMS = (
    Problem("Gaussian", lambda device: Gaussian(0.3, 0.7).to(device), (3, 8, 8), 2, bottom=0.002),
    replace(MIXTURE, states=16, bottom=0.002),
    replace(DIGITS, states=16, bottom=0.002, labels=lambda n: torch.arange(n) % 10),
    Problem("random convolutions", convolutions, (3, 16, 16), 2, bottom=0.002, **NETWORK),
    replace(GUIDED_EMOJI, states=2, bottom=0.002),
    Problem("EDM DDPM++, random", edm, (3, 16, 16), 2, bottom=0.002, **NETWORK),
    replace(TINY_STABLE_DIFFUSION, states=2),
)
"""The denoisers on which exact inversion is tested."""
