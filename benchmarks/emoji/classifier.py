"""A judge that names style, group, subgroup and tone: ``python -m benchmarks.emoji.classifier``.

It is trained on the drawings that the networks are trained on, and tried on those withheld from both.
Its last layer before the names is the space in which Fréchet distances are measured: trained networks of
photographs have never seen drawings of 32 pixels.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from .data import STYLES, TONES, Emoji, load_emoji

WEIGHTS: Final = Path(__file__).parent / "classifier.safetensors"
FEATURES: Final = 64


class Classifier(nn.Module):
    """A small residual network; images of 32 pixels, float32 ``(B, 3, 32, 32)`` from -1 to 1.

    Args:
        sizes: the number of names of each question, in the order of the labels.
    """

    def __init__(self, sizes: tuple[int, ...], channels: int = 32) -> None:
        super().__init__()
        self.sizes = sizes
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            _Block(channels * 2**k, channels * 2 ** (k + 1)) for k in range(3)
        )
        self.features = nn.Linear(channels * 8, FEATURES)
        self.names = nn.Linear(FEATURES, sum(sizes))

    def embed(self, images: Tensor) -> Tensor:
        """The features, ``(B, 64)``."""
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return F.silu(self.features(x.mean((2, 3))))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The logarithms of the odds of style, group, subgroup and tone, ``(B, n)`` each."""
        return self.names(self.embed(images)).split(self.sizes, 1)


class _Block(nn.Module):
    """Two convolutions beside a straight way, at half the size and twice the channels."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.norm0, self.norm1 = nn.GroupNorm(8, cin), nn.GroupNorm(8, cout)
        self.conv0 = nn.Conv2d(cin, cout, 3, stride=2, padding=1)
        self.conv1 = nn.Conv2d(cout, cout, 3, padding=1)
        self.straight = nn.Conv2d(cin, cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv0(F.silu(self.norm0(x)))
        y = self.conv1(F.silu(self.norm1(y)))
        return y + self.straight(F.avg_pool2d(x, 2))


def load_classifier(emoji: Emoji, path: Path = WEIGHTS) -> Classifier:
    """The trained judge, frozen, in float32."""
    model = Classifier(_sizes(emoji))
    model.load_state_dict({name: weight.float() for name, weight in load_file(path).items()})
    return model.eval().requires_grad_(False)


def accuracies(model: Classifier, images: Tensor, labels: Tensor) -> dict[str, float]:
    """The fraction of `images` named as their `labels` say, for each question.

    Args:
        model: the judge.
        images: ``(B, 3, 32, 32)``.
        labels: ``(B, label_dim)`` as in `Emoji.labels`; a pair of persons of two tones counts as
            right where either is named.
    """
    with torch.inference_mode():
        answers = [part.argmax(1) for part in model(images)]
    wanted = labels.split(model.sizes, 1)
    return {
        question: (truth.gather(1, answer[:, None]) > 0).float().mean().item()
        for question, truth, answer in zip(
            ("style", "group", "subgroup", "tone"), wanted, answers, strict=True
        )
    }


def train(epochs: int, batch: int, lr: float, out: Path) -> None:
    """Train the judge; it takes some ten minutes on two cores."""
    from tqdm import tqdm

    emoji = load_emoji()
    seen, unseen = np.flatnonzero(~emoji.held_out), np.flatnonzero(emoji.held_out)
    torch.manual_seed(0)
    model = Classifier(_sizes(emoji)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    steps = epochs * len(seen) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    rng = np.random.default_rng(0)
    sizes = np.bincount(emoji.motif[seen])[emoji.motif[seen]]
    chances = 1 / np.sqrt(sizes)
    for _ in tqdm(range(steps), unit="step"):
        chosen = rng.choice(seen, batch, p=chances / chances.sum())
        # White as often as any other ground, for the networks draw on white.
        ground = np.where(rng.random((batch, 1)) < 0.5, 1, rng.uniform(-1, 1, (batch, 3)))
        images = _moved(emoji.on_ground(chosen, ground.astype(np.float32)), rng)
        images += 0.1 * torch.rand(batch, 1, 1, 1) * torch.randn(images.shape)
        wanted = torch.as_tensor(emoji.labels[chosen]).split(model.sizes, 1)
        loss = torch.stack(
            [
                F.cross_entropy(answer, truth, label_smoothing=0.05)
                for answer, truth in zip(model(images), wanted, strict=True)
            ]
        ).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    model.eval()
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, out)
    model = load_classifier(emoji, out)
    for name, rows in (("training", seen), ("withheld", unseen)):
        found = accuracies(model, emoji.on_ground(rows), torch.as_tensor(emoji.labels[rows]))
        print(f"{name}: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()))


def _moved(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Each picture moved by up to 2 pixels and, as often as not, mirrored; its border is repeated."""
    padded = F.pad(images, (2, 2, 2, 2), mode="replicate")
    size = images.shape[-1]
    moved = [
        picture[:, top : top + size, left : left + size].flip(-1 if mirror else ())
        for picture, top, left, mirror in zip(
            padded,
            rng.integers(0, 5, len(images)),
            rng.integers(0, 5, len(images)),
            rng.random(len(images)) < 0.5,
            strict=True,
        )
    ]
    return torch.stack(moved)


def _sizes(emoji: Emoji) -> tuple[int, ...]:
    return len(STYLES), len(emoji.groups), len(emoji.subgroups), len(TONES)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    train(**vars(parser.parse_args()))
