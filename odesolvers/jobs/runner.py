"""The work of one shard: pictures or seeds in, states out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import odesolvers as ode

from .. import Solution, State
from ..opening import Model
from ..pictures import read_images
from ..values import shown
from .inputs import Entry, open_input
from .job import Job, Output
from .weights import identity

Failure = tuple[str, str]
"""The name of an element, and the reason."""


@contextmanager
def reproducible(job: Job) -> Iterator[None]:
    """The settings of torch on which the bits of a job depend."""
    cudnn, threads = torch.backends.cudnn, torch.get_num_threads()
    before = cudnn.benchmark, cudnn.deterministic
    torch.set_num_threads(job.threads)
    cudnn.benchmark, cudnn.deterministic = False, True  # it chooses by the speed of the moment
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        cudnn.benchmark, cudnn.deterministic = before


def local_device(kind: str, rank: int = 0) -> torch.device:
    """The device of a worker by its rank on this machine; a ValueError if there is none."""
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here")
    return torch.device("cuda", rank % torch.cuda.device_count())


@dataclass(frozen=True)
class Batch:
    """The elements of a shard that can be run.

    Attributes:
        entries: n of them.
        hashes: the SHA-256 of the files of pictures; empty for seeds.
        pictures: float32 ``(n, C, H, W)`` in [-1, 1]; empty for seeds.
    """

    entries: list[Entry]
    hashes: list[str]
    pictures: Tensor

    def __getitem__(self, rows: Sequence[int]) -> Batch:
        entries, rows = [self.entries[k] for k in rows], list(rows)
        if not self.hashes:
            return Batch(entries, [], self.pictures)
        return Batch(entries, [self.hashes[k] for k in rows], self.pictures[rows])


@dataclass(frozen=True)
class Chunks:
    """A denoiser that is called on `size` elements at a time, always; the last call is filled up.

    A network rounds the same element differently in batches of other sizes. Here an element is computed
    in a batch of one size, at one place in it.
    """

    denoiser: Any
    size: int

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        n, parts = len(x), []
        for first in range(0, n, self.size):
            rows = torch.arange(first, first + self.size, device=x.device).clamp_(max=n - 1)
            extra = _rows(extra_args, rows, n)
            parts.append(self.denoiser(x[rows], sigma[rows], **extra)[: n - first])
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class Runner:
    """Reads and runs the shards of a job, with one model.

    Raises:
        ValueError: at construction, if the model is not the one that the job was begun with.
    """

    def __init__(self, output: Output, model: Model) -> None:
        self.output, self.job, self.model = output, output.job, model
        if differences := output.differences(identity(model)):
            raise ValueError(
                f"the model {self.job.model} is another one here than that which {output.path} was "
                f"begun with: {'; '.join(differences)}"
            )
        self.source = open_input(self.job.input)
        self.solver = ode.parse(self.job.solver)
        self.dtype: torch.dtype = getattr(torch, self.job.dtype)

    def read(self, k: int) -> tuple[Batch, list[Failure]]:
        """The elements of a shard, and those that cannot be read.

        Raises:
            OSError: for a fault of the file system; a file that is missing is one of a picture.
        """
        elements = self.output.entries(k)
        if not self.source.pictures:
            return Batch(elements, [], torch.empty(0)), []
        entries, hashes, pictures, failures = [], [], [], []
        for entry in elements:
            found = self._picture(entry)
            if isinstance(found, str):
                failures.append((entry.id, found))
            else:
                entries.append(entry)
                pictures.append(found[0])
                hashes.append(found[1])
        return Batch(entries, hashes, torch.cat(pictures or [torch.empty(0)])), failures

    def _picture(self, entry: Entry) -> tuple[Tensor, str] | str:
        """A picture and the SHA-256 of its file; or the reason why there is none."""
        try:
            data = self.source.read(entry)
            images = read_images(Path(entry.id), self.model.shape, self.job.fit, data=data)
            if len(images) != 1:
                raise ValueError(f"holds {len(images)} pictures: save each as a file of its own")
        except (FileNotFoundError, PermissionError, ValueError) as error:
            return _reason(error).removeprefix(f"{entry.id} ")
        return images, hashlib.sha256(data).hexdigest()

    def start(self, batch: Batch) -> Tensor:
        """The states that a run of the batch starts from."""
        sigmas = self.job.sigmas
        if self.job.kind == "sample":
            seeds = [entry.place for entry in batch.entries if isinstance(entry.place, int)]
            return self.model.draw(seeds, sigmas[0], self.dtype)
        parts = torch.split(batch.pictures, self.job.batch)
        return torch.cat([self.model.enter(part, sigmas[-1], self.dtype) for part in parts])

    @torch.no_grad()
    def run(self, batch: Batch) -> tuple[State | None, Batch, list[float], list[Failure]]:
        """The states of a batch; of which elements; their errors, if a round trip; and failures.

        Elements that make the run fail are found by halves, and left out; no states if none is left.
        """
        if not batch.entries:
            return None, batch, [], []
        if hasattr(self.model.denoiser, "forget_prompts"):  # a million of them do not fit in memory
            self.model.denoiser.forget_prompts()
        try:
            state, errors = self._run(batch)
            return state, batch, errors, []
        except (ArithmeticError, ValueError):
            reasons = self._failing(batch, range(len(batch.entries)))
            if len(reasons) in (0, len(batch.entries)) and len(batch.entries) > 1:
                raise  # that is no fault of single elements
        left = batch[[k for k in range(len(batch.entries)) if k not in reasons]]
        failures = [(batch.entries[k].id, reason) for k, reason in reasons.items()]
        return *self.run(left)[:3], failures

    def _run(self, batch: Batch) -> tuple[State, list[float]]:
        x = self.start(batch)
        solution = self.walk(x, batch.entries, down=self.job.kind == "sample")
        if self.job.kind != "roundtrip":
            return solution.state, []
        back = self.walk(solution.state, batch.entries, down=True)
        return solution.state, self.errors(back.x, x)

    def _failing(self, batch: Batch, rows: Sequence[int]) -> dict[int, str]:
        try:
            self._run(batch[rows])
            return {}
        except (ArithmeticError, ValueError) as error:
            if len(rows) == 1:
                return {rows[0]: _reason(error)}
        half = len(rows) // 2
        return self._failing(batch, rows[:half]) | self._failing(batch, rows[half:])

    @torch.no_grad()
    def walk(self, start: Tensor | State, entries: Sequence[Entry], *, down: bool) -> Solution:
        """Samples from `start`, or inverts it, under the prompts of the entries."""
        prompts = [entry.prompt for entry in entries]
        denoiser, extra = self.job.guided(self.model, prompts, self.output.manifest["prompted"])
        go = self.solver.sample if down else self.solver.invert
        chunks: Any = Chunks(denoiser, self.job.batch)
        found: Solution = go(chunks, start, self.job.sigmas, extra_args=extra)
        return found

    def errors(self, x: Tensor, reference: Tensor) -> list[float]:
        """``|x - reference| / |reference|`` of each element; 0 for equal bits alone.

        In fixed point the reference is that on the grid, see `FixedPoint.snap`.
        """
        arithmetic = self.solver.arithmetic
        if arithmetic.exact:
            reference = arithmetic.snap(reference)
        a, b = x.flatten(1).double(), reference.flatten(1).double()
        found: list[float] = ((a - b).norm(dim=1) / b.norm(dim=1).clamp(min=1e-300)).tolist()
        return found


def _rows(value: Any, rows: Tensor, n: int) -> Any:
    """Rows of tensors of n rows and of lists of n texts, also inside mappings; else the value itself."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and len(value) == n else value
    if isinstance(value, Mapping):
        return {name: _rows(item, rows, n) for name, item in value.items()}
    if isinstance(value, list) and len(value) == n and isinstance(value[0], str):
        return [value[k] for k in rows.tolist()]
    return value


def _reason(error: Exception) -> str:
    """The message of an error, in one line of plain characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return shown(re.sub("0x[0-9a-f]{6,}", "0x...", text), 300)  # addresses differ from run to run
