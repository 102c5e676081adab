"""Verification of a job: files whole, and elements that lead back to where they came from."""

from __future__ import annotations

import math
import os
import random
from pathlib import Path
from typing import Any

from .. import State
from ..opening import Model
from ..progress import progress_bar
from ..values import count, number
from .inputs import Entry
from .job import Output
from .runner import Runner, local_device, reproducible


def verify(
    folder: str | os.PathLike[str],
    *,
    pictures: int = 1,
    tolerance: float = 0.01,
    seed: int = 0,
    model: Model | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Checks the checksum of every shard, and takes some elements of each back to their start.

    Codes are sampled, and compared with the pictures of the input; samples are inverted, and compared
    with the noise of their seeds. In fixed point they must agree to the bit, else within a relative
    error. Whole batches are run, as in the job, so that the denoiser computes the same bits, on a
    device of the kind that the job ran on.

    Args:
        folder: the folder of a job.
        pictures: elements of every shard, at random, rounded up to whole batches.
        tolerance: the largest ``|x - reference| / |reference|`` of an element; unused in fixed point.
        seed: of the choice.
        model: the model, if it is loaded already; else that which the folder names, which may be code of
            yours, ``package.module:function``: only in folders that you trust.
        progress: whether to show a progress bar, which needs tqdm.

    Returns:
        ``elements`` that were compared, the ``largest`` error, and ``faults``, a sentence each.

    Raises:
        ValueError: for settings that check nothing, if the folder holds no job, or if its model is
            another one here.
    """
    if count("pictures", pictures) < 1:
        raise ValueError(f"pictures must be at least 1, got {pictures}")
    if not 0 <= number("tolerance", tolerance) < math.inf:
        raise ValueError(f"tolerance must be finite and at least 0, got {tolerance}")
    output = Output(Path(folder))
    runner = Runner(output, model or output.job.open(local_device(output.job.device)))
    done, compared, largest, faults = output.done(), 0, 0.0, list[str]()
    limit = 0.0 if runner.solver.arithmetic.exact else float(tolerance)
    shards: Any = range(output.count)
    if progress:
        shards = progress_bar(shards, desc="verify", unit="shard")
    with reproducible(output.job):
        for k in shards:
            if k not in done:
                faults.append(f"shard {k} is not written: run the job again")
            elif not output.failed(k).exists():
                try:
                    errors = _back(runner, k, pictures, random.Random(f"{seed} {k}"))
                except (ArithmeticError, RuntimeError, ValueError) as error:
                    faults.append(f"shard {k}: {error}")
                    continue
                compared += len(errors)
                largest = max(largest, *errors.values())
                faults += [
                    f"shard {k}: {name} comes back with an error of {error:.2g}, over {limit:g}"
                    for name, error in errors.items()
                    if not error <= limit
                ]
    return {"elements": compared, "largest": largest, "faults": faults}


def _back(runner: Runner, k: int, pictures: int, chance: random.Random) -> dict[str, float]:
    """The errors of some elements of a shard, by name."""
    state, notes = State.load_with_notes(runner.output.shard(k))
    if notes.get("job") != runner.output.digest:
        raise ValueError(f"{runner.output.shard(k)} is a shard of another job")
    entries = [Entry(*entry) for entry in notes["entries"]]
    size, names = runner.job.batch, [entry.id for entry in entries]
    batches = range(-(-len(entries) // size))
    chosen = chance.sample(batches, min(len(batches), -(-pictures // size)))
    source, failures = runner.read(k)
    places = {entry.id: place for place, entry in enumerate(source.entries)}
    errors: dict[str, float] = {}
    for batch in chosen:
        rows = list(range(batch * size, min((batch + 1) * size, len(entries))))
        if gone := [names[row] for row in rows if names[row] not in places]:
            reason = dict(failures).get(gone[0], "is no element of this shard")
            raise ValueError(f"{gone[0]} {reason}")
        reference = source[[places[names[row]] for row in rows]]
        for row, found in zip(rows, reference.hashes, strict=False):
            if notes["sha256"][row] != found:
                raise ValueError(f"{names[row]} is another picture now than when the job ran")
        part = state[rows].to(runner.model.device)
        back = runner.walk(part, reference.entries, down=runner.job.kind != "sample")
        found_errors = runner.errors(back.x, runner.start(reference))
        errors |= dict(zip((names[row] for row in rows), found_errors, strict=True))
    return errors
