"""Puts a trained network and drawings into the package: ``python -m benchmarks.emoji.box [FOLDER]``.

The drawings are pairs of which one was withheld from the training, one motif of each subgroup.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np

from odesolvers.models.emoji.labels import NAMES
from odesolvers.models.emoji.network import DRAWINGS, LOG, WEIGHTS
from odesolvers.writing import replacing

from .data import load_emoji

MOTIFS = 48


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("out/emoji"))
    args = parser.parse_args()
    shutil.copyfile(args.folder / "emoji.safetensors", WEIGHTS)
    shutil.copyfile(args.folder / "emoji.json", LOG)
    emoji = load_emoji()
    groups: dict[str, list[str]] = {group: [] for group in emoji.groups}
    for group, subgroup in sorted(set(zip(emoji.group, emoji.subgroup, strict=True))):
        groups[emoji.groups[group]].append(emoji.subgroups[subgroup])
    NAMES.write_text(json.dumps(groups, indent=1) + "\n")
    # Motifs without a skin tone, withheld in one style, spread over the subgroups.
    plain = emoji.held_out & (emoji.labels[:, -6] == 1)
    rng = np.random.default_rng(0)
    order = rng.permutation(np.flatnonzero(plain))
    _, first = np.unique(emoji.subgroup[order], return_index=True)
    chosen = np.sort(emoji.motif[order[np.sort(first)[:MOTIFS]]])
    rows = np.array(
        [
            np.flatnonzero(
                (emoji.motif == motif) & (emoji.style == style) & (emoji.labels[:, -6] == 1)
            )[0]
            for motif in chosen
            for style in (0, 1)
        ]
    )
    images = ((emoji.on_ground(rows).numpy() + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
    with replacing(DRAWINGS) as file:
        np.savez_compressed(
            file,
            images=images,
            labels=emoji.labels[rows],
            names=np.array([emoji.names[row] for row in rows[::2]]),
            withheld=emoji.held_out[rows],
        )


if __name__ == "__main__":
    main()
