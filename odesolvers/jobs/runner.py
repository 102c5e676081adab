"""The work of one shard: pictures or seeds in, states out."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import odesolvers as ode

from .. import Solution, State
from ..models import ClassifierFreeGuidance
from .inputs import Entry, Input, decode, noise, open_input
from .job import Output
from .models import Model, load_model

Failure = tuple[str, str]
"""The name of an element, and the reason."""


@dataclass(frozen=True)
class Batch:
    """The elements of a shard that can be run.

    Attributes:
        entries: n of them.
        hashes: the SHA-256 of the files of pictures; empty for seeds.
        x: pictures, float32 ``(n, C, H, W)``, or standard normal noise, float64 ``(n, ...)``.
    """

    entries: list[Entry]
    hashes: list[str]
    x: Tensor

    def __getitem__(self, rows: Sequence[int]) -> Batch:
        hashes = [self.hashes[k] for k in rows] if self.hashes else []
        return Batch([self.entries[k] for k in rows], hashes, self.x[list(rows)])


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
    """Reads and runs the shards of a job, with one model on one device.

    Raises:
        ValueError: at construction, if the model's weights are not those that the job was begun with.
    """

    def __init__(self, output: Output, device: torch.device, model: Model | None = None) -> None:
        self.output, self.job, self.device = output, output.job, device
        self.model = load_model(self.job.model, device) if model is None else model
        if (found := self.model.digest()) != output.manifest["weights"]:
            raise ValueError(
                f"the model {self.job.model} has other weights here than those that {output.path} was "
                f"begun with: SHA-256 {found}, not {output.manifest['weights']}"
            )
        self.solver = ode.parse(self.job.solver)
        self.dtype: torch.dtype = getattr(torch, self.job.dtype)
        network, guidance = self.model.denoiser, self.job.guidance
        guided = network if guidance == 1.0 else ClassifierFreeGuidance(network, guidance)
        self.denoiser = Chunks(guided, self.job.batch)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of one state."""
        with torch.no_grad():
            empty = torch.zeros(1, *self.model.shape, device=self.device)
            return tuple(self.model.encode(empty).shape[1:])

    def read(self, k: int) -> tuple[Batch, list[Failure]]:
        """The elements of a shard, and those that cannot be read.

        Raises:
            OSError: for a fault of the file system; a file that is missing is one of a picture.
        """
        source = open_input(self.job.input, self.job.labels)
        entries, hashes, rows, failures = [], [], [], []
        for entry in self.output.entries(k):
            if not source.pictures:
                assert isinstance(entry.place, int)
                x = noise(entry.place, self.shape)
            elif isinstance(found := self._picture(source, entry), str):
                failures.append((entry.id, found))
                continue
            else:
                x, digest = found
                hashes.append(digest)
            entries.append(entry)
            rows.append(x)
        return Batch(entries, hashes, torch.stack(rows) if rows else torch.empty(0)), failures

    def _picture(self, source: Input, entry: Entry) -> tuple[Tensor, str] | str:
        """A picture and the SHA-256 of its file; or the reason why there is none."""
        try:
            data = source.read(entry)
        except (FileNotFoundError, PermissionError) as error:
            return _reason(error)
        try:
            return decode(data, self.model.shape), hashlib.sha256(data).hexdigest()
        except ImportError:
            raise
        except Exception as error:  # decoders fail in as many ways as files are damaged
            return _reason(error)

    def start(self, batch: Batch) -> Tensor:
        """The states that a run of the batch starts from."""
        sigmas = self.job.sigmas
        if self.job.kind == "sample":
            x = batch.x * math.hypot(sigmas[0], self.model.data_std)
            return x.to(self.device, self.dtype)
        pictures = batch.x.to(self.device)
        x = torch.cat([self.model.encode(part) for part in torch.split(pictures, self.job.batch)])
        if sigmas[-1] > 0:  # a network was trained on pictures with that noise
            grain = torch.stack([noise(entry.id, x.shape[1:]) for entry in batch.entries])
            x = x.double() + grain.to(self.device) * sigmas[-1]
        return x.to(self.dtype)

    @torch.no_grad()
    def run(self, batch: Batch) -> tuple[State, Batch, list[float], list[Failure]]:
        """The states of a batch; of which elements; their errors, if a round trip; and failures.

        Elements that make the run fail are found by halves, and left out.
        """
        try:
            state, errors = self._run(batch)
            return state, batch, errors, []
        except (ArithmeticError, ValueError):
            reasons = self._failing(batch, range(len(batch.entries)))
            if len(reasons) in (0, len(batch.entries)) and len(batch.entries) > 1:
                raise  # that is no fault of single elements
        left = batch[[k for k in range(len(batch.entries)) if k not in reasons]]
        failures = [(batch.entries[k].id, reason) for k, reason in reasons.items()]
        if not left.entries:
            raise AllFailed(failures)
        state, errors = self._run(left)
        return state, left, errors, failures

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
        """Samples from `start`, or inverts it, under the conditions of the entries."""
        positive, negative = self.model.branches([entry.condition for entry in entries])
        extra: Mapping[str, Any] = positive
        if self.job.guidance != 1.0:
            if not positive or not negative:
                raise ValueError("guidance needs labels or prompts, and a model of both branches")
            extra = {"positive": positive, "negative": negative}
        go = self.solver.sample if down else self.solver.invert
        solution: Solution = go(self.denoiser, start, self.job.sigmas, extra_args=extra)
        return solution

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


class AllFailed(Exception):
    """The only element of a shard failed; the argument is the list of failures."""


def _rows(value: Any, rows: Tensor, n: int) -> Any:
    """The rows of tensors of n rows, also inside mappings and lists; other values as they are."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and len(value) == n else value
    if isinstance(value, Mapping):
        return {name: _rows(item, rows, n) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_rows(item, rows, n) for item in value)
    return value


def _reason(error: Exception) -> str:
    """The message of an error, in one line of plain characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub("0x[0-9a-f]{6,}", "0x...", text)  # addresses, which differ from run to run
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)[:300]
