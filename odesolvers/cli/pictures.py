"""Images from and to files: contact sheets, and the figures of a round trip and an edit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..writing import replacing
from .work import Row

Pixels = npt.NDArray[np.uint8]
Place = tuple[float, float]

SLATE, MIST = (64, 86, 128), (222, 228, 238)
INK, ACCENT = "#1d2433", "#c2410c"
GAP = 6

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats of pictures that are read. Pillow knows more, of which EPS would run another program."""
MAX_PIXELS = 2**26
LUMA = (0.299, 0.587, 0.114)


def contact_sheet(
    images: Tensor, columns: int | None = None, paper: tuple[int, int, int] = SLATE
) -> Pixels:
    """Images ``(B, C, H, W)`` in [-1, 1] side by side, row by row, as uint8 ``(height, width, 3)``.

    They have one channel or three, and are magnified to 64 pixels across at least; `paper` is the
    colour between them.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        form = tuple(images.shape)
        raise ValueError(f"a contact sheet needs images (B, 1, H, W) or (B, 3, H, W), got {form}")
    scaled = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels = scaled.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    magnify = math.ceil(64 / images.shape[3])
    pixels = pixels.repeat(magnify, 1).repeat(magnify, 2)
    count, height, width, _ = pixels.shape
    columns = columns or math.ceil(math.sqrt(count))
    size = math.ceil(count / columns) * (height + GAP) - GAP, columns * (width + GAP) - GAP
    sheet = np.full((*size, 3), np.array(paper), np.uint8)
    for k, image in enumerate(pixels):
        top, left = k // columns * (height + GAP), k % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = image
    return sheet


def noise_in_view(x: Tensor, sigma: float) -> Tensor:
    """Noise of standard deviation `sigma` in [-1, 1], which three of them fill."""
    return x / (3 * sigma)


def side_by_side(*sheets: Pixels) -> Image.Image:
    """Sheets of one height, left to right."""
    between = np.full((sheets[0].shape[0], 4 * GAP, 3), 255, np.uint8)
    parts = [part for sheet in sheets for part in (between, sheet)][1:]
    return Image.fromarray(np.concatenate(parts, axis=1))


def save(path: Path, picture: Image.Image | Figure) -> None:
    """Writes a picture whole or not at all, in the format that the ending of `path` names.

    Raises:
        ValueError: if it names none that can be written.
        OSError: if the file cannot be written.
    """
    ending = path.suffix.lower()
    write: Callable[..., object] = (
        picture.save if isinstance(picture, Image.Image) else picture.savefig
    )
    with replacing(path) as file:
        try:
            write(file, format=Image.registered_extensions().get(ending, ending[1:]) or "none")
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} does not end as an image file does: use .png") from error


def read_images(path: Path, shape: Sequence[int]) -> Tensor:
    """The images in a file, as float32 ``(B, C, H, W)`` in [-1, 1], in the `shape` (C, H, W) of a model.

    The file is a picture in one of `FORMATS`; or an ``.npy`` array ``(H, W)``, ``(C, H, W)`` or
    ``(B, C, H, W)`` of one channel or three, uint8 or floating point in [-1, 1].

    Pictures are turned as their EXIF orientation says, and transparent ones are laid on white. All
    modes with a known range of values are read; colours with 16 bits a channel have 8 of them left, as
    Pillow decodes them, and colour profiles are not applied. Colours become grey for a model of one
    channel, by the weights of ITU-R 601. Another size of the same proportions is resized.

    Raises:
        ValueError: if the file is something else, is damaged, is animated, has another shape or has
            values out of range.
    """
    images = _read_array(path) if path.suffix.lower() == ".npy" else _read_picture(path)
    channels, height, width = shape
    if images.shape[1] == 3 and channels == 1:
        images = (images * images.new_tensor(LUMA).reshape(3, 1, 1)).sum(1, keepdim=True)
    elif images.shape[1] == 1:
        images = images.expand(-1, channels, -1, -1)
    if images.shape[1] != channels:
        raise ValueError(f"{path} has {images.shape[1]} channels, the model has {channels}")
    high, wide = images.shape[2:]
    if abs(wide * height - high * width) >= width:  # not that of any picture so high
        raise ValueError(
            f"{path} is {wide} x {high} pixels, the model's images are {width} x {height}: crop it to "
            "these proportions first; the size is changed here, the shape is not"
        )
    if (high, wide) != (height, width):
        resize = torch.nn.functional.interpolate
        images = resize(images, size=(height, width), mode="bilinear", antialias=True)
    return images.clamp(-1, 1).float()


def _read_array(path: Path) -> Tensor:
    """The array in a file of `numpy.save`, with a batch and channels; float64."""
    try:
        array = _load_array(path)
    except Exception as error:  # the header is an expression, and fails in as many ways
        raise ValueError(f"{path} is not an array saved by numpy.save: {_brief(error)}") from error
    if not 2 <= array.ndim <= 4 or array.size == 0:
        form = "(H, W), (C, H, W) or (B, C, H, W)"
        raise ValueError(f"{path} must hold an array {form}, got {array.shape}")
    if array.ndim > 2 and array.shape[-3] not in (1, 3):
        raise ValueError(
            f"{path} holds an array {array.shape}, which has {array.shape[-3]} channels, not 1 or 3: "
            "channels come before height and width"
        )
    if array.dtype == np.uint8:
        array = array / 127.5 - 1
    elif array.dtype.kind != "f":
        raise ValueError(f"{path} must hold uint8, or floating point in [-1, 1], got {array.dtype}")
    low, high = float(array.min()), float(array.max())
    if not -1 <= low <= high <= 1:
        found = f"{low:.6g} to {high:.6g}" if low <= high else "NaN"
        raise ValueError(
            f"{path} must hold floating point in [-1, 1], where -1 is black and 1 is white, got {found}"
        )
    if 0 <= low < 1:
        message = f"{path} holds nothing below 0, which is grey: black is -1, not 0"
        warnings.warn(message, UserWarning, stacklevel=3)
    images = torch.from_numpy(array.astype(np.float64))
    return images.reshape((1,) * (4 - array.ndim) + array.shape)


def _load_array(path: Path) -> npt.NDArray[Any]:
    """`numpy.load`, but of numbers only, and in no more memory than the file is long."""
    formats: Any = np.lib.format
    with path.open("rb") as file:
        read = {
            (1, 0): formats.read_array_header_1_0,
            (2, 0): formats.read_array_header_2_0,
        }.get(formats.read_magic(file))
        if read is None:
            raise ValueError("the version of its format is not 1 or 2")
        shape, columns_first, dtype = read(file)
        if dtype.kind not in "biufc":
            raise ValueError(f"it holds {dtype.name[:40]}, not numbers")
        data, size = file.read(), math.prod(shape) * dtype.itemsize
    if min(shape, default=1) < 0 or len(data) != size:
        raise ValueError(f"it holds {len(data)} bytes, and says that it holds {size}")
    array = np.frombuffer(data, dtype)
    return array.reshape(shape, order="F" if columns_first else "C")


def _read_picture(path: Path) -> Tensor:
    """The picture in a file, upright and without transparency, (1, C, H, W)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of what is refused below or harmless
            with Image.open(path, formats=FORMATS) as picture:
                _check_picture(picture)
                array = _values(ImageOps.exif_transpose(picture))
    except _Refused as error:
        raise ValueError(f"{path} {error}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{path} has more than {MAX_PIXELS} pixels: make it smaller first"
        ) from error
    except UnidentifiedImageError as error:
        formats = ", ".join(FORMATS)
        raise ValueError(
            f"{path} cannot be read as an image: give a picture ({formats}) or an array (.npy); a "
            "saved state ends in .safetensors, and is for `invert` and `sample --from`"
        ) from error
    except Exception as error:  # decoders fail in as many ways as files are damaged
        raise ValueError(
            f"{path} is a damaged picture ({_brief(error)}): save it again with another program"
        ) from error
    return torch.from_numpy(array).permute(2, 0, 1).unsqueeze(0) * 2 - 1


