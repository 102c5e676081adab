"""Folders of results that can be gone on with: what is finished, and under which settings."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from PIL import Image

from .pictures import ENDINGS
from .state import State
from .typed import each, parsed
from .values import shown
from .writing import read_regular, replacing

NOTES: Final = ".odesolvers.json"
STATE: Final = ".safetensors"
_OTHER: Final = {"key": "another key", "pictures": "other pictures"}


@dataclass(frozen=True)
class Item:
    """A result that a command makes.

    Attributes:
        name: its name, without ending.
        path: the file that it is made of; None for noise.
        digest: of what this result alone is made of.
        prompt, to: its prompts.
    """

    name: str
    path: Path | None = None
    digest: str = ""
    prompt: str | None = None
    to: str | None = None

    @property
    def of_state(self) -> bool:
        """Whether it is made of a state."""
        return self.path is not None and self.path.suffix == STATE


class OtherSettings(ValueError):
    """A folder holds results of other settings."""


class Outputs:
    """The folder, or the one file, that a command writes to.

    A hidden file in the folder says which results are finished, and with which settings and inputs. A
    command that is run again makes what is missing, and refuses to mix results of other settings.

    Args:
        out: the folder; or a file with the ending of a picture, for one result.
        items: the results.
        sources: the files that they are made of.
        settings: that the results depend on, as JSON can hold them.
        again: make all results anew.

    Attributes:
        missing: the items that are to be made.

    Raises:
        ValueError: if `out` is a file for many, two results have one name, or one would replace what it
            is made of.
        OtherSettings: if the folder holds results of other settings.
        OSError: if the folder cannot be written to.
    """

    def __init__(
        self,
        out: Path,
        items: Sequence[Item],
        sources: Iterable[Path],
        settings: Mapping[str, Any],
        *,
        again: bool,
    ) -> None:
        self.file = out if out.suffix.lower() in ENDINGS else None
        if self.file is None and out.suffix[1:].isalpha() and not out.is_dir():
            raise ValueError(
                f"{out} ends as no picture ({' '.join(ENDINGS)}), and no folder is there"
            )
        if self.file is not None and len(items) > 1:
            raise ValueError(f"{out} is one picture, and there are {len(items)}: give a folder")
        names: dict[str, Path | None] = {}
        for item in items:
            if item.name in names:
                raise ValueError(
                    f"{names[item.name]} and {item.path} have one name, and their results would be one "
                    "file: rename one, or give each its own --out"
                )
            names[item.name] = item.path
        self.folder = out if self.file is None else out.parent
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise NotADirectoryError(
                f"{out} cannot be written: a file is where a folder should be"
            ) from None
        if not os.access(self.folder, os.W_OK):
            raise PermissionError(f"{self.folder} cannot be written to")
        self.settings = json.loads(json.dumps(settings))
        self.done: dict[str, str] = {}
        self.written = 0
        notes = self.folder / NOTES
        if self.file is None and not again and notes.is_file():
            try:
                found = parsed(read_regular(notes, 2**24), {"settings": dict, "done": each(str)})
            except ValueError as error:
                raise ValueError(f"{notes} is damaged ({error}): remove it, or --again") from error
            if found["settings"] != self.settings:
                raise OtherSettings(
                    f"{self.folder} holds results of other settings: "
                    f"{_differences(found['settings'], self.settings)}; give another --out, or --again "
                    "to make them anew"
                )
            self.done = dict(found["done"])
        kept = {path.resolve() for path in sources}
        for path in (self.path(item.name, end) for item in items for end in (".png", STATE)):
            if path.resolve() in kept:
                raise ValueError(
                    f"the result would replace {path}, which it is made of: give another --out"
                )
        self.missing = [
            item
            for item in items
            if self.done.get(item.name) != item.digest or not self.path(item.name).is_file()
        ]

    def path(self, name: str, ending: str = ".png") -> Path:
        """The file of a result."""
        if self.file is not None:
            return self.file if ending == ".png" else self.file.with_suffix(ending)
        return self.folder / f"{name}{ending}"

    def write(self, item: Item, picture: Image.Image, state: State | None, notes: Any) -> None:
        """Writes a result: the state first, for it is worth more; then that it is finished."""
        if state is not None:
            state.save(self.path(item.name, STATE), notes)
        path = self.path(item.name)
        with replacing(path) as file:
            picture.save(file, format=Image.registered_extensions()[path.suffix.lower()])
        self.written += 1
        if self.file is None:
            self.done[item.name] = item.digest
            content = json.dumps({"settings": self.settings, "done": self.done}, indent=1)
            with replacing(self.folder / NOTES) as file:
                file.write(content.encode())

    def summary(self) -> str:
        """What was written, in words."""
        count = f"{self.written} picture{'s' * (self.written != 1)}"
        return f"wrote {self.file}" if self.file else f"wrote {count} in {self.folder}"


def files_in(paths: Sequence[Path], kind: str) -> list[Path]:
    """The files that are named, and those of the kind in the folders that are named.

    The picture beside a state shows what is in it, and is left out where states are wanted.

    Args:
        paths: files and folders.
        kind: "pictures", "states" or "pictures and states".
    """
    found = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = [p for p in path.iterdir() if p.is_file() and not p.name.startswith(".")]
        states = [p for p in inside if p.suffix == STATE and "states" in kind]
        shown = {p.stem for p in states}
        pictures = [p for p in inside if p.suffix != STATE and p.stem not in shown]
        found += sorted(states + (pictures if "pictures" in kind else []))
    if not found:
        kind = kind.replace("and", "or")
        raise ValueError(f"there are no {kind} in {', '.join(map(str, paths)) or 'the arguments'}")
    return found


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How two settings differ, in words."""

    def value(settings: Mapping[str, Any], key: str) -> str:
        return shown(str(settings[key]), 60) if key in settings else "not given"

    other = sorted(key for key in {**then, **now} if then.get(key) != now.get(key))
    return ", ".join(
        _OTHER.get(key) or f"{key} was {value(then, key)} and is {value(now, key)}" for key in other
    )


def digest_of(path: Path) -> str:
    """The SHA-256 of the content of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
