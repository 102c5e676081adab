"""Folders of results that can be gone on with: what is finished, and under which settings."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from PIL import Image

from ..pictures import ENDINGS
from ..state import State
from ..typed import each, parsed
from ..writing import read_regular, replacing

NOTES: Final = ".odesolvers.json"
STATE: Final = ".safetensors"


class Outputs:
    """The folder, or the one file, that a command writes to.

    A hidden file in the folder says which results are finished, and with which settings and inputs. A
    command that is run again makes what is missing, and refuses to mix results of other settings.

    Args:
        out: the folder; or a file with the ending of a picture, for one result.
        names: of the results, without ending.
        settings: that the results depend on, as JSON can hold them.
        again: make all results anew.

    Raises:
        ValueError: if the folder holds results of other settings, or `out` is a file for many.
        OSError: if the folder cannot be written to.
    """

    def __init__(
        self, out: Path, names: Sequence[str], settings: Mapping[str, Any], *, again: bool
    ) -> None:
        self.file = out if out.suffix.lower() in ENDINGS else None
        if self.file is None and out.suffix[1:].isalpha() and not out.is_dir():
            raise ValueError(
                f"{out} ends as no picture ({' '.join(ENDINGS)}), and no folder is there"
            )
        if self.file is not None and len(names) != 1:
            raise ValueError(f"{out} is one picture, and there are {len(names)}: give a folder")
        doubled = {name for name in names if names.count(name) > 1}
        if doubled:
            raise ValueError(f"two pictures have the name {min(doubled)}: the results would be one")
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
                keys = {**found["settings"], **self.settings}
                other = [k for k in keys if found["settings"].get(k) != self.settings.get(k)]
                raise ValueError(
                    f"{self.folder} holds results of other settings ({', '.join(sorted(other))}): give "
                    "another --out, or --again to make them anew"
                )
            self.done = dict(found["done"])

    def path(self, name: str, ending: str = ".png") -> Path:
        """The file of a result."""
        if self.file is not None:
            return self.file if ending == ".png" else self.file.with_suffix(ending)
        return self.folder / f"{name}{ending}"

    def spare(self, names: Iterable[str], sources: Iterable[Path]) -> None:
        """Checks that no result replaces a file that it is made of.

        Raises:
            ValueError: naming the file.
        """
        kept = {path.resolve() for path in sources}
        for path in (self.path(name, ending) for name in names for ending in (".png", STATE)):
            if path.resolve() in kept:
                raise ValueError(
                    f"the result would replace {path}, which it is made of: give another --out"
                )

    def missing(self, inputs: Mapping[str, str]) -> list[str]:
        """The names of `inputs`, with the digests of their content, that are to be made."""
        return [name for name, digest in inputs.items() if not self._is_done(name, digest)]

    def _is_done(self, name: str, digest: str) -> bool:
        return self.done.get(name) == digest and self.path(name).is_file()

    def write(
        self, name: str, digest: str, picture: Image.Image, state: State | None, notes: Any
    ) -> None:
        """Writes a result: the state first, for it is worth more; then that it is finished."""
        if state is not None:
            state.save(self.path(name, STATE), notes)
        path = self.path(name)
        with replacing(path) as file:
            picture.save(file, format=Image.registered_extensions()[path.suffix.lower()])
        self.written += 1
        if self.file is None:
            self.done[name] = digest
            content = json.dumps({"settings": self.settings, "done": self.done}, indent=1)
            with replacing(self.folder / NOTES) as file:
                file.write(content.encode())

    def summary(self) -> str:
        """What was written, in words."""
        count = f"{self.written} picture{'s' * (self.written != 1)}"
        return f"wrote {self.file}" if self.file else f"wrote {count} in {self.folder}"


def digest_of(path: Path) -> str:
    """The SHA-256 of the content of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def say(text: str) -> None:
    """Prints a line of a result at once.

    Raises:
        OSError: if stdout takes it no more.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
    except OSError as error:
        with suppress(
            OSError, ValueError
        ):  # or Python prints the rest when it ends, and fails again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(f"printing failed ({error}); files that were finished are whole") from error
