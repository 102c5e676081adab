"""What a network of emoji has learned: ``python -m benchmarks.emoji.quality [NETWORK]``.

Samples under the labels of the drawings that were withheld from training are named by a classifier, and
compared with those drawings by their Fréchet distance in its features; drawings of the training set
stand beside them. A sample counts as memorised where its nearest drawing of the training set is closer
than a third of the distance to the second nearest (Yoon et al. 2023); drawings of one motif in one style
count once. Writes a table, a sheet of samples and the curves of the losses.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Final

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

from ..common import IMAGES, TABLES, table, towards, write
from .classifier import Classifier, accuracies, load_classifier
from .data import Emoji, load_emoji
from .train import losses_by_level

SIGMAS: Final = karras_sigmas(18, sigma_min=0.02, sigma_max=80.0)
GUIDANCE: Final = (1.0, 2.0, 3.0, 5.0)
BATCH: Final = 64


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


def judge(network: Denoiser, emoji: Emoji, judge: Classifier, seeds: int) -> list[list[str]]:
    """The rows of the table."""
    unseen, seen = np.flatnonzero(emoji.held_out), np.flatnonzero(~emoji.held_out)
    real, labels = emoji.on_ground(unseen), torch.as_tensor(emoji.labels[unseen])
    rng = np.random.default_rng(0)
    sets = {"withheld drawings": ([real], [labels])}
    others = [rng.choice(seen, len(unseen), replace=False) for _ in range(seeds)]
    sets["drawings of the training set"] = (
        [emoji.on_ground(rows) for rows in others],
        [torch.as_tensor(emoji.labels[rows]) for rows in others],
    )
    for guidance in GUIDANCE:
        name = "samples, " + ("no guidance" if guidance == 1 else f"guidance {guidance:g}")
        sets[name] = (
            [draw(network, labels, guidance, seed) for seed in range(seeds)],
            [labels] * seeds,
        )
    rows = []
    with torch.inference_mode():
        reference = judge.embed(real)
        for name, (images, wanted) in sets.items():
            right = accuracies(judge, torch.cat(images), torch.cat(wanted))
            far = [frechet(judge.embed(part), reference) for part in images]
            copied = "" if "training" in name else f"{memorised(torch.cat(images), emoji):.1%}"
            distance = "0" if images[0] is real else f"{np.mean(far):.2f} ± {np.std(far):.2f}"
            rows.append([name, *(f"{v:.1%}" for v in right.values()), distance, copied])
    return rows


def sheet(network: Denoiser, emoji: Emoji, path: Path) -> None:
    """Withheld drawings, and samples under their labels: without guidance, with 2 and with 4."""
    rng = np.random.default_rng(1)
    rows = rng.choice(np.flatnonzero(emoji.held_out), 16, replace=False)
    labels = torch.as_tensor(emoji.labels[rows])
    lines = [emoji.on_ground(rows)] + [draw(network, labels, w, 0) for w in (1.0, 2.0, 4.0)]
    picture = torch.cat([torch.cat(list(line), -1) for line in lines], -2).permute(1, 2, 0)
    plt.imsave(path, ((picture.clamp(-1, 1) + 1) / 2).numpy().repeat(3, 0).repeat(3, 1))


def curves(log: Path, network: torch.nn.Module, emoji: Emoji, path: Path) -> None:
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
        chosen = np.flatnonzero(rows)[:256]
        right.plot(*losses_by_level(network, emoji, chosen), label=name, marker=".")  # type: ignore[arg-type]
    right.set(xlabel="noise level", xscale="log", ylabel="loss")
    right.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "network", type=Path, nargs="?", default=Path("out/emoji/emoji.safetensors")
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=Path, default=IMAGES)
    parser.add_argument("--tables", type=Path, default=TABLES)
    args = parser.parse_args()
    emoji, network = load_emoji(), load_edm(args.network)
    sheet(network, emoji, args.images / "emoji_samples.png")
    curves(args.network.with_suffix(".json"), network, emoji, args.images / "emoji_loss.png")
    heads = ["", "style", "group", "subgroup", "skin tone", "Fréchet distance", "memorised"]
    rows = judge(network, emoji, load_classifier(emoji), args.seeds)
    write(args.tables / "emoji_quality.md", table(heads, rows))


if __name__ == "__main__":
    main()
