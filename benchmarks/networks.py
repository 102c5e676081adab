"""Whole runs of networks, over the time of their calls alone.

A network is called 50 times in a loop that does nothing else, and then by a sampler of as many calls:
this package's, step by step and as one CUDA graph, and k-diffusion's `sample_euler`. Each with the
network as it is and given to `torch.compile`. The networks are the bundled one of the letters, and one
of the size of Stable Diffusion 1.5 with random weights, in half precision too; states are in float32.

On a GPU that is all of it, with the memory that a run takes beyond the calls. On a CPU, where a call of
the large network takes many seconds, a miniature stands for it, in float32, and no graph is captured.

Run: python benchmarks/networks.py [--write]     (ten minutes; --write makes docs/tables/networks.md)
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from markdown_table import table
from overhead import STEPS, bare, k_diffusion, machine, seconds
from torch import Tensor

from odesolvers import BDIA, DDIM, CUDAGraph, HeunEDM, Solver, karras_sigmas
from odesolvers.models import StableDiffusion, load_letters, save_tiny_stable_diffusion
from odesolvers.models.stable_diffusion import import_diffusers

TABLE = Path(__file__).parent.parent / "docs" / "tables" / "networks.md"
Denoiser = Callable[..., Tensor]


def stable_diffusion(device: torch.device, dtype: torch.dtype, full: bool) -> StableDiffusion:
    """Stable Diffusion with random weights: in miniature, or with the network of 1.5 put in."""
    diffusers = import_diffusers()
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_stable_diffusion(folder)
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    if full:  # diffusers' defaults are the network of 1.5, but for the width of the text
        with device:
            pipeline.unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    model = StableDiffusion(pipeline)
    model.unet.to(dtype)
    return model.to(device)


def networks(device: torch.device, full: bool) -> dict[str, Callable[[], tuple[Denoiser, Tensor]]]:
    """What makes each network, as a denoiser, and the form of its states."""
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
        return _WithText(model, text), x

    made: dict[str, Callable[[], tuple[Denoiser, Tensor]]] = {}
    for dtype in [torch.float32, *halves] if device.type == "cuda" else [torch.float32]:
        made[f"letters, 1, {_short(dtype)}"] = partial(letters, dtype)
    name = "Stable Diffusion 1.5" if full else "Stable Diffusion in miniature"
    for batch, dtype in cases:
        made[f"{name}, {batch}, {_short(dtype)}"] = partial(latents, batch, dtype)
    return made


class _WithText(torch.nn.Module):
    """A model with its prompt, for samplers that know of none."""

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
            denoiser = torch.compile(denoiser)
        runs: dict[str, Callable[[], Any]] = {
            "bare": partial(bare, _at_level(denoiser, 1.0), x),
            "k-diffusion": partial(k_diffusion("sample_euler", sigmas), denoiser, x),
            "ours": partial(BDIA(DDIM()).sample, denoiser, x, sigmas),
        }
        if on_gpu and how == "as it is":
            runs["graph"] = partial(runs["ours"], execution=CUDAGraph())
        waited = {key: _waited(run, form.device) for key, run in runs.items()}
        found = seconds(waited, repeats, twice=False)
        calls = found["bare"]
        row = [name, how, f"{calls / STEPS * 1e3:.2f}", f"{found['k-diffusion'] / calls:.3f}"]
        row += [f"{found['ours'] / calls:.3f}", f"{(found['ours'] - calls) / STEPS * 1e6:.0f}"]
        graph = found.get("graph")
        row += (
            [f"{graph / calls:.3f}", f"{found['k-diffusion'] / graph:.2f}"] if graph else ["", ""]
        )
        if on_gpu:
            beyond = _peak(runs["ours"], x.device) - _peak(runs["bare"], x.device)
            row.append(f"{beyond / x.nbytes:.1f}")
        rows.append(row)
    return rows


def stacked(name: str, denoiser: Denoiser, form: Tensor, repeats: int) -> list[str]:
    """Second stages one by one and in one call."""
    x, sigmas = 14.0 * torch.randn(form.shape, device=form.device), karras_sigmas(18, 0.05, 14.0)
    solvers: dict[str, Solver] = {
        "HeunEDM": HeunEDM(),
        "one by one": BDIA(HeunEDM()),
        "in one call": BDIA(HeunEDM(), batched=True),
    }
    runs = {
        key: _waited(partial(solver.sample, denoiser, x, sigmas), form.device)
        for key, solver in solvers.items()
    }
    found = seconds(runs, repeats, twice=False)
    plain = found["HeunEDM"]
    return [name, f"{plain * 1e3:.0f}", *(f"{found[key] / plain:.2f}" for key in list(found)[1:])]


def _at_level(denoiser: Denoiser, sigma: float) -> Denoiser:
    return lambda x, ones: denoiser(x, sigma * ones)


def _waited(run: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    def wait() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return wait


def _peak(run: Callable[[], Any], device: torch.device) -> int:
    """The most memory on a GPU that a run takes beyond what is there, once it has chosen its kernels."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--full", action="store_true", help="the full-size network on a CPU too")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of grids that amplify: that is not what is measured
    rows, stages = [], []
    for name, make in networks(device, options.full or device.type == "cuda").items():
        denoiser, form = make()
        with torch.no_grad():
            rows += measure(name, denoiser, form, options.repeats)
            stages.append(stacked(name, denoiser, form, options.repeats))
        print(*rows[-2:], stages[-1], sep="\n", flush=True)
    header = ["network, batch, dtype", "", "a call, ms", "k-diffusion", "ours", "µs a step"]
    header += ["graph", "k-diffusion over graph", "states of memory"]
    if device.type != "cuda":
        header, rows = header[:6], [row[:6] for row in rows]
    first = table(header, rows, words=(0, 1))
    second = table(["18 steps", "HeunEDM, ms", "one by one", "in one call"], stages)
    text = "\n\n".join([machine() + ".", first, second]) + "\n"
    print(text)
    if options.write:
        TABLE.write_text(text)


if __name__ == "__main__":
    main()
