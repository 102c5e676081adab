"""The labels of the network of emoji: style, group, subgroup and skin tone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

STYLES: Final = ("noto", "twemoji")
TONES: Final = ("none", "light", "medium-light", "medium", "medium-dark", "dark")
NAMES: Final = Path(__file__).parent / "names.json"


@cache
def emoji_groups() -> dict[str, tuple[str, ...]]:
    """The subgroups of each group, by the names of Unicode: "Animals & Nature" has "animal-bird"."""
    listed: dict[str, list[str]] = json.loads(NAMES.read_text())
    return {group: tuple(subgroups) for group, subgroups in listed.items()}


def emoji_labels(
    subgroup: str | Sequence[str], style: str = "noto", tone: str | Sequence[str] = "none"
) -> Tensor:
    """Labels for ``load_emoji()``, one row for each subgroup.

    Args:
        subgroup: a subgroup such as "cat-face", or one for each picture; `emoji_groups` lists them. A
            subgroup belongs to one group, which is set as well.
        style: "noto" or "twemoji".
        tone: the skin tone of persons and hands, see `TONES`; two for a pair of persons, as a sequence.

    Returns:
        float32 ``(B, label_dim)``: style, group, subgroup and skin tone, one-hot each. Zeros are no
        label.

    Raises:
        ValueError: for a name that the network does not know.
    """
    groups = emoji_groups()
    subgroups = sorted(name for names in groups.values() for name in names)
    group_of = {name: k for k, group in enumerate(groups) for name in groups[group]}
    wanted = [subgroup] if isinstance(subgroup, str) else list(subgroup)
    tones = [tone] if isinstance(tone, str) else list(tone)
    for name, known, what in (
        *((name, subgroups, "subgroup") for name in wanted),
        (style, STYLES, "style"),
        *((name, TONES, "skin tone") for name in tones),
    ):
        if name not in known:
            raise ValueError(f"unknown {what} {name!s:.80}; known: {', '.join(known)}")
    parts = [torch.zeros(len(wanted), len(names)) for names in (STYLES, groups, subgroups, TONES)]
    for k, name in enumerate(wanted):
        parts[0][k, STYLES.index(style)] = 1
        parts[1][k, group_of[name]] = 1
        parts[2][k, subgroups.index(name)] = 1
        for each in tones:
            parts[3][k, TONES.index(each)] += 1 / len(tones)
    return torch.cat(parts, 1)
