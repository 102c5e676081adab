"""Everything on a GPU: ``python -m benchmarks.gpu --write``, or ``make gpu`` with the tests before it.

- runs: whole runs over their calls of the network alone, beside the loops of diffusers and k-diffusion;
  the memory that they add, in states; and whether the host waits for the device between the first call
  and the last (sync debug mode "error");
- exactness: round trips in fixed point, by dtype of the network and by setting of torch;
- gradients: memory of a backward pass through a run, against its number of steps;
- schedulers: microseconds of a step of `InvertibleScheduler` and of `DDIMScheduler`;
- jobs: pictures a second of ``odesolvers batch invert``.

The networks are that of the emoji and two of the sizes of Stable Diffusion 1.5 and XL with random
weights. Each part writes docs/tables/gpu_PART.md when it is done, and none begins after `--minutes`, so
that a short lease is not lost. Without a GPU nothing is measured; ``--device cpu --small`` tries the
script with miniatures.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from odesolvers import BDIA, Euler, FixedPoint, StepRatio, karras_sigmas
from odesolvers.models.emoji import load_emoji
from odesolvers.models.networks import BETAS

from .common import TABLES, Denoiser, machine, peak, seconds, table, waited, write
from .common.networks import HEADER, SD15, SMALL, STEPS, XL, Case, measure

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms need it


def runs(device: torch.device, repeats: int, *, small: bool, late: Callable[[], bool]) -> str:
    """The table of whole runs."""
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    cases = [
        Case("Stable Diffusion 1.5", half, 1, SD15, compiled=True),
        Case("emoji", single, 1, compiled=True),
        Case("Stable Diffusion 1.5", half, 8, SD15),
        Case("emoji", single, 64, compiled=True),
        Case("emoji", single, 1024),
        Case("Stable Diffusion XL", half, 1, XL),
        Case("Stable Diffusion 1.5", brain, 1, SD15),
        Case("Stable Diffusion 1.5", brain, 8, SD15),
        Case("emoji", half, 64),
    ]
    if small:
        cases = [Case("miniature", single, 1, SMALL), Case("emoji", single, 1)]
    rows: list[list[str]] = []
    for case in cases:
        if late() or (case.unet is not None and not find_spec("diffusers")):
            print(f"left out: {case}", flush=True)
            continue
        with suppress(torch.cuda.OutOfMemoryError):
            for row in measure(case, device, repeats):
                rows.append(row)
                print(row, flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return table(HEADER, rows, words=(0, 1))


@contextmanager
def setting(name: str, *, tf32: bool) -> Iterator[None]:
    """A setting of torch, and whether float32 is computed as tf32, in a block."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    deterministic = torch.are_deterministic_algorithms_enabled()
    cudnn.benchmark = name == "cudnn.benchmark"
    cudnn.allow_tf32 = matmul.allow_tf32 = tf32
    torch.use_deterministic_algorithms(name == "deterministic algorithms")
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before
        torch.use_deterministic_algorithms(deterministic)


def exactness(device: torch.device, *, small: bool) -> str:
    """The table of round trips in fixed point."""
    tf32 = "float32 as tf32"
    dtypes = {"float32": torch.float32, tf32: torch.float32}
    dtypes |= {"float16": torch.float16, "bfloat16": torch.bfloat16}
    settings = ("as it is", "cudnn.benchmark", "deterministic algorithms", "compiled")
    cases = {"emoji": None, "Stable Diffusion 1.5": SD15}
    if small:
        cases, settings = {"emoji": None, "miniature": SMALL}, settings[:3]
    rows, sigmas = [], karras_sigmas(20, 0.05, 14.0)
    for name, config in cases.items():
        for kind, dtype in dtypes.items():
            if (config is not None and not find_spec("diffusers")) or (config and kind == tf32):
                continue
            case = Case(name, dtype, 4, config)
            network = case.build(device)
            cells = []
            for how in settings:
                raw: Any = torch.compile(network) if how == "compiled" else network
                with setting(how, tf32=kind == tf32):
                    cells.append(came_back(case.denoiser(raw), case.shape(), sigmas, device))
            rows.append([name, kind, *cells])
            print(rows[-1], flush=True)
    return table(["network", "dtype", *settings], rows, words=range(6))


def came_back(
    denoiser: Denoiser, shape: tuple[int, ...], sigmas: Tensor, device: torch.device
) -> str:
    """Whether a round trip in fixed point is one to the bit, from noise and from the sample."""
    x = 14.0 * torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    solver = BDIA(Euler(), StepRatio(1), FixedPoint())
    try:
        there = solver.sample(denoiser, x, sigmas)
        back = solver.invert(denoiser, there.state)
        again = solver.sample(denoiser, back.state)
    except (RuntimeError, ValueError) as error:
        return f"refused: {str(error)[:60]}"
    missed = [int((a != b).sum()) for a, b in ((back.x, x), (again.x, there.x))]
    return "equal" if missed == [0, 0] else f"{missed[0]} and {missed[1]} elements differ"


