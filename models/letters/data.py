"""Rendered images of letters whose content and style vary independently."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""The classes: label k is the letter ``LETTERS[k]``."""

SIZE = 32
"""Height and width of the images."""

FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *(f"cm{style}" for style in ("r10", "b10", "ss10", "tt10", "ti10")),
)
"""The fonts, all included in matplotlib: DejaVu, STIX and Computer Modern."""

_SCALE = 4  # letters are drawn larger by this factor, then downsampled by averaging
_CONTRAST = 0.4  # minimum difference in luminance between ink and paper

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Style:
    """The appearance of a letter in an image, independent of which letter it is.

    Args:
        font: index into `FONTS`.
        height: height of a capital H, in pixels, from 4 to 32.
        slant: horizontal shift per unit of height, in addition to the font's own; positive to the
            right.
        weight: thickness added to every side of the strokes, in pixels, 0 or more.
        x: horizontal offset of the letter from the centre of the image, in pixels.
        y: vertical offset in pixels, positive downwards.
        ink: red, green and blue of the letter, each in [0, 1].
        paper: red, green and blue of the background, each in [0, 1].

    Raises:
        ValueError: if a setting is out of range.
    """

    font: int = 0
    height: float = 16.0
    slant: float = 0.0
    weight: float = 0.25
    x: float = 0.0
    y: float = 0.0
    ink: Colour = (1.0, 1.0, 1.0)
    paper: Colour = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        if not 0 <= self.font < len(FONTS):
            raise ValueError(f"font must be an index from 0 to {len(FONTS) - 1}, got {self.font}")
        if not 4 <= self.height <= SIZE or self.weight < 0:
            raise ValueError(
                f"height must be 4 to {SIZE} pixels and weight 0 or more, got {self.height} and "
                f"{self.weight}"
            )
        for name, colour in (("ink", self.ink), ("paper", self.paper)):
            if len(colour) != 3 or not all(0 <= c <= 1 for c in colour):
                raise ValueError(f"{name} must be three numbers from 0 to 1, got {colour}")

    @classmethod
    def random(cls, rng: np.random.Generator) -> Style:
        """Draw a style from the distribution that the network was trained on."""
        ink, paper = random_colours(rng, 1)
        return cls(
            font=int(rng.integers(len(FONTS))),
            height=rng.uniform(12, 18),
            slant=rng.uniform(-0.25, 0.35),
            weight=rng.uniform(0, 0.9),
            x=rng.uniform(-4, 4),
            y=rng.uniform(-5, 5),
            ink=tuple(ink[0]),
            paper=tuple(paper[0]),
        )


def random_colours(
    rng: np.random.Generator, n: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Draw `n` inks and darker papers of sufficient contrast, each ``(n, 3)`` in [0, 1]."""
    pairs = rng.beta(0.7, 0.7, (n, 2, 3))
    while True:
        luminance = pairs @ np.array([0.299, 0.587, 0.114])
        dull = np.abs(luminance[:, 0] - luminance[:, 1]) < _CONTRAST
        if not dull.any():
            break
        pairs[dull] = rng.beta(0.7, 0.7, (int(dull.sum()), 2, 3))
    brighter = luminance.argmax(1)
    return pairs[np.arange(n), brighter], pairs[np.arange(n), 1 - brighter]


def render_mask(label: int, style: Style) -> NDArray[np.uint8]:
    """Render the mask of a letter, uint8 ``(32, 32)``, from 0 for paper to 255 for ink."""
    from PIL import Image, ImageDraw

    canvas = SIZE * _SCALE
    picture = Image.new("L", (canvas, canvas))
    font = _font(style.font, round(style.height * _SCALE))
    # Centre a capital H rather than the letter itself, so that the tail of Q is below the baseline.
    baseline = canvas / 2 + style.height * _SCALE / 2
    ImageDraw.Draw(picture).text(
        (canvas / 2, baseline),
        LETTERS[label],
        fill=255,
        font=font,
        anchor="ms",
        stroke_width=style.weight * _SCALE,
    )
    # The output at (u, v) is the input at (u - x + slant (v - y - middle), v - y).
    x, y = style.x * _SCALE, style.y * _SCALE
    shear = (1, style.slant, -x - style.slant * (y + canvas / 2), 0, 1, -y)
    picture = picture.transform(
        picture.size, Image.Transform.AFFINE, shear, Image.Resampling.BILINEAR
    )
    return np.array(picture.reduce(_SCALE))


def paint(mask: NDArray[Any], ink: NDArray[Any], paper: NDArray[Any]) -> Tensor:
    """Colour masks, uint8 ``(n, 32, 32)``, to images, float32 ``(n, 3, 32, 32)`` in [-1, 1].

    `ink` and `paper` are the colours ``(n, 3)`` in [0, 1].
    """
    cover = torch.as_tensor(mask, dtype=torch.float32).unsqueeze(1) / 255
    front = torch.as_tensor(ink, dtype=torch.float32).reshape(-1, 3, 1, 1)
    back = torch.as_tensor(paper, dtype=torch.float32).reshape(-1, 3, 1, 1)
    return (back + (front - back) * cover) * 2 - 1


def render_letter(letter: str | int, style: Style | None = None) -> Tensor:
    """Render an image of a letter, float32 ``(3, 32, 32)`` in [-1, 1].

    Args:
        letter: one of `LETTERS`, or its label.
        style: the appearance; ``Style()`` by default.

    Raises:
        ValueError: if `letter` is not a capital letter from A to Z or a label from 0 to 25.
        ImportError: if Pillow, or matplotlib for its fonts, is not installed.
    """
    style = Style() if style is None else style
    mask = render_mask(_label(letter), style)
    return paint(mask[None], np.array([style.ink]), np.array([style.paper]))[0]


def random_letters(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw `n` letters in styles from the training distribution, deterministically for each `seed`.

    They do not repeat the training set, whose styles come from another random stream.

    Returns:
        Images, float32 ``(n, 3, 32, 32)`` in [-1, 1], and labels, int64 ``(n,)``.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(len(LETTERS), size=n)
    images = [render_letter(int(label), Style.random(rng)) for label in labels]
    return torch.stack(images), torch.as_tensor(labels, dtype=torch.int64)


def _label(letter: str | int) -> int:
    if isinstance(letter, str) and len(letter) == 1 and letter in LETTERS:
        return LETTERS.index(letter)
    if isinstance(letter, int) and 0 <= letter < len(LETTERS):
        return letter
    raise ValueError(
        f"letter must be a capital from A to Z or a label from 0 to {len(LETTERS) - 1}, "
        f"got {letter!r}"
    )


@lru_cache(maxsize=4096)
def _font(index: int, height: int) -> FreeTypeFont:
    """Load a font in the size at which a capital H is `height` pixels high."""
    try:
        import matplotlib
        from PIL import ImageFont
    except ImportError as error:
        raise ImportError(
            "rendering letters needs Pillow and matplotlib's fonts: pip install pillow matplotlib"
        ) from error
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    path = folder / f"{FONTS[index]}.ttf"
    if not path.exists():  # cmti10 before matplotlib 3.11, the first without Python 3.10
        path = folder / "cmmi10.ttf"
    probe = ImageFont.truetype(path, 1000).getbbox("H", anchor="ls")
    return ImageFont.truetype(path, round(1000 * height / -probe[1]))
