"""Tables, and the sentences that say what their numbers mean."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .. import BDIA
from .choices import APPROXIMATORS, GAMMAS, GRIDS, LOADERS, MODELS, Settings
from .work import Row


def comparison(rows: Sequence[Row], chosen: Settings, noun: str) -> Table:
    """One line for each solver, those of one γ together; the chosen one in bold."""
    table = _table("BDIA over")
    for name in (
        "calls",
        "sec",
        "round\ntrip",
        f"nearest\n{noun}",
        "latent\nmean",
        "latent\nstd",
        "sampled\nagain",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    gamma = None
    for row in rows:
        if row.settings.gamma != gamma:
            gamma = row.settings.gamma
            table.add_section()
            table.add_row(f"[cyan]γ = {gamma}[/cyan]")
        there, back = row.trip.evaluations
        table.add_row(
            row.settings.approximator,
            f"{there}+{back}",
            f"{row.trip.seconds:.2f}",
            f"{row.trip.error:.0e}",
            f"{row.distances.median().item():.0e}",
            f"{row.code.mean:.3f}",
            f"{row.code.std:.3f}",
            f"{row.code.error:.0e}",
            style="bold" if row.settings.solver() == chosen.solver() else "",
        )
    return table


def legend(count: int, noun: str) -> str:
    """What the columns of `comparison` hold."""
    return (
        f"calls: denoiser evaluations there + back, for all {count} {noun}s at once. round trip: "
        "error of the recovered noise, relative. "
        f"nearest {noun}: distance of a sample to the nearest real {noun}, root mean square per "
        f"pixel, median (pixels span 2). latent: real {noun}s encoded on their own; 0 and 1 would be "
        f"right. sampled again: error of those {noun}s sampled from their encoding's state, relative."
    )


def findings(rows: Sequence[Row], chosen: Settings, noun: str, *, finite: bool = True) -> list[str]:
    """What the numbers of `rows` say, good or bad, in plain sentences.

    `finite` says that a good sample is one of the real images.
    """
    mine = next(row for row in rows if row.settings.solver() == chosen.solver())
    if not finite:
        dtype = str(mine.trip.noise.dtype).removeprefix("torch.")
        return [
            f"BDIA over {chosen.approximator} with γ = {chosen.gamma} brings the noise back to "
            f"{mine.trip.error:.0e} in {dtype}. A real {noun} on its own is encoded to noise of "
            f"standard deviation {mine.code.std:.3g}; 1 would be right."
        ]
    near = mine.distances.median().item()
    dtype = str(mine.trip.noise.dtype).removeprefix("torch.")
    found = [
        f"BDIA over {chosen.approximator} with γ = {chosen.gamma} brings the noise back to "
        f"{mine.trip.error:.0e} in {dtype}, and its samples are "
        + (f"{noun}s" if near < GOOD else f"not {noun}s")
        + f": {near:.0e} from the nearest real one."
    ]
    poor = [row for row in rows if row.distances.median().item() > GOOD and row.trip.error < 1e-2]
    if poor:
        worst = max(poor, key=lambda row: row.distances.median().item())
        gammas = sorted({row.settings.gamma for row in poor})
        found.append(
            f"A small round-trip error alone says nothing about the samples: {len(poor)} of the "
            f"{len(rows)} solvers (γ = {', '.join(gammas)}) go there and back to "
            f"{max(row.trip.error for row in poor):.0e} or better, yet end up to "
            f"{worst.distances.median().item():.1f} from any {noun}. Their error alternates in sign "
            "from step to step, and a large γ does not damp it."
        )
    if mine.code.std < 0.9:
        found.append(
            f"A lone {noun} is encoded to noise of standard deviation {mine.code.std:.2f}, not 1: "
            f"many noises flow to the same {noun}, so the image alone does not hold the noise it "
            "came from. The pair of states that sampling ends with does."
        )
    elif mine.code.std > 1.1:
        found.append(
            f"A lone {noun} is encoded to noise of standard deviation {mine.code.std:.3g}, not 1: "
            "this γ amplifies errors when inverting."
        )
    return found


GOOD = 0.05
"""Samples nearer to a real image than this, per pixel, are taken for one."""


def catalogue() -> list[Table]:
    """Solvers, gamma rules, grids and models, and what each needs."""
    solvers = _table("approximator", caption="BDIA over any of these, or alone with --gamma 0")
    for name in ("order", "calls/step", "under BDIA", "state scale"):
        solvers.add_column(name, justify="right")
    for name, method in APPROXIMATORS.items():
        step = BDIA(method).step(behind=3.0, sigma=2.0, ahead=1.0, g=1.0)
        scale = "x" if method.scale(1.0) == 1.0 else "x / sqrt(1 + σ²)"
        numbers = method.order, method.evaluations, len(step.calls), scale
        solvers.add_row(name, *map(str, numbers))

    gammas = _table("gamma", "what it does")
    for form, meaning in GAMMAS.items():
        gammas.add_row(form, meaning)

    grids = _table("grid", "levels", "options")
    for name, choice in GRIDS.items():
        options = " ".join(f"--{option.replace('_', '-')}" for option in choice.takes)
        grids.add_row(name, choice.summary, f"--steps {options}")

    models = _table("model", "what it is", "needs", "installed")
    for name, model in MODELS.items():
        installed = "yes" if model.installed else "no"
        models.add_row(name, model.summary, f"odesolvers\\[{model.extra}]", installed)

    loaders = _table(
        "from Python",
        "what it is",
        "extra",
        "installed",
        caption="pip install 'odesolvers\\[extra]'",
    )
    for loader in LOADERS:
        installed = "yes" if loader.installed else "no"
        loaders.add_row(loader.name, loader.summary, loader.extra or "none", installed)
    return [solvers, gammas, grids, models, loaders]


def _table(*columns: str, caption: str | None = None) -> Table:
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        caption=caption,
        caption_justify="left",
    )
    for name in columns:
        table.add_column(name, no_wrap=name == columns[0])
    return table
