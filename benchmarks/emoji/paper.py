"""The comparison of the BDIA paper on trained EDM networks: ``python -m benchmarks.emoji.paper``.

BDIA over DDIM against DDIM, and BDIA over EDM's Heun against EDM's Heun, at equal evaluations, on four
small networks of emoji, each under a preconditioning of its own (``python -m benchmarks.emoji.train
--preconditioning vp --channels 16 --out out/emoji_vp`` and so on). Constant weights are the paper's;
calibrated weights are learned on other noise, under other labels. The figures are the Fréchet distance
to withheld drawings, in the features of the classifier, and the distance to a fine solution from the
same noise, relative to its size; both with their spread over seeds. Each figure is kept as soon as it is
found, and a second call goes on where the first was stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from odesolvers import (
    BDIA,
    DDIM,
    HeunEDM,
    HeunStepRatio,
    Objective,
    StepRatio,
    karras_sigmas,
)
from odesolvers.models.edm import Preconditioner, load_edm

from ..common import TABLES, relative_errors, table, write
from .classifier import Classifier, load_classifier
from .data import Emoji, load_emoji
from .quality import frechet
from .runs import Figures, learned

PRECONDITIONINGS: Final = ("edm", "vp", "ve", "iddpm")
EVALUATIONS: Final = (10, 20, 40)
FINE: Final = 128  # steps of Heun
BATCH: Final = 64

Sampler = Any
"""A solver or an approximator."""
SOLVERS: Final[dict[str, Callable[[], Sampler]]] = {
    "DDIM": DDIM,
    "BDIA(DDIM(), 0.5)": partial(BDIA, DDIM(), 0.5),
    "BDIA(DDIM(), 0.96)": partial(BDIA, DDIM(), 0.96),
    "BDIA(DDIM(), 1)": partial(BDIA, DDIM(), 1.0),
    "BDIA(DDIM(), StepRatio(2))": partial(BDIA, DDIM(), StepRatio(2)),
    "BDIA(DDIM()), calibrated": DDIM,
    "EDM's Heun": HeunEDM,
    "BDIA(HeunEDM('both'), 0.5)": partial(BDIA, HeunEDM("both"), 0.5),
    "BDIA(HeunEDM('both'), 1)": partial(BDIA, HeunEDM("both"), 1.0),
    "BDIA(HeunEDM(), 0.5)": partial(BDIA, HeunEDM(), 0.5),
    "BDIA(HeunEDM(), 1)": partial(BDIA, HeunEDM(), 1.0),
    "BDIA(HeunEDM(), HeunStepRatio())": partial(BDIA, HeunEDM(), HeunStepRatio()),
    "BDIA(HeunEDM()), calibrated": HeunEDM,
}


def evaluations(name: str) -> int:
    """Evaluations a step; the form of Heun with a look behind of its own takes three."""
    return 3 if "both" in name else 2 if "Heun" in name else 1


def grid(network: Preconditioner, steps: int) -> Tensor:
    """Karras levels from 80 to 0.02, which counts as clean, as the network rounds them."""
    return network.round_sigma(
        karras_sigmas(steps + 1, 0.02, min(80.0, network.sigma_max), append_zero=False)
    )


def starts(network: Preconditioner, labels: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of noise and labels."""
    generator = torch.Generator().manual_seed(seed)
    top = grid(network, 10)[0].float()
    for part in labels.split(BATCH):
        yield top * torch.randn(len(part), 3, 32, 32, generator=generator), part


def measure(
    name: str,
    make: Callable[[], Sampler],
    network: Preconditioner,
    emoji: Emoji,
    steps: int,
    seed: int,
    fine: Callable[[], Tensor],
    judge: Classifier,
) -> dict[str, float]:
    """The two figures of one sampler, one grid and one seed."""
    unseen = np.flatnonzero(emoji.held_out)
    labels, sigmas = torch.as_tensor(emoji.labels[unseen]), grid(network, steps)
    sampler = make()
    if "calibrated" in name:  # for samples
        weights = learned(
            network, emoji, sigmas, base=sampler, objective=Objective(sampling=1, encoding=0)
        )
        sampler = BDIA(sampler, weights)
    drawn = torch.cat(
        [
            sampler.sample(network, x, sigmas, extra_args={"class_labels": part}).x
            for x, part in starts(network, labels, seed)
        ]
    )
    with torch.inference_mode():
        distance = frechet(judge.embed(drawn), judge.embed(emoji.on_ground(unseen)))
    return {"frechet": distance, "error": float(relative_errors(drawn, fine()).median())}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--networks", type=Path, default=Path("out"), help="holds emoji_edm, ...")
    parser.add_argument("--results", type=Path, default=Path("out/emoji_paper.json"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="the table, from what is there")
    args = parser.parse_args()
    results, emoji = Figures(args.results), load_emoji()
    judge = load_classifier(emoji)
    for kind in PRECONDITIONINGS:
        network = load_edm(args.networks / f"emoji_{kind}" / "emoji.safetensors")
        for seed in range(args.seeds):
            fine = cache(partial(_fine, network, emoji, seed))
            for name, make in SOLVERS.items():
                for budget in EVALUATIONS:
                    steps = budget // evaluations(name)
                    results.get(
                        f"{kind}|{name}|{budget}|{seed}",
                        partial(measure, name, make, network, emoji, steps, seed, fine, judge),
                    )
    if args.write:
        heads = ["network", "solver", *(f"{n}" for n in EVALUATIONS)]
        for figure, digits in (("frechet", 2), ("error", 4)):
            rows = [
                [
                    kind,
                    name,
                    *(_cell(results.found, kind, name, n, figure, digits) for n in EVALUATIONS),
                ]
                for kind in PRECONDITIONINGS
                for name in SOLVERS
            ]
            write(TABLES / f"emoji_paper_{figure}.md", table(heads, rows, words=(0, 1)))


def _fine(network: Preconditioner, emoji: Emoji, seed: int) -> Tensor:
    """The fine solutions under the labels of the withheld drawings."""
    labels = torch.as_tensor(emoji.labels[np.flatnonzero(emoji.held_out)])
    high, low = grid(network, 10)[[0, -1]].tolist()
    sigmas = karras_sigmas(
        FINE + 1, low, high, append_zero=False
    )  # between the levels of iDDPM, too
    return torch.cat(
        [
            HeunEDM().sample(network, x, sigmas, extra_args={"class_labels": part}).x
            for x, part in starts(network, labels, seed)
        ]
    )


def _cell(
    results: dict[str, Any], kind: str, name: str, budget: int, figure: str, digits: int
) -> str:
    found = [
        value[figure]
        for key, value in results.items()
        if key.rsplit("|", 1)[0] == f"{kind}|{name}|{budget}"
    ]
    return f"{np.mean(found):.{digits}f} ± {np.std(found):.{digits}f}" if found else ""


if __name__ == "__main__":
    main()