def gradients(device: torch.device, *, small: bool) -> str:
    """The table of memory and time of a backward pass."""
    network = load_emoji(device).requires_grad_(True)
    batch = 2 if small else 16
    rows = []
    for steps in (4, 8) if small else (10, 40, 160):
        row = [str(steps)]
        for kind in ("autograd", "checkpointed", "reversible"):

            def denoiser(x: Tensor, sigma: Tensor, kind: str = kind) -> Tensor:
                if kind == "checkpointed":
                    return checkpoint(network, x, sigma, use_reentrant=False)  # type: ignore[no-any-return]
                return network(x, sigma)

            def run(kind: str = kind, steps: int = steps, denoiser: Any = denoiser) -> None:
                x = 80.0 * torch.randn(batch, 3, 32, 32, device=device)
                found = BDIA(Euler(), StepRatio(1)).sample(
                    denoiser,
                    x.requires_grad_(),
                    karras_sigmas(steps, append_zero=False),
                    differentiable="reversible" if kind == "reversible" else True,
                )
                network.zero_grad()
                found.x.square().mean().backward()

            run()  # chooses kernels, and makes room for the gradients of the weights
            start = time.perf_counter()
            most = peak(run, device)
            row += [f"{most / 2**20:.0f}", f"{time.perf_counter() - start:.2f}"]
        rows.append(row)
        print(row, flush=True)
    header = ["steps"]
    for kind in ("autograd", "checkpointed", "reversible"):
        header += [f"{kind}, MB", "s"]
    return table(header, rows)


def schedulers(device: torch.device, repeats: int) -> str:
    """The table of steps of schedulers."""
    if not find_spec("diffusers"):
        return "diffusers is not installed."
    import diffusers

    from odesolvers.schedulers import InvertibleScheduler

    def steps(scheduler: Any, z: Tensor) -> None:
        scheduler.set_timesteps(STEPS, device=device)
        output = 0.1 * z
        for t in scheduler.timesteps:
            z = scheduler.step(output, t, z, return_dict=False)[0]

    made = {
        "InvertibleScheduler": InvertibleScheduler(**BETAS),
        "the same, state in float32": InvertibleScheduler(**BETAS, state_dtype="float32"),
        "DDIMScheduler": diffusers.DDIMScheduler(**BETAS, clip_sample=False),
    }
    columns = []
    for shape in ((1, 4, 64, 64), (8, 4, 128, 128)):
        z = torch.randn(shape, device=device, dtype=torch.float16)
        timed = {name: waited(partial(steps, one, z), device) for name, one in made.items()}
        found = seconds(timed, repeats)
        columns.append([f"{found[name] / STEPS * 1e6:.0f}" for name in made])
    rows = [[name, *cells] for name, cells in zip(made, zip(*columns, strict=True), strict=True)]
    return table(["µs a step, float16", "(1, 4, 64, 64)", "(8, 4, 128, 128)"], rows)


def jobs(device: torch.device, *, small: bool) -> str:
    """Pictures a second of a data-set job, without its start: of two sizes of set, the difference."""
    from PIL import Image

    few, many = (8, 24) if small else (512, 4096)
    taken = {}
    with tempfile.TemporaryDirectory() as name:
        for count in (few, many):
            folder = Path(name) / f"in-{count}"
            folder.mkdir()
            for k in range(count):
                pixels = np.random.default_rng(k).integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{k:05}.png")
            command = [sys.executable, "-m", "odesolvers", "batch", "invert", "--model", "emoji"]
            command += ["--input", str(folder), "--output", f"{name}/out-{count}"]
            start = time.perf_counter()
            subprocess.run([*command, "--device", device.type], check=True, stdout=sys.stderr)
            taken[count] = time.perf_counter() - start
    rate = (many - few) / (taken[many] - taken[few])
    return table(
        ["`odesolvers batch invert --model emoji`", ""],
        [["pictures a second", f"{rate:.0f}"], ["start, s", f"{taken[few] - few / rate:.0f}"]],
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="miniatures, to try the script")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=6.0, help="no part begins later")
    parser.add_argument("--only", nargs="+", help="parts to measure")
    parser.add_argument("--write", action="store_true", help="write docs/tables/gpu_*.md")
    args = parser.parse_args()
    device, small, begun = torch.device(args.device), args.small, time.monotonic()
    if device.type == "cuda" and not torch.cuda.is_available():
        print("No GPU: skipped are runs, exactness, gradients, schedulers and jobs on it.")
        return

    def late() -> bool:
        return time.monotonic() - begun > 60 * args.minutes

    parts: dict[str, Callable[[], str]] = {
        "exactness": partial(exactness, device, small=small),
        "gradients": partial(gradients, device, small=small),
        "schedulers": partial(schedulers, device, args.repeats),
        "jobs": partial(jobs, device, small=small),
        "runs": partial(runs, device, args.repeats, small=small, late=late),
    }
    warnings.simplefilter("ignore")  # about grids that amplify errors
    for name in args.only or parts:
        if late():
            print(f"left out for lack of time: {name}")
            continue
        text = f"{machine()}.\n\n{parts[name]()}"
        if args.write:
            write(TABLES / f"gpu_{name}.md", text)
        else:
            print(text, flush=True)


if __name__ == "__main__":
    main()
