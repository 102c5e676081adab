"""The hostile files of every kind, in an order that `--every N` thins out evenly."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from odesolvers import BDIA, EDICT, Euler, FixedPoint, HeunEDM, State, files, karras_sigmas
from odesolvers.calibration import Calibrated
from odesolvers.models import Gaussian, load_edm, save_edm
from odesolvers.models.edm import CheckpointError

from ..models.edm_files import arguments, dump, record, tiny
from ..models.edm_floods import floods
from ..models.edm_hostile import handmade
from .bend import (
    TEXTS,
    WILD,
    bent_bytes,
    bent_json,
    bent_safetensors,
    changed,
    joined,
    places,
    split,
)
from .watch import Case, Loader

LOADERS: dict[str, Loader] = {
    "edm": Loader(load_edm, (CheckpointError,)),
    "state": Loader(State.load, (ValueError, OSError)),
    "calibration": Loader(Calibrated.load, (ValueError, OSError)),
}


def file(kind: str, label: str, name: str, data: bytes | Callable[[], bytes]) -> Case:
    """A case of one file."""

    def write(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(data() if callable(data) else data)
        return path

    return Case(f"{kind}: {label}", kind, write)


def no_files(kind: str, name: str) -> Iterator[Case]:
    """What has the name of a file and is none."""

    def case(label: str, make: Callable[[Path], object]) -> Case:
        def write(folder: Path) -> Path:
            make(folder / name)
            return folder / name

        return Case(f"{kind}: {label}", kind, write)

    yield case("a folder", Path.mkdir)
    yield case("a link to nothing", lambda path: path.symlink_to("nothing"))
    yield case("a link to itself", lambda path: path.symlink_to(path.name))
    yield case("a link to an endless device", lambda path: path.symlink_to("/dev/zero"))
    yield case("a pipe", lambda path: __import__("os").mkfifo(path))


def edm() -> Iterator[Case]:
    """Pickles and safetensors of EDM networks."""
    for label, ending, data in (*handmade(), *floods()):
        yield file("edm", label, f"a.{ending}", data)
    # A missing file is no fault of a checkpoint: FileNotFoundError is promised for it.
    yield from (
        c for c in no_files("edm", "a.pkl") if "nothing" not in c.label and "itself" not in c.label
    )


def states() -> Iterator[Case]:
    """Saved states: broken safetensors, and headers of other content with their right checksum."""
    for k, data in enumerate(genuine("state")):
        header, _ = split(data)
        text = json.loads(header["__metadata__"]["state"])
        for path in places(text, 2):
            for value in (*WILD, ...):
                bent = sealed(data, changed(text, path, value))
                yield file("state", f"{k} {path} = {ascii(value)[:20]}", "s.safetensors", bent)
        for label, bent in bent_safetensors(data):
            yield file("state", f"{k} {label}", "s.safetensors", bent)
        for content in TEXTS:
            yield file("state", f"{k} text {content[:8]!r}", "s.safetensors", sealed(data, content))
    yield from no_files("state", "s.safetensors")


def calibrations() -> Iterator[Case]:
    """Files of learned weights."""
    content = json.loads(genuine("calibration")[0])
    for path in places(content):
        for value in (*WILD, "0x1p99999", "nan", "-0x1p-3", ...):
            bent = json.dumps(changed(content, path, value)).encode(errors="replace")
            yield file("calibration", f"{path} = {ascii(value)[:20]}", "c.json", bent)
    for text in TEXTS:
        yield file("calibration", f"{text[:10]!r}", "c.json", text)
    yield from no_files("calibration", "c.json")


def saved(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Safetensors in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a")
        save_file(tensors, path, metadata)
        return path.read_bytes()


def sealed(data: bytes, header: Any) -> bytes:
    """A saved state with another header, and the checksum of that."""
    outer, numbers = split(data)
    text = header.decode(errors="replace") if isinstance(header, bytes) else json.dumps(header)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a")
        path.write_bytes(data)
        tensors = load_file(path)
    digest = files._digest(text.encode(errors="replace").decode(), tensors)
    metadata = {**outer["__metadata__"], "state": text, "sha256": digest}
    return joined({**outer, "__metadata__": metadata}, numbers)


@cache
def genuine(kind: str) -> tuple[bytes, ...]:
    """Files of a kind that load."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.safetensors")

        def content(save: Callable[[Path], object]) -> bytes:
            save(path)
            return path.read_bytes()

        if kind == "edm":
            networks = [tiny(precond=p, model_channels=8) for p in ("EDMPrecond", "iDDPMPrecond")]
            return tuple(
                data
                for n in networks
                for data in (
                    *(dump({"ema": record(n, arguments(n))}, protocol) for protocol in (2, 3, 4)),
                    content(lambda p, n=n: save_edm(n, p)),  # type: ignore[misc]
                )
            )
        grid = karras_sigmas(6)
        if kind == "state":
            x = torch.randn(
                2, 1, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
            )
            solvers = BDIA(HeunEDM(), 1.0), EDICT(0.93), BDIA(Euler(), 0.5, FixedPoint())
            return tuple(content(s.sample(Gaussian(), 80 * x, grid).state.save) for s in solvers)
        rule = Calibrated("Euler()", tuple(grid.tolist()), (0.9,) * (len(grid) - 2))
        return (content(rule.save),)


def bent(kind: str, rng: random.Random) -> Case:
    """A genuine file of a kind with random changes."""
    data = rng.choice(genuine(kind))
    name = {"calibration": "c.json"}.get(kind, "a.safetensors")
    if kind == "edm" and not data.startswith(b"\x80"):
        name = "a.safetensors"
    elif kind == "edm":
        name = "a.pkl"
    if kind == "calibration" and rng.random() < 0.7:
        label, content = next(bent_json(json.loads(data), rng, 1))
        return file(kind, label, name, json.dumps(content).encode(errors="replace"))
    if kind == "state" and rng.random() < 0.7:
        text = json.loads(split(data)[0]["__metadata__"]["state"])
        label, content = next(bent_json(text, rng, 1))
        return file(kind, label, name, sealed(data, content))
    return file(kind, "bent bytes", name, bent_bytes(data, rng))
