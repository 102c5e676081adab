"""A job: its settings in a manifest, its plan of shards, and its files."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import IO, Any, Final, Literal

import torch

import odesolvers as ode

from ..extend import Solver
from ..opening import Model
from ..typed import hexadecimal, parsed, whole
from ..writing import read_regular, replacing
from .inputs import Entry, open_input

if sys.platform != "win32":
    import fcntl

FORMAT: Final = "odesolvers job"
VERSION: Final = 1
MOST: Final = 20_000
"""Elements of a shard: their names stand in the header of its file."""
_PREPARING: Final = 2**40
"""The number of a claim that no shard has."""
_FORM: Final = {
    "format": str,
    "version": int,
    "kind": str,
    "model": str,
    "weights": str,
    "input": str,
    "elements": whole(0),
    "plan": str,
    "prompts": [str],
    "solver": str,
    "sigmas": [hexadecimal],
    "guidance": float,
    "dtype": str,
    "batch": whole(1),
    "shard_size": whole(1),
    "device": str,
    "threads": whole(1),
    "odesolvers": str,
    "torch": str,
}


@dataclass(frozen=True)
class Job:
    """The settings of a job, all of which its results depend on.

    Attributes:
        kind: "invert": pictures to their codes, the states at the highest level; "roundtrip": the same,
            and down again, with the error of every picture; "sample": noise to the states at the
            lowest level.
        model: see `odesolvers.opening.open_model`.
        input: see `open_input`; seeds or prompts to sample, else pictures.
        solver: an expression, see `odesolvers.parse`.
        sigmas: all levels of the grid, decreasing.
        prompts: of ``seeds:N``, in turn.
        guidance: its scale, away from no prompt; 1 for none.
        dtype: of states, float32 or float64.
        batch: elements of one call of the denoiser: every call has so many, the last one is filled up.
        shard_size: elements of a shard, a multiple of `batch`, at most 20,000.
        device: the kind of device, cpu or cuda.
        threads: of each worker on the CPU; the last bits depend on it.

    Raises:
        ValueError: at construction, if a setting is not usable.
    """

    kind: Literal["invert", "sample", "roundtrip"]
    model: str
    input: str
    solver: str
    sigmas: tuple[float, ...]
    prompts: tuple[str, ...] = ()
    guidance: float = 1.0
    dtype: Literal["float32", "float64"] = "float32"
    batch: int = 32
    shard_size: int = 256
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        for name, known in {
            "kind": ("invert", "sample", "roundtrip"),
            "dtype": ("float32", "float64"),
            "device": ("cpu", "cuda"),
        }.items():
            if getattr(self, name) not in known:
                found = getattr(self, name)
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {found!r}")
        if not 1 <= self.shard_size <= MOST or self.batch < 1 or self.shard_size % self.batch:
            raise ValueError(
                f"shard_size must be a multiple of batch, from 1 to {MOST}, got a shard_size of "
                f"{self.shard_size} and a batch of {self.batch}"
            )
        if not isinstance(ode.parse(self.solver), Solver):
            raise ValueError(f"solver must name a solver, got {self.solver!r}")
        object.__setattr__(self, "solver", repr(ode.parse(self.solver)))
        object.__setattr__(self, "sigmas", ode.Grid(self.sigmas).levels)

    def manifest(self, model: Model, elements: int, plan: str) -> dict[str, Any]:
        """The settings, with what the names in them stand for at this time."""
        fields = asdict(self) | {"sigmas": [sigma.hex() for sigma in self.sigmas]}
        fields |= {"prompts": list(self.prompts), "guidance": float(self.guidance)}
        fields |= {"format": FORMAT, "version": VERSION, "odesolvers": ode.__version__}
        fields |= {"weights": weights(model), "torch": torch.__version__}
        fields |= {"elements": elements, "plan": plan}
        return {name: fields[name] for name in _FORM}

    def prepare(self, output: Path, model: Model) -> Output:
        """Begins the job in a folder, or finds that it is the one begun there.

        Raises:
            ValueError: if another job was begun there; names every difference.
            OSError: if the folder cannot be written.
        """
        source = open_input(self.input, self.prompts)
        if source.pictures == (self.kind == "sample"):
            needed = "seeds or prompts" if self.kind == "sample" else "pictures"
            raise ValueError(f"{self.kind} takes {needed}, got the input {self.input}")
        (output / "shards").mkdir(parents=True, exist_ok=True)
        with Claims(output / "claims") as claims:
            claims.take(_PREPARING, wait=True)
            begun = (output / "manifest.json").exists()
            digest, elements = hashlib.sha256(), 0
            with nullcontext() if begun else replacing(output / "plan.jsonl") as file:
                for entry in source.entries():
                    line = entry.line()
                    digest.update(line)
                    elements += 1
                    if file is not None:
                        file.write(line)
                if not elements:
                    raise ValueError(f"there is nothing in the input {self.input}")
            text = json.dumps(self.manifest(model, elements, digest.hexdigest()), indent=1)
            if begun:
                _compare(Output(output).manifest, parsed(text, _FORM), output)
            else:
                with replacing(output / "manifest.json") as file:
                    file.write(text.encode() + b"\n")
        return Output(output)


def weights(model: Model) -> str:
    """The SHA-256 of all weights and buffers of a model; of a denoiser without modules, of none."""
    digest, denoiser = hashlib.sha256(), model.denoiser
    parts = getattr(getattr(denoiser, "pipeline", None), "components", {"": denoiser})
    for part, module in sorted(parts.items()):
        state = module.state_dict() if isinstance(module, torch.nn.Module) else {}
        for name, tensor in sorted(state.items()):
            digest.update(f"{part} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            data = tensor.detach().cpu().contiguous().flatten()
            digest.update(data.view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Output:
    """The folder of a job.

    ``manifest.json`` holds the settings, ``plan.jsonl`` an `Entry` a line, ``claims`` is locked by the
    workers, ``log.jsonl`` holds the seconds of each shard, and ``shards/`` the results: a saved `State`
    a shard, or, where all of its elements failed, a file of JSON.
    """

    path: Path

    @cached_property
    def _text(self) -> bytes:
        return read_regular(self.path / "manifest.json")

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The settings as they are written; a ValueError if the file is damaged."""
        try:
            found: dict[str, Any] = parsed(self._text, _FORM)
        except ValueError as error:
            raise ValueError(
                f"{self.path / 'manifest.json'} is no job's manifest: {error}"
            ) from None
        if (found["format"], found["version"]) != (FORMAT, VERSION):
            raise ValueError(
                f"{self.path} holds a job in version {found['version']} of the format, this "
                f"odesolvers reads version {VERSION}"
            )
        return found

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the manifest, which every shard names."""
        return hashlib.sha256(self._text).hexdigest()

    @cached_property
    def job(self) -> Job:
        """The settings."""
        return Job(**{name: self.manifest[name] for name in Job.__dataclass_fields__})

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
        with open(self.path / "plan.jsonl", "rb") as file:
            for k, line in enumerate(file):
                if k % size == 0:
                    offsets.append(position)
                position += len(line)
        if len(offsets) != self.count:
            raise ValueError(f"{self.path / 'plan.jsonl'} is damaged: begin the job elsewhere")
        return offsets

    def entries(self, k: int) -> list[Entry]:
        """The elements of a shard."""
        with open(self.path / "plan.jsonl", "rb") as file:
            file.seek(self._offsets[k])
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

    def __init__(self, path: Path) -> None:
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


def _compare(then: dict[str, Any], now: dict[str, Any], output: Path) -> None:
    """A ValueError that names the differences of two manifests."""
    differences = [
        _difference(name, then[name], now[name]) for name in then if then[name] != now[name]
    ]
    if differences:
        raise ValueError(
            f"{output} holds a job that was begun with other settings: {'; '.join(differences)}. Repeat "
            "the settings to go on with it, or give another --output"
        )


def _difference(name: str, then: Any, now: Any) -> str:
    if isinstance(then, tuple) and len(then) != len(now):
        then, now = f"{len(then)} values", f"{len(now)} values"
    elif isinstance(then, tuple):
        k = next(k for k, (a, b) in enumerate(zip(then, now, strict=True)) if a != b)
        name, then, now = f"{name}[{k}]", then[k], now[k]
    return f"{name} was {then} and is {now}"
