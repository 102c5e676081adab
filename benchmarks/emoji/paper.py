"""The comparison of the BDIA paper on trained EDM networks: ``python -m benchmarks.emoji.paper``.

BDIA over DDIM against DDIM, and BDIA over EDM's Heun against EDM's Heun, at equal evaluations, on four
small networks of emoji, each under a preconditioning of its own (``python -m benchmarks.emoji.train
--preconditioning vp --channels 16 --out out/emoji_vp`` and so on). Constant weights are the paper's;
calibrated weights are learned on other noise, under other labels. The figures are the Fréchet distance
to withheld drawings, in the features of the classifier, and the distance to a fine solution from the
same noise, relative to its size; both with their spread over seeds. Each figure is kept as soon as it is
found: a second call goes on where the first was stopped, and several may run at once. ``--write`` makes
the tables from them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from odesolvers import (
    BDIA,
    DDIM,
    RK4,
    HeunEDM,
    HeunStepRatio,
    Objective,
    StepRatio,
    karras_sigmas,
)
from odesolvers.models.edm import Preconditioner, load_edm

from ..common import Kept, relative_errors, table, write
from .classifier import load_classifier
from .data import Emoji, load_emoji
from .quality import frechet
from .runs import learned, options, same, shown, weights

PRECONDITIONINGS: Final = ("edm", "vp", "ve", "iddpm")
EVALUATIONS: Final = (10, 20)
FINE: Final = 32  # steps of RK4
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


class Bench:
    """One network, the pictures to draw and the figures."""

    def __init__(self, kept: Kept, kind: str, folder: Path, emoji: Emoji, count: int) -> None:
        path = folder / f"emoji_{kind}" / "emoji.safetensors"
        same(kept, **{f"weights of {kind}": weights(path), "count": count})
        self.kept, self.kind, self.network, self.emoji = kept, kind, load_edm(path), emoji
        unseen = np.flatnonzero(emoji.held_out)
        chosen = np.random.default_rng(9).permutation(unseen)[:count]
        self.labels = torch.as_tensor(emoji.labels[chosen])
        self.classifier = load_classifier(emoji)
        with torch.inference_mode():
            self.real = self.classifier.embed(emoji.on_ground(unseen))
        self.fine = cache(self._fine)

    def figures(self, name: str, budget: int, seed: int) -> None:
        """The two figures of one sampler, one grid and one seed, unless another process is at them."""
        sigmas, sampler = grid(self.network, budget // evaluations(name)), SOLVERS[name]()
        if "calibrated" in name:  # for samples
            for_samples = Objective(sampling=1, encoding=0)
            sampler = learned(
                self.kept, self.kind, self.network, self.emoji, sigmas, sampler, for_samples
            )
            if sampler is None:
                return
        key = key_of(self.kind, name, budget, seed)
        self.kept(key, lambda: shown(key, self._measure(sampler, sigmas, seed)))

    def _measure(self, sampler: Sampler, sigmas: Tensor, seed: int) -> dict[str, float]:
        drawn = self._draw(sampler, sigmas, seed)
        with torch.inference_mode():
            distance = frechet(self.classifier.embed(drawn), self.real)
        errors = relative_errors(drawn, self.fine(seed))
        return {"frechet": distance, "error": float(errors.median())}

    def _fine(self, seed: int) -> Tensor:
        high, low = grid(self.network, 10)[[0, -1]].tolist()
        # Between the levels of iDDPM, too.
        sigmas = karras_sigmas(FINE + 1, low, high, append_zero=False)
        return self._draw(RK4(), sigmas, seed)

    def _draw(self, sampler: Sampler, sigmas: Tensor, seed: int) -> Tensor:
        parts = [
            sampler.sample(self.network, x, sigmas, extra_args={"class_labels": labels}).x
            for x, labels in starts(self.network, self.labels, seed)
        ]
        return torch.cat(parts)


def key_of(kind: str, name: str, budget: int, seed: int) -> str:
    """The key of a figure."""
    return f"{kind}|{name}|{budget}|{seed}"


def main() -> None:
    """The command line."""
    parser = options(__doc__, "emoji_paper", count=96)
    parser.add_argument("--networks", type=Path, default=Path("out"), help="holds emoji_edm, ...")
    parser.add_argument("--kinds", nargs="+", choices=PRECONDITIONINGS, default=PRECONDITIONINGS)
    parser.add_argument("--evaluations", nargs="+", type=int, default=EVALUATIONS)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    kept = Kept(args.results)
    if args.write:
        report(kept.read(), args.evaluations, args.seeds, args.tables)
        return
    emoji = load_emoji()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # contestants are run as they are
        for kind in args.kinds:
            bench = Bench(kept, kind, args.networks, emoji, args.count)
            for seed in range(args.seeds):
                for name in SOLVERS:
                    for budget in args.evaluations:
                        bench.figures(name, budget, seed)


def report(found: dict[str, Any], budgets: Sequence[int], seeds: int, folder: Path) -> None:
    """The tables; a cell without figures is empty."""

    def cell(kind: str, name: str, budget: int, figure: str, digits: int) -> str:
        each = [found.get(key_of(kind, name, budget, seed)) for seed in range(seeds)]
        values = [figures[figure] for figures in each if figures is not None]
        return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}" if values else ""

    for figure, digits in (("frechet", 2), ("error", 4)):
        rows = [
            [kind, name, *(cell(kind, name, n, figure, digits) for n in budgets)]
            for kind in PRECONDITIONINGS
            for name in SOLVERS
        ]
        heads = ["network", "solver", *map(str, budgets)]
        write(folder / f"emoji_paper_{figure}.md", table(heads, rows, words=(0, 1)))


if __name__ == "__main__":
    main()
