"""Whole runs of networks, over the time of their calls alone.

A network is called 50 times in a loop that does nothing else, and then by samplers with as many calls,
Heun's with twice as many: this package's, k-diffusion's `sample_euler`, and diffusers' `DDIMScheduler`
in the loop of its pipelines. Each is measured with the network as it is and compiled by
``torch.compile(network, mode="reduce-overhead")``.

The networks are that of the emoji and a UNet of diffusers with random weights: in miniature, or with
`--full` of the size of Stable Diffusion 1.5, whose calls take many seconds on a CPU. States are in
float32. GPUs are in `gpu.py`.

    python -m benchmarks.networks --write        # ten minutes; makes docs/tables/networks.md
    python -m benchmarks.networks --repeats 1    # a minute or two
"""

from __future__ import annotations

import argparse
import warnings

import torch

from .common import TABLES, machine, table, write
from .common.networks import HEADER, SD15, SMALL, Case, measure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--full", action="store_true", help="the full-size network")
    parser.add_argument("--write", action="store_true", help="write docs/tables/networks.md")
    options = parser.parse_args()
    name, config = ("Stable Diffusion 1.5", SD15) if options.full else ("UNet in miniature", SMALL)
    cases = [
        Case("emoji", torch.float32, 1, compiled=True),
        Case(name, torch.float32, 1, config, compiled=True),
    ]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # about grids that amplify errors
    rows = []
    for case in cases:
        for row in measure(case, torch.device("cpu"), options.repeats):
            rows.append(row[:-2])
            print(row, flush=True)
    text = f"{machine()}.\n\n{table(HEADER[:-2], rows, words=(0, 1))}"
    if options.write:
        write(TABLES / "networks.md", text)
    else:
        print(text)


if __name__ == "__main__":
    main()
