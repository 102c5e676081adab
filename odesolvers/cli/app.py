"""The commands of `odesolvers`, and their options."""

from __future__ import annotations

import argparse
import sys
import warnings
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from rich.text import Text
from tqdm import tqdm

from .. import InversionWarning, Solution, State, calibrate as learn
from ..extend import IntegrationApproximator
from ..models import ClassifierFreeGuidance
from . import choices, pictures, report, work
from .choices import DEFAULT, DTYPES, GRIDS, MODELS
from .report import Report
from .work import Setup

SUFFIX: Final = ".safetensors"
MOST: Final = 10_000
"""Images and steps that are taken for no slip of the keyboard."""


def roundtrip(args: Namespace) -> Report:
    """Compare solvers on a round trip from noise, and draw one."""
    setup = Setup.of(args)
    noun, solvers = setup.model.noun, work.compared(setup.solver)
    compared = work.compare(setup, solvers, args.count, args.seed)
    rows = list(tqdm(compared, desc="solvers", total=len(solvers)))
    chosen = next(row for row in rows if row.solver == setup.solver)
    title = f"From noise to {noun}s and back: {work.short(setup.solver)}"
    figure = pictures.draw_round_trip(chosen, setup.sigmas[0].item(), title, noun)
    wrote = _write(args.out, "picture", lambda path: pictures.save(path, figure))
    legend = Text(f"\n{report.legend(args.count, noun)}", style="dim")
    findings = [Text(f"\n{sentence}") for sentence in report.findings(rows, setup)]
    return [report.comparison(rows, setup), legend, *findings, *wrote]


def sample(args: Namespace) -> Report:
    """Sample images; --save keeps the state that leads back to noise."""
    start: State | torch.Tensor
    if file := getattr(args, "from"):
        setup, start, _ = Setup.restore(args, file, relabel=True)
    else:
        setup = Setup.of(args, sampled=True)
        start = setup.noise(args.count, args.seed)
    solution = setup.run(start, down=True)
    wrote = _save(solution, setup, args.save)
    sheet = pictures.side_by_side(pictures.contact_sheet(solution.x))
    wrote += _write(args.out, "contact sheet", lambda path: pictures.save(path, sheet))
    noun = setup.model.noun
    lines = [f"{solution.nfe} evaluations of the denoiser for {len(solution.x)} {noun}s"]
    if setup.model.finite:
        distance = setup.distance(solution.x)
        lines.append(f"distance to the nearest real {noun}, per pixel, median: {distance:.1e}")
    return [*lines, *wrote]


def invert(args: Namespace) -> Report:
    """Invert a saved state exactly, or a lone image approximately.

    A state brings its solver, grid, model and labels; options that say otherwise are refused.
    """
    start: State | torch.Tensor
    if args.file.suffix == SUFFIX:
        setup, start, images = Setup.restore(args, args.file)
    else:
        setup = Setup.of(args)
        images = pictures.read_images(args.file, setup.images.shape[1:])
        start = images = setup.at_last_level(images)
    solution = setup.run(start, down=False)
    wrote = _save(solution, setup, args.save)
    noise = pictures.noise_in_view(solution.x, setup.sigmas[0].item())
    sheets = pictures.side_by_side(pictures.contact_sheet(images), pictures.contact_sheet(noise))
    wrote += _write(args.out, "images and their noise", lambda path: pictures.save(path, sheets))
    return [*_about_code(setup, solution.x, solution.nfe), *wrote]


