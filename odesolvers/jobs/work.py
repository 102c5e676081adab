"""Workers, which share out the shards of a job among themselves, and the process that starts them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Final

import torch

from .. import StabilityWarning, State
from ..opening import Model
from ..writing import replacing
from .claims import Claims
from .job import Output
from .runner import Batch, Failure, Runner, local_device, reproducible
from .weights import versions

WATCHED: Final = "ODESOLVERS_WATCHED"
"""Set for workers whose standard input is a pipe from their parent."""
LAUNCHERS: Final = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "RANK"),  # torchrun, and `run_workers`
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_ID"),  # in a step of srun
)
"""Variables of rank, number of ranks and rank on the machine, and the one that says that they hold."""


def launched() -> tuple[int, int, int] | None:
    """The rank, the number of ranks and the rank on this machine, where a launcher gave them."""
    for *names, sign in LAUNCHERS:
        if sign in os.environ:
            found = [os.environ.get(name, "0") for name in names]
            if not all(map(str.isdecimal, found)):
                raise ValueError(
                    f"{', '.join(names)} must be whole numbers, got {', '.join(found)}"
                )
            rank, world, local = map(int, found)
            return rank, max(world, 1), local
    return None


def work(
    folder: str | os.PathLike[str],
    *,
    rank: int = 0,
    world: int = 1,
    local_rank: int | None = None,
    model: Model | None = None,
) -> int:
    """Makes shards until all of them are written, beside any number of others that do the same.

    A worker claims one shard at a time, reads the next one and writes the last one meanwhile, and in the
    end waits for those that others have claimed: what a worker leaves undone that dies, others do.
    Memory is that of three shards. `rank` and `world` say only where it begins.

    Args:
        folder: the folder of a job that was prepared, see `Job.prepare`.
        rank: the number of this worker.
        world: how many workers there are.
        local_rank: its number on this machine, which selects the GPU; by default `rank`.
        model: the model, if it is loaded already.

    Returns:
        The number of shards that this worker wrote.

    Raises:
        OSError: if the input cannot be read, or the output not be written.
        ValueError: if the folder holds no job, or its model or a library is another one here.
    """
    output = Output(Path(folder))
    job = output.job
    if model is None:
        model = job.open(local_device(job.device, rank if local_rank is None else local_rank))
    elif model.device.type != job.device:
        raise ValueError(
            f"the job is one of the device {job.device}, the model is on {model.device}"
        )
    runner = Runner(output, model)
    if differences := output.differences(versions()):
        raise ValueError(f"the job in {folder} was begun elsewhere: {'; '.join(differences)}")
    with reproducible(job), Claims(output.claims) as claims:
        return _work(runner, claims, rank % world * output.count // world)


def _work(runner: Runner, claims: Claims, first: int) -> int:
    output, made = runner.output, 0
    order = [*range(first, output.count), *range(first)]
    with ThreadPoolExecutor(1) as reading, ThreadPoolExecutor(1) as writing:
        ahead: tuple[int, Future[tuple[Batch, list[Failure]]]] | None = None
        written: Future[None] | None = None
        for k, after in _claimed(output, claims, order):
            if ahead is None or ahead[0] != k:
                ahead = k, reading.submit(runner.read, k)
            batch, failures = ahead[1].result()
            ahead = None if after is None else (after, reading.submit(runner.read, after))
            begun = time.perf_counter()
            state, notes = _made(runner, batch, failures)
            record = {"shard": k, "seconds": time.perf_counter() - begun, "end": time.time()}
            if written is not None:
                written.result()
            written = writing.submit(_write, output, claims, k, state, notes, record)
            made += 1
        if written is not None:
            written.result()
    return made


def _claimed(output: Output, claims: Claims, order: list[int]) -> Iterator[tuple[int, int | None]]:
    """Shards to make, each with the one that probably follows: first the free ones, then the others."""
    busy: list[int] = []
    for wait in (False, True):
        shards = list(busy) if wait else order
        for place, k in enumerate(shards):
            if output.is_done(k):
                continue
            if not claims.take(k, wait=wait):
                busy.append(k)
            elif output.is_done(k):
                claims.release(k)
            else:
                rest = (j for j in shards[place + 1 :] if not output.is_done(j))
                yield k, None if wait else next(rest, None)


def _made(
    runner: Runner, batch: Batch, failures: list[Failure]
) -> tuple[State | None, dict[str, Any]]:
    """The state of a batch and the notes of its shard; no state if all elements failed."""
    state, batch, errors, more = runner.run(batch)
    device = runner.model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    notes: dict[str, Any] = {"job": runner.output.digest, "device": name}
    notes |= {"entries": [list(entry) for entry in batch.entries], "sha256": batch.hashes}
    notes |= {"errors": [error.hex() for error in errors], "failures": sorted(failures + more)}
    return None if state is None else state.to("cpu"), notes


def _write(
    output: Output,
    claims: Claims,
    k: int,
    state: State | None,
    notes: dict[str, Any],
    record: dict[str, Any],
) -> None:
    if state is None:
        with replacing(output.failed(k)) as file:
            file.write(json.dumps(notes).encode())
    else:
        state.save(output.shard(k), notes)
    output.log(record | {"elements": len(notes["entries"])})
    claims.release(k)


def run_workers(output: Output, workers: int) -> list[str]:
    """Runs worker processes on this machine until all of them have ended.

    They end at once if this process does, in whatever way. A worker that is killed is not started
    again; the others do its work.

    Args:
        output: a job that was prepared.
        workers: their number.

    Returns:
        What went wrong with workers, a sentence each.
    """
    processes: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []
    try:
        for rank in range(workers):
            variables = {"RANK": rank, "WORLD_SIZE": workers, "LOCAL_RANK": rank, WATCHED: 1}
            said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
            process = subprocess.Popen(
                [sys.executable, "-m", "odesolvers.jobs", str(output.path)],
                stdin=subprocess.PIPE,
                stdout=said,
                env=os.environ | {name: str(value) for name, value in variables.items()},
            )
            processes.append((process, said))
        return [
            _fault(rank, process.returncode, said)
            for rank, (process, said) in enumerate(processes)
            if process.wait()
        ]
    finally:
        for process, said in processes:
            assert process.stdin is not None
            process.stdin.close()  # which ends it, see `main`
            process.wait()
            said.close()


def _fault(rank: int, code: int, said: IO[bytes]) -> str:
    said.seek(0)
    lines = said.read().decode(errors="replace").strip().splitlines()
    if code < 0:
        return f"worker {rank} was ended by the signal {signal.Signals(-code).name}"
    return f"worker {rank} stopped: {lines[-1] if lines else f'exit code {code}'}"


def main() -> None:
    """``python -m odesolvers.jobs FOLDER``: one worker, under `run_workers` or a launcher.

    Under `run_workers` it ends when its standard input does, which is a pipe from the parent.
    """

    def leave_with_parent() -> None:
        os.read(0, 1)  # nothing is written: it returns when the pipe is closed
        os._exit(1)

    rank, world, local_rank = launched() or (0, 1, 0)
    if WATCHED in os.environ:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
        threading.Thread(target=leave_with_parent, daemon=True).start()
    warnings.simplefilter("ignore", StabilityWarning)  # it was said when the job was begun
    try:
        work(sys.argv[1], rank=rank, world=world, local_rank=local_rank)
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        print(" ".join(f"{type(error).__name__}: {error}".split())[:1000])
        raise SystemExit(2) from None
