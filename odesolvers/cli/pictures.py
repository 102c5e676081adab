"""Images into and out of files: contact sheets, and the figure of a round trip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from .work import Edit, RoundTrip

Pixels = npt.NDArray[np.uint8]

SLATE, MIST = (64, 86, 128), (222, 228, 238)
INK, ACCENT = "#1d2433", "#c2410c"


def contact_sheet(
    images: Tensor,
    columns: int | None = None,
    *,
    magnify: int | None = None,
    gap: int = 6,
    paper: tuple[int, int, int] = SLATE,
) -> Pixels:
    """Images side by side, row by row.

    Args:
        images: ``(B, C, H, W)`` with one channel or three, in [-1, 1]; what lies outside is clipped.
        columns: as many as make it square, or a little wider, by default.
        magnify: screen pixels along one of an image's; by default images are 64 or more across.
        gap: between images, in screen pixels.
        paper: the colour there, which is neither black nor white nor noise's grey.

    Returns:
        uint8 ``(height, width, 3)``.

    Raises:
        ValueError: if `images` has another form.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.shape[0] == 0:
        raise ValueError(
            "a contact sheet is made of images (B, 1, H, W) or (B, 3, H, W), got "
            f"{tuple(images.shape)}"
        )
    magnify = magnify or max(1, math.ceil(64 / images.shape[3]))
    magnified = _to_bytes(images).repeat(magnify, 1).repeat(magnify, 2)
    count, height, width, _ = magnified.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    size = rows * (height + gap) - gap, columns * (width + gap) - gap
    sheet = np.full((*size, 3), np.array(paper), np.uint8)
    for k, image in enumerate(magnified):
        top, left = k // columns * (height + gap), k % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def noise_in_view(x: Tensor, sigma: float) -> Tensor:
    """Noise of standard deviation `sigma` in [-1, 1], where three of them reach the ends."""
    return x / (3 * sigma)


def save(pixels: Pixels, path: Path) -> None:
    """Write pixels to an image file, making its folder."""
    Image = _pillow()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        Image.fromarray(pixels).save(path)
    except ValueError as error:  # Pillow knows the format by the ending
        raise ValueError(f"{path} does not end as an image file does: use .png") from error


def side_by_side(*sheets: Pixels, gap: int = 24) -> Pixels:
    """Sheets of one height, left to right."""
    between = np.full((sheets[0].shape[0], gap, 3), 255, np.uint8)
    parts = [part for sheet in sheets for part in (between, sheet)][1:]
    return np.concatenate(parts, axis=1)


