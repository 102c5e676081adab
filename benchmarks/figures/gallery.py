"""The pictures and tables of docs/gallery.md, by the commands that the page shows.

Takes the commands from the page itself, runs them in a temporary folder on photos of a model's own kind,
and joins what they write. Writes ``gallery_*.png`` and ``gallery_*.md``.

    python -m benchmarks.figures.gallery                    # minutes on one core
    python -m benchmarks.figures.gallery --model NAME --photos FOLDER
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

import numpy as np
from PIL import Image

from odesolvers.models.letters import LETTERS, random_letters

from ..common import IMAGES, TABLES

PAGE = IMAGES.parent / "gallery.md"
PLACES = {
    "roundtrip": ["roundtrip"],
    "edit": ["edit", "strength", "mask"],
    "interpolate": ["interpolate"],
}
"""The figures of each command, in the order of the page."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", help="another model than the page's")
    parser.add_argument("--photos", type=Path, help="a folder of its pictures, 1.png to 4.png")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        shutil.copytree(args.photos, "photos") if args.photos else save_photos(Path("photos"))
        side = Image.open("photos/1.png").width
        mask = np.zeros((side, side), np.uint8)
        mask[:, side // 2 :] = 255
        Image.fromarray(mask).save("mask.png")
        join(sorted(Path("photos").iterdir())).save(IMAGES / "gallery_photos.png")
        counts: dict[str, int] = {}
        said: list[str] = []
        for command in commands():
            name = command.split()[0]
            output = run(f"{command} --model {args.model}" if args.model else command)
            if name == "watermark":
                said += [f"$ odesolvers {command}", *output.splitlines(), ""]
                if "embed" in command:
                    show("watermark", 4)
                continue
            which = PLACES[name][counts.get(name, 0)]
            counts[name] = counts.get(name, 0) + 1
            show(which, 1 if name == "roundtrip" else 9, source=name)
            if which == "roundtrip":
                write(which, output.splitlines()[:-1])
            if which == "mask":
                write(which, [outside(side)])
            shutil.rmtree(Path("out") / name)
        write("watermark", said[:-1])


def commands() -> list[str]:
    """The commands of the page before those for Stable Diffusion."""
    text = PAGE.read_text().split("## Stable Diffusion")[0]
    return re.findall(r"^\$ odesolvers (.*)$", text, re.MULTILINE)


def run(command: str) -> str:
    """What a command prints."""
    line = [sys.executable, "-m", "odesolvers", *shlex.split(command)]
    return subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True).stdout


def save_photos(folder: Path) -> None:
    """Four pictures of an A that the network was not trained on."""
    folder.mkdir()
    images, labels = random_letters(520, seed=7)
    chosen = images[labels == LETTERS.index("A")][:4]
    for k, image in enumerate(chosen):
        values = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(values).save(folder / f"{k + 1}.png")


def outside(side: int) -> str:
    """How many values outside of the mask differ from those of the photos."""
    changed = total = 0
    for photo in sorted(Path("photos").iterdir()):
        pair = [np.asarray(Image.open(path)) for path in (photo, Path("out/edit", photo.name))]
        kept = [array[:, : side // 2].astype(int) for array in pair]
        changed += int((kept[0] != kept[1]).sum())
        total += kept[0].size
    return f"values outside of the mask that differ from the photos: {changed} of {total}"


def show(figure: str, columns: int, source: str | None = None) -> None:
    """Joins the pictures that a command wrote."""
    found = sorted(Path("out", source or figure).glob("*.png"))
    join(found, columns).save(IMAGES / f"gallery_{figure}.png")


def join(paths: Sequence[Path], columns: int = 9) -> Image.Image:
    """Pictures in rows, enlarged."""
    pictures = [Image.open(path).convert("RGB") for path in paths]
    times = max(1, 96 // pictures[0].height)
    width, height = (times * n for n in pictures[0].size)
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + 8) - 8, rows * (height + 8) - 8), "white")
    for k, picture in enumerate(pictures):
        large = picture.resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(large, (k % columns * (width + 8), k // columns * (height + 8)))
    return sheet


def write(name: str, lines: Sequence[str]) -> None:
    """Writes what a command printed as a table of the docs."""
    text = "\n".join(["```text", *lines, "```", ""])
    (TABLES / f"gallery_{name}.md").write_text(text)


if __name__ == "__main__":
    main()
