"""Images from and to files: contact sheets, and the figures of a round trip and an edit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from .work import Row

Pixels = npt.NDArray[np.uint8]
Place = tuple[float, float]

SLATE, MIST = (64, 86, 128), (222, 228, 238)
INK, ACCENT = "#1d2433", "#c2410c"
GAP = 6


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


def save(path: Path, *sheets: Pixels) -> None:
    """Writes sheets of one height, left to right, to an image file, and makes its folder."""
    between = np.full((sheets[0].shape[0], 4 * GAP, 3), 255, np.uint8)
    parts = [part for sheet in sheets for part in (between, sheet)][1:]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        Image.fromarray(np.concatenate(parts, axis=1)).save(path)
    except ValueError as error:  # Pillow takes the format from the ending
        raise ValueError(f"{path} does not end as an image file does: use .png") from error


def read_images(path: Path, shape: Sequence[int]) -> Tensor:
    """The images in a file, as float32 ``(B, C, H, W)`` in [-1, 1], in the `shape` (C, H, W) of a model.

    The file is an image; or an ``.npy`` array ``(H, W)``, ``(C, H, W)`` or ``(B, C, H, W)``, uint8 or
    floating point in [-1, 1]. Colours are averaged if the model has one channel, and the size is
    changed to that of the model.
    """
    images = _read_array(path) if path.suffix == ".npy" else _read_picture(path)
    channels, *size = shape
    if channels == 1:
        images = images.mean(1, keepdim=True)
    elif images.shape[1] == 1:
        images = images.expand(-1, channels, -1, -1)
    if images.shape[1] != channels:
        raise ValueError(f"{path} has {images.shape[1]} channels, the model has {channels}")
    if list(images.shape[2:]) != size:
        resize = torch.nn.functional.interpolate
        images = resize(images, size=tuple(size), mode="bilinear", antialias=True)
    return images


def _read_array(path: Path) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not an array saved by numpy.save: {error}") from error
    if not 2 <= array.ndim <= 4 or array.size == 0:
        form = "(H, W), (C, H, W) or (B, C, H, W)"
        raise ValueError(f"{path} must hold an array {form}, got {array.shape}")
    if array.dtype == np.uint8:
        array = array / 127.5 - 1
    if array.dtype.kind != "f" or not (np.abs(array) <= 1).all():
        raise ValueError(f"{path} must hold uint8, or floating point in [-1, 1], got {array.dtype}")
    images = torch.as_tensor(array, dtype=torch.float32)
    return images.reshape((1,) * (4 - array.ndim) + array.shape)


def _read_picture(path: Path) -> Tensor:
    try:
        with Image.open(path) as picture:
            array = np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read as an image: give an image file or an array (.npy); a saved "
            "state ends in .safetensors, and is for `invert` and `sample --from`"
        ) from error
    return torch.tensor(array).permute(2, 0, 1).unsqueeze(0) / 127.5 - 1


def signed_colours(x: Tensor) -> Tensor:
    """Signed values in [-1, 1] as colours, channels averaged: red above 0, blue below, 0 white."""
    v = x.float().mean(1, keepdim=True).clamp(-1, 1)
    up, down = v.clamp(min=0), (-v).clamp(min=0)
    colours = [1 - 0.9 * down - 0.2 * up, 1 - 0.6 * down - 0.85 * up, 1 - 0.2 * down - up]
    return 2 * torch.cat(colours, 1) - 1


def draw_round_trip(row: Row, sigma: float, path: Path, title: str, noun: str) -> None:
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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def draw_edit(columns: Mapping[str, Tensor], rows: Sequence[str], path: Path, title: str) -> None:
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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


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
