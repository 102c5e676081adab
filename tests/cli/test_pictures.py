"""Pictures and arrays that the command line reads: the right values, or a refusal in words."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from odesolvers.pictures import FORMATS, MAX_PIXELS, read_images, read_mask

RAMP = np.linspace(0, 255, 32 * 32).reshape(32, 32).astype(np.uint8)
COLOURS = np.stack([RAMP, RAMP.T, 255 - RAMP], 2)
HOLE = np.zeros((32, 32), np.uint8)
HOLE[8:24, 8:24] = 255  # opaque inside


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(picture: Any, name: str = "a.png", channels: int = 3, **options: Any) -> Tensor:
    """The picture, an image or an array, written to a file and read for a model of its size."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(name, **options)
    size = (image.height, image.width)
    return read_images(Path(name), (channels, *size))


def values(pixels: Any) -> Tensor:
    """Pixels (H, W) or (H, W, 3) from 0 to 255 as the reader is to give them, for three channels."""
    array = torch.from_numpy(np.asarray(pixels).astype(np.float64) / 127.5 - 1)
    array = array if array.ndim == 3 else array[:, :, None].expand(-1, -1, 3)
    return array.permute(2, 0, 1)[None].float()


def close(a: Tensor, b: Tensor, levels: float = 1e-4) -> None:
    """The two are equal to within so many of 255 levels."""
    torch.testing.assert_close(a, b, rtol=0, atol=levels / 127.5)


def refused(data: bytes | str, *words: str, name: str = "a.png") -> str:
    """The words with which a file is refused; bytes are written to it first."""
    if isinstance(data, bytes):
        Path(name).write_bytes(data)
    with pytest.raises(ValueError) as error:
        read_images(Path(name), (3, 32, 32))
    message = str(error.value)
    assert message.startswith(name)
    assert len(message) < 400
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def test_modes_agree_with_pillow() -> None:
    palette = Image.fromarray(COLOURS).quantize(64)
    close(read(RAMP), values(RAMP))
    close(read(COLOURS), values(COLOURS))
    close(read(palette), values(palette.convert("RGB")))
    close(read(palette, "a.gif"), values(palette.convert("RGB")))
    bits = Image.fromarray(RAMP).convert("1")
    close(read(bits), values(bits.convert("L")))
    cmyk = Image.fromarray(COLOURS).convert("CMYK")
    close(read(cmyk, "a.tif"), values(cmyk.convert("RGB")))
    close(
        read(cmyk, "a.jpg", quality=95), values(cmyk.convert("RGB")), levels=12
    )  # chroma is lossy
    for name in ("a.bmp", "a.ppm", "a.tif", "a.webp"):
        close(
            read(COLOURS, name, **({"lossless": True} if name == "a.webp" else {})), values(COLOURS)
        )


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    deep = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    for name in ("a.png", "a.tif", "a.pgm"):
        got = read(deep, name)
        torch.testing.assert_close(
            got[0, 0].double(), torch.from_numpy(deep / 32767.5 - 1.0), atol=1e-6, rtol=0
        )
        close(read(RAMP.astype(np.uint16) * 257, name), values(RAMP))
    Image.fromarray(deep).save("clear.png", transparency=int(deep[3, 3]))
    (clear,) = read_images(Path("clear.png"), (1, 32, 32))
    assert clear[0, 3, 3] == 1
    assert clear[0, 3, 4] == pytest.approx(deep[3, 4] / 32767.5 - 1, abs=1e-6)


