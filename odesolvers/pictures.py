"""Pictures from files, in the shape of a model, and tensors as pictures."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats of pictures that are read. Pillow knows more, of which EPS would run another program."""
MAX_PIXELS = 2**26
LUMA = (0.299, 0.587, 0.114)
FITS = ("crop", "pad", "refuse")


def to_picture(image: Tensor) -> Image.Image:
    """An image (C, H, W) in [-1, 1], of one channel or three, as a picture of 8 bits."""
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"a picture has 1 or 3 channels, got an image {tuple(image.shape)}")
    bytes_ = ((image.detach().double().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels = bytes_.permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def noise_in_view(x: Tensor, sigma: float) -> Tensor:
    """Noise (C, H, W) of standard deviation `sigma` as an image, which three of them fill.

    Of more than three channels, as latents have, the first three are shown; packed ones as a matrix.
    """
    shown = (x if x.ndim == 3 else x.unsqueeze(0)) / (3 * sigma)
    return shown[:3] if shown.shape[0] >= 3 else shown[:1]


def side_by_side(images: Sequence[Tensor]) -> Tensor:
    """Images (C, H, W) of one height in a row, as one image, small ones enlarged."""
    channels = max(image.shape[0] for image in images)
    rows = [image.cpu().double().expand(channels, -1, -1) for image in images]
    gap = torch.ones(channels, rows[0].shape[1], max(1, rows[0].shape[2] // 16)).double()
    joined = torch.cat([part for row in rows for part in (gap, row)][1:], 2)
    times = math.ceil(96 / joined.shape[1])
    return joined.repeat_interleave(times, 1).repeat_interleave(times, 2)


def read_images(
    path: Path, shape: Sequence[int], fit: str = "refuse", data: bytes | None = None
) -> Tensor:
    """The images in a file, as float32 ``(B, C, H, W)`` in [-1, 1], in the `shape` (C, H, W) of a model.

    See `load_images` for the files that are read, and `fitted` for `fit`.

    Raises:
        ValueError: if the file cannot be read, or its images do not fit.
    """
    return fitted(load_images(path, data), shape, fit, path)


def load_images(path: Path, data: bytes | None = None) -> Tensor:
    """The images in a file in their own size, ``(B, C, H, W)`` in [-1, 1] of one channel or three.

    The file is a picture in one of `FORMATS`; or an ``.npy`` array ``(H, W)``, ``(C, H, W)`` or
    ``(B, C, H, W)`` of one channel or three, uint8 or floating point in [-1, 1].

    Pictures are turned as their EXIF orientation says, and transparent ones are laid on white. All
    modes with a known range of values are read; colours with 16 bits a channel have 8 of them left, as
    Pillow decodes them, and colour profiles are not applied.

    Args:
        path: the file; or what errors call it.
        data: its content, if it was read already.

    Raises:
        ValueError: if the file is something else, is damaged, is animated or has values out of range.
    """
    array = path.suffix.lower() == ".npy"
    return _read_array(path, data) if array else _read_picture(path, data)


def fitted(
    images: Tensor, shape: Sequence[int], fit: str, name: object, border: float = 1.0
) -> Tensor:
    """Images ``(B, C, H, W)`` in the `shape` (C, H, W) of a model, float32, never squashed.

    Colours become grey for a model of one channel, by the weights of ITU-R 601. Another size is resized;
    of other proportions "crop" keeps the centre, "pad" adds a `border`, white by default, and "refuse"
    raises a ValueError about `name`.
    """
    channels, height, width = shape
    if images.shape[1] == 3 and channels == 1:
        images = (images * images.new_tensor(LUMA).reshape(3, 1, 1)).sum(1, keepdim=True)
    elif images.shape[1] == 1:
        images = images.expand(-1, channels, -1, -1)
    if images.shape[1] != channels:
        raise ValueError(f"{name} has {images.shape[1]} channels, the model has {channels}")
    high, wide = images.shape[2:]
    if not proportional((high, wide), (height, width)):
        if fit == "refuse":
            raise ValueError(
                f"{name} is {wide} x {high} pixels, the model's images are {width} x {height}: --fit "
                "crop takes the centre of it, --fit pad adds white; nothing is squashed"
            )
        images = _proportioned(images, height, width, fit, border)
    if images.shape[2:] != (height, width):
        resize = torch.nn.functional.interpolate
        images = resize(images, size=(height, width), mode="bilinear", antialias=True)
    return images.clamp(-1, 1).float()


def proportional(size: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two sizes (H, W) have the same proportions, to the pixel of the first."""
    return abs(size[1] * other[0] - size[0] * other[1]) < other[1]


def read_mask(path: Path, photo: Sequence[int], shape: Sequence[int], fit: str) -> Tensor:
    """The mask in a file, ``(H, W)`` from 0, kept, to 1, in the size of a model: float64.

    It is cropped, padded and resized like the photo that it was drawn over; one in the proportions of
    the model is resized. What padding adds to a photo is kept.

    Args:
        path: a picture, white where the photo may change.
        photo: the size (H, W) of the photo, upright.
        shape: that of the model's images, (C, H, W).
        fit: as the photo is fitted, see `fitted`.

    Raises:
        ValueError: if the mask has the proportions neither of the photo nor of the model.
    """
    mask, model = load_images(path), shape[1:]
    size = mask.shape[2:]
    if len(mask) != 1 or not (proportional(size, photo) or proportional(size, model)):
        raise ValueError(
            f"the mask {path} is {size[1]} x {size[0]} pixels: draw one over the photo as it is shown, "
            f"{photo[1]} x {photo[0]}, or in the proportions of the model, {model[1]} x {model[0]}"
        )
    return (fitted(mask, (1, *model), fit, path, border=-1.0)[0, 0].double() + 1) / 2


def _proportioned(images: Tensor, height: int, width: int, fit: str, border: float) -> Tensor:
    """The centre of `images`, or all of them within a border, in the proportions height to width."""
    high, wide = images.shape[2:]
    pick = min if fit == "crop" else max
    scale = pick(high / height, wide / width)
    rows, columns = max(1, round(scale * height)), max(1, round(scale * width))
    if fit == "crop":
        top, left = (high - rows) // 2, (wide - columns) // 2
        return images[:, :, top : top + rows, left : left + columns]
    above, left = (rows - high) // 2, (columns - wide) // 2
    edges = (left, columns - wide - left, above, rows - high - above)
    return torch.nn.functional.pad(images, edges, value=border)


def _read_array(path: Path, data: bytes | None) -> Tensor:
    """The array in a file of `numpy.save`, with a batch and channels; float64."""
    try:
        array = _load_array(path.read_bytes() if data is None else data)
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


def _load_array(content: bytes) -> npt.NDArray[Any]:
    """`numpy.load`, but of numbers only, and in no more memory than the file is long."""
    formats: Any = np.lib.format
    with io.BytesIO(content) as file:
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


def _read_picture(path: Path, data: bytes | None) -> Tensor:
    """The picture in a file, upright and without transparency, (1, C, H, W)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of what is refused below or harmless
            source = path if data is None else io.BytesIO(data)
            with Image.open(source, formats=FORMATS) as picture:
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
            "saved state ends in .safetensors, and is for `invert` and `sample`"
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
