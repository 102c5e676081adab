"""Memory and time of gradients through a run: ``python -m benchmarks.gradients``.

The loss is the mean square of samples of the emoji under BDIA over Euler, its gradient that of the
start, of a condition and of all weights. Each figure comes from a process of its own. Memory is the
most that it held above what a call of the network without gradients had taken, where the allocator of
the system returns what is freed. Time is that of the processor, in one thread.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from odesolvers import BDIA, Euler, StepRatio, karras_sigmas
from odesolvers.models import Gaussian, emoji_labels, load_emoji

from .common import TABLES, machine, table, write

STEPS: Final = (10, 20, 40, 80)
KINDS: Final = {
    "autograd": "autograd",
    "checkpoint": "autograd, checkpointed calls",
    "reversible": "reversible",
}
BATCH: Final = 4


def measure(kind: str, steps: int) -> dict[str, Any]:
    """Megabytes, seconds and the gradient of the start, of one backward pass in this process."""
    torch.set_num_threads(1)
    network = load_emoji().requires_grad_(True)
    rows = emoji_labels(["cat-face", "person", "time", "heart"])

    def denoiser(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        if kind == "checkpoint" and torch.is_grad_enabled():
            return checkpoint(network, x, sigma, labels, use_reentrant=False)  # type: ignore[no-any-return]
        return network(x, sigma, labels)  # type: ignore[no-any-return]

    def gradient(n: int) -> tuple[Tensor, Tensor]:
        x = 80.0 * torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        labels = rows.clone().requires_grad_()
        solution = BDIA(Euler(), StepRatio(1)).sample(
            denoiser,
            x.requires_grad_(),
            karras_sigmas(n, append_zero=False),
            extra_args={"labels": labels},
            differentiable="reversible" if kind == "reversible" else True,
        )
        network.zero_grad()
        solution.x.square().mean().backward()
        assert x.grad is not None
        assert labels.grad is not None
        return x.grad, labels.grad

    warm_up()
    with torch.no_grad():
        denoiser(torch.zeros(BATCH, 3, 32, 32), torch.ones(BATCH), rows)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    found = gradient(steps)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "megabytes": (peak - before) / 1024,
        "seconds": seconds,
        "gradient": torch.cat([g.flatten() for g in found]).tolist(),
    }


def warm_up() -> None:
    """What is imported at the first use: 150 MB by `checkpoint`, 34 MB by the reversible run."""
    x = torch.ones(1, 1, requires_grad=True)
    checkpoint(torch.sin, x, use_reentrant=False).sum().backward()  # type: ignore[union-attr]
    for way in (True, "reversible"):
        run = BDIA(Euler()).sample(Gaussian(), x, [2.0, 1.0, 0.5], differentiable=way)
        run.x.sum().backward()


def measured(module: str, *arguments: str) -> Any:
    """What `module` prints; its megabytes by a second process, in which no freed block is kept."""
    call = [sys.executable, "-m", module, *arguments]
    one, other = (
        json.loads(
            subprocess.run(
                call, check=True, capture_output=True, text=True, env=os.environ | more
            ).stdout
        )
        for more in ({}, {"MALLOC_MMAP_THRESHOLD_": "65536"})
    )
    return one | {"megabytes": other["megabytes"]}


def main() -> None:
    """Print the table, and write it to ``docs/tables/gradients.md``."""
    rows = []
    for steps in STEPS:
        found = {kind: measured("benchmarks.gradients", kind, str(steps)) for kind in KINDS}
        true = torch.tensor(found["autograd"]["gradient"])
        for kind, name in KINDS.items():
            one = found[kind]
            miss = (torch.tensor(one["gradient"]) - true).norm() / true.norm()
            rows.append(
                [
                    str(steps),
                    name,
                    f"{one['megabytes']:.1f}",
                    f"{one['seconds'] / found['checkpoint']['seconds']:.2f}",
                    f"{miss:.0e}" if kind != "autograd" else "",
                ]
            )
            print(rows[-1], flush=True)
    header = ["steps", "gradient", "MB", "time / checkpointed", "difference from autograd"]
    write(TABLES / "gradients.md", f"{machine()}.\n\n{table(header, rows, words=(1,))}\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
    else:
        main()
