"""Reading of JSON and of the headers of safetensors that may come from strangers.

Only regular files are read, sizes are limited before anything is parsed, and every failure is a
`ValueError` or an `OSError`.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeGuard, final

from .edm.checks import brief

JSON = 2**23
"""The most bytes of a file of JSON; the largest of Stable Diffusion, a tokenizer, has 3.6 million."""

SETTINGS = 2**18
"""The most bytes of a file of settings; those of Stable Diffusion have 2 thousand, and a schedule of
1000 betas has 20 thousand."""

HEADER = 2**23
"""The most bytes in the header of safetensors; that of Stable Diffusion XL has 0.3 million."""

DEPTH = 8
"""The most lists and dictionaries around a value in JSON."""

_NAMES = {1: "BOOL U8 I8 F8_E4M3 F8_E5M2", 2: "I16 F16 BF16", 4: "I32 F32", 8: "I64 F64"}
SIZES: Mapping[str, int] = {name: size for size, row in _NAMES.items() for name in row.split()}
"""The bytes of a number by the names of dtypes in safetensors."""


@final
@dataclass(frozen=True)
class Entry:
    """A tensor in safetensors: a name of `SIZES`, its shape, and where its bytes begin and end."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


class MissingFile(ValueError):
    """Error for a folder without a file that belongs there."""


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a file for reading, without waiting for the other end of a pipe.

    Raises:
        ValueError: if it is a folder, a device or a pipe, which may have no end.
        OSError: if it cannot be opened.
    """
    return open(path, "rb", opener=_open)


def _open(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        what = "is a folder, not a file" if stat.S_ISDIR(mode) else "is not a file"
        raise ValueError(f"{os.path.basename(path)} {what}")
    return descriptor


def read_text(path: Path, most: int = JSON) -> str:
    """The text of a file of at most `most` bytes.

    Raises:
        ValueError: if the file is longer, or is not UTF-8.
        OSError: if it cannot be read.
    """
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"its {path.name} has more than {most} bytes")
    return data.decode()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of settings in JSON.

    Raises:
        ValueError: if the file is longer than `SETTINGS`, is damaged, or holds something else.
        OSError: if it cannot be read.
    """
    return parse_json(read_text(path, SETTINGS), f"its {path.name}")


def parse_json(text: str, name: str) -> dict[str, Any]:
    """The object in a text of JSON, which is `name` in messages.

    Raises:
        ValueError: if it is damaged, or is something else.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is damaged: {type(error).__name__}: {error}") from error
    if not isinstance(content, dict) or _depth(content) > DEPTH:
        raise ValueError(f"{name} is damaged: it holds {brief(content)} of another form")
    return content


def _depth(value: Any) -> int:
    """The number of lists and dictionaries around the innermost value, up to one above `DEPTH`."""
    level, depth = [value], 0
    while depth <= DEPTH:
        inner = [v for v in level if isinstance(v, (list, dict)) and v]
        if not inner:
            break
        level = [v for item in inner for v in (item.values() if isinstance(item, dict) else item)]
        depth += 1
    return depth


def read_header(path: Path) -> tuple[dict[str, str], dict[str, Entry]]:
    """The metadata and the tensors of a safetensors file, by its header alone.

    Raises:
        ValueError: if the file is damaged, or its header is longer than `HEADER`.
        OSError: if it cannot be read.
    """
    with open_regular(path) as file:
        start = file.read(8)
        text = file.read(header_length(start, os.fstat(file.fileno()).st_size))
        return parse_header(text, os.fstat(file.fileno()).st_size - 8 - len(text))


def header_length(start: bytes | memoryview, size: int) -> int:
    """The length of the header of safetensors of `size` bytes, which its first eight bytes state.

    Raises:
        ValueError: if it is longer than the file or than `HEADER`.
    """
    length = int.from_bytes(start[:8], "little")
    if not 2 <= length <= min(HEADER, size - 8):
        raise ValueError(f"it is damaged: no header of 2 to {HEADER} bytes, as safetensors have")
    return length


def parse_header(text: bytes | memoryview, size: int) -> tuple[dict[str, str], dict[str, Entry]]:
    """The metadata and the tensors that a header of safetensors with `size` bytes of numbers describes.

    The tensors must fill these bytes without gaps and overlaps.

    Raises:
        ValueError: if they do not, or the header is damaged.
    """
    try:
        header = parse_json(str(text, "utf-8"), "its header")
    except UnicodeDecodeError as error:
        raise ValueError(f"its header is damaged: {error}") from error
    metadata = header.pop("__metadata__", None) or {}
    strings = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not strings:
        raise ValueError("its header is damaged: its metadata is not made of texts")
    entries = {name: _entry(name, value, size) for name, value in header.items()}
    position = 0
    for begin, end in sorted((entry.begin, entry.end) for entry in entries.values()):
        if begin != position:
            raise ValueError("it is damaged: its tensors overlap, or leave a gap")
        position = end
    if position != size:
        raise ValueError("it is damaged: its tensors overlap, or leave a gap")
    return metadata, entries


def _entry(name: str, value: Any, size: int) -> Entry:
    form = value if isinstance(value, dict) else {}
    dtype, shape, span = form.get("dtype"), form.get("shape"), form.get("data_offsets")
    if not (_counts(shape) and _counts(span) and len(shape) <= 8 and len(span) == 2):
        raise ValueError(f"its header is damaged: the entry {brief(name)} has another form")
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise ValueError(f"it holds a tensor of {brief(dtype)}, {brief(name)}")
    entry = Entry(dtype, tuple(shape), *span)
    if not entry.begin <= entry.end <= size:
        raise ValueError(f"it is damaged: it ends before byte {brief(entry.end)} of its tensors")
    if entry.numel * SIZES[dtype] != entry.end - entry.begin:
        raise ValueError("it is damaged: the shape of a tensor does not fit its bytes")
    return entry


def _counts(value: Any) -> TypeGuard[list[int]]:
    """Whether a value of JSON is a list of sizes."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**48 for n in value)