def _brief(error: Exception) -> str:
    """The message of `error` in one line of plain characters, and its kind if there is none."""
    return ascii(str(error) or type(error).__name__)[1:-1][:150]


class _Refused(ValueError):
    """A fault of a picture, as the end of a sentence about its file."""


def _check_picture(picture: Image.Image) -> None:
    """Refuses pictures by their header, before they are decoded."""
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise _Refused(
            f"has {width} x {height} pixels, more than {MAX_PIXELS}: make it smaller first"
        )
    # A camera's MPO file is one picture, with previews.
    if picture.format != "MPO" and getattr(picture, "is_animated", False):
        raise _Refused(
            "holds several pictures or is animated: save one of them as a file of its own"
        )
    deep = picture.mode in ("I", "F") or picture.mode.startswith("I;16")
    tags = getattr(picture, "tag_v2", {})
    # Whole numbers of 16 bits, and no others, have a black and a white that all programs agree on.
    plain = picture.mode != "F" and picture.format in ("PNG", "PPM")
    plain |= picture.mode.startswith("I;16") and (tags.get(258), tags.get(262)) == ((16,), 1)
    if deep and not plain:
        raise _Refused(
            f"holds numbers of unknown range (mode {picture.mode} of {picture.format}): save it with 8 "
            "bits a channel, or as an array (.npy) in [-1, 1]"
        )


