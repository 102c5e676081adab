"""Files that appear whole or not at all, and are read whole."""

from __future__ import annotations

import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

if sys.platform != "win32":
    import fcntl


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A new file, open for writing in binary, that takes the place of `path` when the block ends.

    Until then `path` is as it was; and it stays so if the block raises, or the process dies. Readers
    find the old content or the new, and the last of several writers wins. Links are followed. A file
    that is replaced keeps its mode. The new file lies beside `path`, in a hidden name of its own; what a
    killed process left there is removed by the next one that writes to `path`.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp(), "notes.txt")
    >>> with replacing(path) as file:
    ...     _ = file.write(b"whole")
    >>> path.read_bytes()
    b'whole'

    Raises:
        OSError: if the file cannot be written, or `path` is a folder, a device or anything else but a
            regular file.
    """
    try:
        folder, name = os.path.split(os.path.realpath(path))
        target = os.path.join(folder, name)
        mode = os.stat(target).st_mode if os.path.lexists(target) else None
        os.fsencode(target)
    except ValueError as error:  # a null, or what the file system's encoding does not have
        raise OSError(f"{os.fspath(path)!r} is no name of a file: {error}") from error
    if mode is not None and not stat.S_ISREG(mode):
        raise (IsADirectoryError if stat.S_ISDIR(mode) else OSError)(
            f"{os.fspath(path)} is not a regular file: only such are replaced; choose another name"
        )
    if mode is not None and not os.access(target, os.W_OK):
        raise PermissionError(f"{os.fspath(path)} is read-only")
    _remove_leftovers(folder, name)
    with _beside(folder, name, private=mode is not None) as file:
        partial = file.name
        try:
            if mode is not None:
                os.chmod(partial, stat.S_IMODE(mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
            if sys.platform == "win32":
                file.close()  # an open file cannot be renamed there
            os.replace(partial, target)  # before the lock is given up
        except BaseException:
            if sys.platform == "win32":
                file.close()
            with suppress(OSError):
                os.unlink(partial)
            raise


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """A regular file, open for reading in binary.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if it is a folder, a device or a pipe, or cannot be read.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no file {path}")
    if not os.path.isfile(path):
        raise OSError(f"{path} is not a regular file")
    return open(path, "rb")


def read_regular(path: str | os.PathLike[str], most: int = -1) -> bytes:
    """The first `most` bytes of a regular file, by default all. Errors as of `open_regular`."""
    with open_regular(path) as file:
        return file.read(most)


def _beside(folder: str, name: str, *, private: bool) -> IO[bytes]:
    """A new file of a name of its own, locked for as long as it is open; `private` to its owner."""
    mode = 0o600 if private else 0o666  # from its start: who has opened it can read it ever after
    while True:
        # 50 characters are at most 200 bytes; a name may have 255.
        partial = os.path.join(folder, f".{name[:50]}.{secrets.token_hex(8)}.partial")
        file = open(partial, "xb", opener=lambda path, flags: os.open(path, flags, mode))  # noqa: SIM115
        if sys.platform != "win32":
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # another process took it for a leftover before it was locked


def _remove_leftovers(folder: str, name: str) -> None:
    """Removes what killed processes left beside a file: what is not locked."""
    names: list[str] = []
    ours = re.compile(re.escape(f".{name[:50]}.") + r"[0-9a-f]{16}\.partial")
    with suppress(PermissionError):  # a folder can be written to and not listed
        names = [name for name in os.listdir(folder) if ours.fullmatch(name)]
    for path in (os.path.join(folder, name) for name in names):
        with suppress(OSError):  # a file that is open cannot be removed on Windows
            if sys.platform == "win32":
                os.unlink(path)
            else:
                with open(path, "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(path)
