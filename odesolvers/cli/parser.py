"""The options of the commands, with the defaults that will be used."""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import shtab
import torch

from .. import StabilityWarning, __version__
from ..bundled import BUNDLED, GRIDS
from ..jobs.command import batch
from ..pictures import FITS
from . import commands
from .outputs import say

DTYPES: Final = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
NETWORKS: Final = {**DTYPES, "float16": torch.float16}
EXECUTORS: Final = ("local", "slurm", "ray")
MOST: Final = 10_000
"""Pictures and steps that are taken for no slip of the keyboard."""


def _whole(least: int, most: int, named: str = "") -> Callable[[str], int]:
    """The type of a whole number in a range."""

    def read(text: str) -> int:
        if not text.isdecimal() or len(text) > 40 or not least <= int(text) <= most:
            raise ArgumentTypeError(
                f"must be a whole number from {least} to {named or most}, got {text[:40]!r}"
            )
        return int(text)

    return read


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ArgumentTypeError(f"must be a finite number, got {text[:40]!r}")
    return value


def _device(text: str) -> torch.device:
    try:
        return torch.tensor([0], device=text).cpu().to(text).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ArgumentTypeError(f"the device {text!r} cannot be used here: {reason}") from error


def _file(text: str) -> Path:
    if not Path(text).is_file():
        raise ArgumentTypeError(f"there is no file {text}")
    return Path(text)


