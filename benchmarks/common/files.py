"""Files that several runs of the benchmarks write to."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
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


def append(path: Path, lines: str, header: str = "") -> None:
    """Adds whole lines behind the last whole line of `path`, and `header` before the first."""
    with locked(path) as file:
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)  # the line that a process could not finish
        file.write((lines if whole else header + lines).encode())


@contextmanager
def claimed(folder: Path, name: str) -> Iterator[bool]:
    """Whether no other process has claimed `name` in this folder; a process that ends claims nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    claims = _claims(folder / "claims")
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    try:
        if sys.platform != "win32":
            fcntl.lockf(claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        if sys.platform != "win32":
            fcntl.lockf(claims, fcntl.LOCK_UN, 1, place)


@cache
def _claims(path: Path) -> int:
    """The open file of claims; never closed, for that would end all claims of this process."""
    return os.open(path, os.O_RDWR | os.O_CREAT)
