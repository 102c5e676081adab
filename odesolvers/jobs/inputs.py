"""The inputs of jobs: pictures in folders, WebDatasets and Hugging Face data sets; seeds and prompts."""

from __future__ import annotations

import json
import os
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, Final, NamedTuple

from ..pictures import ENDINGS as PICTURES
from ..typed import optional, parsed, read
from ..writing import read_regular

ENDINGS: Final = (*PICTURES, ".npy")
PROMPTS: Final = (".cls", ".txt")


class Entry(NamedTuple):
    """One element of an input."""

    id: str
    """Its name, which no other element has."""
    place: tuple[str, int, int] | int
    """The file below the root, with the first byte and the number of bytes; or a row; or a seed."""
    prompt: str | None
    """Its prompt, or the name of its class."""

    def line(self) -> bytes:
        """One line of JSON, which `of_line` reads back."""
        return json.dumps(self, separators=(",", ":")).encode() + b"\n"

    @classmethod
    def of_line(cls, line: bytes) -> Entry:
        """The entry that `line` wrote; or a ValueError."""
        return cls(*parsed(line, (str, _place, optional(str))))


class Input(ABC):
    """Elements in an order that depends on nothing but the data."""

    pictures: bool = True
    """Whether the elements are pictures; else they are seeds of noise."""

    @abstractmethod
    def entries(self) -> Iterator[Entry]:
        """The elements in order; holds the names of one folder at a time."""

    def read(self, entry: Entry) -> bytes:
        """The content of the file of an entry.

        Raises:
            OSError: if it cannot be read.
            ValueError: if it is another file now than when it was listed.
        """
        raise NotImplementedError(f"{type(self).__name__} holds no pictures")


