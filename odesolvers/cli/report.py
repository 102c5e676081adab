"""Tables, and the conclusions from their numbers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from inspect import signature
from typing import Final, TypeAlias

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

import odesolvers as ode

from .choices import GRIDS, LEVELS, LISTED, LOADERS, METHODS, MODELS, installed
from .work import Row, Setup, short

Report: TypeAlias = Sequence[str | Table | Text]
"""What a command prints when its files are written: a string is printed as it is, others are wrapped."""

WROTE: Final = "wrote "
"""Begins the line that reports a file."""
GOOD: Final = 0.05
"""A sample nearer than this to a real image, per pixel, counts as that image."""

HINTS: Final = """\
--solver takes an expression of these names, such as
  "BDIA(HeunEDM(), gamma=StepRatio(1), arithmetic=FixedPoint())"; in it,
  load('FILE.json') is the rule that `odesolvers calibrate` wrote.
An extra is installed in a clone by: pip install '.[extra]'"""


def show(report: Report) -> None:
    """Prints `report`.

    Raises:
        OSError: if stdout takes it no more; the message names the files that were written before.
    """
    console = Console(highlight=False)
    with console.capture() as captured:
        for part in report:
            if isinstance(part, str):
                console.out(part, highlight=False)
            else:
                console.print(part)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(captured.get().encode(encoding, "replace").decode(encoding), end="", flush=True)
    except OSError as error:
        with suppress(
            OSError, ValueError
        ):  # or Python prints the rest when it ends, and fails again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        wrote = [part for part in report if isinstance(part, str) and part.startswith(WROTE)]
        raise OSError("; ".join([f"printing failed ({error})", *wrote])) from error


def comparison(rows: Sequence[Row], setup: Setup) -> Table:
    """The table of a comparison: a line for each solver, in sections; the chosen one in bold."""
    nearest, section = f"nearest\n{setup.model.noun}", ""
    latent = "latent\nmean", "latent\nstd"
    table = _table(("BDIA over", "calls", "sec", "round\ntrip", nearest, *latent, "sampled\nagain"))
    for row in rows:
        if row.section != section:
            section = row.section
            table.add_section()
            table.add_row(f"[cyan]{escape(section)}[/cyan]")
        calls, seconds = "{}+{}".format(*row.evaluations), f"{row.seconds:.2f}"
        errors = f"{row.error:.0e}", f"{row.distance:.0e}"
        last = *(f"{value:.3f}" for value in row.latent), f"{row.again:.0e}"
        style = "bold" if row.solver == setup.solver else ""
        table.add_row(escape(row.name), calls, seconds, *errors, *last, style=style)
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    return table


def legend(count: int, noun: str) -> str:
    """The columns of `comparison` in words."""
    return (
        f"calls: denoiser evaluations there + back, for all {count} {noun}s at once. round trip: "
        f"relative error of the recovered noise. nearest {noun}: distance of a sample to the nearest "
        f"real {noun}, root mean square per pixel, median (pixels span 2). latent: real {noun}s "
        "encoded on their own; 0 and 1 would be right. sampled again: relative error of those "
        f"{noun}s, sampled from the state of their encoding."
    )


def findings(rows: Sequence[Row], setup: Setup) -> list[str]:
    """Conclusions from the numbers of `rows`, good or bad."""
    noun, finite = setup.model.noun, setup.model.finite  # if finite, samples must be real images
    mine = next(row for row in rows if row.solver == setup.solver)
    std, dtype = mine.latent[1], str(setup.dtype).removeprefix("torch.")
    found = [f"{short(mine.solver)} recovers the noise to {mine.error:.0e} in {dtype}."]
    if finite:
        verdict = "are" if mine.distance < GOOD else "are not"
        found[0] += (
            f" Its samples {verdict} {noun}s: {mine.distance:.0e} from the nearest real one."
        )
    poor = [row for row in rows if finite and row.distance > GOOD and row.error < 1e-2]
    if poor:
        error, distance = max(row.error for row in poor), max(row.distance for row in poor)
        found.append(
            f"A small round-trip error alone says nothing about the samples: {len(poor)} of the "
            f"{len(rows)} solvers recover the noise to {error:.0e} or better, yet end up to "
            f"{distance:.0f} from any {noun}. With gamma=1, BDIA does not damp an error that "
            "alternates in sign from step to step."
        )
    if not 0.9 <= std <= 1.1:
        reason = "this solver amplifies errors when it inverts on this grid."
        if finite and std < 0.9:
            reason = (
                f"many noises flow to the same {noun}, so the image alone does not hold the noise it "
                "came from. The pair of states at the end of sampling does."
            )
        code = f"A lone {noun} is encoded to noise of standard deviation {std:.3g}, not 1"
        found.append(f"{code}: {reason}")
    return found


def catalogue() -> list[Table]:
    """Tables of what `--solver`, `--grid` and `--model` accept, and of what models need."""
    parts = []
    for kind, names in LISTED.items():
        docs = [(name, getattr(ode, name).__doc__ or "") for name in names.split()]
        rows = [(name, doc.split("\n")[0].replace("`", "")) for name, doc in docs]
        parts.append(_table((kind, "what it is"), rows))
    methods = []
    for method in map(ode.parse, [*METHODS.split(), "Exponential(Euler())"]):
        calls = len(ode.BDIA(method).step(behind=3.0, sigma=2.0, ahead=1.0, g=1.0).calls)
        scale = {1.0: "x", 0.5: "x / (1 + σ)"}.get(method.scale(1.0), "x / sqrt(1 + σ²)")
        methods.append((method, method.order, method.evaluations, calls, scale))
    grids = []
    for name, (make, summary) in GRIDS.items():
        options = ["steps", *(k for k in LEVELS if k in signature(make).parameters)]
        grids.append((name, summary, " ".join(f"--{k.replace('_', '-')}" for k in options)))
    yes = {True: "yes", False: "no"}
    models = [(name, m.summary, name, yes[installed(m.modules)]) for name, m in MODELS.items()]
    loaders = [(*loader, yes[installed(modules)]) for *loader, modules in LOADERS]
    needs = "what it is", "extra", "installed"
    return [
        *parts,
        _table(("approximator", "order", "calls/step", "under BDIA", "state scale"), methods),
        _table(("--grid", "levels", "options"), grids),
        _table(("--model", *needs), models),
        _table(("from Python", *needs), loaders),
    ]


def _table(columns: Sequence[str], rows: Iterable[Iterable[object]] = ()) -> Table:
    table = Table(*columns, box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    return table
