"""What a network of emoji has learned: ``python -m benchmarks.emoji.quality``.

Samples under the labels of drawings that were withheld from training are named by a classifier, and
compared with all of those drawings by their Fréchet distance in its features; drawings of the training
set stand beside them. A sample counts as memorised where its nearest drawing of the training set is
closer than a third of the distance to the second nearest (Yoon et al. 2023); drawings of one motif in
one style count once. Draws a sheet of samples and the curves of the losses. Every figure is kept as soon
as it is found: a second call goes on where the first was stopped, and several may run at once.
``--write`` makes the table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from odesolvers import Denoiser, HeunEDM, karras_sigmas
from odesolvers.models import ClassifierFreeGuidance
from odesolvers.models.edm import load_edm
from odesolvers.models.emoji.network import WEIGHTS

from ..common import IMAGES, Kept, table, towards, write
from .classifier import accuracies, load_classifier
from .data import Emoji, load_emoji
from .runs import options, same, shown, weights
from .train import losses_by_level

SIGMAS: Final = karras_sigmas(18, sigma_min=0.02, sigma_max=80.0)
GUIDANCE: Final = (1.0, 2.0, 3.0, 5.0)
BATCH: Final = 64
SETS: Final[dict[str, float | None]] = {
    "withheld drawings": None,
    "drawings of the training set": None,
    **{"samples, " + (f"guidance {w:g}" if w != 1 else "no guidance"): w for w in GUIDANCE},
}
"""What is judged, and the guidance of samples."""


def draw(
    network: Denoiser, labels: Tensor, guidance: float, seed: int, batch: int = BATCH
) -> Tensor:
    """Samples of EDM's Heun in 18 steps, float32 ``(N, 3, 32, 32)``; guidance is towards `labels`."""
    generator = torch.Generator().manual_seed(seed)
    guided = ClassifierFreeGuidance(network, guidance)
    drawn = []
    for part in labels.split(batch):
        x = SIGMAS[0].float() * torch.randn(len(part), 3, 32, 32, generator=generator)
        drawn.append(HeunEDM().sample(guided, x, SIGMAS, extra_args=towards(part)).x)
    return torch.cat(drawn)


def frechet(a: Tensor, b: Tensor) -> float:
    """The Fréchet distance of two sets of features, ``(N, 64)`` and ``(M, 64)``."""
    means, covariances = zip(
        *((x.mean(0), x.T.cov()) for x in (a.double(), b.double())), strict=True
    )
    root = sqrtm((covariances[0] @ covariances[1]).numpy())
    squared = (means[0] - means[1]).square().sum() + (covariances[0] + covariances[1]).trace()
    return float(squared - 2 * np.trace(root).real)


def memorised(images: Tensor, emoji: Emoji) -> float:
    """The fraction of `images` that copy a motif of the training set."""
    rows = np.flatnonzero(~emoji.held_out)
    distances = torch.cdist(images.flatten(1), emoji.on_ground(rows).flatten(1))
    motifs = torch.as_tensor(emoji.motif[rows] * 2 + emoji.style[rows]).expand_as(distances)
    nearest = torch.full((len(images), int(motifs.max()) + 1), torch.inf)
    nearest = nearest.scatter_reduce(1, motifs, distances, "amin")
    first, second = nearest.topk(2, largest=False).values.T
    return (first < second / 3).float().mean().item()


class Bench:
    """The network, the drawings and the figures."""

    def __init__(self, network: Denoiser, kept: Kept, count: int) -> None:
        self.network, self.kept, self.emoji = network, kept, load_emoji()
        self.classifier = load_classifier(self.emoji)
        self.unseen = np.flatnonzero(self.emoji.held_out)
        self.count = min(count, len(self.unseen))
        with torch.inference_mode():
            self.real = self.classifier.embed(self.emoji.on_ground(self.unseen))

    def figures(self, name: str, seed: int) -> None:
        """The figures of one of `SETS`, unless another process is at them."""
        key = f"{name}|{seed}"
        self.kept(key, lambda: shown(key, self._measure(name, seed)))

    def _measure(self, name: str, seed: int) -> dict[str, Any]:
        seen, guidance = np.flatnonzero(~self.emoji.held_out), SETS[name]
        rng = np.random.default_rng(seed)
        among = seen if "training" in name else self.unseen
        rows = rng.choice(among, self.count, replace=False)
        labels = torch.as_tensor(self.emoji.labels[rows])
        if guidance is None:
            images = self.emoji.on_ground(rows)
        else:
            images = draw(self.network, labels, guidance, seed)
        with torch.inference_mode():
            return {
                "named": accuracies(self.classifier, images, labels),
                "frechet": frechet(self.classifier.embed(images), self.real),
                "memorised": None if "training" in name else memorised(images, self.emoji),
            }


