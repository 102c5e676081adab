"""Pictures of the letters network: its losses, its samples, and edits of letters it never saw.

Prints as a table: the share of pictures that a nearest-neighbour reader takes for the right letter (also
of real letters), how far edits keep the colours of their source (also samples from fresh noise), the
round trip, and mean and standard deviation of the codes. Writes ``letters_{loss,samples,edit}.png``.

    python -m benchmarks.figures.letters        # minutes on one core
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from odesolvers import BDIA, Denoiser, Euler, StepRatio, karras_sigmas
from odesolvers.models.letters import LETTERS, LettersDenoiser, Style, load_letters, random_letters
from odesolvers.models.letters.data import render_mask
from odesolvers.models.letters.network import LOG, WEIGHTS

from ..common import IMAGES

SOLVER = BDIA(Euler(), StepRatio(2))
# Pictures count as clean at σ = 0.02, in both directions.
SIGMAS = karras_sigmas(24, sigma_min=0.02, sigma_max=80.0)[:-1]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder to write")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--log", type=Path, default=LOG)
    parser.add_argument("--guidance", type=float, default=5.0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    letters = load_letters(path=args.weights)
    reader = Reader()

    plot_losses(json.loads(args.log.read_text()), args.out / "letters_loss.png")
    samples_picture(letters, reader, (1.0, args.guidance), args.out / "letters_samples.png")
    edit_picture(letters, reader, args.guidance, args.out / "letters_edit.png")


def guide(letters: LettersDenoiser, weight: float) -> Denoiser:
    """Classifier-free guidance: ``D_none + weight (D_label - D_none)``; 1 is no guidance."""

    def denoiser(x: Tensor, sigma: Tensor, class_labels: Tensor) -> Tensor:
        given = letters(x, sigma, class_labels)
        return given if weight == 1 else torch.lerp(letters(x, sigma), given, weight)

    return denoiser


def noise(n: int, seed: int = 0) -> Tensor:
    """Starting points for `n` samples."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 32, 32, generator=generator) * SIGMAS[0].float()


def paper_and_ink(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Colours ``(n, 3)`` of background and letter, and how much ink is where, ``(n, 32, 32)``."""
    border = torch.cat([images[..., 0], images[..., -1], images[..., 0, :], images[..., -1, :]], -1)
    paper = border.median(-1).values
    ink_amount = (images - paper[..., None, None]).norm(dim=1)
    strongest = ink_amount.flatten(1).topk(20).indices
    pixels = images.flatten(2).gather(2, strongest[:, None].expand(-1, 3, -1))
    return paper, pixels.median(-1).values, ink_amount


class Reader:
    """Reads the letter of a picture: that of the nearest of many rendered ones, without colours.

    It shares only the fonts with the network.
    """

    def __init__(self, n: int = 13_000) -> None:
        rng = np.random.default_rng(12345)
        self.labels = torch.arange(n) % len(LETTERS)
        masks = [render_mask(int(label), Style.random(rng)) for label in self.labels]
        self.templates = _unit(torch.as_tensor(np.stack(masks)).float())

    def share_read(self, images: Tensor, labels: Tensor) -> float:
        """The share of `images` that read as `labels`."""
        nearest = (_unit(paper_and_ink(images)[2]) @ self.templates.T).argmax(1)
        return (self.labels[nearest] == labels).float().mean().item()


def _unit(masks: Tensor) -> Tensor:
    flat = masks.flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    return flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-6)


def plot_losses(log: dict, path: Path) -> None:  # type: ignore[type-arg]
    """Losses over training, and at its end by noise level."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    history = log["history"]
    seen = [entry["images"] / 1000 for entry in history]
    left.plot(seen, [entry["train"] for entry in history], label="training", alpha=0.5)
    left.plot(seen, [entry["held_out"] for entry in history], label="held out, averaged weights")
    left.set(xlabel="thousand pictures seen", ylabel="denoising loss", yscale="log")
    left.legend()
    if "by_sigma" in log:
        by_sigma = log["by_sigma"]
        right.plot(by_sigma["sigma"], by_sigma["held_out"], "o-", label="with label")
        right.plot(by_sigma["sigma"], by_sigma["held_out_without_label"], "o--", label="without")
        right.set(xlabel="σ", ylabel="held-out loss", xscale="log", yscale="log")
        right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110)


