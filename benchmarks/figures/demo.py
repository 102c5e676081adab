"""The main job: drawings are inverted, come back, and are redrawn in the other style.

Drawings that the network has not seen become codes by BDIA, by DDIM inversion and by EDICT, at the same
evaluations. Each code is sampled again under the labels of its drawing, from the code alone, and under
those of the other style, of which the true drawing is known. Prints errors relative to the ink of the
drawings, and writes a picture.

    python -m benchmarks.figures.demo               # a minute on two cores; writes demo.png and demo.md
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from odesolvers import BDIA, EDICT, DDIMInversion, Euler, StepRatio, karras_sigmas
from odesolvers.models import ClassifierFreeGuidance
from odesolvers.models.emoji import STYLES, emoji_drawings, load_emoji
from odesolvers.progress import progress_bar

from ..common import IMAGES, TABLES, save, table, towards

EVALUATIONS: Final = 24
GUIDANCE: Final = 3.0
BOTTOM: Final = 0.02
METHODS: Final[dict[str, tuple[int, Callable[[], Any]]]] = {
    "BDIA": (1, lambda: BDIA(Euler(), StepRatio(1))),
    "DDIM inversion": (1, DDIMInversion),
    "EDICT": (2, EDICT),
}
"""Evaluations a step, and the solver."""
MOTIFS: Final = (
    "SMILING FACE WITH SUNGLASSES",
    "CRYING CAT FACE",
    "DOG FACE",
    "WOMAN RAISING HAND",
    "BEARDED PERSON",
    "PINEAPPLE",
)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=IMAGES / "demo.png", help="file to write")
    path: Path = parser.parse_args().out
    path.parent.mkdir(parents=True, exist_ok=True)
    network, (images, labels, names, withheld) = load_emoji(), emoji_drawings()
    target = torch.tensor([2 * names.index(name) for name in MOTIFS])
    target += withheld[target + 1].long()
    source = target ^ 1  # the same motif in the style that the network was trained on
    pictures, true = images[source], images[target]
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(3))
    start = pictures + BOTTOM * noise  # a state at the last level, too faint a noise to see
    own, other = {"class_labels": labels[source]}, towards(labels[target])
    guided = ClassifierFreeGuidance(network, GUIDANCE)
    columns: list[tuple[Tensor, str]] = [(pictures, "\ndrawing")]
    rows = [["the drawing as it is", "", "", f"{distance(pictures, true, true):.2f}", ""]]
    calls = progress_bar(total=4 * len(METHODS) * EVALUATIONS, unit="step", desc="demo")

    def watched(denoiser: Any) -> Any:
        def denoise(x: Tensor, sigma: Tensor, **arguments: Any) -> Tensor:
            calls.update()
            found: Tensor = denoiser(x, sigma, **arguments)
            return found

        return denoise

    for name, (cost, make) in METHODS.items():
        solver = make()
        sigmas = karras_sigmas(EVALUATIONS // cost + 1, BOTTOM, append_zero=False)
        plain = watched(network)
        code = solver.invert(plain, start, sigmas, extra_args=own)
        back = solver.sample(plain, code.x, sigmas, extra_args=own).x
        pair = solver.sample(plain, code.state, sigmas, extra_args=own).x
        edit = solver.sample(watched(guided), code.state, sigmas, extra_args=other).x
        columns += [(back, f"{name},\nback"), (edit, "\nredrawn")]
        rows.append(
            [
                name,
                f"{distance(pair, start, pictures):.1e}",
                f"{distance(back, start, pictures):.3f}",
                f"{distance(edit, true, true):.2f}",
                f"{(code.x / sigmas[0].to(code.x)).std():.2f}",
            ]
        )
    calls.close()
    heads = ["", "pair, back", "code alone, back", "redrawn, to the true one", "deviation of codes"]
    text = table(heads, rows)
    print(text)
    if path == IMAGES / "demo.png":
        save(TABLES / "demo.md", text)
    draw([*columns, (true, "true\ndrawing")]).save(path)
    print(f"wrote {path}: {len(MOTIFS)} drawings, redrawn in the other of {' and '.join(STYLES)}")


def distance(x: Tensor, y: Tensor, drawing: Tensor) -> float:
    """The difference of pictures over the ink of drawings on white, in norms; the median of them."""
    ink = (drawing - 1).flatten(1).norm(dim=1)
    return float(((x - y).flatten(1).norm(dim=1) / ink).median())


def draw(columns: list[tuple[Tensor, str]]) -> Image.Image:
    """A row for each drawing, three times as large, under the titles of the columns."""
    side, gap, head = 96, 8, 40
    rows = len(columns[0][0])
    size = len(columns) * (side + gap) + gap, head + rows * (side + gap)
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for k, (pictures, title) in enumerate(columns):
        left = gap + k * (side + gap)
        pen.multiline_text((left, 4), title, fill="black", font=font)
        values = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        for row, picture in enumerate(values):
            large = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(large, (left, head + row * (side + gap)))
    return sheet


if __name__ == "__main__":
    main()