def report(found: Mapping[str, Any], folder: Path, seeds: int) -> None:
    """The table; sets without figures are left out."""
    questions = {"style": "style", "group": "group", "subgroup": "subgroup", "tone": "skin tone"}
    rows = []
    for name in SETS:
        keys = [f"{name}|{seed}" for seed in range(seeds)]
        each = [found[key] for key in keys if key in found]
        if not each:
            continue
        named = [np.mean([figures["named"][q] for figures in each]) for q in questions]
        far = [figures["frechet"] for figures in each]
        copied = [figures["memorised"] for figures in each]
        rows.append(
            [
                name,
                *(f"{value:.1%}" for value in named),
                f"{np.mean(far):.2f}" + (f" ± {np.std(far):.2f}" if len(far) > 1 else ""),
                "" if None in copied else f"{np.mean(copied):.1%}",
            ]
        )
    heads = ["", *questions.values(), "Fréchet distance", "memorised"]
    write(folder / "emoji_quality.md", table(heads, rows))


def sheet(network: Denoiser, emoji: Emoji, count: int, path: Path) -> None:
    """Withheld drawings, and samples under their labels: without guidance, with 2 and with 4."""
    rng = np.random.default_rng(1)
    rows = rng.choice(np.flatnonzero(emoji.held_out), count, replace=False)
    labels = torch.as_tensor(emoji.labels[rows])
    lines = [emoji.on_ground(rows)] + [draw(network, labels, w, 0) for w in (1.0, 2.0, 4.0)]
    picture = torch.cat([torch.cat(list(line), -1) for line in lines], -2).permute(1, 2, 0)
    plt.imsave(path, ((picture.clamp(-1, 1) + 1) / 2).numpy().repeat(3, 0).repeat(3, 1))


def curves(log: Path, network: torch.nn.Module, emoji: Emoji, count: int, path: Path) -> None:
    """The losses over the training, and at each noise level."""
    history = json.loads(log.read_text())["history"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for key, name in (
        ("train", "training"),
        ("held_out", "withheld"),
        ("known", "seen, averaged weights"),
    ):
        left.plot([h["images"] / 1e3 for h in history], [h[key] for h in history], label=name)
    left.set(xlabel="thousands of images", ylabel="loss", yscale="log")
    left.legend()
    for name, rows in (("withheld", emoji.held_out), ("seen", ~emoji.held_out)):
        chosen = np.flatnonzero(rows)[:count]
        right.plot(*losses_by_level(network, emoji, chosen), label=name, marker=".")  # type: ignore[arg-type]
    right.set(xlabel="noise level", xscale="log", ylabel="loss")
    right.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """The command line."""
    parser = options(__doc__, "emoji_quality", count=256)
    parser.add_argument("--network", type=Path, default=WEIGHTS, help="the log lies beside it")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder of the pictures")
    args = parser.parse_args()
    kept = Kept(args.results)
    if args.write:
        report(kept.read(), args.tables, args.seeds)
        return
    same(kept, network=weights(args.network), count=args.count)
    bench = Bench(network := load_edm(args.network), kept, args.count)
    args.images.mkdir(parents=True, exist_ok=True)
    log, few = args.network.with_suffix(".json"), min(16, args.count)
    sheet(network, bench.emoji, few, args.images / "emoji_samples.png")
    curves(log, network, bench.emoji, args.count, args.images / "emoji_loss.png")
    for seed in range(args.seeds):
        for name in SETS:
            bench.figures(name, seed)


if __name__ == "__main__":
    main()
