"""Claims of workers on shards: locks that the system releases when a process dies."""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import suppress
from typing import IO, Final

if sys.platform != "win32":
    import fcntl


class Claims:
    """Claims of one process on shards: byte k of a file is locked, until released or until it dies.

    Locks of bytes are seen by all machines that share a file system, NFS among them. Where there are
    none (Windows, some parallel file systems) every claim succeeds: two workers may then do the same
    work, to the same bits. No process may open the file twice: closing one would release all.
    """

    PREPARING: Final = 2**40
    """The number of a claim that no shard has."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file: IO[bytes] = open(path, "ab")  # noqa: SIM115

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
