"""The folder of a job: the manifest, the plan, the claims of workers, the log and the shards."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import IO, Any, Final

from ..typed import hexadecimal, optional, parsed, read, whole
from ..writing import read_regular
from .inputs import Entry

if sys.platform != "win32":
    import fcntl

FORMAT: Final = "odesolvers job"
VERSION: Final = 2
MOST: Final = 20_000
"""Elements of a shard: their names stand in the header of its file."""
FORM: Final = {
    "format": str,
    "version": int,
    "kind": str,
    "model": str,
    "size": optional((whole(1), whole(1))),
    "network": optional(str),
    "weights": str,
    "input": str,
    "fit": str,
    "prompts": [str],
    "negative": optional(str),
    "guidance": optional(float),
    "solver": str,
    "sigmas": [hexadecimal],
    "dtype": str,
    "batch": whole(1),
    "shard_size": whole(1, MOST),
    "device": str,
    "threads": whole(1),
    "odesolvers": str,
    "torch": str,
    "elements": whole(1),
    "prompted": bool,
    "plan": str,
}
"""The form of the manifest: the settings of a `Job`, what they stand for, and what is in the plan."""


@dataclass(frozen=True)
class Output:
    """The folder of a job.

    ``manifest.json`` holds the settings, ``plan.jsonl`` an `Entry` a line, ``claims`` is locked by the
    workers, ``log.jsonl`` holds the seconds of each shard, and ``shards/`` the results: a saved `State`
    a shard, or, where all of its elements failed, a file of JSON.
    """

    path: Path

    @property
    def plan(self) -> Path:
        """The file of the plan."""
        return self.path / "plan.jsonl"

    @property
    def begun(self) -> bool:
        """Whether a job was begun here."""
        return (self.path / "manifest.json").exists()

    @cached_property
    def _text(self) -> bytes:
        return read_regular(self.path / "manifest.json")

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The settings as they are written; a ValueError if the file is damaged."""
        try:
            content = parsed(self._text, dict)
            if (content.get("format"), content.get("version")) != (FORMAT, VERSION):
                raise ValueError(
                    f"it is in version {content.get('version')} of the format, this odesolvers reads "
                    f"version {VERSION}"
                )
            found: dict[str, Any] = read(content, FORM)
        except ValueError as error:
            path = self.path / "manifest.json"
            raise ValueError(f"{path} is no manifest of a job: {error}") from None
        return found

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the manifest, which every shard names."""
        return hashlib.sha256(self._text).hexdigest()

    @property
    def count(self) -> int:
        """The number of shards."""
        return -(-int(self.manifest["elements"]) // int(self.manifest["shard_size"]))

    def shard(self, k: int) -> Path:
        """The file of a shard."""
        return self.path / "shards" / f"{k:06d}.safetensors"

    def failed(self, k: int) -> Path:
        """The file that stands for a shard without any result."""
        return self.shard(k).with_suffix(".json")

    def is_done(self, k: int) -> bool:
        """Whether the shard is written."""
        return self.shard(k).exists() or self.failed(k).exists()

    def done(self) -> set[int]:
        """The shards that are written."""
        names = [name.partition(".")[0] for name in os.listdir(self.path / "shards")]
        return {int(name) for name in names if name.isdecimal()}

    @cached_property
    def _offsets(self) -> list[int]:
        """The first byte of each shard in the plan."""
        offsets, position, size = [], 0, self.manifest["shard_size"]
        digest = hashlib.sha256()
        with open(self.plan, "rb") as file:
            for k, line in enumerate(file):
                if k % size == 0:
                    offsets.append(position)
                position += len(line)
                digest.update(line)
        if digest.hexdigest() != self.manifest["plan"]:
            raise ValueError(f"{self.plan} is damaged: begin the job elsewhere")
        return offsets

    def entries(self, k: int) -> list[Entry]:
        """The elements of a shard."""
        offset = self._offsets[k]
        with open(self.plan, "rb") as file:
            file.seek(offset)
            return [Entry.of_line(line) for line in islice(file, self.manifest["shard_size"])]

    def log(self, record: dict[str, Any]) -> None:
        """Adds a line to the log, in one write."""
        with open(self.path / "log.jsonl", "ab", buffering=0) as file:
            file.write(json.dumps(record).encode() + b"\n")

    def logged(self) -> Iterator[dict[str, Any]]:
        """The lines of the log that are whole."""
        if (self.path / "log.jsonl").exists():
            with open(self.path / "log.jsonl", "rb") as file:
                for line in file:
                    with suppress(ValueError):
                        yield parsed(line, dict)


class Claims:
    """Claims of one process on shards: byte k of a file is locked, until released or until it dies.

    Locks of bytes are seen by all machines that share a file system, NFS among them. Where there are
    none (Windows, some parallel file systems) every claim succeeds: two workers may then do the same
    work, to the same bits. No process may open the file twice: closing one would release all.
    """

    PREPARING: Final = 2**40
    """The number of a claim that no shard has."""

    def __init__(self, output: Output) -> None:
        self._file: IO[bytes] = open(output.path / "claims", "ab")  # noqa: SIM115

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def take(self, k: int, *, wait: bool = False) -> bool:
        """Claims k; False if another process has it, unless told to wait."""
        if sys.platform == "win32":
            return True
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, k)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            warnings.warn(f"{self._file.name} cannot be locked ({error})", stacklevel=2)
        return True

    def release(self, k: int) -> None:
        """Gives k up."""
        if sys.platform != "win32":
            with suppress(OSError):
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, k)
