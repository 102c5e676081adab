"""Processes that are killed, and many at once: a saved state is whole, and nothing is left beside it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from odesolvers import State

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks and signals of POSIX")


def apart(function: Callable[[Path, int], None], folder: Path, n: int) -> None:
    """Calls a function of this file in a process of one thread, which may fork."""
    call = f"{function.__name__}(pathlib.Path({str(folder)!r}), {n})"
    code = f"import pathlib, tests.test_kills; tests.test_kills.{call}"
    root, one = Path(__file__).parents[1], {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env={**os.environ, **one}, capture_output=True
    )
    assert found.returncode == 0, found.stderr.decode()


def forked(function: Callable[[], object]) -> int:
    """A child that calls `function`; its exit status is 0 where that returns."""
    child = os.fork()
    if child:
        return child
    try:
        function()
        os._exit(0)
    except BaseException as error:
        os.write(2, repr(error).encode())
    finally:
        os._exit(1)


def save(path: Path, value: int, size: int = 2) -> None:
    x = torch.full((1, size), float(value))
    State(x, x + 0.5, 1, (2.0, 1.0), "s").save(path, {"value": value})


def check(path: Path) -> None:
    state, notes = State.load_with_notes(path)
    assert state.partner is not None
    assert bool((state.current == notes["value"]).all())
    assert bool((state.partner == state.current + 0.5).all())


def killed_saves(folder: Path, kills: int) -> None:
    path, generator, cut = folder / "state", random.Random(0), 0
    save(path, 0)

    def saves() -> None:
        for value in range(10**6):
            save(path, value, 2**20)

    for kill in range(kills):
        before = set(folder.iterdir())
        writer = forked(saves)
        if kill % 2:  # within a write, however busy the machine is
            while set(folder.iterdir()) <= before:
                time.sleep(1e-4)
        else:
            time.sleep(generator.uniform(0.0, 0.2))
        os.kill(writer, signal.SIGKILL)
        assert os.waitpid(writer, 0)[1] == signal.SIGKILL
        check(path)
        left = len(list(folder.iterdir())) - 1
        assert left <= 1  # what the last one left, and not those before it
        cut += left
    assert cut >= kills // 20  # killed in the middle of a write
    save(path, 0)
    assert [p.name for p in folder.iterdir()] == ["state"]


def writers_and_readers(folder: Path, writers: int) -> None:
    path, stop = folder / "state", folder / "stop"
    save(path, 0)

    def saves(number: int) -> None:
        for k in range(50):
            save(path, 100 * number + k, 2**14)

    def reads() -> None:
        while not stop.exists():
            check(path)

    readers = [forked(reads) for _ in range(2)]
    for child in [forked(lambda n=n: saves(n)) for n in range(writers)]:  # type: ignore[misc]
        assert os.waitpid(child, 0)[1] == 0
    stop.touch()
    for child in readers:
        assert os.waitpid(child, 0)[1] == 0
    check(path)
    assert sorted(p.name for p in folder.iterdir()) == ["state", "stop"]


def overwritten_in_place(folder: Path, times: int) -> None:
    path = folder / "state"
    save(path, 0, 2**18)
    content = path.read_bytes()

    def reads() -> None:
        for _ in range(times):
            with suppress(ValueError):
                check(path)

    reader = forked(reads)
    while (found := os.waitpid(reader, os.WNOHANG)) == (0, 0):
        with path.open("r+b") as file:
            file.truncate(len(content) // 3)
            file.write(content)
    assert found[1] == 0


@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_saves_lose_nothing_and_leave_nothing(tmp_path: Path, kills: int) -> None:
    apart(killed_saves, tmp_path, kills)


@pytest.mark.parametrize("writers", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_many_writers_and_readers_see_whole_states(tmp_path: Path, writers: int) -> None:
    """Fifty saves each."""
    apart(writers_and_readers, tmp_path, writers)


def test_a_file_that_is_overwritten_while_it_is_read_kills_no_reader(tmp_path: Path) -> None:
    """As cp and rsync --inplace do: the file is shorter for a moment. Mapped files end in SIGBUS."""
    apart(overwritten_in_place, tmp_path, 50)