def edit(args: Namespace) -> Report:
    """Invert images under their label, and sample under others.

    Without FILE the images are real ones, which the letters' network was not trained on.
    """
    setup = Setup.of(args)
    setup.guidance = 1.0  # --guidance is that of the edits
    names = setup.model.names
    spread = ",".join(names[:: len(names) // 8 or 1])
    targets = setup.model.labels(spread if args.to is None else args.to)
    if args.image is None:
        images, setup.labels = setup.real_images(args.count, args.seed)
    elif setup.labels is None:
        raise ValueError(f"an edit starts from the image's label: give --labels for {args.image}")
    else:
        images = pictures.read_images(args.image, setup.images.shape[1:])
    images, count = setup.at_last_level(images), len(images)
    code = setup.run(images, down=False)
    runs = [code, setup.run(code.state, down=True)]
    guided = ClassifierFreeGuidance(setup.denoiser, args.guidance)
    own = setup.extra_args(setup.labels, count)
    for target in targets:
        branches = {"positive": setup.extra_args((target,), count), "negative": own}
        options: Any = {"extra_args": branches, "progress": True}
        runs.append(setup.solver.sample(guided, code.state.fork(), setup.sigmas, **options))
    noise = pictures.noise_in_view(code.x, setup.sigmas[0].item())
    columns = {"image": images, "code": noise, "back": runs[1].x}
    columns |= {f"as {names[k]}": run.x for k, run in zip(targets, runs[2:], strict=True)}
    rows = [names[k] for k in own["class_labels"]]
    title = f"The same code under another label, guidance {args.guidance:g}"
    figure = pictures.draw_edit(columns, rows, title)
    wrote = _write(args.out, "edits", lambda path: pictures.save(path, figure))
    back = f"back under its own label to {work.relative(runs[1].x, images):.1e}"
    return [*_about_code(setup, code.x, sum(run.nfe for run in runs)), back, *wrote]


def calibrate(args: Namespace) -> Report:
    """Learn weights of BDIA for a model and a grid, for --weights."""
    base = choices.read("--base", args.base, IntegrationApproximator, "a method such as Euler()")
    setup = Setup.of(args, base, sampled=True)
    denoiser, extra = setup.condition(args.count)
    noise, options = setup.noise(args.count, args.seed), {"max_runs": args.runs, "progress": True}
    rule = learn(denoiser, noise, setup.sigmas, base=base, extra_args=extra, **options)
    return [str(rule.report), *_write(args.out, "weights", rule.save)]


def list_(args: Namespace) -> Report:
    """List solvers, gamma rules, grids, models and what they need."""
    del args
    return [*(part for table in report.catalogue() for part in (table, "")), report.HINTS]


def _about_code(setup: Setup, code: torch.Tensor, evaluations: int) -> list[str]:
    mean, std = setup.latent(code)
    return [
        f"{evaluations} evaluations of the denoiser",
        f"latent mean {mean:.4f}, standard deviation {std:.4f} (of noise: 0 and 1)",
    ]


def _save(solution: Solution, setup: Setup, path: Path | None) -> list[str]:
    """Writes the state if a path is given: before its picture, for it is worth more."""
    if path is None:
        return []
    return _write(path, "state", lambda path: solution.state.save(path, setup.notes()))


def _write(path: Path, what: str, write: Callable[[Path], object]) -> list[str]:
    """Lets `write` write a file, in a folder that is made if need be; the line that reports it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            f"{path} cannot be written: {error.filename} is no folder"
        ) from None
    write(path)
    return [f"{report.WROTE}{path} ({what})"]


def _count(text: str) -> int:
    return _whole(text, 1, MOST, str(MOST))


def _seed(text: str) -> int:
    return _whole(text, 0, 2**63 - 1, "2^63 - 1")


def _whole(text: str, least: int, most: int, name: str) -> int:
    """A whole number in a range, whose end has a `name`."""
    if not text.isdecimal() or len(text) > 40 or not least <= int(text) <= most:
        found = repr(text) if len(text) <= 40 else f"{len(text)} characters"
        raise ArgumentTypeError(f"must be a whole number from {least} to {name}, got {found}")
    return int(text)


def _number(text: str) -> float:
    try:
        return choices.finite(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error


def _device(text: str) -> torch.device:
    try:
        return torch.tensor([0], device=text).cpu().to(text).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ArgumentTypeError(f"the device {text!r} cannot be used here: {reason}") from error


def _input(text: str) -> Path:
    if not Path(text).is_file():
        raise ArgumentTypeError(f"there is no file {text}")
    return Path(text)


def _state_file(text: str) -> Path:
    if not text.endswith(SUFFIX):
        raise ArgumentTypeError(f"{text} must end in {SUFFIX}")
    return Path(text)


def _option(kind: Callable[[str], Any], metavar: str, text: str) -> Mapping[str, Any]:
    return {"type": kind, "metavar": metavar, "help": text}


def _choice(names: Iterable[str], default: str) -> Mapping[str, Any]:
    names = tuple(names)
    return {"choices": names, "metavar": "NAME", "help": f"{', '.join(names)} ({default})"}


OPTIONS: Final[Mapping[str, Mapping[str, Any]]] = {
    "file": _option(_input, "FILE", f"a saved state ({SUFFIX}), an image, or an array (.npy)"),
    "image": {**_option(_input, "FILE", "an image or an array, with its --labels"), "nargs": "?"},
    "--from": _option(_input, "FILE", "start from a state of `invert --save`, not from noise"),
    "--to": _option(str, "LABELS", "labels to sample under (eight or more, evenly spread)"),
    "--base": _option(str, "METHOD", "one-step method under BDIA (%(default)s)"),
    "--runs": _option(_count, "N", "sample and encode the batch at most N times (%(default)s)"),
    "--solver": _option(str, "EXPR", f"such as 'EDICT()', see `odesolvers list` ({DEFAULT})"),
    "--weights": _option(_input, "FILE", "BDIA with weights that `odesolvers calibrate` wrote"),
    "--model": _choice(MODELS, "letters if installed; roundtrip: digits"),
    "--labels": _option(str, "LABELS", "3 or 1,4,7 or 0-9 or A-E (none; sampled letters: A-Z)"),
    "--guidance": _option(_number, "X", "classifier-free guidance (1; edit, sampled letters: 3)"),
    "--count": _option(_count, "N", "how many images (%(default)s)"),
    "--seed": _option(_seed, "N", "seed of the noise and of the choice of images (%(default)s)"),
    "--grid": _choice(GRIDS, "karras"),
    "--steps": _option(_count, "N", "steps of the grid (18; letters: 24)"),
    "--sigma-min": _option(_number, "X", "lowest noise level above 0 (0.002; letters: 0.02)"),
    "--sigma-max": _option(_number, "X", "highest noise level (80)"),
    "--rho": _option(_number, "X", "how much the levels crowd at the lower end (karras: 7)"),
    "--dtype": _choice(DTYPES, "float32"),
    "--device": _option(_device, "NAME", "cpu, cuda, cuda:1, mps (%(default)s)"),
    "--out": _option(Path, "FILE", "the file to write (%(default)s)"),
    "--save": _option(_state_file, "FILE", f"write the state too, to go on or back ({SUFFIX})"),
}
SOLVER: Final = "--solver --weights"
MODEL: Final = "--model --labels --guidance"
NOISE: Final = "--count --seed"
RUN: Final = "--grid --steps --sigma-min --sigma-max --rho --dtype --device --out"
ALL: Final = f"{SOLVER} {MODEL} {NOISE} {RUN}"

DEFAULTS: Final = {"base": "Euler()", "runs": 80, "count": 36, "seed": 0, "device": "cpu"}
LEARNING: Final = {"count": 16, "seed": 1000}  # so that learning and sampling see other noise
COMMANDS: Final[tuple[tuple[Callable[[Namespace], Report], str, str, Mapping[str, Any]], ...]] = (
    (roundtrip, "", ALL, {"out": "out/roundtrip.png", "model": "digits"}),
    (sample, "", f"--from {ALL} --save", {"out": "out/samples.png"}),
    (invert, "FILE", f"file {SOLVER} {MODEL} {RUN} --save", {"out": "out/inverted.png"}),
    (edit, "[FILE]", f"image --to {ALL}", {"out": "out/edit.png", "count": 6, "guidance": 3.0}),
    (calibrate, "", f"--base --runs {MODEL} {NOISE} {RUN}", {"out": "out/gamma.json", **LEARNING}),
    (list_, "", "", {}),
)
"""The commands: function, operand, names of the options, and defaults other than `DEFAULTS`.

A function writes its files, and then returns what is to be printed.
"""


class Parser(argparse.ArgumentParser):
    """A parser that takes options in full only, and raises its errors, those of printing too."""

    def __init__(self, **settings: Any) -> None:
        def formatter(prog: str) -> argparse.HelpFormatter:
            return argparse.HelpFormatter(prog, max_help_position=21)

        super().__init__(allow_abbrev=False, formatter_class=formatter, **settings)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see `{self.prog} --help`")

    def print_help(self, file: object = None) -> None:
        del file
        report.show([self.format_help().rstrip("\n")])


def parser() -> Parser:
    """The parser of all commands."""
    top = Parser(
        prog="odesolvers",
        usage="%(prog)s COMMAND [options]",
        description="ODE solvers for diffusion models that go from noise to data and exactly back.",
        epilog="The options of a command, with their defaults: odesolvers COMMAND --help",
    )
    # A metavar as wide as the names, for the layout of the help.
    parsers = top.add_subparsers(
        title="commands", metavar="COMMAND ...", required=True, prog="odesolvers"
    )
    for function, operand, names, defaults in COMMANDS:
        name, doc = function.__name__.rstrip("_"), function.__doc__ or ""
        command = parsers.add_parser(name, description=doc, help=doc.split("\n")[0])
        if names:
            command.usage = " ".join(["%(prog)s", *operand.split(), "[options]"])
            command.epilog = "Defaults are in parentheses."
        command.set_defaults(function=function, prog=command.prog, **DEFAULTS | dict(defaults))
        for name in names.split():
            command.add_argument(name, **OPTIONS[name])
    return top


def run(argv: Sequence[str]) -> None:
    """Runs the command that `argv` names."""
    args, unknown = parser().parse_known_args(argv or ["--help"])
    if unknown:
        raise ValueError(f"{args.prog} takes no {unknown[0]!r}; see `{args.prog} --help`")
    with warnings.catch_warnings():
        warnings.simplefilter("always", InversionWarning)
        warnings.showwarning = lambda message, *_: print(f"Warning: {message}", file=sys.stderr)
        report.show(args.function(args))