def read_images(path: Path, shape: Sequence[int]) -> Tensor:
    """The image or images in a file, in the form of a model.

    Args:
        path: an image file; or an ``.npy`` array ``(H, W)``, ``(C, H, W)`` or ``(B, C, H, W)``, uint8 or
            floating point in [-1, 1].
        shape: ``(C, H, W)`` of the model: colours are averaged where it has one channel, and the
            size is changed by area.

    Returns:
        float32 ``(B, C, H, W)`` in [-1, 1].

    Raises:
        ValueError: if the file holds something else.
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
        raise ValueError(
            f"{path} must hold an array (H, W), (C, H, W) or (B, C, H, W), got {array.shape}"
        )
    if array.dtype == np.uint8:
        array = array / 127.5 - 1
    if array.dtype.kind != "f" or not (np.abs(array) <= 1).all():
        raise ValueError(f"{path} must hold uint8, or floating point in [-1, 1], got {array.dtype}")
    return torch.as_tensor(array, dtype=torch.float32).reshape(
        (1,) * (4 - array.ndim) + array.shape
    )


def _read_picture(path: Path) -> Tensor:
    Image = _pillow()
    try:
        with Image.open(path) as picture:
            array = np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise ValueError(
            f"{path} is none of what can be inverted: a state saved with --save (.safetensors), an "
            "image, or an array (.npy)"
        ) from error
    return torch.tensor(array).permute(2, 0, 1).unsqueeze(0) / 127.5 - 1


def signed_colours(x: Tensor) -> Tensor:
    """Signed values in [-1, 1] as colours, channels averaged: red above 0, blue below, 0 white."""
    v = x.float().mean(1, keepdim=True).clamp(-1, 1)
    up, down = v.clamp(min=0), (-v).clamp(min=0)
    lightness = torch.cat(
        [1 - 0.9 * down - 0.2 * up, 1 - 0.6 * down - 0.85 * up, 1 - 0.2 * down - up], 1
    )
    return 2 * lightness - 1


def draw_round_trip(
    trip: RoundTrip, sigma: float, path: Path, *, title: str, noun: str = "image"
) -> None:
    """The figure of a round trip: noise, samples, and both again, with what differs.

    Args:
        trip: the tensors.
        sigma: the noise level of the noise.
        path: the image file to write; its folder is made.
        title: over the figure.
        noun: what one image shows.
    """
    noise_gap, noise_note = _difference(trip.recovered / sigma, trip.noise / sigma)
    sample_gap, sample_note = _difference(trip.resampled, trip.samples)
    panels = [
        (noise_in_view(trip.noise, sigma), "Noise", 1),
        (noise_in_view(trip.recovered, sigma), "Recovered noise", 3),
        (noise_gap, f"(3 − 1) {noise_note[0]}", noise_note[1]),
        (trip.samples, f"Sampled {noun}s", 2),
        (trip.resampled, "Sampled again", 4),
        (sample_gap, f"(4 − 2) {sample_note[0]}", sample_note[1]),
    ]
    figure = _figure(12.0, 8.6)
    figure.text(0.02, 0.955, title, fontsize=18, weight="bold", color=INK, va="center")
    axes = figure.subplots(2, 3)
    figure.subplots_adjust(left=0.02, right=0.98, top=0.865, bottom=0.02, wspace=0.3, hspace=0.27)
    for ax, (images, name, note) in zip(axes.flat, panels, strict=True):
        numbered = isinstance(note, int)
        ax.imshow(contact_sheet(images, paper=SLATE if numbered else MIST), interpolation="nearest")
        ax.set_axis_off()
        line = {"transform": ax.transAxes, "va": "center", "fontsize": 14, "color": INK}
        ax.text(0.1 if numbered else 0.0, 1.06, name, **line)
        if numbered:
            badge = {"boxstyle": "circle,pad=0.22", "facecolor": ACCENT, "edgecolor": "none"}
            line |= {"color": "white", "weight": "bold", "fontsize": 13, "bbox": badge}
            ax.text(0.035, 1.06, str(note), ha="center", **line)
        else:
            ax.text(1.0, 1.06, note, ha="right", **(line | {"fontsize": 12, "alpha": 0.6}))
    (first, third, _), (second, fourth, _) = axes
    there, back = trip.evaluations
    for above, below in ((first, second), (third, fourth)):
        _arrow(figure, (above, 0.88, -0.03), (below, 0.88, 1.03))
        _say(above, 0.84, -0.115, f"sample, {there} calls", "right")
    _arrow(figure, (second, 1.05, 0.8), (third, -0.05, 0.2))
    _say(second, 1.15, 0.62, f"invert,\n{back} calls", "center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def draw_edit(
    edit: Edit, sigma: float, path: Path, *, own: Sequence[str], targets: Sequence[str], title: str
) -> None:
    """The figure of an edit: a row for each image, with its code, itself again, and the edits.

    Args:
        edit: the tensors.
        sigma: the noise level of the code.
        path: the image file to write; its folder is made.
        own: the label of each image.
        targets: the labels of the edits.
        title: over the figure.
    """
    code = noise_in_view(edit.code, sigma)
    columns = [edit.images, code, edit.back, *edit.edits]
    heads = ["image", "code", "back", *(f"as {name}" for name in targets)]
    rows = torch.stack([column.cpu() for column in columns], 1).flatten(0, 1)
    sheet = contact_sheet(rows, columns=len(columns))
    height, width, _ = sheet.shape
    figure = _figure(1 + width / 110, 1.1 + height / 110)
    ax = figure.subplots()
    figure.subplots_adjust(left=0.06, right=0.98, top=1 - 0.9 / (1.1 + height / 110), bottom=0.02)
    ax.imshow(sheet, interpolation="nearest")
    ax.set_xticks([(k + 0.5) * width / len(heads) for k in range(len(heads))], heads)
    ax.set_yticks([(k + 0.5) * height / len(own) for k in range(len(own))], own)
    ax.tick_params(
        length=0, labelsize=12, labelcolor=INK, top=True, labeltop=True, labelbottom=False
    )
    for side in ax.spines.values():
        side.set_visible(False)
    figure.suptitle(title, x=0.02, ha="left", fontsize=15, weight="bold", color=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _arrow(figure: Any, start: tuple[Any, float, float], end: tuple[Any, float, float]) -> None:
    """An arrow between two places, each given as axes and where in them."""
    from matplotlib.patches import ConnectionPatch

    (tail, *a), (head, *b) = start, end
    arrow = ConnectionPatch(
        (a[0], a[1]),
        (b[0], b[1]),
        tail.transAxes,
        head.transAxes,
        arrowstyle="-|>",
        mutation_scale=18,
        color=ACCENT,
        linewidth=2.0,
    )
    figure.add_artist(arrow)


def _say(ax: Any, x: float, y: float, text: str, align: str) -> None:
    style = {"color": ACCENT, "fontsize": 12, "va": "center", "ha": align}
    ax.text(x, y, text, transform=ax.transAxes, **style)


def _difference(a: Tensor, b: Tensor) -> tuple[Tensor, tuple[str, str]]:
    """``a - b`` in colours, magnified by a power of ten until it shows; the power, and its top."""
    difference = (a.double() - b.double()).cpu()
    sizes = difference.abs().flatten()
    largest = sizes.max().item()
    visible = sizes[:: max(1, len(sizes) // 2**20)].quantile(0.95).item() or largest
    power = max(0, math.floor(-math.log10(visible))) if visible > 0 else 0
    scale = f"× $10^{{{power}}}$" if power else ""
    return signed_colours(difference * 10.0**power), (scale, f"largest: {largest:.0e}")


def _to_bytes(images: Tensor) -> Pixels:
    """uint8 ``(B, H, W, 3)`` of images in [-1, 1]."""
    scaled = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    channels_last: Pixels = scaled.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    return channels_last


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("pictures need Pillow: pip install 'odesolvers[cli]'") from error
    return Image


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'odesolvers[cli]'") from error
    return Figure(figsize=(width, height), dpi=110, facecolor="white")
