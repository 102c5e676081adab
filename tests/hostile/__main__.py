"""Reads hostile files in this process, and prints how each load ended.

python -m tests.hostile KIND EVERY         every EVERYth of the files made by hand
python -m tests.hostile fuzz SEED SECONDS  genuine files with random changes
python -m tests.hostile check ...          either in a child process, with a summary
"""

from __future__ import annotations

import itertools
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from . import burdens, corpus, stable_diffusion
from .corpus import LOADERS
from .watch import Case, in_child, watched

KINDS = {
    "edm": corpus.edm,
    "states": corpus.states,
    "calibrations": corpus.calibrations,
    "stable-diffusion": stable_diffusion.stable_diffusion,
    "burdens": burdens.burdens,
}
EVERYTHING = {**LOADERS, **stable_diffusion.LOADERS}


def fuzz(seed: int, seconds: float) -> Iterator[Case]:
    """Files with random changes until the time is over, of the cheap kinds more."""
    rng, end = random.Random(seed), time.monotonic() + seconds
    while time.monotonic() < end:
        for kind in ("edm", "state", "state", "calibration", "calibration"):
            case = corpus.bent(kind, rng)
            yield case._replace(label=f"seed {seed}, {case.label}")
        yield stable_diffusion.bent(rng)


def warm_up(kinds: set[str]) -> None:
    """Import what the libraries import at first use, which is no file's doing."""
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds & set(LOADERS):
            for data in corpus.genuine(kind):
                name = "a.pkl" if data.startswith(b"\x80") else "a.safetensors"
                path = Path(folder, name)
                path.write_bytes(data)
                LOADERS[kind].load(path)
    if "sd" in kinds:
        home = stable_diffusion.home()
        for path in (home / "folder", home / "a.safetensors", home / "a.ckpt"):
            stable_diffusion.load(path)


def main(kind: str, number: str, *rest: str) -> None:
    """Read the files, but for those to skip."""
    warnings.simplefilter("ignore")
    skip = next((int(word[7:]) for word in rest if word.startswith("--skip=")), 0)
    if kind == "fuzz":
        warm_up(set(EVERYTHING))
        # After a kill the random numbers go on elsewhere, and the time starts again but shorter.
        cases = fuzz(int(number) + skip, float(rest[0]) / (1 + skip))
    else:
        cases = itertools.islice(KINDS[kind](), 0, None, int(number))
        cases = itertools.islice(cases, skip, None)
        warm_up({"sd"} if kind in ("stable-diffusion", "burdens") else {kind.rstrip("s"), kind})
    watched(cases, EVERYTHING)


if __name__ == "__main__":
    if sys.argv[1] == "check":
        report = in_child(*sys.argv[2:])
        print(*report.broken, report, sep="\n")
        sys.exit(bool(report.broken))
    else:
        main(*sys.argv[1:])