class Pictures(Input):
    """The pictures below a folder, or in its WebDataset shards (``*.tar``), or in one of them.

    ``NAME.txt`` or ``NAME.cls`` beside a picture ``NAME.png``, in the folder or the archive, holds its
    prompt or the name of its class. NAME ends at the first dot, as in WebDataset.
    """

    def __init__(self, path: Path) -> None:
        self.root = path if path.is_dir() else path.parent
        self.only = None if path.is_dir() else path.name

    def entries(self) -> Iterator[Entry]:
        if self.only is not None:
            yield from self._archive(self.only)
            return
        seen = set[str]()  # links may lead in a circle
        for folder, folders, names in os.walk(self.root, onerror=_raise, followlinks=True):
            if (real := os.path.realpath(folder)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            inner = Path(folder).relative_to(self.root)
            found: list[tuple[str, str, int, int]] = []
            for name in sorted(name for name in names if not name.startswith(".")):
                file = (inner / name).as_posix()
                if name.endswith(".tar"):
                    yield from self._archive(file)
                elif name.lower().endswith((*ENDINGS, *PROMPTS)):
                    found.append((file, file, 0, _size(self.root / file)))
            yield from self._prompted(found)

    def read(self, entry: Entry) -> bytes:
        assert not isinstance(entry.place, int)
        found, size = self._bytes(*entry.place), entry.place[2]
        if len(found) != size:
            raise ValueError(f"was replaced since the job was begun: it had {size} bytes")
        return found

    def _bytes(self, file: str, offset: int, size: int) -> bytes:
        with open(self.root / file, "rb") as opened:
            opened.seek(offset)
            return opened.read(size if file.endswith(".tar") else size + 1)

    def _archive(self, file: str) -> Iterator[Entry]:
        try:
            with tarfile.open(self.root / file, "r:") as archive:  # without compression
                yield from self._prompted(
                    (f"{file}/{member.name}", file, member.offset_data, member.size)
                    for member in _members(archive)
                    if member.isfile()
                )
        except tarfile.TarError as error:
            raise ValueError(f"{self.root / file} is not a whole tar archive: {error}") from error

    def _prompted(self, members: Iterable[tuple[str, str, int, int]]) -> Iterator[Entry]:
        """The pictures among neighbours (id, file, offset, size) of one name, with their prompt."""
        for _, group in groupby(members, key=lambda member: _key(member[0])):
            pictures: list[tuple[str, tuple[str, int, int]]] = []
            prompt: str | None = None
            for id, file, offset, size in group:
                if id.lower().endswith(ENDINGS):
                    pictures.append((id, (file, offset, size)))
                elif id.lower().endswith(PROMPTS):
                    text = self._bytes(file, offset, size).decode(errors="replace")
                    prompt = text.strip() or None
            yield from (Entry(id, place, prompt) for id, place in pictures)


class HuggingFace(Input):
    """A data set that `datasets` wrote with ``save_to_disk``, or a split of one on the hub.

    The columns are ``image`` (or ``img``) and, if there is one, ``text`` or ``label``, the prompt.
    """

    def __init__(self, name: str, split: str) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ImportError("hf: needs datasets: pip install datasets") from error
        found = (
            datasets.load_from_disk(name)
            if Path(name).is_dir()
            else datasets.load_dataset(name, split=split)
        )
        if isinstance(found, dict):
            found = found[split]
        self.image = next((k for k in ("image", "img") if k in found.column_names), None)
        if self.image is None:
            raise ValueError(f"hf:{name} must have a column image or img, got {found.column_names}")
        self.prompt = next((k for k in ("text", "label") if k in found.column_names), None)
        self.data = found.cast_column(self.image, datasets.Image(decode=False))

    def entries(self) -> Iterator[Entry]:
        columns = self.data.select_columns([self.prompt] if self.prompt else [])
        for row in range(len(self.data)):
            prompt = columns[row][self.prompt] if self.prompt else None
            yield Entry(f"row-{row:09d}", row, None if prompt is None else str(prompt))

    def read(self, entry: Entry) -> bytes:
        found = self.data[entry.place][self.image]
        if found is None:
            raise ValueError("holds no picture")
        return found["bytes"] if found["bytes"] is not None else Path(found["path"]).read_bytes()


class Seeds(Input):
    """Noise of the seeds 0 to `count` - 1, each under the next of `prompts` in turn."""

    pictures = False

    def __init__(self, count: int, prompts: Sequence[str | None] = (None,)) -> None:
        self.count, self.prompts = count, prompts

    def entries(self) -> Iterator[Entry]:
        for seed in range(self.count):
            yield Entry(f"seed-{seed:09d}", seed, self.prompts[seed % len(self.prompts)])


def open_input(text: str) -> Input:
    """The input that a text names.

    Args:
        text: a folder of pictures or of WebDataset shards, or one shard ``NAME.tar``; ``hf:NAME`` or
            ``hf:NAME@SPLIT``, by default the split train; ``seeds:N``; or ``prompts:FILE@N``, N
            pictures of every line of a text file.

    Raises:
        ValueError, OSError: if there is no such input.
        ImportError: if it needs a library that is not installed.
    """
    scheme, colon, rest = text.partition(":")
    if colon and scheme in ("seeds", "prompts"):
        file, at, number = rest.rpartition("@") if scheme == "prompts" else ("", "@", rest)
        if not at or not number.isdecimal() or not 0 < int(number) < 2**40:
            form = "seeds:N" if scheme == "seeds" else "prompts:FILE@N"
            raise ValueError(f"{text} must be {form} with a whole number N above 0")
        if scheme == "seeds":
            return Seeds(int(number))
        try:
            content = read_regular(file).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} must be a text in UTF-8, and is none: {error}") from None
        lines = list(filter(None, map(str.strip, content.splitlines())))
        if not lines:
            raise ValueError(f"{file} must hold a prompt in each line, and is empty")
        return Seeds(int(number) * len(lines), lines)
    if colon and scheme == "hf":
        name, _, split = rest.partition("@")
        return HuggingFace(name, split or "train")
    path = Path(text)
    if not (path.is_dir() or (path.is_file() and path.suffix == ".tar")):
        raise FileNotFoundError(
            f"there is no input {text}: give a folder, a file NAME.tar, hf:NAME, seeds:N or "
            "prompts:FILE@N"
        )
    return Pictures(path)


def _size(path: Path) -> int:
    """The size of a file; 0 of a link that leads nowhere, which is a failure when it is read."""
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of an archive, which would all stay in memory otherwise."""
    while (member := archive.next()) is not None:
        yield member
        archive.members.clear()  # type: ignore[attr-defined]


def _place(value: Any) -> tuple[str, int, int] | int:
    if type(value) is int:
        return value
    found: tuple[str, int, int] = read(value, (str, int, int))
    return found


def _key(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.parent / path.name.partition(".")[0])


def _raise(error: OSError) -> None:
    raise error