def _values(picture: Image.Image) -> npt.NDArray[np.float32]:
    """The values of a picture laid on white: (H, W, 1 or 3) from 0 to 1."""
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        grey = np.asarray(picture).astype(np.int64)
        clear = picture.info.get("transparency")
        return np.where(grey == clear, 1.0, grey / 65535).astype(np.float32)[:, :, None]
    if picture.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        picture = picture.convert("RGB")
    pixels = np.asarray(picture.convert("RGBA"))
    white, alpha = np.float32(255), pixels[:, :, 3:]
    colours: npt.NDArray[np.float32] = pixels[:, :, :3].astype(np.float32) / white
    if not (alpha == 255).all():
        colours = np.float32(1) - (np.float32(1) - colours) * (alpha.astype(np.float32) / white)
    return colours


def signed_colours(x: Tensor) -> Tensor:
    """Signed values in [-1, 1] as colours, channels averaged: red above 0, blue below, 0 white."""
    v = x.float().mean(1, keepdim=True).clamp(-1, 1)
    up, down = v.clamp(min=0), (-v).clamp(min=0)
    colours = [1 - 0.9 * down - 0.2 * up, 1 - 0.6 * down - 0.85 * up, 1 - 0.2 * down - up]
    return 2 * torch.cat(colours, 1) - 1