def samples_picture(
    letters: LettersDenoiser, reader: Reader, weights: tuple[float, float], path: Path
) -> None:
    """Every letter from three starting points, each in a row; then again, with guidance."""
    rows = 3
    labels = torch.arange(len(LETTERS)).repeat(rows)
    start = noise(rows).repeat_interleave(len(LETTERS), 0)
    real, real_labels = random_letters(520, seed=2)
    print(f"| read as their letter: real held-out | {reader.share_read(real, real_labels):.0%} |")
    images = []
    for weight in weights:
        solution = SOLVER.sample(
            guide(letters, weight), start, SIGMAS, extra_args={"class_labels": labels}
        )
        share = reader.share_read(solution.x, labels)
        print(f"| samples, guidance {weight:g} | {share:.0%} |", flush=True)
        images.append(solution.x)
    figure, grid = plt.subplots(
        2 * rows, len(LETTERS), figsize=(13, 3), gridspec_kw={"wspace": 0.04, "hspace": 0.04}
    )
    for axes, image in zip(grid.flat, torch.cat(images), strict=True):
        _show(axes, image)
    for axes, letter in zip(grid[0], LETTERS, strict=True):
        axes.set_title(letter, fontsize=9)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def edit_picture(letters: LettersDenoiser, reader: Reader, weight: float, path: Path) -> None:
    """Held-out letters inverted under their label and sampled under others."""
    n, targets = 6, torch.tensor([LETTERS.index(c) for c in "AEHKMORSTX"])
    images, labels = random_letters(n, seed=3)
    source = {"class_labels": labels.repeat_interleave(len(targets))}
    sources, others = images.repeat_interleave(len(targets), 0), targets.repeat(n)
    paper, ink, _ = paper_and_ink(sources)
    fresh_paper, fresh_ink, _ = paper_and_ink(random_letters(n * len(targets), seed=4)[0])
    print(
        "| colour difference between unrelated letters: paper | "
        f"{_difference(paper, fresh_paper):.3f}, ink {_difference(ink, fresh_ink):.3f} |"
    )
    clean = SOLVER.invert(letters, images, SIGMAS, extra_args={"class_labels": labels}).x
    clean = clean / SIGMAS[0].float()
    print(
        "| latents of clean letters | "
        f"mean {clean.mean():.3f}, standard deviation {clean.std():.3f} |"
    )
    # A state at the last level is a picture and noise of that level, too faint to see.
    sources = (
        sources
        + noise(n, seed=5).repeat_interleave(len(targets), 0) * (SIGMAS[-1] / SIGMAS[0]).float()
    )
    code = SOLVER.invert(letters, sources, SIGMAS, extra_args=source)
    back = SOLVER.sample(letters, code.state, SIGMAS, extra_args=source)
    z = code.x / SIGMAS[0].float()
    print(
        f"| latents of held-out letters | mean {z.mean():.3f}, standard deviation {z.std():.3f}; "
        f"round trip {(back.x - sources).norm() / sources.norm():.1e} |"
    )
    edits = []
    for w in (1.0, weight):
        # Encoded without guidance, which is no flow of the data; decoded with it.
        edit = SOLVER.sample(
            guide(letters, w), code.state, SIGMAS, extra_args={"class_labels": others}
        ).x
        new_paper, new_ink, _ = paper_and_ink(edit)
        print(
            f"| edits, guidance {w:g} | read as target {reader.share_read(edit, others):.0%}; colour "
            f"difference: paper {_difference(paper, new_paper):.3f}, "
            f"ink {_difference(ink, new_ink):.3f} |",
            flush=True,
        )
        edits.append(edit.unflatten(0, (n, len(targets))))

    columns = 3 + 2 * len(targets)
    figure, grid = plt.subplots(
        n, columns, figsize=(13.5, 4), gridspec_kw={"wspace": 0.04, "hspace": 0.04}
    )
    titles = ["source", "latent", "back"] + [LETTERS[k] for k in targets] * 2
    for row in range(n):
        first = row * len(targets)
        pictures = [images[row], z[first] / 3, back.x[first], *edits[0][row], *edits[1][row]]
        for axes, picture, title in zip(grid[row], pictures, titles, strict=True):
            _show(axes, picture)
            if row == 0:
                axes.set_title(title, fontsize=9)
    figure.text(0.38, 0.97, "sampled under another label", ha="center")
    figure.text(0.73, 0.97, f"the same with guidance {weight:g}", ha="center")
    figure.savefig(path, dpi=110, bbox_inches="tight")


def _difference(a: Tensor, b: Tensor) -> float:
    """Mean absolute difference of colours, in units of the range from black to white."""
    return (a - b).abs().mean().item() / 2


def _show(axes: plt.Axes, image: Tensor) -> None:
    axes.imshow(((image.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy())
    axes.axis("off")


if __name__ == "__main__":
    main()