def _of(known: Mapping[str, Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if text not in known:
            raise ArgumentTypeError(f"must be one of {', '.join(known)}, got {text[:40]!r}")
        return known[text]

    return read


def _option(kind: Callable[[str], Any], metavar: str, text: str, **more: Any) -> Mapping[str, Any]:
    return {"type": kind, "metavar": metavar, "help": text, **more}


_SIZE: Final = _whole(1, 2**14)
_COUNT: Final = _whole(1, MOST)
OPTIONS: Final[Mapping[str, Mapping[str, Any]]] = {
    "pictures": _option(Path, "FILE", "pictures, or folders of them", nargs="*"),
    "states": _option(Path, "STATE", "states to start from in place of noise", nargs="*"),
    "--prompt": _option(str, "TEXT", "of the pictures; repeated, in turn (none)", action="append"),
    "--to": _option(str, "TEXT", "prompt of the edit", required=True),
    "--negative": _option(str, "TEXT", "prompt to guide away from (none)"),
    "--guidance": _option(_number, "X", "guidance scale (of the model; invert: 1)"),
    "--strength": _option(_number, "X", "share of the steps, above 0 to 1 (%(default)s)"),
    "--mask": _option(_file, "FILE", "picture, white where the edit may change"),
    "--frames": _option(_whole(2, MOST), "N", "pictures, the two among them (%(default)s)"),
    "--key": _option(str, "TEXT", "the secret of the watermark", required=True),
    "--compare": _option(str, "NAMES", "other solvers for the table (%(default)s)"),
    "--base": _option(str, "METHOD", "one-step method (that of the model)"),
    "--runs": _option(_COUNT, "N", "sample and encode at most N times (%(default)s)"),
    "--model": _option(str, "NAME", f"see `odesolvers list` ({next(iter(BUNDLED))})"),
    "--solver": _option(str, "NAME", "short name or expression (%(default)s)"),
    "--count": _option(_COUNT, "N", "how many pictures (%(default)s)"),
    "--seed": _option(_whole(0, 2**62, "2^62"), "N", "of the first picture (%(default)s)"),
    "--batch": _option(_COUNT, "N", "pictures at once (%(default)s; saved, exact: 1)"),
    "--fit": _option(_of({f: f for f in FITS}), "HOW", f"{', '.join(FITS)} (%(default)s)"),
    "--size": _option(_SIZE, "N", "height and width, of pipelines", nargs=2),
    "--grid": _option(_of({g: g for g in GRIDS}), "NAME", f"{', '.join(GRIDS)} (karras)"),
    "--steps": _option(_COUNT, "N", "of the grid (of the model: 24; pipelines 50)"),
    "--sigma-min": _option(_number, "X", "lowest noise level above 0 (of the model)"),
    "--sigma-max": _option(_number, "X", "highest noise level (of the model)"),
    "--rho": _option(_number, "X", "how much levels crowd at the low end (7)"),
    "--dtype": _option(_of(DTYPES), "NAME", "of states (float32; pipelines: float64)"),
    "--network": _option(_of(NETWORKS), "NAME", "of networks (float32; on a GPU float16)"),
    "--device": _option(_device, "NAME", "cpu, cuda, cuda:1, mps (%(default)s)"),
    "--out": _option(Path, "PATH", "folder, or one picture (%(default)s)"),
    "--save": {"action": "store_true", "help": "save states too, to go back"},
    "--again": {"action": "store_true", "help": "make finished results again"},
    "--port": _option(_whole(1, 65535), "N", "of the page (%(default)s)"),
    "--input": _option(str, "WHAT", "pictures: a folder, FILE.tar or hf:NAME; or noise: seeds:N"),
    "--output": _option(Path, "FOLDER", "of the job", required=True),
    "--shard-size": _option(_COUNT, "N", "elements of a file (%(default)s)"),
    "--workers": _option(_COUNT, "N", "processes (one for each GPU, or 1)"),
    "--threads": _option(_COUNT, "N", "of each worker on the CPU (%(default)s)"),
    "--executor": _option(_of({e: e for e in EXECUTORS}), "NAME", ", ".join(EXECUTORS)),
    "--option": _option(str, "NAME=VALUE", "of datatrove's executor; repeated", action="append"),
    "--per-shard": _option(_COUNT, "N", "verify: elements of each shard (%(default)s)"),
    "--tolerance": _option(_number, "X", "verify: largest relative error (%(default)s)"),
    "batch --solver": _option(str, "NAME", "short name or expression (damped; invert: codes)"),
    "batch --batch": _option(_COUNT, "N", "elements of a call of the network (%(default)s)"),
    "batch --device": _option(_of({"cpu": "cpu", "cuda": "cuda"}), "NAME", "cpu, cuda (cpu)"),
}
"""The options, some of them as one command has them."""
ACTIONS: Final = {
    "watermark": ("embed", "detect"),
    "batch": ("invert", "sample", "roundtrip", "verify"),
}
MODEL: Final = "--model --prompt --guidance --negative"
RUN: Final = (
    "--solver --steps --grid --sigma-min --sigma-max --rho --size --dtype --network --device"
)
FILES: Final = "--fit --out --again"
UNSET: Final = "prompt guidance negative steps grid sigma_min sigma_max rho size dtype network mask"
DEFAULTS: Final[Mapping[str, Any]] = {
    **dict.fromkeys(f"{UNSET} model base key".split()),
    "solver": "damped",
    "count": 8,
    "seed": 0,
    "batch": 8,
    "strength": 1.0,
    "frames": 9,
    "runs": 80,
    "compare": "ddim,edict",
    "fit": "crop",
    "device": torch.device("cpu"),
    "states": (),
    "pictures": (),
    "port": 7860,
}
COMMANDS: Final[tuple[tuple[Callable[[Namespace], None], str, Mapping[str, Any]], ...]] = (
    (commands.sample, f"states {MODEL} --count --seed --batch {RUN} --save --out --again", {}),
    (commands.invert, f"pictures {MODEL} {RUN} {FILES}", {"solver": "codes"}),
    (commands.edit, f"pictures --to {MODEL} --strength --mask {RUN} --save {FILES}", {}),
    (commands.interpolate, f"pictures {MODEL} --frames {RUN} {FILES}", {"solver": "codes"}),
    (
        commands.watermark,
        f"pictures --key {MODEL} --count --seed --batch {RUN} --save {FILES}",
        {"solver": "codes"},
    ),
    (commands.roundtrip, f"pictures {MODEL} --compare --seed {RUN} {FILES}", {}),
    (
        commands.calibrate,
        f"--base --runs {MODEL} --count --seed {RUN} --out",
        {"out": Path("out/gamma.json"), "count": 16, "seed": 1000},
    ),
    (
        batch,
        f"--input --output {MODEL} --fit --batch --shard-size {RUN} --threads --workers --executor "
        "--option --per-shard --tolerance",
        {
            **dict.fromkeys(("solver", "device", "input", "workers", "option")),
            "batch": 32,
            "shard_size": 256,
            "threads": 1,
            "executor": "local",
            "per_shard": 1,
            "tolerance": 0.01,
        },
    ),
    (commands.report, f"{RUN} --model", {}),
    (commands.list_, "", {}),
    (commands.app, "--model --network --device --port", {}),
)
"""The commands: function, names of the options, and defaults other than `DEFAULTS`."""


class Parser(argparse.ArgumentParser):
    """A parser that takes options in full only, and raises its errors, those of printing too."""

    def __init__(self, **settings: Any) -> None:
        def formatter(prog: str) -> argparse.HelpFormatter:
            return argparse.HelpFormatter(prog, max_help_position=21)

        super().__init__(allow_abbrev=False, formatter_class=formatter, **settings)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see `{self.prog} --help`")

    def _print_message(self, message: str, file: Any = None) -> None:
        del file
        say(message.rstrip("\n"))


def parser() -> Parser:
    """The parser of all commands."""
    top = Parser(
        prog="odesolvers",
        usage="%(prog)s COMMAND [options]",
        description="ODE solvers for diffusion models that go from noise to data and exactly back.",
        epilog="The options of a command, with their defaults: odesolvers COMMAND --help",
    )
    top.add_argument("--version", action="version", version=f"odesolvers {__version__}")
    shtab.add_argument_to(top)
    parsers = top.add_subparsers(
        title="commands", metavar="COMMAND ...", required=True, prog="odesolvers"
    )
    for function, names, defaults in COMMANDS:
        name, doc = function.__name__.rstrip("_"), function.__doc__ or ""
        operand = next((w for w in ("pictures", "states") if w in names.split()), "")
        command = parsers.add_parser(name, description=doc, help=doc.split("\n")[0])
        words = [
            "%(prog)s",
            "|".join(ACTIONS.get(name, ())),
            operand and "[FILE ...]",
        ]
        if names:
            command.usage = " ".join([*filter(None, words), "[options]"])
            command.epilog = "Defaults are in parentheses."
        if name in ACTIONS:
            command.add_argument("action", choices=ACTIONS[name], help="what to do")
        out = {"out": Path("out") / name}
        for option in names.split():
            command.add_argument(option, **OPTIONS.get(f"{name} {option}", OPTIONS[option]))
        command.set_defaults(
            function=function, prog=command.prog, **{**DEFAULTS, **out, **defaults}
        )
    return top


def run(argv: Sequence[str]) -> None:
    """Runs the command that `argv` names."""
    args, unknown = parser().parse_known_args(argv or ["--help"])
    if unknown:
        raise ValueError(f"{args.prog} takes no {unknown[0]!r}; see `{args.prog} --help`")
    for path in (*args.pictures, *args.states):
        if not path.exists():
            raise FileNotFoundError(f"there is no file or folder {path}; see `{args.prog} --help`")
    if args.function.__name__ in ("invert", "edit") and not args.pictures:
        raise ValueError(f"{args.prog} needs pictures: FILE; see `{args.prog} --help`")
    if args.function is not commands.list_:
        args.named, args.model = args.model, args.model or next(iter(BUNDLED))
    with warnings.catch_warnings():
        warnings.simplefilter("always", StabilityWarning)
        warnings.showwarning = lambda message, *_: print(f"Warning: {message}", file=sys.stderr)
        args.function(args)
