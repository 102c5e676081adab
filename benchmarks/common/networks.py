"""Networks to time: that of the emoji, and UNets of diffusers in published sizes, random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Final

import torch
from torch import Tensor, nn

from odesolvers import BDIA, DDIM, Euler, FixedPoint, HeunEDM, karras_sigmas
from odesolvers.models import DiscreteDenoiser
from odesolvers.models.emoji import load_emoji
from odesolvers.models.networks import BETAS

from .problems import Denoiser
from .timing import bare, k_diffusion, peak, seconds, waited

XL: Final = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "cross_attention_dim": 2048,
}
SD15: Final = {"sample_size": 64, "cross_attention_dim": 768}
SMALL: Final = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
}


STEPS: Final = 50
HEADER: Final = (
    "network, batch, dtype",
    "",
    "a call, ms",
    "diffusers",
    "k-diffusion",
    "BDIA(DDIM())",
    "BDIA(Euler())",
    "BDIA(HeunEDM())",
    "fixed point",
    "states of memory",
    "waits",
)
"""The columns of `measure`: times of whole runs over those of their calls alone."""


@dataclass(frozen=True)
class Case:
    """A network to measure, made when its turn comes.

    Attributes:
        name: in tables.
        dtype: that of the network; states are in float32.
        batch: states in a batch.
        unet: the configuration of a UNet of diffusers; None for the network of the emoji.
        compiled: whether it is measured compiled as well.
    """

    name: str
    dtype: torch.dtype
    batch: int
    unet: dict[str, Any] | None = None
    compiled: bool = False

    def build(self, device: torch.device) -> nn.Module:
        """The raw network: ``(z, t) -> epsilon`` of a UNet, or a denoiser."""
        if self.unet is None:
            return load_emoji(device, self.dtype)
        return WithText(self.unet, self.batch, device, self.dtype)

    def denoiser(self, network: Any) -> Any:
        """The raw network, or the same compiled, as a denoiser of states in float32."""
        if self.unet is None:
            return network
        return DiscreteDenoiser(network, alphas_cumprod(), dtype=self.dtype)

    def __str__(self) -> str:
        return f"{self.name}, {self.batch}, {str(self.dtype).removeprefix('torch.')}"

    def shape(self) -> tuple[int, ...]:
        """That of the states."""
        size = 32 if self.unet is None else self.unet["sample_size"]
        return self.batch, 3 if self.unet is None else 4, size, size


class WithText(nn.Module):
    """A UNet of diffusers with random weights and a prompt, as ``network(z, t)``."""

    def __init__(
        self, config: dict[str, Any], batch: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        import diffusers

        torch.manual_seed(0)
        with device:
            self.unet = diffusers.UNet2DConditionModel(**config).eval().requires_grad_(False)
            text = torch.randn(batch, 77, config["cross_attention_dim"])
            added = {"text_embeds": torch.randn(batch, 1280), "time_ids": torch.rand(batch, 6)}
        self.unet.to(dtype)
        self.text = text.to(dtype)
        self.added = {name: value.to(dtype) for name, value in added.items()}

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        found: Tensor = self.unet(z, t, self.text, added_cond_kwargs=self.added).sample
        return found


def alphas_cumprod() -> Tensor:
    """ᾱ of Stable Diffusion."""
    start, end = BETAS["beta_start"], BETAS["beta_end"]
    assert isinstance(start, float)
    assert isinstance(end, float)
    roots = torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64)
    return (1 - roots.square()).cumprod(0)


class Unwaited:
    """A denoiser from whose first call to its last the host may not wait for the device."""

    def __init__(self, denoiser: Denoiser, calls: int) -> None:
        self.denoiser, self.left = denoiser, calls

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        output = self.denoiser(x, sigma, **extra_args)
        self.left -= 1
        torch.cuda.set_sync_debug_mode("error" if self.left else "default")
        return output


def diffusers_loop(network: nn.Module, z: Tensor, dtype: torch.dtype) -> None:
    """The loop of diffusers' pipelines with its `DDIMScheduler`."""
    import diffusers

    scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False)
    scheduler.set_timesteps(STEPS, device=z.device)
    z = z.to(dtype)
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(z, t), t)
        z = scheduler.step(output, t, z, return_dict=False)[0]


def measure(case: Case, device: torch.device, repeats: int) -> Iterator[list[str]]:
    """A row for the network as it is, and one for it compiled."""
    network = case.build(device)
    sigmas = karras_sigmas(STEPS, 0.05, 14.0)
    x = 14.0 * torch.randn(case.shape(), device=device)
    for how in ("as it is", "compiled")[: 1 + case.compiled]:
        if how == "compiled":
            network = torch.compile(network, mode="reduce-overhead")  # type: ignore[assignment]
        denoiser = case.denoiser(network)

        def several(
            x: Tensor, sigma: Tensor, denoiser: Denoiser = denoiser, how: str = how
        ) -> Tensor:
            output = denoiser(x, sigma)
            return output.clone() if how == "compiled" else output

        solvers: dict[str, tuple[Any, Any, int]] = {
            "BDIA(DDIM())": (BDIA(DDIM()), denoiser, 1),
            "BDIA(Euler())": (BDIA(Euler()), denoiser, 1),
            "BDIA(HeunEDM())": (BDIA(HeunEDM()), several, 2),
            "fixed point": (BDIA(DDIM(), 1.0, FixedPoint()), denoiser, 1),
        }
        runs: dict[str, Callable[[], Any]] = {"bare": partial(bare, denoiser, x, STEPS)}
        if case.unet is not None:
            runs["diffusers"] = partial(diffusers_loop, network, x, case.dtype)
        if find_spec("k_diffusion"):
            runs["k-diffusion"] = partial(k_diffusion("sample_euler", sigmas), denoiser, x)
        for name, (solver, given, _) in solvers.items():
            runs[name] = partial(solver.sample, given, x, sigmas)
        found = seconds(
            {name: waited(run, device) for name, run in runs.items()}, repeats, twice=False
        )
        calls = found["bare"]
        row = [str(case), how, f"{calls / STEPS * 1e3:.2f}"]
        row += [
            f"{found[name] / calls:.3f}" if name in found else ""
            for name in ("diffusers", "k-diffusion")
        ]
        row += [f"{found[name] / calls / each:.3f}" for name, (_, _, each) in solvers.items()]
        beyond = peak(runs["BDIA(DDIM())"], device) - peak(runs["bare"], device)
        row.append(f"{beyond / x.nbytes:.1f}" if device.type == "cuda" else "")
        row.append(waits(solvers["BDIA(DDIM())"][0], denoiser, x, sigmas))
        yield row


def waits(solver: Any, denoiser: Denoiser, x: Tensor, sigmas: Tensor) -> str:
    """Whether a run waits for the device between its first call and its last."""
    if x.device.type != "cuda":
        return ""
    try:
        solver.sample(Unwaited(denoiser, STEPS), x, sigmas)
    except RuntimeError as error:
        return str(error).splitlines()[0][:60]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "never"