def draw_round_trip(row: Row, sigma: float, title: str, noun: str) -> Figure:
    """The figure of a round trip: noise of level `sigma`, samples, both again, and the differences."""
    noise_gap, noise_power, noise_note = _difference(row.recovered / sigma, row.noise / sigma)
    sample_gap, sample_power, sample_note = _difference(row.resampled, row.samples)
    panels: list[tuple[Tensor, str, str]] = [
        (noise_in_view(row.noise, sigma), "Noise", "1"),
        (noise_in_view(row.recovered, sigma), "Recovered noise", "3"),
        (noise_gap, f"(3 − 1) {noise_power}", noise_note),
        (row.samples, f"Sampled {noun}s", "2"),
        (row.resampled, "Sampled again", "4"),
        (sample_gap, f"(4 − 2) {sample_power}", sample_note),
    ]
    figure = Figure(figsize=(12.0, 8.6), dpi=110, facecolor="white")
    figure.text(0.02, 0.955, title, fontsize=16, weight="bold", color=INK, va="center")
    axes = figure.subplots(2, 3)
    figure.subplots_adjust(left=0.02, right=0.98, top=0.865, bottom=0.02, wspace=0.3, hspace=0.27)
    for ax, (images, name, note) in zip(axes.flat, panels, strict=True):
        numbered = note.isdigit()
        ax.imshow(contact_sheet(images, paper=SLATE if numbered else MIST), interpolation="nearest")
        ax.set_axis_off()
        _say(ax, 0.1 if numbered else 0.0, 1.06, name, fontsize=14)
        if numbered:
            badge = {"boxstyle": "circle,pad=0.22", "facecolor": ACCENT, "edgecolor": "none"}
            bold = {"color": "white", "weight": "bold", "fontsize": 13, "ha": "center"}
            _say(ax, 0.035, 1.06, note, bbox=badge, **bold)
        else:
            _say(ax, 1.0, 1.06, note, ha="right", alpha=0.6)
    (first, third, _), (second, fourth, _) = axes
    there, back = row.evaluations
    for above, below in ((first, second), (third, fourth)):
        _arrow(above, (0.88, -0.03), below, (0.88, 1.03))
        _say(above, 0.84, -0.115, f"sample, {there} calls", ha="right", color=ACCENT)
    _arrow(second, (1.05, 0.8), third, (-0.05, 0.2))
    _say(second, 1.15, 0.62, f"invert,\n{back} calls", ha="center", color=ACCENT)
    return figure


def draw_edit(columns: Mapping[str, Tensor], rows: Sequence[str], title: str) -> Figure:
    """The figure of an edit: images in `columns` by their headings, one in each of the named rows."""
    images = torch.stack([column.cpu() for column in columns.values()], 1).flatten(0, 1)
    sheet = contact_sheet(images, len(columns))
    height, width, _ = sheet.shape
    across, down = 1 + width / 110, 1.1 + height / 110  # inches
    figure = Figure(figsize=(across, down), dpi=110, facecolor="white")
    ax = figure.subplots()
    figure.subplots_adjust(left=0.06, right=0.98, top=1 - 0.9 / down, bottom=0.02)
    ax.imshow(sheet, interpolation="nearest")
    ax.set_xticks([(k + 0.5) * width / len(columns) for k in range(len(columns))], list(columns))
    ax.set_yticks([(k + 0.5) * height / len(rows) for k in range(len(rows))], rows)
    ax.tick_params(length=0, labelsize=12, labelcolor=INK, labeltop=True, labelbottom=False)
    ax.set_frame_on(False)
    style = {"fontsize": min(15, 2.2 * across), "weight": "bold", "color": INK}
    figure.suptitle(title, x=0.02, ha="left", **style)
    return figure


def _arrow(tail: Any, start: Place, head: Any, end: Place) -> None:
    """An arrow from the place `start` in the axes `tail` to the place `end` in the axes `head`."""
    style = {"arrowstyle": "-|>", "mutation_scale": 18, "color": ACCENT, "linewidth": 2.0}
    ends = {"xycoords": head.transAxes, "textcoords": tail.transAxes}
    head.annotate("", end, start, arrowprops=style, annotation_clip=False, **ends)


def _say(ax: Any, x: float, y: float, text: str, **style: Any) -> None:
    default = {"color": INK, "fontsize": 12, "va": "center", "transform": ax.transAxes}
    ax.text(x, y, text, **(default | style))


def _difference(a: Tensor, b: Tensor) -> tuple[Tensor, str, str]:
    """``a - b`` in colours, times the power of ten that makes it visible; that power; the maximum."""
    difference = (a.double() - b.double()).cpu()
    sizes = difference.abs().flatten()
    visible = sizes[:: max(1, len(sizes) // 2**20)].quantile(0.95).item() or sizes.max().item()
    power = max(0, math.floor(-math.log10(visible))) if visible > 0 else 0
    scale = f"× $10^{{{power}}}$" if power else ""
    return signed_colours(difference * 10.0**power), scale, f"largest: {sizes.max().item():.0e}"
