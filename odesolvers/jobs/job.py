"""A job: its settings, and the folder that it is begun in, or found in."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, Final, Literal

import torch

import odesolvers as ode

from ..extend import Solver
from ..opening import Model, open_model
from ..pictures import FITS
from ..typed import parsed, whole
from ..values import count, number
from ..writing import read_regular, replacing
from .claims import Claims
from .inputs import Entry, Input, open_input
from .weights import identity, versions

FORMAT: Final = "odesolvers job, version 3"
ENDINGS: Final = ("safetensors", "json")
"""Of a shard, and of what stands for one without any result."""
MOST: Final = 20_000
"""Elements of a shard: their names stand in the header of its file."""
DTYPES: Final = ("float32", "float64", "bfloat16")
KNOWN: Final = {
    "kind": ("invert", "sample", "roundtrip"),
    "fit": FITS,
    "dtype": DTYPES,
    "network": (*DTYPES, "float16", None),
    "device": ("cpu", "cuda"),
}
FORM: Final = {
    "format": str,
    "settings": dict,
    "weights": str,
    "shape": [int],
    "default_guidance": float,
    "odesolvers": str,
    "torch": str,
    "elements": whole(1),
    "prompted": bool,
    "plan": str,
}
"""The form of the manifest: the settings of a job, what they stand for, and what is in the plan."""


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
        prompts: of the elements that have none of their own, in turn.
        negative: the prompt to guide away from.
        guidance: its scale; by default 1 to invert, else that of the model if there are prompts.
        fit: of pictures of other proportions, see `odesolvers.pictures.read_images`.
        size: height and width of the pictures of a pipeline; by default its own.
        dtype: of states: float32, float64 or bfloat16.
        network: the dtype of the network; by default that of `open_model` on the device.
        batch: elements of one call of the denoiser: every call has so many, the last one is filled up.
        shard_size: elements of a shard, a multiple of `batch`, at most 20,000.
        device: the kind of device, cpu or cuda.
        threads: of each worker on the CPU; the last bits depend on it.

    Raises:
        TypeError, ValueError: at construction, if a setting is not usable.
    """

    kind: Literal["invert", "sample", "roundtrip"]
    model: str
    input: str
    solver: str
    sigmas: tuple[float, ...]
    prompts: Sequence[str] = ()
    negative: str | None = None
    guidance: float | None = None
    fit: str = "crop"
    size: Sequence[int] | None = None
    dtype: str = "float32"
    network: str | None = None
    batch: int = 32
    shard_size: int = 256
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        for name, known in KNOWN.items():
            if (found := getattr(self, name)) not in known:
                listed = ", ".join(map(str, known))
                raise ValueError(f"{name} must be one of {listed}, got {found!r}")
        for name in ("batch", "shard_size", "threads"):
            if (value := count(name, getattr(self, name))) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.shard_size > MOST or self.shard_size % self.batch:
            raise ValueError(
                f"shard_size must be a multiple of batch, from 1 to {MOST}, got a shard_size of "
                f"{self.shard_size} and a batch of {self.batch}"
            )
        if self.guidance is not None:
            object.__setattr__(self, "guidance", number("guidance", self.guidance))
            if not math.isfinite(self.guidance):
                raise ValueError(f"guidance must be finite, got {self.guidance}")
        prompts = (self.prompts,) if isinstance(self.prompts, str) else tuple(self.prompts)
        for text in (self.model, self.input, self.solver, self.negative or "", *prompts):
            if not isinstance(text, str):
                raise TypeError(f"model, input, solver and prompts must be texts, got {text!r}")
        solver = ode.parse(self.solver)
        if not isinstance(solver, Solver):
            raise ValueError(f"solver must name a solver, got {self.solver!r}")
        object.__setattr__(self, "solver", repr(solver))
        object.__setattr__(self, "sigmas", ode.Grid(self.sigmas).levels)
        object.__setattr__(self, "prompts", prompts)
        if self.size is not None:
            object.__setattr__(self, "size", tuple(count("size", side) for side in self.size))

    def open(self, device: torch.device) -> Model:
        """The model on a device of the job's kind."""
        network = None if self.network is None else getattr(torch, self.network)
        return open_model(self.model, device, network, self.size)

    def guided(self, model: Model, prompts: Sequence[str | None], prompted: bool) -> Any:
        """The denoiser under guidance, and its arguments; `prompted`: whether any element has a prompt.

        All elements have one scale, whatever elements are run together.
        """
        scale = 1.0 if self.guidance is None and self.kind == "invert" else self.guidance
        scale = model.scale(scale, "a prompt" if prompted else None)
        if scale == 1 and self.negative is not None:
            raise ValueError("a negative prompt changes nothing without guidance: give its scale")
        return model.guided(prompts, scale, self.negative)

    def prepare(self, folder: Path, model: Model) -> Output:
        """Begins the job in a folder, or finds that it is the one begun there.

        All settings are checked before anything is written.

        Raises:
            ValueError: if the model cannot be used as asked, or another job was begun in the folder;
                names every difference.
            OSError: if the folder cannot be written, or the input not be read.
        """
        source, output = open_input(self.input), Output(Path(folder))
        self._check(source, model)
        now = identity(model) | versions()
        if not output.begun:
            (output.path / "shards").mkdir(parents=True, exist_ok=True)
            with Claims(output.claims) as claims:
                claims.take(Claims.PREPARING, wait=True)
                if not output.begun:  # by another process meanwhile
                    if output.done():
                        raise ValueError(
                            f"{output.path}/shards holds results of a job whose manifest is gone: "
                            "remove them, or give another --output"
                        )
                    self._begin(output, source, now)
                    return output
        self._compare(output, source, now)
        (output.path / "shards").mkdir(exist_ok=True)
        return output

    def _entries(self, source: Input) -> Iterator[Entry]:
        """The elements of the input, with their prompts."""
        for k, entry in enumerate(source.entries()):
            own = entry.prompt is not None or not self.prompts
            yield entry if own else entry._replace(prompt=self.prompts[k % len(self.prompts)])

    def _check(self, source: Input, model: Model) -> None:
        """Refuses what would make every element fail."""
        if source.pictures == (self.kind == "sample"):
            needed = "seeds or prompts" if self.kind == "sample" else "pictures"
            raise ValueError(f"{self.kind} takes {needed}, got the input {self.input}")
        first = list(islice(self._entries(source), self.shard_size))
        if not first:
            raise ValueError(f"there is nothing in the input {self.input}")
        prompts = dict.fromkeys(entry.prompt for entry in first)
        for prompt in prompts:
            self.guided(model, [prompt], prompts.keys() != {None})
        nothing = torch.zeros(1, 1, dtype=getattr(torch, self.dtype))
        ode.parse(self.solver).sample(lambda x, sigma: torch.zeros_like(x), nothing, self.sigmas)

    def _begin(self, output: Output, source: Input, now: dict[str, Any]) -> None:
        digest, elements, prompted = hashlib.sha256(), 0, False
        with replacing(output.plan) as file:
            for entry in self._entries(source):
                line = entry.line()
                digest.update(line)
                file.write(line)
                elements, prompted = elements + 1, prompted or entry.prompt is not None
        manifest = {"format": FORMAT, "settings": asdict(self), **now, "elements": elements}
        manifest |= {"prompted": prompted, "plan": digest.hexdigest()}
        with replacing(output.path / "manifest.json") as file:
            file.write(json.dumps(manifest, indent=1).encode() + b"\n")

    def _compare(self, output: Output, source: Input, now: dict[str, Any]) -> None:
        """A ValueError that names the differences to the job that was begun."""
        pairs = [(f.name, getattr(output.job, f.name), getattr(self, f.name)) for f in fields(self)]
        differences = [_difference(*pair) for pair in pairs if pair[1] != pair[2]]
        if differences := differences + output.differences(now):
            raise ValueError(
                f"{output.path} holds a job that was begun with other settings: "
                f"{'; '.join(differences)}. Repeat the settings to go on with it, or give another "
                "--output"
            )
        with open(output.plan, "rb") as plan:
            for line, entry in zip_longest(plan, self._entries(source)):
                if entry is None or line != entry.line():
                    before = None if line is None else Entry.of_line(line)
                    raise self._changed(output, _change(before, entry))
        for k in output.done() if source.pictures else ():  # names and sizes may stay the same
            notes = output.notes(k)
            for entry, found in zip(notes["entries"][:1], notes["sha256"], strict=False):
                if hashlib.sha256(source.read(Entry(*entry))).hexdigest() != found:
                    raise self._changed(output, f"{entry[0]} is another picture")

    def _changed(self, output: Output, what: str) -> ValueError:
        return ValueError(
            f"the input {self.input} has changed since the job in {output.path} was begun: {what}. "
            "Restore it, or give another --output"
        )


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
    def claims(self) -> Path:
        """The file that is locked."""
        return self.path / "claims"

    @property
    def begun(self) -> bool:
        """Whether a job was begun here."""
        return (self.path / "manifest.json").exists()

    @cached_property
    def _text(self) -> bytes:
        return read_regular(self.path / "manifest.json")

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What is written of the job; a ValueError if the file is damaged."""
        try:
            form = parsed(self._text, dict).get("format")
            if form != FORMAT:
                raise ValueError(f"its format is {form!r}, this odesolvers reads {FORMAT!r}")
            found: dict[str, Any] = parsed(self._text, FORM)
        except ValueError as error:
            raise ValueError(
                f"{self.path}/manifest.json is no manifest of a job: {error}"
            ) from None
        return found

    @cached_property
    def job(self) -> Job:
        """The settings of the job that was begun here."""
        try:
            return Job(**self.manifest["settings"])
        except TypeError as error:
            raise ValueError(f"{self.path}/manifest.json holds other settings: {error}") from error

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the manifest, which every shard names."""
        return hashlib.sha256(self._text).hexdigest()

    @property
    def count(self) -> int:
        """The number of shards."""
        return -(-int(self.manifest["elements"]) // self.job.shard_size)

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
        with suppress(FileNotFoundError):
            names = [name.partition(".") for name in os.listdir(self.path / "shards")]
            return {int(k) for k, _, end in names if k.isdecimal() and end in ENDINGS}
        return set()

    def notes(self, k: int) -> dict[str, Any]:
        """What a shard says of its elements; a ValueError if it is of another job."""
        if self.failed(k).exists():
            found = parsed(read_regular(self.failed(k)), dict)
        else:
            found = header(self.shard(k))["notes"]
        if found.get("job") != self.digest:
            raise ValueError(
                f"{self.shard(k)} is a shard of another job than {self.path}: remove it"
            )
        return dict(found)

    def differences(self, now: Mapping[str, Any]) -> list[str]:
        """How the model or the libraries differ from those that the job was begun with."""
        pairs = [(name, self.manifest[name], value) for name, value in now.items()]
        return [_difference(*pair) for pair in pairs if pair[1] != pair[2]]

    @cached_property
    def _offsets(self) -> list[int]:
        """The first byte of each shard in the plan."""
        offsets, position, size = [], 0, self.job.shard_size
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
            return [Entry.of_line(line) for line in islice(file, self.job.shard_size)]

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


def header(path: Path) -> dict[str, Any]:
    """The description of a saved state with its notes, without its tensors."""
    import safetensors

    with safetensors.safe_open(path, framework="pt") as opened:
        found: dict[str, Any] = json.loads(opened.metadata()["state"])
    return found


def _change(then: Entry | None, now: Entry | None) -> str:
    if then is not None and now is not None and then.id == now.id:
        what = "has another prompt" if then.place == now.place else "was replaced"
        return f"{now.id} {what}"
    return f"where {then.id if then else 'it ended'} was, there is {now.id if now else 'nothing'}"


def _difference(name: str, then: Any, now: Any) -> str:
    if isinstance(then, tuple) and isinstance(now, tuple) and name != "size":
        if len(then) != len(now):
            return f"{name} was {len(then)} values and is {len(now)} values"
        k = next(k for k, (a, b) in enumerate(zip(then, now, strict=True)) if a != b)
        name, then, now = f"{name}[{k}]", then[k], now[k]
    return f"{name} was {then} and is {now}"
