"""What a state in float64 costs in a scheduler, and what it is good for.

Microseconds a step on one CPU thread, for latents of Stable Diffusion 1.x and of XL: a loop over the
timesteps of a run of 50 that calls `step` with a ready output of the network. All take turns in random
order; times are medians, less those of the same loop without `step`. The C library keeps freed memory,
as in `overhead.py`.

Relative error of the noise that comes back through miniature pipelines of Stable Diffusion, over 50
steps at a guidance scale of 5: of three, the worst.

    python -m benchmarks.schedulers --write         # four minutes; makes docs/tables/schedulers*.md
    python -m benchmarks.schedulers --repeats 3
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor

from odesolvers.models import save_tiny_stable_diffusion
from odesolvers.schedulers import InvertibleScheduler

from .common import TABLES, machine, seconds, table, write
from .overhead import KEPT

SHAPES = [(1, 4, 64, 64), (4, 4, 128, 128)]
STEPS = 50
KINDS = ("1.x", "2.x-v", "xl")
BARE = "bare"
BDIA = "BDIA(DDIM(), gamma=DampedStepRatio())"


@torch.no_grad()
def steps(scheduler: Any, output: Tensor, z: Tensor) -> Tensor:
    """A run from latents `z`, in which the network always returns `output`."""
    scheduler.set_timesteps(STEPS)
    for t in scheduler.timesteps:
        scheduler.scale_model_input(z, t)
        z = scheduler.step(output, t, z, return_dict=False)[0]
    return z


def bare(scheduler: Any) -> None:
    """What a run does besides its steps."""
    scheduler.set_timesteps(STEPS)
    for _ in scheduler.timesteps:
        pass


def contestants() -> dict[str, Any]:
    """The schedulers, for the same network."""
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    ours = partial(InvertibleScheduler, **config)
    return {
        "`InvertibleScheduler`, BDIA over DDIM": ours(BDIA),
        "the same, state in float32": ours(BDIA, state_dtype="float32"),
        "the same, inverted": ours(BDIA, inverted=True),
        "the same in fixed point": ours(f"{BDIA[:-1]}, arithmetic=FixedPoint())"),
        "diffusers `DDIMScheduler`": diffusers.DDIMScheduler(**config, clip_sample=False),
        "diffusers `EulerDiscreteScheduler`": diffusers.EulerDiscreteScheduler(**config),
        "diffusers `DPMSolverMultistepScheduler`": diffusers.DPMSolverMultistepScheduler(**config),
    }


def miss(folder: str, dtype: torch.dtype, state_dtype: str) -> float:
    """The relative error of the noise that comes back through the pipeline in `folder`."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = InvertibleScheduler.from_config(
        pipe.scheduler.config, solver=BDIA, state_dtype=state_dtype
    )
    call: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": STEPS, "guidance_scale": 5.0}
    call |= {"height": 16, "width": 16, "output_type": "latent"}
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    latents = pipe(**call, latents=noise).images
    pipe.scheduler = pipe.scheduler.inverse()
    back = pipe(**call, latents=latents).images
    return float((back.double() - noise.double()).norm() / noise.double().norm())


def round_trips() -> str:
    """A table of `miss`."""
    rows = []
    with tempfile.TemporaryDirectory() as root:
        for kind in KINDS:
            save_tiny_stable_diffusion(f"{root}/{kind}", kind)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            worst = (
                max(miss(f"{root}/{kind}", dtype, state) for kind in KINDS)
                for state in ("float64", "float32")
            )
            rows.append([str(dtype).removeprefix("torch."), *(f"{x:.1e}" for x in worst)])
    return table(["the noise comes back, pipeline in", "state in float64", "in float32"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--write", action="store_true", help="write docs/tables/schedulers.md")
    options = parser.parse_args()
    if not KEPT.items() <= os.environ.items():  # they are read when a process starts
        command = [sys.executable, "-m", "benchmarks.schedulers", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | KEPT)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of diffusers
    rows: dict[str, list[str]] = {}
    for shape in SHAPES:
        z, output = torch.randn(shape), torch.randn(shape)
        runs: dict[str, Callable[[], Any]] = {}
        for name, scheduler in contestants().items():
            runs[name] = partial(steps, scheduler, 0.1 * output, z)
            runs[BARE + name] = partial(bare, scheduler)
        times = seconds(runs, options.repeats)
        for name in contestants():
            spent = (times[name] - times[BARE + name]) / STEPS * 1e6
            rows.setdefault(name, []).append(f"{spent:.0f}")
    header = ["µs a step, one thread", *(f"latents {shape}" for shape in SHAPES)]
    text = f"{machine()}.\n\n{table(header, [[name, *row] for name, row in rows.items()])}"
    if options.write:
        write(TABLES / "schedulers.md", text)
        write(TABLES / "schedulers_precision.md", round_trips())
    else:
        print(text, round_trips(), sep="\n\n")


if __name__ == "__main__":
    main()
