"""A job: its settings, and how it is begun in a folder or found there."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, Final, Literal

import torch

import odesolvers as ode

from ..extend import Solver
from ..opening import Model, open_model
from ..pictures import FITS
from ..typed import read
from ..values import count, number
from ..writing import replacing
from .inputs import Entry, Input, open_input
from .output import FORM, FORMAT, MOST, VERSION, Claims, Output
from .weights import fingerprint

DTYPES: Final = ("float32", "float64", "bfloat16")
KNOWN: Final = {
    "kind": ("invert", "sample", "roundtrip"),
    "fit": FITS,
    "dtype": DTYPES,
    "network": (*DTYPES, "float16", None),
    "device": ("cpu", "cuda"),
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
        solver = ode.parse(self.solver)
        if not isinstance(solver, Solver):
            raise ValueError(f"solver must name a solver, got {self.solver!r}")
        object.__setattr__(self, "solver", repr(solver))
        object.__setattr__(self, "sigmas", ode.Grid(self.sigmas).levels)
        object.__setattr__(self, "prompts", tuple(self.prompts))
        object.__setattr__(self, "size", None if self.size is None else tuple(self.size))

    @classmethod
    def of(cls, output: Output) -> Job:
        """The job that was begun in a folder."""
        return cls(**{name: output.manifest[name] for name in cls.__dataclass_fields__})

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
        asked = self._asked(model)
        if not output.begun:
            (output.path / "shards").mkdir(parents=True, exist_ok=True)
            with Claims(output) as claims:
                claims.take(Claims.PREPARING, wait=True)
                if not output.begun:  # by another process meanwhile
                    self._begin(output, source, asked)
                    return output
        self._compare(output, source, asked)
        return output

    def _asked(self, model: Model) -> dict[str, Any]:
        """The settings, and what the names in them stand for at this time, as JSON holds them."""
        found = asdict(self) | {"sigmas": [sigma.hex() for sigma in self.sigmas]}
        found |= {"weights": fingerprint(model.denoiser)}
        found |= {"format": FORMAT, "version": VERSION}
        found |= {"odesolvers": ode.__version__, "torch": torch.__version__}
        asked: dict[str, Any] = json.loads(json.dumps(found))
        _read(asked)  # what could not be read again is not written
        return asked

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
        for prompt in dict.fromkeys(entry.prompt for entry in first):
            self.guided(model, [prompt], prompt is not None)
        nothing = torch.zeros(1, 1, dtype=getattr(torch, self.dtype))
        ode.parse(self.solver).sample(lambda x, sigma: torch.zeros_like(x), nothing, self.sigmas)

    def _begin(self, output: Output, source: Input, asked: dict[str, Any]) -> None:
        digest, elements, prompted = hashlib.sha256(), 0, False
        with replacing(output.plan) as file:
            for entry in self._entries(source):
                line = entry.line()
                digest.update(line)
                file.write(line)
                elements, prompted = elements + 1, prompted or entry.prompt is not None
        listed = {"elements": elements, "prompted": prompted, "plan": digest.hexdigest()}
        with replacing(output.path / "manifest.json") as file:
            file.write(json.dumps(asked | listed, indent=1).encode() + b"\n")

    def _compare(self, output: Output, source: Input, asked: dict[str, Any]) -> None:
        """A ValueError that names the differences to the job that was begun."""
        then, now = output.manifest, _read(asked)
        differences = [
            _difference(k, then[k], now[k]) for k in then if k in now and then[k] != now[k]
        ]
        if differences:
            raise ValueError(
                f"{output.path} holds a job that was begun with other settings: "
                f"{'; '.join(differences)}. Repeat the settings to go on with it, or give another "
                "--output"
            )
        with open(output.plan, "rb") as plan:
            for line, entry in zip_longest(plan, self._entries(source)):
                if entry is None or line != entry.line():
                    before = None if line is None else Entry.of_line(line)
                    raise ValueError(
                        f"the input {self.input} has changed since the job in {output.path} was begun: "
                        f"{_change(before, entry)}. Restore it, or give another --output"
                    )


def _read(asked: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = read(asked, {name: FORM[name] for name in asked})
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
