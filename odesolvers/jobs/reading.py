"""Reading the shards of a job: as a data set of torch, as states, as arrays; and the report."""

from __future__ import annotations

import json
import os
import statistics
from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

import odesolvers as ode

from .. import State
from ..writing import replacing
from .job import Output, header


class Shards(Dataset[dict[str, Any]]):
    """The results of a job, in the order of its input, one element for each that did not fail.

    As a map-style `torch.utils.data.Dataset` it reads single elements from mapped files, in any order,
    in the workers of a `DataLoader` too. An element is a dictionary of ``id`` and ``x``: the code at the
    highest level, or the sample at the lowest. Pairs and side information are in `states`. Checksums are
    of whole files: `states`, `arrays` and `verify` compare them, reading a single element does not.

    Args:
        folder: the folder of a job. Shards that are not written yet are left out; see `missing`.

    Raises:
        ValueError, OSError: if it is no folder of a job.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.output = Output(Path(folder))
        done = self.output.done()
        self.missing = [k for k in range(self.output.count) if k not in done]
        self.files = [self.output.shard(k) for k in sorted(done) if self.output.shard(k).exists()]
        job = self.output.job
        self._up = job.kind != "sample"
        self._arithmetic = ode.parse(job.solver).arithmetic
        self._dtype: torch.dtype = getattr(torch, job.dtype)

    @cached_property
    def _ends(self) -> list[int]:
        """The number of elements up to the end of each file."""
        notes = (self.output.notes(int(path.stem)) for path in self.files)
        return list(accumulate(len(each["entries"]) for each in notes))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, k: int) -> dict[str, Any]:
        n = len(self)
        if not -n <= k < n:
            raise IndexError(f"there are {n} elements, got the index {k}")
        k %= n
        place = bisect_right(self._ends, k)
        row = k - (self._ends[place - 1] if place else 0)
        found = os.stat(self.files[place])
        tensors, header = _opened(self.files[place], found.st_ino, found.st_mtime_ns)
        paired = "partner" in header["strides"] and not header["coupled"]
        stored = tensors.get_slice("partner" if paired and self._up else "current")[row]
        return {"id": header["notes"]["entries"][row][0], "x": self._loaded(stored)}

    def states(self) -> Iterator[tuple[list[str], State]]:
        """The names of elements and their state, shard by shard: what `Solver.sample` continues."""
        for path in self.files:
            state, notes = State.load_with_notes(path)
            if notes.get("job") != self.output.digest:
                raise ValueError(f"{path} is a shard of another job than {self.output.path}")
            yield [entry[0] for entry in notes["entries"]], state

    def arrays(self) -> Iterator[tuple[list[str], npt.NDArray[Any]]]:
        """The names of elements and an array ``(n, ...)`` of their states, shard by shard.

        Of bfloat16, which numpy does not have, it is float32, to the same values.
        """
        for names, state in self.states():
            paired = state.partner is not None and not state.coupled  # at neighbouring levels
            end = state.partner if paired and self._up else state.current
            assert end is not None
            x = self._loaded(end)
            yield names, (x.float() if x.dtype == torch.bfloat16 else x).numpy()

    def _loaded(self, stored: Tensor) -> Tensor:
        x: Tensor = self._arithmetic.load(stored, self._dtype)
        return x

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_ends": self._ends}


def report(folder: str | os.PathLike[str], *, write: bool = False) -> dict[str, Any]:
    """What a job has done: elements, failures with reasons, seconds, and round-trip errors.

    Args:
        folder: the folder of a job.
        write: whether to write it there as ``report.json``.

    Returns:
        ``elements`` of the input, ``written``, ``failed`` as (name, reason), ``shards`` and the shards
        that are ``missing``; ``seconds`` of all workers in runs, with ``timed``, the elements that they
        are of (a worker that is killed logs less); for round trips ``errors``, with the median, the
        largest and the number that are ``exact``.
    """
    output, failed, errors, written = Output(Path(folder)), [], list[float](), 0
    done = output.done()
    for k in sorted(done):
        notes = output.notes(k)
        written += len(notes["entries"])
        failed += [list(failure) for failure in notes["failures"]]
        errors += map(float.fromhex, notes["errors"])
    timed = {record["shard"]: record for record in output.logged() if record["shard"] in done}
    found: dict[str, Any] = {
        "elements": output.manifest["elements"],
        "written": written,
        "failed": failed,
        "shards": output.count,
        "missing": [k for k in range(output.count) if k not in done],
        "seconds": sum(record["seconds"] for record in timed.values()),
        "timed": sum(record["elements"] for record in timed.values()),
    }
    if errors:
        middle, most = statistics.median(errors), max(errors)
        found["errors"] = {"median": middle, "largest": most, "exact": errors.count(0.0)}
    if write:
        with replacing(output.path / "report.json") as file:
            file.write(json.dumps(found, indent=1).encode() + b"\n")
    return found


@lru_cache(maxsize=8)
def _opened(path: Path, *_: int) -> tuple[Any, dict[str, Any]]:
    """The mapped file of a state, and its description; the numbers tell it from an earlier file."""
    import safetensors

    return safetensors.safe_open(path, framework="pt"), header(path)
