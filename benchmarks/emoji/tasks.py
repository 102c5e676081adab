"""Drawings of emoji to edit, with their true targets where there are any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from .data import Emoji

SEARCHED: Final = 2
"""The drawings of an edit over those of a search."""


@dataclass(frozen=True)
class Task:
    """Drawings to edit.

    Attributes:
        images: ``(B, 3, 32, 32)``.
        source, labels: labels of the inversion and of the sample.
        target: the true targets, if there are any.
        question: the part of the labels that tells source and target apart.
    """

    images: Tensor
    source: Tensor
    labels: Tensor
    target: Tensor | None
    question: str


def task(emoji: Emoji, edit: str, count: int, seed: int) -> Task:
    """`count` drawings for an edit; for seed 1 fewer, and others, to search on."""
    part = slice(count, count + max(1, count // SEARCHED)) if seed else slice(count)
    rng = np.random.default_rng(7)
    tone = emoji.labels[:, -6:]
    if edit == "style":  # the drawing that was seen; the target was not
        targets = rng.permutation(np.flatnonzero(emoji.held_out))
        half = len(emoji.labels) // 2
        rows = (targets + half) % (2 * half)  # the two styles are listed alike
    elif edit == "tone":
        rows = rng.permutation(np.flatnonzero(~emoji.held_out & (tone[:, 1:].max(1) == 1)))
        targets = np.array([_other_tone(emoji, row, rng) for row in rows[: part.stop]])
    else:
        rows = rng.permutation(np.flatnonzero(~emoji.held_out & (tone[:, 0] == 1)))
        targets = np.array([_elsewhere(emoji, row, edit, rng) for row in rows[: part.stop]])
    rows, targets = rows[part], targets[part]
    true = emoji.on_ground(targets) if edit in ("style", "tone") else None
    question = {"style": "style", "tone": "tone"}.get(edit, "subgroup")
    labels = torch.as_tensor(emoji.labels)
    return Task(emoji.on_ground(rows), labels[rows], labels[targets], true, question)


def _other_tone(emoji: Emoji, row: int, rng: np.random.Generator) -> int:
    """The same motif in the same style, in another skin tone."""
    motif = (emoji.motif == emoji.motif[row]) & (emoji.style == emoji.style[row])
    others = motif & (emoji.labels[:, -6] == 0) & (emoji.labels[:, -5:].max(1) == 1)
    others[row] = False
    return int(rng.choice(np.flatnonzero(others)))


def _elsewhere(emoji: Emoji, row: int, edit: str, rng: np.random.Generator) -> int:
    """A drawing in the same style, of another subgroup of the same group or of another group."""
    near = emoji.group == emoji.group[row]
    others = (near & (emoji.subgroup != emoji.subgroup[row])) if edit == "motif" else ~near
    others &= (emoji.style == emoji.style[row]) & (emoji.labels[:, -6] == 1)
    return int(rng.choice(np.flatnonzero(others)))
