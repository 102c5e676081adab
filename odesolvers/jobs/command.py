"""The command `odesolvers batch`."""

from __future__ import annotations

import json
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from ..cli.outputs import say
from ..opening import BUNDLED, open_model, solver_and_grid
from ..progress import progress_bar
from ..values import shown
from .check import verify
from .job import Job, Output
from .reading import report
from .runner import local_device
from .work import launched, run_workers, work

SHOWN: Final = 5
"""Failures that are printed; all are in the report."""


def batch(args: Namespace) -> None:
    """Jobs over data sets, on many workers.

    The same command goes on with a job that was interrupted, and reports on one that is done; `verify`
    takes some elements of one back to their start.
    """
    if args.action == "verify":
        return _verify(args)
    options, ranks = dict(map(_option, args.option or ())), launched()
    if args.executor != "local":
        from .engines import run_on
    device, place = torch.device(args.device or "cpu"), torch.device("cpu")
    if device.type == "cuda" and (ranks or args.executor == "local"):
        found = local_device("cuda", ranks[2] if ranks else 0)
        place = found if ranks else place  # it is opened once
    model = open_model(args.model, device, args.network, args.size, place)
    levels = {k: getattr(args, k) for k in ("sigma_min", "sigma_max", "rho")}
    levels = {name: level for name, level in levels.items() if level is not None}
    solver, sigmas = solver_and_grid(model, args.solver, args.steps, args.grid, levels)
    job = Job(
        args.action,
        args.model,
        _absolute(args.input),
        repr(solver),
        tuple(sigmas.tolist()),
        args.prompt or (),
        args.negative,
        args.guidance,
        args.fit,
        args.size,
        str(args.dtype or model.dtype).removeprefix("torch."),
        None if args.network is None else str(args.network).removeprefix("torch."),
        args.batch,
        args.shard_size,
        device.type,
        args.threads,
    )
    output, faults = job.prepare(args.output, model), list[str]()
    if ranks is not None:  # one of the workers that torchrun or srun started
        rank, world, local_rank = ranks
        work(output.path, rank=rank, world=world, local_rank=local_rank, model=model)
        return _say_report(output, faults) if rank == 0 else None
    del model
    workers = args.workers or (torch.cuda.device_count() if device.type == "cuda" else 1)
    workers = min(max(workers, 1), output.count)
    if len(output.done()) < output.count:
        with _progress(output):
            if args.executor == "local":
                faults = run_workers(output, workers)
            else:
                run_on(args.executor, output, workers, options)
        if args.executor == "slurm":
            say(f"{workers} workers are queued on Slurm; the same command reports when done.")
            return None
    return _say_report(output, faults)


def _say_report(output: Output, faults: list[str]) -> None:
    found = report(output.path, write=True)
    if found["missing"]:
        reasons = "; ".join(faults) or "they were removed, or their workers ended"
        raise RuntimeError(
            f"{len(found['missing'])} of {found['shards']} shards are not written: {reasons}. The rest "
            "is whole; the same command goes on"
        )
    lines = [f"{fault}; others did its work" for fault in faults]
    lines += [f"{found['written']} of {found['elements']} elements in {found['shards']} shards"]
    if found["timed"]:
        rate = found["seconds"] / found["timed"]
        lines.append(f"{rate:.3g} s of a worker for each of {found['timed']}")
    if "errors" in found:
        errors, n = found["errors"], found["written"]
        lines.append(
            f"round trip: relative error {errors['median']:.2g} (median), {errors['largest']:.2g} "
            f"(largest); {errors['exact']} of {n} exact to the bit"
        )
    lines += [f"failed: {id}: {reason}" for id, reason in found["failed"][:SHOWN]]
    if len(found["failed"]) > SHOWN:
        lines.append(f"and {len(found['failed']) - SHOWN} more failed, see the report")
    say("\n".join([*lines, f"wrote {output.path / 'report.json'} (report)"]))


def _verify(args: Namespace) -> None:
    output, (k, tolerance) = Output(args.output), (args.per_shard, args.tolerance)
    job = output.job
    if args.named is None and job.model not in BUNDLED:  # a file does not choose which code is run
        raise ValueError(f"the job is of another model: give --model {shown(job.model, 200)}")
    model = replace(job, model=args.named or job.model).open(local_device(job.device))
    found = verify(output.path, pictures=k, tolerance=tolerance, model=model, progress=True)
    if faults := found["faults"]:
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise RuntimeError(
            f"{args.output} is not as it should be: {'; '.join(faults[:SHOWN])}{more}"
        )
    say(
        f"{output.count} shards are whole; {found['elements']} elements lead back, with a relative "
        f"error of at most {found['largest']:.2g}"
    )


@contextmanager
def _progress(output: Output) -> Iterator[None]:
    """A progress bar over the elements in shards that are written, whichever worker writes them."""
    ended, size = threading.Event(), output.job.shard_size
    total = output.manifest["elements"]

    def written() -> Any:
        return min(total, size * len(output.done()))

    bar = progress_bar(desc="batch", total=total, initial=written(), unit="element")

    def watch() -> None:
        last = False
        while not last:
            last = ended.wait(1.0)
            bar.update(written() - bar.n)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        bar.close()


def _absolute(text: str) -> str:
    """An input as workers in other folders name it."""
    scheme, colon, rest = text.partition(":")
    if not colon or scheme not in ("seeds", "prompts", "hf"):
        return str(Path(text).absolute())
    file = scheme == "prompts" or (scheme == "hf" and Path(rest.partition("@")[0]).exists())
    return f"{scheme}:{Path(rest).absolute()}" if file else text


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--option must be NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
