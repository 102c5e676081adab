"""A file is replaced whole or stays as it was, whatever the path is and whatever happens on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest

from odesolvers.writing import read_regular, replacing

needs_posix = pytest.mark.skipif(
    sys.platform == "win32", reason="modes, links and signals of POSIX"
)


def write(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_file_and_one_that_is_replaced(tmp_path: Path) -> None:
    for content in (b"one", b"another, longer", b""):
        write(tmp_path / "file", content)
        assert read_regular(tmp_path / "file") == content
    assert names(tmp_path) == ["file"]


def test_a_path_as_text_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with replacing("file") as file:
        file.write(b"here")
    assert (tmp_path / "file").read_bytes() == b"here"


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), OSError(28, "full")])
@pytest.mark.parametrize("old", [b"old", None])
def test_after_an_error_everything_is_as_it_was(
    tmp_path: Path, error: BaseException, old: bytes | None
) -> None:
    if old is not None:
        (tmp_path / "file").write_bytes(old)

    def write_half() -> None:
        with replacing(tmp_path / "file") as file:
            file.write(b"half")
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert names(tmp_path) == ([] if old is None else ["file"])
    assert old is None or (tmp_path / "file").read_bytes() == old


def test_a_writer_may_move_about_in_the_file(tmp_path: Path) -> None:
    with replacing(tmp_path / "arrays.npz") as file:
        np.savez(file, a=np.arange(3))
    assert np.load(tmp_path / "arrays.npz")["a"].tolist() == [0, 1, 2]
    with replacing(tmp_path / "archive.zip") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", "b")
    assert zipfile.ZipFile(tmp_path / "archive.zip").read("a") == b"b"


@pytest.mark.parametrize(
    "name", ["x.partial", "x" * 255, "ä" * 127, "a b*?[c].json", ".hidden", "-x", "new\nline"]
)
def test_names_of_every_kind(tmp_path: Path, name: str) -> None:
    own = tmp_path / f"{name[:50]}.partial"  # of the user
    own.write_bytes(b"mine")
    write(tmp_path / name, b"content")
    assert (tmp_path / name).read_bytes() == b"content"
    assert own.read_bytes() == (b"content" if own.name == name else b"mine")
    assert names(tmp_path) == sorted({name, own.name})


@needs_posix
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_mode_is_that_of_the_old_file_or_of_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "new", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o666 & ~umask
    for mode in (0o644, 0o600, 0o664, 0o755):
        (tmp_path / "new").chmod(mode)
        write(tmp_path / "new", b"again")
        assert (tmp_path / "new").stat().st_mode & 0o777 == mode


@needs_posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644])
def test_a_new_content_is_never_shown_to_more_than_the_old(tmp_path: Path, mode: int) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "file").chmod(mode)
    created: list[int] = []
    make = os.open

    def watched(path: str, flags: int, given: int = 0o777, **options: int) -> int:
        descriptor = make(path, flags, given, **options)
        created.append(os.fstat(descriptor).st_mode & 0o777)
        return descriptor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", watched)
        with replacing(tmp_path / "file") as file:
            assert os.stat(file.name).st_mode & 0o777 == mode
    assert created == [0o600]


@pytest.mark.parametrize("name", ["a\0b", "\0", "a\ud800b"])
def test_a_path_that_no_file_can_have_is_an_os_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(OSError, match="is no name of a file"):
        write(tmp_path / name, b"")
    with pytest.raises(OSError, match="there is no file"):
        read_regular(tmp_path / name)
    assert names(tmp_path) == []


@needs_posix
def test_links_are_followed(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder / "file")
    (tmp_path / "chain").symlink_to("link")
    (tmp_path / "folder").symlink_to(folder)
    for path in (tmp_path / "link", tmp_path / "chain", tmp_path / "folder" / "file"):
        write(path, path.name.encode())
        assert (folder / "file").read_bytes() == path.name.encode()
    assert names(folder) == ["file"]
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "chain").is_symlink()
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(OSError, match="symbolic links"):
        write(tmp_path / "circle", b"")


@needs_posix
def test_what_is_no_regular_file_is_neither_replaced_nor_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "null").symlink_to("/dev/null")
    for path in (tmp_path / "pipe", tmp_path / "folder", tmp_path / "null", Path("/dev/zero")):
        with pytest.raises(OSError, match="not a regular file"):
            write(path, b"x")
        with pytest.raises(OSError, match="not a regular file"):
            read_regular(path)
    assert names(tmp_path) == ["folder", "null", "pipe"]
    assert (tmp_path / "pipe").is_fifo()
    assert Path("/dev/null").is_char_device()


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        write(tmp_path / "absent" / "file", b"")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_regular(tmp_path / "absent")


@needs_posix
@pytest.mark.skipif(not Path("/dev/full").exists() or os.geteuid() == 0, reason="root writes all")
def test_a_file_or_folder_that_is_read_only_stays(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "file").chmod(0o444)
    with pytest.raises(PermissionError, match="read-only"):
        write(tmp_path / "file", b"new")
    tmp_path.chmod(0o555)
    with pytest.raises(PermissionError):
        write(tmp_path / "other", b"new")
    tmp_path.chmod(0o755)
    assert (tmp_path / "file").read_bytes() == b"old"


@needs_posix
@pytest.mark.parametrize("old", [b"old", None])
def test_a_disk_that_is_full_is_an_os_error(tmp_path: Path, old: bytes | None) -> None:
    import resource

    if old is not None:
        (tmp_path / "file").write_bytes(old)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(tmp_path / "file", b"x" * 200_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ([] if old is None else ["file"])
    assert old is None or (tmp_path / "file").read_bytes() == old


KILLED = """
import os, signal, sys
from odesolvers.writing import replacing
with replacing(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def leftover(tmp_path: Path) -> Path:
    """A path with old content, beside which a killed process left its file."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)])
    assert killed.returncode == -signal.SIGKILL
    return path


@needs_posix
def test_the_next_writer_removes_what_a_killed_one_left(leftover: Path) -> None:
    assert leftover.read_bytes() == b"old"
    assert len(names(leftover.parent)) == 2
    write(leftover.with_name("another file"), b"")  # knows nothing of it
    assert len(names(leftover.parent)) == 3
    write(leftover, b"new")
    assert leftover.read_bytes() == b"new"
    assert names(leftover.parent) == ["another file", "file"]


@needs_posix
def test_a_writer_leaves_alone_what_others_still_write(leftover: Path) -> None:
    with replacing(leftover) as file:
        file.write(b"slow")
        write(leftover, b"quick")
        assert leftover.read_bytes() == b"quick"
    assert leftover.read_bytes() == b"slow"
    assert names(leftover.parent) == ["file"]


def test_many_writers_and_readers_never_see_half_a_file(tmp_path: Path) -> None:
    path, failures = tmp_path / "file", list[object]()
    contents = [bytes([k]) * (100_000 + k) for k in range(8)]
    write(path, contents[0])

    def work(k: int) -> None:
        try:
            for _ in range(10):
                write(path, contents[k])
                if read_regular(path) not in contents:
                    failures.append("half a file")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert names(tmp_path) == ["file"]
