"""Jobs over data sets: their cost beside the network, two workers against one, and their memory.

- Overhead: the job `odesolvers batch invert` of emoji in one process, over the time that it spends in
  calls of the network: that of the processor in all threads, which other programs on the machine change
  little, and that of the clock. Both are of one run, so that a busy machine slows both alike.
- Workers: the same job by one and by two worker processes, from their start to their end, with the time
  that they need to load the network; only where the load of the machine is below 1.
- Memory: the largest resident set of the command and of a worker, for 1,000, 10,000 and 100,000 pictures
  of 8 x 8 pixels in one tar archive, under a denoiser of one formula.

    python -m benchmarks.jobs --write        # makes docs/tables/jobs.md; 20 minutes
    python -m benchmarks.jobs --pictures 32 --most 1000
    python -m benchmarks.jobs --workers      # one worker and two alone, side by side, at any load
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from odesolvers.jobs import Job, run_workers, work
from odesolvers.models.emoji import emoji_drawings
from odesolvers.opening import Model, open_model

from .common import TABLES, machine, table, write

SOLVER, BATCH, SHARD, STEPS = "BDIA(Euler(), gamma=DampedStepRatio())", 32, 64, 24
MILLION = 1_000_000


class Tiny:
    """The denoiser of normal data of variance 1 in pictures of 8 x 8 pixels."""

    shape = (1, 8, 8)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2).to(x.dtype)


def archive(path: Path, pictures: list[np.ndarray[Any, Any]], count: int) -> Path:
    """A tar archive of `count` PNG pictures, `pictures` in turn."""
    files = []
    for pixels in pictures:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        files.append(file.getvalue())
    with tarfile.open(path, "w") as tar:
        for k in range(count):
            member = tarfile.TarInfo(f"{k:07d}.png")
            member.size = len(files[k % len(files)])
            tar.addfile(member, io.BytesIO(files[k % len(files)]))
    return path


def emoji(folder: Path, count: int) -> tuple[Path, Model]:
    """Drawings of emoji, and the model."""
    images = ((emoji_drawings().images + 1) * 127.5).round().to(torch.uint8)
    pictures = [image.permute(1, 2, 0).numpy() for image in images]
    path = archive(folder / "emoji.tar", pictures, count)
    return path, open_model("emoji", torch.device("cpu"), None, None)


def job(path: Path, name: str, model: Model, steps: int, **settings: Any) -> Job:
    levels = tuple(model.sigmas(steps, None, {}).tolist())
    known = {"batch": BATCH, "shard_size": SHARD}
    return Job("invert", name, str(path), SOLVER, levels, **{**known, **settings})


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the processor and of the clock."""
    start = time.process_time(), time.perf_counter()
    run()
    return time.process_time() - start[0], time.perf_counter() - start[1]


def overhead(folder: Path, count: int, repeats: int) -> tuple[list[float], float]:
    """The ratios of a job to its calls, by processor and by clock, and seconds a picture."""
    path, model = emoji(folder, count)
    described, inside = job(path, "emoji", model, STEPS), [0.0, 0.0]
    denoiser = model.denoiser

    class Timed(torch.nn.Module):
        def forward(self, *args: Any, **options: Any) -> Tensor:
            start = time.thread_time(), time.perf_counter()
            found: Tensor = denoiser(*args, **options)
            inside[0] += time.thread_time() - start[0]
            inside[1] += time.perf_counter() - start[1]
            return found

    model.denoiser = Timed()
    ratios, rates = [], []
    for k in range(repeats):
        output = described.prepare(folder / f"overhead-{k}", model)
        inside[:] = 0.0, 0.0
        whole = timed(lambda path=output.path: work(path, model=model))  # type: ignore[misc]
        ratios.append((whole[0] / inside[0], whole[1] / inside[1]))
        rates.append(whole[0] / count)
    return [statistics.median(r[k] for r in ratios) for k in (0, 1)], statistics.median(rates)


def speed_up(folder: Path, count: int, repeats: int) -> list[tuple[float, float]]:
    """Of jobs by one worker over those by two, in turn: seconds of the clock, and of the processor."""
    path, model = emoji(folder, count)
    described, found = job(path, "emoji", model, STEPS), list[tuple[float, float]]()
    for k in range(repeats):
        pair = []
        for workers in (1, 2):
            output = described.prepare(folder / f"workers-{k}-{workers}", model)
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            clock = timed(lambda: run_workers(output, workers))[1]  # noqa: B023
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            pair.append((clock, after.ru_utime - before.ru_utime))
        found.append((pair[0][0] / pair[1][0], pair[0][1] / pair[1][1]))
    return found


def memory(folder: Path, count: int) -> tuple[float, float]:
    """The largest resident set of the command as the only worker, in MB, and its seconds."""
    pixels = [np.random.default_rng(k).integers(0, 255, (8, 8), dtype=np.uint8) for k in range(64)]
    path = archive(folder / f"{count}.tar", pixels, count)
    command = f"batch invert --model benchmarks.jobs:Tiny --steps 6 --input {path} --output"
    code = (
        "import resource; from odesolvers.cli import main\n"
        f"main({[*command.split(), str(folder / f'out-{count}')]!r})\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    start = time.perf_counter()
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    found = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | one,
    )
    return float(found.stdout.split()[-1]), time.perf_counter() - start


def report(pictures: int, repeats: int, most: int) -> str:
    """The tables."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (processor, clock), rate = overhead(folder, pictures, repeats)
        load = os.getloadavg()[0]
        faster = f"not measured: the load was {load:.0f}"
        if load <= 1:
            faster = f"{speed_up(folder, 8 * pictures, 1)[0][0]:.2f}"
        sets = {n: memory(folder, n) for n in (1_000, 10_000, 100_000) if n <= most}
    hours = MILLION * rate / 3600
    lines = [
        ["a job over its calls of the network, time of the processor", f"{processor:.3f}"],
        ["the same, time of the clock", f"{clock:.3f}"],
        ["processor seconds for a picture", f"{rate:.3f}"],
        ["hours of one core for a million pictures", f"{hours:,.0f}"],
        [f"{8 * pictures} pictures: seconds of one worker over those of two", faster],
    ]
    lines += [
        [f"MB of a worker, {n:,} tiny pictures ({t:.0f} s)", f"{mb:.0f}"]
        for n, (mb, t) in sets.items()
    ]
    note = f"{pictures} emoji of 32 x 32, {STEPS} steps, batches of {BATCH}. {machine()}."
    return f"{table(['measured', 'value'], lines)}\n\n{note}\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--most", type=int, default=100_000)
    parser.add_argument("--workers", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.workers:
        with tempfile.TemporaryDirectory() as name:
            print(
                f"load {os.getloadavg()[0]:.2f}; one worker over two, by the clock, by the processor:"
            )
            for clock, processor in speed_up(Path(name), 2 * args.pictures, args.repeats):
                print(f"{clock:.2f} {processor:.2f}")
        return
    text = report(args.pictures, args.repeats, args.most)
    if args.write:
        write(TABLES / "jobs.md", text)
    else:
        print(text)


if __name__ == "__main__":
    main()
