"""Whole runs of networks, over the time of their calls alone.

A network is called 50 times in a loop that does nothing else, and then by samplers with as many calls:
this package's and k-diffusion's `sample_euler`. Each is measured with the network as it is and compiled
by ``torch.compile(denoiser, mode="reduce-overhead")``, which on a GPU replays calls as CUDA graphs.

The networks are that of the letters and one of the size of Stable Diffusion 1.5 with random weights, on
a GPU in half precision too; states are in float32. On a GPU the table also has the memory that a run
takes beyond the calls. On a CPU, where a call of the large network takes many seconds, a miniature
replaces it.

    python -m benchmarks.networks --write        # ten minutes; makes docs/tables/networks.md
    python -m benchmarks.networks --repeats 1    # a minute or two
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from odesolvers import BDIA, DDIM, karras_sigmas
from odesolvers.models import StableDiffusion, load_letters, save_tiny_stable_diffusion
from odesolvers.models.stable_diffusion import import_diffusers

from .common import TABLES, Denoiser, bare, k_diffusion, machine, seconds, table, write

STEPS = 50


def stable_diffusion(device: torch.device, dtype: torch.dtype, full: bool) -> StableDiffusion:
    """Stable Diffusion with random weights, in miniature or with a network of the size of 1.5."""
    diffusers = import_diffusers()
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_stable_diffusion(folder)
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    if full:  # diffusers' defaults are those of 1.5 except for the width of the text
        with device:
            pipeline.unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    model = StableDiffusion(pipeline)
    model.unet.to(dtype)
    return model.to(device)


def networks(device: torch.device, full: bool) -> dict[str, Callable[[], tuple[Denoiser, Tensor]]]:
    """Builders of the networks: each returns a denoiser and an empty state."""
    halves = [torch.float16, torch.bfloat16]  # several times slower on a CPU
    cases = [(1, torch.float32)]
    if device.type == "cuda":
        cases = [*((1, dtype) for dtype in halves), (8, torch.float16)]

    def letters(dtype: torch.dtype) -> tuple[Denoiser, Tensor]:
        return load_letters(device, dtype), torch.empty(1, 3, 32, 32, device=device)

    def latents(batch: int, dtype: torch.dtype) -> tuple[Denoiser, Tensor]:
        model = stable_diffusion(device, dtype, full)
        width = model.unet.config.cross_attention_dim
        text = torch.randn(1, 77, width, device=device, dtype=dtype)
        channels, rows, columns = model.latent_shape()
        x = torch.empty(batch, channels, rows, columns, device=device)
        return WithText(model, text), x

    made: dict[str, Callable[[], tuple[Denoiser, Tensor]]] = {}
    for dtype in [torch.float32, *halves] if device.type == "cuda" else [torch.float32]:
        made[f"letters, 1, {short(dtype)}"] = partial(letters, dtype)
    name = "Stable Diffusion 1.5" if full else "Stable Diffusion in miniature"
    for batch, dtype in cases:
        made[f"{name}, {batch}, {short(dtype)}"] = partial(latents, batch, dtype)
    return made


class WithText(torch.nn.Module):
    """A model with its prompt, for samplers that pass none."""

    def __init__(self, model: StableDiffusion, text: Tensor) -> None:
        super().__init__()
        self.model, self.text = model, text

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.model(x, sigma, encoder_hidden_states=self.text)  # type: ignore[no-any-return]


def measure(name: str, denoiser: Denoiser, form: Tensor, repeats: int) -> list[list[str]]:
    """A row for the network as it is, and one for it compiled."""
    on_gpu = form.device.type == "cuda"
    sigmas = karras_sigmas(STEPS, 0.05, 14.0)
    x = 14.0 * torch.randn(form.shape, device=form.device)
    rows = []
    for how in ("as it is", "compiled"):
        if how == "compiled":
            denoiser = torch.compile(denoiser, mode="reduce-overhead")
        runs: dict[str, Callable[[], Any]] = {
            "bare": partial(bare, denoiser, x, STEPS),
            "k-diffusion": partial(k_diffusion("sample_euler", sigmas), denoiser, x),
            "ours": partial(BDIA(DDIM()).sample, denoiser, x, sigmas),
        }
        timed = {key: waited(run, form.device) for key, run in runs.items()}
        found = seconds(timed, repeats, twice=False)
        calls = found["bare"]
        row = [name, how, f"{calls / STEPS * 1e3:.2f}", f"{found['k-diffusion'] / calls:.3f}"]
        row += [f"{found['ours'] / calls:.3f}", f"{(found['ours'] - calls) / STEPS * 1e6:.0f}"]
        if on_gpu:
            beyond = peak(runs["ours"], x.device) - peak(runs["bare"], x.device)
            row.append(f"{beyond / x.nbytes:.1f}")
        rows.append(row)
    return rows


def waited(run: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    def wait() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return wait


def peak(run: Callable[[], Any], device: torch.device) -> int:
    """The peak of GPU memory that a run adds, once it has chosen its kernels."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--full", action="store_true", help="the full-size network on a CPU too")
    parser.add_argument("--write", action="store_true", help="write docs/tables/networks.md")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # about grids that amplify errors
    rows = []
    for name, make in networks(device, options.full or device.type == "cuda").items():
        denoiser, form = make()
        with torch.no_grad():
            rows += measure(name, denoiser, form, options.repeats)
        print(*rows[-2:], sep="\n", flush=True)
    header = ["network, batch, dtype", "", "a call, ms", "k-diffusion", "ours", "µs a step"]
    header += ["states of memory"] if device.type == "cuda" else []
    text = f"{machine()}.\n\n{table(header, rows, words=(0, 1))}"
    if options.write:
        write(TABLES / "networks.md", text)
    else:
        print(text)


if __name__ == "__main__":
    main()