def png(depth: int, colour: int, rows: bytes, width: int = 32, height: int = 32) -> bytes:
    """A PNG by its specification, for what Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_sixteen_bit_colours_to_eight_bits() -> None:
    rng = np.random.default_rng(0)
    deep = rng.integers(0, 65536, (32, 32, 4)).astype(">u2")
    for colour, channels in ((2, 3), (6, 4), (4, 2)):
        part = deep[:, :, :channels]
        Path("a.png").write_bytes(png(16, colour, b"".join(b"\0" + row.tobytes() for row in part)))
        shares = part.astype(np.float64) / 65535
        alpha = shares[:, :, -1:] if channels in (2, 4) else np.ones((32, 32, 1))
        colours = shares[:, :, :1] if channels == 2 else shares[:, :, :3]
        right = values(np.broadcast_to(255 * (1 - alpha + alpha * colours), (32, 32, 3)))
        close(read_images(Path("a.png"), (3, 32, 32)), right, levels=2)


def test_transparency_is_laid_on_white() -> None:
    for black in (np.zeros((32, 32, 2), np.uint8), np.zeros((32, 32, 4), np.uint8)):
        black[:, :, -1] = HOLE
        for name in ("a.png", "a.webp", "a.tif"):
            if black.shape[2] == 2 and name == "a.webp":
                continue
            options = {"lossless": True} if name == "a.webp" else {}
            close(read(black, name, **options), values(255 - HOLE))
    shares = np.dstack([COLOURS, RAMP])
    right = Image.new("RGBA", (32, 32), "white")
    right.alpha_composite(Image.fromarray(shares))
    close(read(shares), values(right.convert("RGB")), levels=0.51)


def test_transparent_colours_are_laid_on_white() -> None:
    """Of palettes, by index or by an alpha for each; of grey and of RGB, by the one colour."""
    palette = Image.new("P", (32, 32))
    palette.putdata((HOLE // 255).flatten().tolist())
    palette.putpalette([0, 0, 0, 0, 0, 255])
    blue = np.dstack([255 - HOLE, 255 - HOLE, np.full_like(HOLE, 255)])
    close(read(palette, "a.png", transparency=0), values(blue))
    close(read(palette, "a.gif", transparency=0), values(blue))
    half = 255 - HOLE * (128 / 255)  # blue of alpha 128
    right = np.dstack([half, half, np.full_like(HOLE, 255)])
    close(read(palette, "a.png", transparency=bytes([0, 128])), values(right))
    dark = np.minimum(HOLE, 100)
    close(read(dark, transparency=0), values(np.where(dark == 0, 255, dark)))
    close(
        read(np.dstack([dark] * 3), transparency=(0, 0, 0)), values(np.where(dark == 0, 255, dark))
    )


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.webp"])
def test_orientations_of_exif(name: str) -> None:
    """The eight orientations, by their definition: which side of the picture row 0 and column 0 are."""
    upright = np.arange(12 * 8).reshape(12, 8).astype(np.uint8) * 2
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).T,
        8: np.rot90(upright, -1),
    }
    for orientation, array in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        pixels = np.dstack([array] * 3).repeat(8, 0).repeat(8, 1)
        options: dict[str, Any] = {"quality": 100} if name == "a.jpg" else {}
        options |= {"lossless": True} if name == "a.webp" else {}
        Image.fromarray(pixels).save(name, exif=exif, **options)
        got = read_images(Path(name), (3, 96, 64))
        close(got, values(upright.repeat(8, 0).repeat(8, 1)), levels=2)
        if name == "a.png":
            deep = np.ascontiguousarray(pixels[:, :, 0]).astype(np.uint16) * 257
            Image.fromarray(deep).save(name, exif=exif)
            close(read_images(Path(name), (3, 96, 64)), got)


def test_colours_become_grey_as_in_pillow() -> None:
    grey = values(Image.fromarray(COLOURS).convert("L"))[:, :1]
    close(read(COLOURS, channels=1), grey, levels=0.51)
    close(read(RAMP, channels=1), values(RAMP)[:, :1])


def test_other_sizes_are_resized_and_never_squashed() -> None:
    smooth = 127.5 + 127 * np.sin(np.linspace(0, 6, 64))[:, None] * np.cos(np.linspace(0, 5, 64))
    Image.fromarray(smooth.astype(np.uint8)).save("a.png")
    for size in (16, 40, 128):
        with Image.open("a.png") as picture:
            pillow = picture.convert("F").resize((size, size), Image.Resampling.BILINEAR)
        close(read_images(Path("a.png"), (1, size, size)), values(pillow)[:, :1], levels=0.1)
    for height, width in ((64, 63), (32, 64), (1, 64)):
        Image.fromarray(np.zeros((height, width), np.uint8)).save("a.png")
        words = f"is {width} x {height} pixels, the model's images are 32 x 32", "--fit crop"
        refused("written", *words)
    Image.fromarray(np.zeros((76, 101), np.uint8)).save("a.png")
    assert read_images(Path("a.png"), (3, 48, 64)).shape == (1, 3, 48, 64)  # 4:3, to the pixel


def test_other_proportions_are_cropped_or_padded() -> None:
    """A square ring on white, 40 high and 60 wide: its centre, or all of it between white bars."""
    wide = np.full((40, 60), 255, np.uint8)
    wide[:, 10:50] = 0
    wide[5:35, 15:45] = 128
    Image.fromarray(wide).save("a.png")
    cropped = read_images(Path("a.png"), (1, 40, 40), "crop")
    close(cropped, values(wide[:, 10:50])[:, :1])
    padded = read_images(Path("a.png"), (1, 60, 60), "pad")
    close(padded[:, :, 10:50], values(wide)[:, :1])
    assert (padded[:, :, :10] == 1).all()
    assert (padded[:, :, 50:] == 1).all()
    Image.fromarray(wide.T).save("a.png")
    close(read_images(Path("a.png"), (1, 40, 40), "crop"), values(wide.T[10:50])[:, :1])
    assert read_images(Path("a.png"), (1, 20, 30), "crop").shape == (1, 1, 20, 30)
    Image.fromarray(np.zeros((1, 64), np.uint8)).save("a.png")
    assert read_images(Path("a.png"), (1, 8, 8), "crop").shape == (1, 1, 8, 8)


def test_a_mask_is_fitted_like_its_photo() -> None:
    """A photo that is its own mask: what is white of it after the fit is what the mask has as 1."""
    wide = np.zeros((40, 60), np.uint8)
    wide[10:20, 5:25] = 255
    Image.fromarray(wide).save("photo.png")
    Image.fromarray(wide.repeat(2, 0).repeat(2, 1)).save("twice.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(np.rot90(wide, 1)).save("turned.png", exif=turned)
    for name in ("photo.png", "twice.png", "turned.png"):
        for fit, shape in (("crop", (1, 40, 40)), ("crop", (1, 20, 20)), ("pad", (1, 60, 60))):
            photo = (read_images(Path("photo.png"), shape, fit)[0, 0] + 1) / 2
            if fit == "pad":
                photo[:10] = photo[50:] = 0  # the border is kept
            mask = read_mask(Path(name), (40, 60), shape, fit)
            assert mask.dtype == torch.float64
            assert torch.equal(mask > 0.5, photo > 0.5), (name, fit, shape)
            assert (mask - photo).abs().max() < (0.3 if name == "twice.png" else 0.01)
    Image.fromarray(wide[:, :40]).save("square.png")  # in the proportions of the model already
    mask = read_mask(Path("square.png"), (40, 60), (1, 40, 40), "crop")
    assert torch.equal(mask, torch.from_numpy(wide[:, :40] / 255))
    Image.fromarray(wide.T).save("tall.png")
    with pytest.raises(ValueError, match=r"tall.png is 40 x 60 pixels: .* shown, 60 x 40, or"):
        read_mask(Path("tall.png"), (40, 60), (1, 40, 40), "crop")


def animation(name: str) -> None:
    frames = [Image.fromarray(np.full((32, 32, 3), 80 * k, np.uint8)) for k in range(3)]
    frames[0].save(name, save_all=True, append_images=frames[1:], duration=50)


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_animations_are_refused(name: str) -> None:
    animation(name)
    refused("written", "several pictures or is animated", name=name)
    frame = Image.fromarray(np.full((32, 32, 3), 80, np.uint8))
    frame.save(name, save_all=True)
    assert read_images(Path(name), (3, 32, 32)).shape == (1, 3, 32, 32)


def test_a_cameras_picture_with_previews_is_one_picture() -> None:
    pictures = [Image.fromarray(COLOURS), Image.fromarray(COLOURS[::2, ::2])]
    pictures[0].save("a.mpo", "MPO", save_all=True, append_images=pictures[1:], quality=95)
    with Image.open("a.mpo") as first:
        close(read_images(Path("a.mpo"), (3, 32, 32)), values(first))


def test_numbers_of_unknown_range_are_refused() -> None:
    for array in (RAMP.astype(np.int32) * 70000, RAMP.astype(np.float32) / 255):
        Image.fromarray(array).save("a.tif")
        refused("written", "numbers of unknown range", "8 bits a channel", name="a.tif")
    deep = Image.fromarray(RAMP.astype(np.uint16) * 257)
    deep.save("a.tif", tiffinfo={262: 0})  # white is 0
    refused("written", "numbers of unknown range", name="a.tif")


def formats() -> dict[str, bytes]:
    """A small picture in every format."""
    files = {}
    for name in FORMATS:
        buffer = io.BytesIO()
        Image.fromarray(COLOURS).save(buffer, name)
        files[name] = buffer.getvalue()
    return files


@pytest.mark.parametrize("name", FORMATS)
def test_cut_files_are_refused_or_whole(name: str) -> None:
    data = formats()[name]
    Path("a.png").write_bytes(data)
    whole = read_images(Path("a.png"), (3, 32, 32))
    complete = 0
    for k in range(0, len(data), max(1, len(data) // 60)):
        Path("a.png").write_bytes(data[:k])
        try:
            got = read_images(Path("a.png"), (3, 32, 32))
        except ValueError:
            continue
        complete += 1
        assert torch.equal(got, whole), k
    assert complete < 20


OTHERS: dict[str, Callable[[], bytes]] = {
    "empty": bytes,
    "text": lambda: b"a picture of a cat\n" * 10,
    "page": lambda: b"<!DOCTYPE html><html>Not found</html>",
    "postscript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n",
    "vectors": lambda: b"<svg xmlns='http://www.w3.org/2000/svg' width='32' height='32'/>",
    "array": lambda: b"\x93NUMPY\x01\x00" + bytes(100),
    "archive": lambda: b"PK\x03\x04" + bytes(100),
    "zeros": lambda: bytes(1000),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_are_refused(kind: str) -> None:
    for name in ("a.png", "a.jpg", "a"):
        refused(OTHERS[kind](), "give a picture (PNG, JPEG", "or an array", name=name)


def test_bombs_are_refused_by_their_header() -> None:
    side = int(MAX_PIXELS**0.5)
    for width, height in ((side + 1, side), (20000, 20000), (2**31 - 1, 2**31 - 1)):
        data = png(8, 2, bytes(1000), width, height)
        assert str(MAX_PIXELS) in refused(data) or width > 2**30
    gif = b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\0\0\0,\0\0\0\0"
    refused(gif + struct.pack("<HH", 65535, 65535) + b"\0\x08\x01\0\0;", f"more than {MAX_PIXELS}")


# arrays


def saved(array: Any, shape: tuple[int, ...] = (3, 32, 32)) -> Tensor:
    np.save("a.npy", array, allow_pickle=False)
    return read_images(Path("a.npy"), shape)


def test_arrays_are_read_as_they_are() -> None:
    colours = COLOURS.transpose(2, 0, 1)
    floats = colours / 127.5 - 1
    close(saved(colours), values(COLOURS))
    close(saved(RAMP), values(RAMP))
    close(
        saved(np.stack([colours, colours[::-1]])),
        torch.cat([values(COLOURS), values(COLOURS[:, :, ::-1])]),
    )
    for dtype in ("<f4", ">f4", "<f8", ">f8", "g"):
        close(saved(floats.astype(dtype)), values(COLOURS))
    close(saved(floats.astype(np.float16)), values(COLOURS), levels=0.1)
    close(saved(np.asfortranarray(floats)), values(COLOURS))
    assert torch.equal(
        saved(floats.astype(np.float32)), torch.from_numpy(floats.astype(np.float32))[None]
    )


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((3, 32, 32), 1.5), "where -1 is black and 1 is white, got 1.5 to 1.5"),
        (RAMP.astype(np.float64), "got 0 to 255"),
        (np.full((32, 32), np.nan), "got NaN"),
        (np.where(RAMP > 250, np.nan, 0.5), "got NaN"),
        (np.where(RAMP > 250, -np.inf, 0.5), "got -inf to 0.5"),
        (RAMP.astype(np.uint16), "must hold uint8, or floating point in [-1, 1], got uint16"),
        (RAMP.astype(np.int64), "got int64"),
        (RAMP > 3, "got bool"),
        (RAMP * 1j, "got complex128"),
        (np.zeros((32, 32), "m8[s]"), "not numbers"),
        (np.zeros((32, 32), [("a", "f4")]), "not numbers"),
        (np.zeros((32, 32), "U3"), "not numbers"),
        (COLOURS, "(32, 32, 3), which has 32 channels, not 1 or 3: channels come before"),
        (np.zeros((4, 32, 32)), "4 channels, not 1 or 3"),
        (np.zeros((1, 1, 1, 32, 32)), "got (1, 1, 1, 32, 32)"),
        (np.zeros(32), "got (32,)"),
        (np.zeros((0, 3, 32, 32)), "got (0, 3, 32, 32)"),
        (-np.ones((3, 32, 30)), "is 30 x 32 pixels"),
    ],
)
def test_other_arrays_are_refused(array: Any, message: str) -> None:
    np.save("a.npy", array, allow_pickle=False)
    refused("written", message, name="a.npy")


def test_floats_from_0_to_1_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="black is -1, not 0"):
        saved(RAMP / 255)
    saved(np.ones((32, 32)))


def header(text: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = text.ljust(117) + "\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text.encode() + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x09\x00" + bytes(100),
        b"PK\x03\x04" + bytes(200),
        header("{'descr': '<f8', 'fortran_order': False, 'shape': (100000000, 1000000000)}"),
        header("{'descr': '<f8', 'fortran_order': False, 'shape': (-1, 32)}", bytes(256)),
        header("{'descr': '<f8', 'fortran_order': False, 'shape': (2, 2)}", bytes(31)),
        header("{'descr': '<f8', 'fortran_order': False, 'shape': (2, 2)}", bytes(33)),
        header("{'descr': '|O', 'fortran_order': False, 'shape': (1, 1)}", b"\x80\x04N."),
        header("{'descr': '" + "<f8" * 30 + "'}"),
        header("[" * 110),
        header("open('made', 'w')"),
        header("\x00\x00"),
    ],
)
def test_broken_arrays_are_refused(data: bytes) -> None:
    refused(data, "is not an array saved by numpy.save", name="a.npy")
    assert not Path("made").exists()
