"""Files that several runs of the benchmarks write to."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from odesolvers.writing import replacing

if sys.platform != "win32":
    import fcntl


def save(path: Path, text: str) -> None:
    """Writes `text` and the end of its line to `path`, whole or not at all; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(f"{text}\n".encode())


@contextmanager
def locked(path: Path) -> Iterator[IO[bytes]]:
    """A file, open at its start for reading and for adding, that other processes wait for."""
    with path.open("ab+") as file:
        if sys.platform != "win32":
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        yield file


@contextmanager
def claimed(folder: Path, name: str) -> Iterator[bool]:
    """Whether no other process has claimed `name` in this folder; a process that ends claims nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "claims").open("ab") as file:
        place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        try:
            if sys.platform != "win32":
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except OSError:
            yield False
        else:
            yield True
