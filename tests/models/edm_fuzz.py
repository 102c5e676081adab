"""Reads hostile files in this process, and reports what broke a promise.

python -m tests.models.edm_fuzz handmade EVERY
python -m tests.models.edm_fuzz mutants SEED COUNT
"""

from __future__ import annotations

import itertools
import random
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from odesolvers.models import load_edm, save_edm
from odesolvers.models.edm import CheckpointError

from .edm_files import arguments, dump, load, published, record, tiny
from .edm_hostile import handmade

SECONDS, MEGABYTES = 5.0, 500


def mutants(seed: int, count: int) -> Iterator[tuple[str, str, bytes | Callable[[], bytes]]]:
    """Genuine files with parts changed, cut, repeated, moved or taken from others."""
    rng = random.Random(seed)
    sources: list[tuple[str, bytes]] = []
    for precond in ("EDMPrecond", "iDDPMPrecond"):
        denoiser = tiny(precond=precond, model_channels=8)
        sources += [
            ("pkl", dump({"ema": record(denoiser, arguments(denoiser))}, p)) for p in (2, 3, 4)
        ]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "a.safetensors")
            save_edm(denoiser, path)
            sources.append(("safetensors", path.read_bytes()))
    wild = [
        b"\xff" * 4,
        b"\x00" * 8,
        b"\x7f\xff\xff\xff",
        b"\x94",
        b"h\x00",
        b"R",
        b"b",
        b"\x81",
        b"Q",
        b"(",
        b".",
        b"u",
        b"\x93",
        b"}",
    ]
    for k in range(count):
        ending, source = rng.choice(sources)
        data = bytearray(source)
        # Instructions lie between weights; most of a small file is instructions or header.
        for _ in range(rng.choice((1, 1, 2, 4, 16))):
            at = (
                rng.randrange(len(data))
                if rng.random() < 0.5
                else rng.randrange(min(len(data), 5000))
            )
            width = rng.choice((1, 1, 4, 30, 300))
            match rng.randrange(7):
                case 0:
                    data[at] = rng.randrange(256)
                case 1:
                    data[at] ^= 1 << rng.randrange(8)
                case 2:
                    del data[at : at + width]
                case 3:
                    data[at:at] = data[at : at + width] * rng.choice((1, 2, 50))
                case 4:
                    data[at : at + 1] = rng.choice(wild)
                case 5:
                    other = rng.choice(sources)[1]
                    start = rng.randrange(len(other))
                    data[at : at + width] = other[start : start + width]
                case 6:
                    numbers = [m.start() for m in re.finditer(rb"\d+", data[:20000])]
                    if ending == "safetensors" and numbers:
                        data[numbers[rng.randrange(len(numbers))]] = rng.choice(b"0123456789-.e")
            if not data:
                break
        if rng.random() < 0.05:
            del data[rng.randrange(len(data) + 1) :]
        yield f"mutant {seed} {k}", ending, bytes(data)


def memory(entry: str) -> float:
    """An entry of what the kernel says of this process, in MB: VmRSS, VmHWM or VmSize."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{entry}:")[1].split()[0]) / 1024


def main(files: Iterator[tuple[str, str, bytes | Callable[[], bytes]]]) -> None:
    """Read the files; print what broke a promise, and a summary."""
    executed: list[str] = []
    watched = ("exec", "compile", "subprocess", "os.system", "socket", "os.remove", "os.fork")

    def audit(event: str, _: Any) -> None:
        if watching and event.startswith(watched):
            executed.append(event)

    watching = False
    sys.addaudithook(audit)
    loaded = refused = broken = 0
    slowest, largest = (0.0, ""), (0.0, "")
    limit = int(memory("VmSize") + 4096) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # what torch imports at first use is no file's doing
        load(published(tiny()), Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        for label, ending, content in files:
            data = content() if callable(content) else content
            del content
            path = Path(folder, f"a.{ending}")
            path.write_bytes(data)
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
            size, before, start = len(data) / 2**20, memory("VmRSS"), time.process_time()
            problem = ""
            del data
            watching = True
            try:
                load_edm(path)
                loaded += 1
                if "-v" in sys.argv:
                    print("loaded", label)
            except CheckpointError as error:
                refused += 1
                if len(str(error)) > 300 or not str(error).isprintable():
                    problem = f"message {error!r:.400}"
            except BaseException as error:
                problem = f"{type(error).__name__}: {error!s:.200}"
            watching = False
            seconds = time.process_time() - start
            growth = memory("VmHWM") - before - size
            slowest = max(slowest, (seconds, label))
            largest = max(largest, (growth, label))
            if executed:
                problem = f"executed {executed[:3]}"
                executed.clear()
            if seconds > SECONDS:
                problem = f"took {seconds:.1f} s"
            if growth > MEGABYTES:
                problem = f"took {growth:.0f} MB beyond its size"
            if problem:
                broken += 1
                print(f"BROKEN {label}: {problem}")
    print(f"{loaded} loaded, {refused} refused, {broken} broken")
    print(f"slowest: {slowest[0]:.2f} s, {slowest[1]}; largest: {largest[0]:.0f} MB, {largest[1]}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "handmade":
        main(itertools.islice(handmade(), 0, None, int(sys.argv[2])))
    else:
        main(mutants(int(sys.argv[2]), int(sys.argv[3])))
