"""The command `odesolvers batch`."""

from __future__ import annotations

import argparse
import json
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import torch

from ..opening import SHORT, open_model, solver_of
from ..progress import progress_bar
from .check import verify
from .job import Job, Output
from .reading import report
from .work import launched, run_workers, work

SHOWN: Final = 5
"""Failures that are printed; all are in the report."""
USAGE: Final = """\
examples:
  odesolvers batch invert --model letters --input pictures/ --output codes/ --workers 2
  odesolvers batch sample --model letters --input seeds:10000 --prompts A,B,C --output samples/
  odesolvers batch roundtrip --model network.pkl --solver exact --input data.tar --output check/
  odesolvers batch verify --output codes/ --pictures 8
The same command goes on with a job that was interrupted, or is done already.
"""


class Parser(ArgumentParser):
    """A parser that takes options in full only, and raises its errors."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see `{self.prog} --help`")


def parser() -> Parser:
    """The parser of the command."""
    top = Parser(
        prog="odesolvers batch",
        description="Invert, sample or take there and back a whole data set, shard by shard.",
        epilog=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("kind", choices=("invert", "sample", "roundtrip", "verify"))
    add: Any = top.add_argument
    add("--output", type=Path, required=True, help="the folder of the job")
    add("--model", help="as of the other commands: letters, FILE.pkl, MODULE:FUNCTION")
    add("--input", help="folder, FILE.tar, hf:NAME@SPLIT; seeds:N, prompts:FILE@N to sample")
    add("--prompts", help="of seeds:N, in turn: A,B,C")
    add("--solver", default="damped", help=f"{', '.join(SHORT)} or an expression (%(default)s)")
    add("--steps", type=int, help="steps of the model's own grid (the model's)")
    add("--guidance", type=float, default=1.0, help="classifier-free guidance (%(default)g)")
    add("--dtype", default="float32", help="float32 or float64, of states (%(default)s)")
    add("--batch", type=int, default=32, help="elements of a call (%(default)s)")
    add("--shard-size", type=int, default=256, help="elements of a shard (%(default)s)")
    add("--device", help="cpu or cuda (cuda where there is one)")
    add("--threads", type=int, default=1, help="of each worker on the CPU (%(default)s)")
    add("--workers", type=int, help="processes (one for each GPU, or 1)")
    add("--executor", choices=("local", "slurm", "ray"), default="local", help="(%(default)s)")
    add("--option", action="append", default=[], help="NAME=VALUE, of datatrove's executor")
    add("--pictures", type=int, default=1, help="verify: elements of each shard (%(default)s)")
    add("--tolerance", type=float, default=0.01, help="verify: relative error (%(default)g)")
    return top


def run(argv: Sequence[str]) -> list[str]:
    """Runs the command, and returns what is to be printed.

    Raises:
        ValueError, OSError: if a job cannot be done as asked.
        RuntimeError: if shards are missing in the end, or do not stand verification.
    """
    args = parser().parse_args(argv or ["--help"])
    device: Any = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.kind == "verify":
        return _verified(args, device)
    for name in ("model", "input"):
        if getattr(args, name) is None:
            raise ValueError(f"a job needs --{name}; see `odesolvers batch --help`")
    model = open_model(args.model, torch.device("cpu"), None, None)
    sigmas = model.sigmas(args.steps or model.steps, None, {})
    job = Job(
        args.kind,
        args.model,
        _absolute(args.input),
        repr(solver_of(args.solver, model.method, sigmas)),
        tuple(sigmas.tolist()),
        () if args.prompts is None else tuple(args.prompts.split(",")),
        args.guidance,
        args.dtype,
        args.batch,
        args.shard_size,
        device,
        args.threads,
    )
    output = job.prepare(args.output, model)
    ranks, faults = launched(), list[str]()
    if ranks is not None:  # one of the workers that torchrun or srun started
        rank, world, local_rank = ranks
        work(output.path, rank=rank, world=world, local_rank=local_rank)
        return _reported(output, faults) if rank == 0 else []
    del model
    devices = torch.cuda.device_count() if device == "cuda" else 1
    workers = min(args.workers or devices, output.count)
    if len(output.done()) == output.count:
        return _reported(output, faults)
    if args.executor == "local":
        with _progress(output, output.count) as watch:
            faults = run_workers(output, workers, watch)
    else:
        from .engines import run_on

        run_on(args.executor, output, workers, dict(map(_option, args.option)))
        if args.executor == "slurm":
            return [f"{workers} workers are queued on Slurm; the same command reports when done."]
    return _reported(output, faults)


def _reported(output: Output, faults: list[str]) -> list[str]:
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
    return [*lines, f"wrote {output.path / 'report.json'} (report)"]


def _verified(args: Namespace, device: str) -> list[str]:
    output = Output(args.output)
    with _progress(output, output.count, started=0) as watch:
        found = verify(
            args.output,
            pictures=args.pictures,
            tolerance=args.tolerance,
            device=device,
            watch=watch,
        )
    if found["faults"]:
        faults = found["faults"]
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise RuntimeError(
            f"{args.output} is not as it should be: {'; '.join(faults[:SHOWN])}{more}"
        )
    return [
        f"{output.count} shards are whole; {found['elements']} elements lead back, with a relative "
        f"error of at most {found['largest']:.2g}"
    ]


class _progress:
    """A progress bar over shards, of this run: those that were there before are no part of the rate."""

    def __init__(self, output: Output, count: int, started: int | None = None) -> None:
        initial = len(output.done()) if started is None else started
        self._bar = progress_bar(desc="shards", total=count, initial=initial)
        self._size = output.job.shard_size

    def __enter__(self) -> Callable[[int], None]:
        begun, first = time.monotonic(), self._bar.n

        def watch(done: int) -> None:
            rate = (done - first) * self._size / (time.monotonic() - begun)
            self._bar.set_postfix_str(f"{rate:.3g} elements/s", refresh=False)
            self._bar.update(done - self._bar.n)

        return watch

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _absolute(text: str) -> str:
    """An input as workers in other folders name it."""
    scheme, colon, rest = text.partition(":")
    if colon and scheme == "prompts":
        return f"{scheme}:{Path(rest).absolute()}"
    if colon and scheme == "hf" and Path(rest.partition("@")[0]).exists():
        return f"{scheme}:{Path(rest).absolute()}"
    return text if colon and scheme in ("seeds", "hf") else str(Path(text).absolute())


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--option must be NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
