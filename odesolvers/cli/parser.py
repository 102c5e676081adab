"""The options of the commands, with the defaults that will be used."""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from argparse import SUPPRESS, ArgumentTypeError, Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import shtab
import torch

from .. import StabilityWarning, __version__
from ..bundled import DEFAULT_MODEL, GRIDS, GUIDANCE, STEPS
from ..jobs.command import batch
from ..pictures import FITS
from . import commands
from .outputs import say

DTYPES: Final = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
NETWORKS: Final = {**DTYPES, "float16": torch.float16}
MOST: Final = 10_000
"""Pictures and steps that are taken for no slip of the keyboard."""


def _whole(least: int, most: int) -> Callable[[str], int]:
    """The type of a whole number in a range."""

    def read(text: str) -> int:
        if not text.isdecimal() or len(text) > 40 or not least <= int(text) <= most:
            raise ArgumentTypeError(
                f"must be a whole number from {least} to {most}, got {text[:40]!r}"
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


def _secret(text: str) -> str:
    if not text:
        raise ArgumentTypeError("must not be empty: anyone could find the mark of no key")
    return text


def _of(known: Collection[str]) -> Callable[[str], Any]:
    """The type of one of some names, or of what a mapping has under it."""

    def read(text: str) -> Any:
        if text not in known:
            raise ArgumentTypeError(f"must be one of {', '.join(known)}, got {text[:40]!r}")
        return known[text] if isinstance(known, Mapping) else text

    return read


def _option(
    kind: Callable[[str], Any], metavar: str, text: str, default: Any = None, **more: Any
) -> dict[str, Any]:
    return {"type": kind, "metavar": metavar, "help": text, "default": default, **more}


def _flag(text: str) -> dict[str, Any]:
    return {"action": "store_true", "help": text, "default": False}


_SIZE: Final = _whole(1, 2**14)
_COUNT: Final = _whole(1, MOST)
OPTIONS: Final[Mapping[str, dict[str, Any]]] = {
    "files": _option(Path, "FILE", "{}, or folders of them", (), nargs="*"),
    "--prompt": _option(str, "TEXT", "of all; repeated, one for each (none)", action="append"),
    "--to": _option(
        str, "TEXT", "prompt of the edit, likewise (required)", action="append", required=True
    ),
    "--negative": _option(str, "TEXT", "prompt to guide away from (none)"),
    "--guidance": _option(_number, "X", "guidance scale ({})"),
    "--strength": _option(_number, "X", "share of the steps, above 0 to 1 ({})", 1.0),
    "--mask": _option(Path, "FILE", "picture over the photo, white where it may change (all)"),
    "--frames": _option(_whole(2, MOST), "N", "pictures, the two among them ({})", 9),
    "--key": _option(_secret, "TEXT", "the secret of the watermark (required)", required=True),
    "--compare": _option(
        str, "NAME", "another solver, repeated ({})", ["ddim", "edict"], action="append"
    ),
    "--base": _option(str, "METHOD", "one-step method (that of the model)"),
    "--runs": _option(_COUNT, "N", "sample and encode at most N times (by the steps: 80 or more)"),
    "--levels": _flag("learn the noise levels too"),
    "--model": _option(str, "NAME", "see `odesolvers list` ({})", DEFAULT_MODEL),
    "--solver": _option(str, "NAME", "short name or expression ({})", "damped"),
    "--count": _option(_COUNT, "N", "how many pictures ({})", 8),
    "--seed": _option(_whole(0, 10**18), "N", "of the first picture ({})", 0),
    "--batch": _option(_COUNT, "N", "pictures at once ({}; saved, exact: 1)", 8),
    "--fit": _option(_of(FITS), "HOW", f"{', '.join(FITS)} ({{}})", "crop"),
    "--size": _option(_SIZE, "N", "height and width, of pipelines (their own)", nargs=2),
    "--grid": _option(_of(tuple(GRIDS)), "NAME", f"{', '.join(GRIDS)} (karras)"),
    "--steps": _option(_COUNT, "N", "number of steps ({})"),
    "--sigma-min": _option(_number, "X", "lowest noise level above 0 (of the model)"),
    "--sigma-max": _option(_number, "X", "highest noise level (of the model)"),
    "--rho": _option(_number, "X", "how much levels crowd at the low end (7)"),
    "--dtype": _option(_of(DTYPES), "NAME", "type of states (float32; pipelines: float64)"),
    "--network": _option(_of(NETWORKS), "NAME", "as --dtype (float32; pipelines on a GPU float16)"),
    "--device": _option(_device, "NAME", "cpu, cuda, cuda:1, mps ({})", torch.device("cpu")),
    "--out": _option(Path, "PATH", "folder, or one picture ({})"),
    "--save": _flag("save states too, to go back"),
    "--again": _flag("make finished results again"),
    "--port": _option(_whole(1, 65535), "N", "of the page ({})", 7860),
    "--input": _option(
        str,
        "WHAT",
        "pictures: a folder, FILE.tar, hf:NAME; noise: seeds:N, prompts:FILE@N",
        required=True,
    ),
    "--output": _option(Path, "FOLDER", "of the job", required=True),
    "--shard-size": _option(_COUNT, "N", "elements of a file ({})", 256),
    "--workers": _option(_COUNT, "N", "processes (one for each GPU, or 1)"),
    "--threads": _option(_COUNT, "N", "of each worker on the CPU ({})", 1),
    "--executor": _option(
        _of(("local", "slurm", "ray")), "NAME", "local, slurm, ray ({})", "local"
    ),
    "--option": _option(str, "NAME=VALUE", "of datatrove's executor; repeated", action="append"),
    "--per-shard": _option(_COUNT, "N", "elements of each shard ({})", 1),
    "--tolerance": _option(_number, "X", "largest relative error ({})", 0.01),
    "calibrate --out": _option(Path, "FILE", "file that ends in .json ({})"),
    "batch --prompt": _option(
        str, "TEXT", "of elements without their own; repeated, in turn (none)", action="append"
    ),
    "batch --batch": _option(_COUNT, "N", "elements of a call of the network ({})", 32),
    "batch --device": _option(_of(("cpu", "cuda")), "NAME", "cpu, cuda (cpu)"),
}
"""The options, some of them as one command has them; {} stands for the default."""
GRID: Final = "--steps --grid --sigma-min --sigma-max --rho"
MODEL: Final = "--model --size --network --device"
RUN: Final = f"--solver {GRID} --dtype {MODEL}"
PROMPTS: Final = "--prompt --guidance --negative"
NOISE: Final = "--count --seed"
FILES: Final = "--fit --out --again"
JOB: Final = (
    f"--input --output {PROMPTS} --batch --shard-size {RUN} --threads --workers --executor --option"
)
CODES: Final = {"solver": "codes"}
_OF_MODEL: Final = {
    "steps": "; ".join(f"{name} {n}" for name, n in STEPS.items()),
    "guidance": "with a prompt: "
    + "; ".join(f"{name} {scale:g}" for name, scale in GUIDANCE.items())
    + "; pipelines their own",
}
COMMANDS: Final[Mapping[str, tuple[Callable[[Namespace], None], str, Mapping[str, Any]]]] = {
    "sample": (commands.sample, f"files {PROMPTS} {NOISE} --batch {RUN} --save --out --again", {}),
    "invert": (commands.invert, f"files {PROMPTS} {RUN} {FILES}", {**CODES, "guidance": 1.0}),
    "edit": (commands.edit, f"files {PROMPTS} --to --strength --mask {RUN} --save {FILES}", {}),
    "interpolate": (commands.interpolate, f"files {PROMPTS} --frames {RUN} {FILES}", CODES),
    "watermark embed": (
        commands.from_noise,
        f"--key {PROMPTS} {NOISE} --batch {RUN} --save --out --again",
        {**CODES, "out": Path("out/watermark")},
    ),
    "watermark detect": (commands.watermark_detect, f"files --key --prompt {RUN} --fit", CODES),
    "roundtrip": (commands.roundtrip, f"files {PROMPTS} --compare --seed {RUN} {FILES}", {}),
    "calibrate": (
        commands.calibrate,
        f"--base --runs --levels {PROMPTS} {NOISE} {GRID} --dtype {MODEL} --out --again",
        {"count": 16, "seed": 1000, "solver": "damped", "out": Path("out/gamma.json")},
    ),
    "batch invert": (batch, f"{JOB} --fit", {**CODES, "guidance": 1.0, "action": "invert"}),
    "batch sample": (batch, JOB, {"action": "sample", "fit": "crop"}),
    "batch roundtrip": (batch, f"{JOB} --fit", {"action": "roundtrip"}),
    "batch verify": (
        batch,
        "--output --model --per-shard --tolerance",
        {"action": "verify", "model": "that of the job"},
    ),
    "report": (commands.report, f"--solver {GRID} --model --size", {}),
    "list": (commands.list_, "", {}),
    "app": (commands.app, "--model --network --device --port", {}),
}
"""The commands: function, names of the options, and defaults of their own."""
STATES: Final = "pictures or saved states"
FILES_OF: Final = {"sample": "saved states", "invert": STATES, "edit": STATES}
"""What commands take that take more than pictures, or none."""
TEXTS: Final = {
    "watermark": "Put a key into the noise of samples, and find it in pictures.",
    "batch": "Jobs over data sets, on many workers.",
    "batch invert": "Invert the pictures of a data set to noise.",
    "batch sample": "Sample from noise of many seeds or prompts.",
    "batch roundtrip": "Invert pictures and sample them again, and measure the errors.",
    "batch verify": "Take some elements of a job back to their start.",
}
"""What groups do, and commands that share a function."""


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
    commands_of: Any = {"title": "commands", "metavar": "COMMAND ...", "required": True}
    groups = {"": top.add_subparsers(prog="odesolvers", **commands_of)}
    for name, (function, options, own) in COMMANDS.items():
        group, _, word = name.rpartition(" ")
        if group not in groups:
            inner = groups[""].add_parser(group, description=TEXTS[group], help=TEXTS[group])
            groups[group] = inner.add_subparsers(prog=inner.prog, **commands_of)
        doc = TEXTS.get(name, function.__doc__ or "")
        command = groups[group].add_parser(word, description=doc, help=doc.split("\n")[0])
        defaults: dict[str, Any] = {"out": Path("out") / name, **own}
        if options:
            operand = " [FILE ...]" if options.startswith("files") else ""
            command.usage = f"%(prog)s{operand} [options]"
            command.epilog = "Defaults are in parentheses."
        for option in options.split():
            settings = OPTIONS.get(f"{group or name} {option}", OPTIONS[option])
            dest = _dest(option)
            default = defaults.setdefault(dest, settings.get("default"))
            shown = ", ".join(default) if isinstance(default, list) else default
            shown = FILES_OF.get(name, "pictures") if option == "files" else shown
            text = settings["help"].format(_OF_MODEL.get(dest) if default is None else shown)
            command.add_argument(option, **{**settings, "default": SUPPRESS, "help": text})
        command.set_defaults(command=(name, function, options, defaults))
    return top


def run(argv: Sequence[str]) -> None:
    """Runs the command that `argv` names."""
    found, unknown = parser().parse_known_args(argv or ["--help"])
    name, function, options, defaults = vars(found).pop("command")
    given, prog = vars(found), f"odesolvers {name}"
    if unknown:
        raise ValueError(f"{prog} takes no {unknown[0]!r}; see `{prog} --help`")
    args = Namespace(**{**dict.fromkeys(map(_dest, OPTIONS)), **defaults, **given}, prog=prog)
    args.given, args.options = frozenset(given), frozenset(map(_dest, options.split()))
    args.named, args.size = given.get("model"), args.size and tuple(args.size)
    for path in (*(args.files or ()), args.mask):
        if path is not None and not path.exists():
            raise FileNotFoundError(f"there is no file or folder {path}; see `{prog} --help`")
    if name in ("invert", "edit", "watermark detect") and not args.files:
        raise ValueError(f"{prog} needs pictures: FILE; see `{prog} --help`")
    said = set[str]()

    def show(message: Warning | str, *_: Any) -> None:
        if str(message) not in said:  # of many pictures once
            said.add(str(message))
            print(f"Warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", StabilityWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        function(args)


def _dest(option: str) -> str:
    """The attribute of an option."""
    return option.split()[-1].lstrip("-").replace("-", "_")
