"""Reads hostile files in a process of its own, and reports what broke a promise.

The promises: nothing runs, is imported, asked, sent, written or printed; a load takes at most `SECONDS`,
and `MEGABYTES` beyond the size of its file; it returns, or raises what its docstring says, in a short
printable message.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[2]
SECONDS, MEGABYTES = 5.0, 500
ALARM = 30
"""The seconds after which a load is killed."""

LETTERS = 1200
"""The most characters of a message, beside the path of the file."""

RUN = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.Popen",
    "pty.spawn",
)
ASK = ("builtins.input", "socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.Request")


class Case(NamedTuple):
    """A hostile file: its name, the loader that reads it, and what writes it into a folder."""

    label: str
    loader: str
    write: Callable[[Path], Path]


class Loader(NamedTuple):
    """What reads a file, and the exceptions that it promises."""

    load: Callable[[Path], object]
    promised: tuple[type[Exception], ...]


class Watch:
    """Hears what the interpreter does while a file is read."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.on = folder, False
        self.heard: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        told = ""
        if event in ("exec", "compile", "import", "open", "pickle.find_class"):
            told = self._judge(event, args)
        elif event.startswith(RUN) or event in ASK:
            told = f"{event} {args!r:.100}"
        if told:
            self.heard.append(told)

    def _judge(self, event: str, args: tuple[Any, ...]) -> str:
        if event == "pickle.find_class":
            return f"the unpickler looked up {args!r:.100}"
        if event == "open":
            path, mode = args[0], args[1]
            written = isinstance(mode, str) and set(mode) & set("wax+")
            inside = str(path).startswith((tempfile.gettempdir(), "/dev/null"))
            return f"wrote to {path}" if written and not inside and isinstance(path, str) else ""
        place = args[0].co_filename if event == "exec" else args[1]
        if isinstance(place, bytes):
            place = place.decode(errors="replace")
        return f"{event} of {place}" if isinstance(place, str) and str(self.folder) in place else ""


def memory(entry: str) -> float:
    """An entry of what the kernel says of this process, in MB: VmRSS, VmHWM or VmSize."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{entry}:")[1].split()[0]) / 1024


def size_of(path: Path) -> float:
    """The size in MB of a file, or of all files in a folder."""
    paths = [path, *path.rglob("*")] if path.is_dir() else [path]
    return sum(p.lstat().st_size for p in paths) / 2**20


def watched(cases: Iterable[Case], loaders: dict[str, Loader]) -> None:
    """Read the files of `cases` in this process, and print two lines of JSON for each.

    The first has its name, so that whoever started this process knows which file killed it; the second
    how it ended: the outcome, the seconds and the MB beyond its size.
    """
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="hostile"))
    watch = Watch(folder)
    limit = int(memory("VmSize") + 6144) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        for case in cases:
            place = folder / "case"
            place.mkdir()
            path = case.write(place)
            print(json.dumps(case.label), flush=True)
            print(json.dumps(_read(path, loaders[case.loader], watch)), flush=True)
            shutil.rmtree(place)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _printed() -> Iterator[list[str]]:
    """Collects what reaches the terminal: any output, and control characters in the output of errors.

    Progress bars of the libraries, on the error output, are let through.
    """
    found: list[str] = []
    kept = [os.dup(number) for number in (1, 2)]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        sys.stdout.flush()
        for number, file in ((1, output), (2, errors)):
            os.dup2(file.fileno(), number)
        try:
            yield found
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, file in zip((1, 2), kept, strict=True):
                os.dup2(file, number)
                os.close(file)
            for file in (output, errors):
                file.seek(0)
                text = file.read().decode(errors="replace")
                odd = any(not c.isprintable() and c not in "\r\n\t" for c in text)
                if odd or (text and file is output):
                    found.append(text)


def _read(path: Path, loader: Loader, watch: Watch) -> tuple[str, float, float]:
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
    size, before = size_of(path) if path.exists() else 0.0, memory("VmRSS")
    start, outcome = time.process_time(), "loaded"
    signal.setitimer(signal.ITIMER_REAL, ALARM)  # kills the process, even in C
    watch.on = True
    try:
        with _printed() as printed:
            loader.load(path)
    except loader.promised as error:
        outcome, message = "refused", str(error).replace(str(path), "")
        if len(message) > LETTERS or not message.isprintable():
            outcome = f"message of {len(message)} characters: {message!r:.200}"
        odd = {c for c in "".join(traceback.format_exception(error)) if not c.isprintable()}
        if odd - set("\n\t"):
            outcome = f"a traceback that prints {sorted(odd)!r:.100}"
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error!s:.300}"
    watch.on = False
    signal.setitimer(signal.ITIMER_REAL, 0)
    if printed:
        outcome = f"printed {printed[0]!r:.200}"
    seconds, growth = time.process_time() - start, memory("VmHWM") - before - size
    if seconds > SECONDS:
        outcome = f"took {seconds:.1f} s"
    if growth > MEGABYTES:
        outcome = f"took {growth:.0f} MB beyond its size"
    if watch.heard or (watch.folder / "case" / "RAN").exists() or Path("RAN").exists():
        outcome = f"ran something: {watch.heard[:3]}"
        watch.heard.clear()
    return outcome, seconds, growth


class Report(NamedTuple):
    """How the loads of a child process ended."""

    loaded: list[str]
    refused: int
    broken: list[str]
    slowest: tuple[float, str]
    largest: tuple[float, str]

    def __str__(self) -> str:
        return (
            f"{len(self.loaded)} loaded, {self.refused} refused, {len(self.broken)} broken; slowest "
            f"{self.slowest[0]:.2f} s ({self.slowest[1]}), largest {self.largest[0]:.0f} MB "
            f"({self.largest[1]})"
        )


def in_child(*arguments: object) -> Report:
    """The report of ``python -m tests.hostile ARGUMENTS``, which goes on after files that kill it."""
    labels: list[str] = []
    ends: list[tuple[str, float, float]] = []
    done = False
    while not done:
        result = subprocess.run(
            [sys.executable, "-m", "tests.hostile", *map(str, arguments), f"--skip={len(labels)}"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        lines = [json.loads(line) for line in result.stdout.splitlines() if line[:1] in '["']
        labels += [line for line in lines if isinstance(line, str)]
        ends += [tuple(line) for line in lines if isinstance(line, list)]
        done = len(ends) == len(labels)
        if not done:
            ends.append((f"killed the process: {result.returncode}", 0.0, 0.0))
        elif result.returncode:
            raise AssertionError(f"the process failed: {result.stderr[-3000:]}")
    pairs = list(zip(labels, ends, strict=True))
    return Report(
        [label for label, end in pairs if end[0] == "loaded"],
        sum(end[0] == "refused" for end in ends),
        [f"{label}: {end[0]}" for label, end in pairs if end[0] not in ("loaded", "refused")],
        max((end[1], label) for label, end in pairs),
        max((end[2], label) for label, end in pairs),
    )
