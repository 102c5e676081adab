"""The pictures and tables of docs/gallery.md, by the commands that the page shows.

Takes the commands from the page itself, runs them in a temporary folder on drawings that the network has
not seen, and joins the pictures that each block of commands wrote. Writes ``gallery_*.png`` and
``gallery_*.md``.

    python -m benchmarks.figures.gallery                    # minutes on one core
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image
from torch import Tensor

from odesolvers.models import emoji_drawings

from ..common import IMAGES, TABLES

PAGE: Final = IMAGES.parent / "gallery.md"
FIGURES: Final = ("roundtrip", "style", "tone", "strength", "mask", "interpolate", "watermark")
"""The figure of each block of commands, in the order of the page."""
PHOTOS: Final = {
    "cat": "CRYING CAT FACE",
    "face": "FACE WITH DIAGONAL MOUTH",
    "hand": "PALM UP HAND",
    "person": "BEARDED PERSON",
}
"""Motifs of which Noto's drawing was withheld from the training, by the names of their files."""


def main() -> None:
    """The command line."""
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        save_photos(Path("photos"))
        save_photos(Path("true"), style=1)
        save_mask(Path("mask.png"))
        photos = pictures("photos")
        join([photos]).save(IMAGES / "gallery_photos.png")
        for figure, commands in zip(FIGURES, blocks(), strict=True):
            printed = [run(command) for command in commands]
            made = pictures("out")
            if figure in ("roundtrip", "interpolate", "watermark"):
                rows = [made] if figure != "roundtrip" else [[picture] for picture in made]
            elif figure == "strength":
                rows = [[Path("photos/cat.png"), *made]]
            else:
                rows = [[Path("photos", path.name) for path in made], made]
            if figure == "style":
                rows.append(pictures("true"))
            join(rows).save(IMAGES / f"gallery_{figure}.png")
            if figure == "roundtrip":
                write(figure, printed[0].splitlines()[:-1])
            elif figure == "mask":
                write(figure, [outside(made)])
            elif figure == "watermark":
                shown = [f"$ odesolvers {c}\n{p}" for c, p in zip(commands, printed, strict=True)]
                write(figure, "\n".join(shown).splitlines())
            shutil.rmtree("out")


def blocks() -> list[list[str]]:
    """The commands of each block of the page before those for Stable Diffusion."""
    text = PAGE.read_text().split("## Stable Diffusion")[0].replace("\\\n", "")
    found = re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [re.findall(r"^\$ odesolvers (.*)$", block, re.MULTILINE) for block in found]


def run(command: str) -> str:
    """What a command prints."""
    line = [sys.executable, "-m", "odesolvers", *shlex.split(command)]
    return subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True).stdout


def save_photos(folder: Path, style: int = 0) -> None:
    """The drawings of `PHOTOS` by Noto, which the network has not seen, or by Twemoji, of style 1."""
    folder.mkdir()
    images, _, names, withheld = emoji_drawings()
    for file, motif in PHOTOS.items():
        row = 2 * names.index(motif)
        if not withheld[row]:
            raise ValueError(f"{motif} by Noto was in the training: take another motif")
        save(images[row + style], folder / f"{file}.png")


def save(image: Tensor, path: Path) -> None:
    """Save a picture, ``(3, H, W)`` from -1 to 1."""
    values = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(values).save(path)


def save_mask(path: Path) -> None:
    """A mask of the right half."""
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 16:] = 255
    Image.fromarray(mask).save(path)


def outside(edits: Sequence[Path]) -> str:
    """How many values outside of the mask differ from those of the photos."""
    changed = total = 0
    for path in edits:
        photo, edit = (np.asarray(Image.open(p)) for p in (Path("photos", path.name), path))
        changed += int((photo[:, :16] != edit[:, :16]).sum())
        total += photo[:, :16].size
    return f"values outside of the mask that differ from the photos: {changed} of {total}"


def pictures(folder: str) -> list[Path]:
    """The pictures in a folder and its folders, by name."""
    return sorted(Path(folder).rglob("*.png"))


def join(rows: Sequence[Sequence[Path]]) -> Image.Image:
    """Rows of pictures as one, enlarged."""
    lines = [[Image.open(path).convert("RGB") for path in row] for row in rows]
    times = max(1, 96 // lines[0][0].height)
    width, height = (times * n for n in lines[0][0].size)
    size = max(map(len, lines)) * (width + 8) - 8, len(lines) * (height + 8) - 8
    sheet = Image.new("RGB", size, "white")
    for k, line in enumerate(lines):
        for j, picture in enumerate(line):
            large = picture.resize(
                (picture.width * times, picture.height * times), Image.Resampling.NEAREST
            )
            sheet.paste(large, (j * (width + 8), k * (height + 8)))
    return sheet


def write(name: str, lines: Sequence[str]) -> None:
    """Writes what commands printed as a table of the docs."""
    text = "\n".join(["```text", *lines, "```", ""])
    (TABLES / f"gallery_{name}.md").write_text(text)


if __name__ == "__main__":
    main()
