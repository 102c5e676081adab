"""Edits with a true target: ``python -m benchmarks.emoji.edits``.

A drawing is inverted under its own labels and sampled under others. Four sizes of edits: the other
*style* and another skin *tone*, for which the set holds the true target; another *motif*, of the same
group; and a motif of another *group*. In each the labels of the source stand for the inversion and
those of the target for the sample, which is guided from no label towards them; the inversion is not
guided. The sources of the style edits are motifs of which the target was withheld from training.

Four figures, as medians over drawings: the error to the true *target*, relative to its size; the error
of the *ground*, where source and target are white; how much of the source is *kept*, as the distance of
the edit to it; and how many edits are *named* as their target by the classifier. Contestants run as
published, and with the best settings found by the same search, on drawings of their own, over their own
parameter and the level at which the edit begins; ``--others`` takes the best of some of them to other
evaluations and guidance. Every figure is kept as soon as it is found: a second call goes on where the
first was stopped, and several may run at once. ``--write`` makes the tables.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from torch import Tensor

from odesolvers import (
    BDIA,
    BELM,
    DDIM,
    EDICT,
    RK4,
    DampedStepRatio,
    DDIMInversion,
    Denoiser,
    Dopri5,
    Euler,
    FixedPointInversion,
    HeunEDM,
    McCallumFoster,
    ReverseStepInversion,
    ReversibleHeun,
    Rex,
    StepRatio,
    karras_sigmas,
)
from odesolvers.models import ClassifierFreeGuidance
from odesolvers.models.edm import load_edm
from odesolvers.models.emoji.network import WEIGHTS
from odesolvers.writing import replacing

from ..common import IMAGES, Kept, table, towards, write
from .classifier import accuracies, load_classifier
from .data import load_emoji
from .released import EditFriendly, LegacyRK4, ReleasedBDIA, Unedited, adaptive, mali
from .runs import learned, options, same, shown, weights
from .tasks import Task, task

EDITS: Final = ("style", "tone", "motif", "group")
GUIDANCE: Final = 3.0
EVALUATIONS: Final = 20
OTHERS: Final = ((10, 3.0), (20, 1.0), (20, 7.0), (50, 3.0))
"""Other evaluations and guidance, for `SOME`, with the settings that are best at the first."""
SOME: Final = (
    "DDIM inversion",
    "BDIA(Euler), step ratio",
    "BDIA(Euler), damped",
    "O-BELM",
    "EDICT",
    "Rex (Euler)",
    "edit-friendly noise maps",
)
TOPS: Final = (80.0, 10.0)
BOTTOM: Final = 0.02
UNEDITED: Final = "the drawing as it is"

Solver = Any
Figures: TypeAlias = "dict[str, float] | None"
"""Figures by name, none where the run leaves the finite numbers; None while they are not known."""
Lookup: TypeAlias = "Callable[[str, Any, float, str, int], Figures]"
"""Figures of a contestant, a parameter, a first level, an edit and a seed."""


@dataclass(frozen=True)
class Contestant:
    """A family of invertible samplers.

    Attributes:
        make: the solver for a parameter and a grid, or None while it is not known.
        cost: evaluations a step, each way; those with a grid or iterations of their own are listed with
            the evaluations that they took.
        published: the parameters that its authors use.
        searched: the parameters of the search.
    """

    make: Callable[[Any, Tensor], Solver]
    cost: int
    published: tuple[Any, ...]
    searched: tuple[Any, ...]


def contestants(learn: Callable[[Tensor], BDIA | None]) -> dict[str, Contestant]:
    """All of them; `learn` calibrates BDIA on a grid, unless another process is at it."""
    zetas = (0.9, 0.99, 0.999)

    def coupled(solver: Any, base: Any, cost: int) -> Contestant:
        return Contestant(lambda zeta, _: solver(base, zeta=zeta), cost, (0.999,), zetas)

    return {
        UNEDITED: Contestant(lambda _, __: Unedited(), 1, (None,), ()),
        "DDIM inversion": Contestant(lambda _, __: DDIMInversion(), 1, (None,), (None,)),
        "BDIA(DDIM), constant": Contestant(
            lambda g, _: BDIA(DDIM(), g), 1, (0.5, 0.96, 1.0), (0.5, 0.8, 0.96, 1.0)
        ),
        "BDIA(Euler), step ratio": Contestant(
            lambda p, _: BDIA(Euler(), StepRatio(p)), 1, (1.0,), (0.5, 1.0, 1.5, 2.0)
        ),
        "BDIA(Euler), damped": Contestant(
            lambda c, _: BDIA(Euler(), DampedStepRatio(c)), 1, (0.5,), (0.25, 0.5, 1.0)
        ),
        "BDIA(Euler), calibrated": Contestant(lambda _, sigmas: learn(sigmas), 1, (None,), (None,)),
        "O-BELM": Contestant(lambda _, __: BELM(), 1, (None,), (None,)),
        "O-BELM, as released": Contestant(lambda _, __: ReleasedBDIA(BELM()), 1, (None,), ()),
        "BDIA(DDIM), as released with Rex": Contestant(
            lambda g, _: ReleasedBDIA(BDIA(DDIM(), g)), 1, (0.5, 0.96), ()
        ),
        "MALI": Contestant(lambda eta, _: mali(eta), 1, (1.0,), (0.9, 1.0)),
        "EDICT": Contestant(lambda p, _: EDICT(p), 2, (0.93,), (0.9, 0.93, 0.97, 0.99)),
        "McCallum-Foster (Euler)": coupled(McCallumFoster, Euler(), 2),
        "McCallum-Foster (Heun)": coupled(McCallumFoster, HeunEDM(), 4),
        "Rex (Euler)": coupled(Rex, Euler(), 2),
        "Rex (Heun)": coupled(Rex, HeunEDM(), 4),
        "Rex (RK4)": coupled(Rex, RK4(), 8),
        "Rex (RK4), as released": Contestant(
            lambda zeta, _: Rex(LegacyRK4(), zeta=zeta), 6, (0.999,), ()
        ),
        "Rex (Dopri5, adaptive)": Contestant(
            lambda tolerance, _: adaptive(Rex(Dopri5()), tolerance), 1, (1e-3,), (1e-1, 1e-2)
        ),
        "EES(2,5)": Contestant(lambda _, __: ReverseStepInversion(), 3, (None,), (None,)),
        "edit-friendly noise maps": Contestant(
            lambda skip, _: EditFriendly(skip), 1, (0.36,), (0.2, 0.36, 0.6)
        ),
        "reversible Heun": Contestant(lambda _, __: ReversibleHeun(), 1, (None,), (None,)),
        "fixed point (DDIM)": Contestant(
            lambda _, __: FixedPointInversion(DDIM(), tolerance=1e-4), 1, (None,), (None,)
        ),
    }


class Bench:
    """The network, the drawings and the figures."""

    def __init__(self, network: Path, kept: Kept, count: int) -> None:
        same(kept, network=weights(network), count=count)
        self.network, self.kept, self.emoji = load_edm(network), kept, load_emoji()
        self.classifier = load_classifier(self.emoji)
        self.contestants = contestants(partial(learned, kept, "edits", self.network, self.emoji))
        self.tasks = cache(partial(task, self.emoji, count=count))

    def figures(
        self,
        name: str,
        parameter: Any,
        top: float,
        edit: str,
        seed: int,
        evaluations: int = EVALUATIONS,
        guidance: float = GUIDANCE,
    ) -> Figures:
        """The four figures and the evaluations each way."""
        contestant, drawings = self.contestants[name], self.tasks(edit, seed=seed)
        steps = evaluations // contestant.cost
        sigmas = karras_sigmas(steps + 1, BOTTOM, top, append_zero=False)
        solver = contestant.make(parameter, sigmas)
        if solver is None:
            return None
        key = key_of(evaluations, guidance, name, parameter, top, edit, seed)
        run = partial(self._run, solver, drawings, sigmas, guidance)
        return self.kept(key, lambda: shown(key, run()))  # type: ignore[no-any-return]

    def _run(self, solver: Solver, task: Task, sigmas: Tensor, guidance: float) -> dict[str, float]:
        noise = torch.randn(task.images.shape, generator=torch.Generator().manual_seed(3))
        start = task.images + BOTTOM * noise  # a state at the last level
        guided: Denoiser = ClassifierFreeGuidance(self.network, guidance)
        source = {"class_labels": task.source}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # contestants are run as they are
            try:
                code = solver.invert(self.network, start, sigmas, extra_args=source)
                down = solver.sample(guided, code, sigmas, extra_args=towards(task.labels))
            except FloatingPointError:
                return {}
        return {**self._judge(task, down.x), "evaluations": (code.nfe + down.nfe) / 2}

    def _judge(self, task: Task, edit: Tensor) -> dict[str, float]:
        target = task.images if task.target is None else task.target
        white = (task.images.amin(1) > 0.99) & (target.amin(1) > 0.99)
        if task.target is None:  # the new motif may be drawn anywhere but at the border
            white[:, 2:-2, 2:-2] = False
        off = (edit - 1).square().mean(1)
        named = accuracies(self.classifier, edit.clamp(-1, 1), task.labels)[task.question]
        figures = {
            "ground": float(
                ((off * white).sum((1, 2)) / white.sum((1, 2)).clamp_min(1)).sqrt().median()
            ),
            "kept": _distance(edit, task.images),
            "named": named,
        }
        return (
            figures if task.target is None else {"target": _distance(edit, task.target), **figures}
        )


def _distance(x: Tensor, y: Tensor) -> float:
    """The root mean square of the difference over that of the ink of `y`; the median over pictures."""
    size = (y - 1).flatten(1).norm(dim=1)
    return float(((x - y).flatten(1).norm(dim=1) / size).median())


def key_of(
    evaluations: int, guidance: float, name: str, parameter: Any, top: float, edit: str, seed: int
) -> str:
    """The key of figures."""
    return f"{name}|{parameter}|{top:g}|{edit}|{evaluations}|{guidance:g}|{seed}"


def best(name: str, contestant: Contestant, lookup: Lookup) -> tuple[Any, float] | None:
    """The parameter and the first level with the smallest error to the true targets."""
    errors: dict[tuple[Any, float], float] = {}
    for choice in product(contestant.searched, TOPS):
        found = [lookup(name, *choice, edit, 1) for edit in ("style", "tone")]
        known = [figures.get("target", np.inf) for figures in found if figures is not None]
        if len(known) == len(found):
            errors[choice] = float(np.mean(known))
    if not errors or len(errors) < len(contestant.searched) * len(TOPS):
        return None
    return min(errors, key=errors.__getitem__)


def rows(
    contestants: Mapping[str, Contestant], lookup: Lookup
) -> Iterator[tuple[str, dict[str, Figures]]]:
    """Every contestant as published and at its best, with its figures of each edit."""
    for name, contestant in contestants.items():
        settings = {(p, 80.0): "as published" for p in contestant.published}
        searched = best(name, contestant, lookup)
        if searched is not None:
            settings.setdefault(searched, "searched")
        for (parameter, top), kind in settings.items():
            title = name if name == UNEDITED else f"{_title(name, parameter, top)}, {kind}"
            yield title, {edit: lookup(name, parameter, top, edit, 0) for edit in EDITS}


def _title(name: str, parameter: Any, top: float) -> str:
    return name + ("" if parameter is None else f" {parameter:g}") + f" from {top:g}"


def report(found: Mapping[str, Any], folder: Path, picture: Path) -> None:
    """The tables: one for each figure; and some contestants at other evaluations and guidance.

    Draws how far edits are from their source, and how often they are named as meant.
    """
    among = contestants(lambda sigmas: None)
    listed = dict(rows(among, found_in(found, EVALUATIONS, GUIDANCE)))
    for figure in ("target", "named", "ground", "kept"):
        edits = EDITS[:2] if figure == "target" else EDITS
        lines = [
            [title, _spent(figures), *(_cell(figures[edit], figure) for edit in edits)]
            for title, figures in listed.items()
        ]
        heads = ["", "evaluations each way", *edits]
        write(folder / f"emoji_edits_{figure}.md", table(heads, lines))
    settings = sorted({(EVALUATIONS, GUIDANCE), *OTHERS}, key=lambda n_w: (n_w[1], n_w[0]))
    heads = ["", *(f"{n} evaluations, guidance {w:g}" for n, w in settings)]
    for edit in EDITS:
        figure = "target" if edit in EDITS[:2] else "named"
        lines = [
            [
                _title(name, *setting),
                *(
                    _cell(found_in(found, n, w)(name, *setting, edit, 0), figure)
                    for n, w in settings
                ),
            ]
            for name, setting in best_of_some(among, found).items()
        ]
        write(folder / f"emoji_edits_others_{edit}.md", table(heads, lines))
    plot(listed, picture)


def best_of_some(
    contestants: Mapping[str, Contestant], found: Mapping[str, Any]
) -> dict[str, tuple[Any, float]]:
    """The settings of `SOME` that the search found."""
    lookup = found_in(found, EVALUATIONS, GUIDANCE)
    settings = {name: best(name, contestants[name], lookup) for name in SOME}
    return {name: setting for name, setting in settings.items() if setting is not None}


def plot(figures: Mapping[str, Mapping[str, Figures]], path: Path) -> None:
    """A panel for each edit, a point for each contestant: the more to the left, the more is kept."""
    import matplotlib.pyplot as plt

    chart, panels = plt.subplots(
        1, len(EDITS), figsize=(11, 3.4), sharey=True, layout="constrained"
    )
    kinds = {"BDIA": "o", "as released": "x", "": "s"}
    for panel, edit in zip(panels, EDITS, strict=True):
        for kind, marker in kinds.items():
            of_kind = [
                found[edit]
                for title, found in figures.items()
                if next(k for k in ("as released", "BDIA", "") if k in title) == kind
            ]
            points = [(f["kept"], f["named"]) for f in of_kind if f and f["kept"] < 1.2]
            panel.scatter(
                *zip(*points, strict=True), marker=marker, label=kind or "others", alpha=0.7
            )
        panel.set(title=edit, xlabel="distance to the source")
    panels[0].set_ylabel("named as the target")
    panels[0].legend(loc="lower right")
    with replacing(path) as file:
        chart.savefig(file, dpi=150)
    plt.close(chart)


def found_in(found: Mapping[str, Any], evaluations: int, guidance: float) -> Lookup:
    """Figures that were measured before."""
    return lambda *which: found.get(key_of(evaluations, guidance, *which))


def _spent(found: Mapping[str, Figures]) -> str:
    """Evaluations each way, over all edits."""
    spent = [figures["evaluations"] for figures in found.values() if figures]
    return f"{np.mean(spent):.0f}" if spent else ""


def _cell(figures: Figures, figure: str) -> str:
    if not figures:
        return "" if figures is None else "not finite"
    return f"{figures[figure]:.0%}" if figure == "named" else f"{figures[figure]:.3f}"


def chosen(names: Sequence[str], among: dict[str, Contestant]) -> dict[str, Contestant]:
    """The contestants with one of these parts of names; all for none."""
    return {
        name: contestant
        for name, contestant in among.items()
        if not names or any(part in name for part in names)
    }


def main() -> None:
    """The command line."""
    parser = options(__doc__, "emoji_edits", count=8)
    parser.add_argument("--network", type=Path, default=WEIGHTS)
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder of the plot")
    parser.add_argument("--contestants", nargs="+", default=(), help="parts of names; all")
    parser.add_argument("--others", action="store_true", help="other evaluations and guidance")
    args = parser.parse_args()
    kept = Kept(args.results)
    if args.write:
        report(kept.read(), args.tables, args.images / "emoji_edits.png")
        return
    bench = Bench(args.network, kept, args.count)
    if not args.others:
        for _ in rows(chosen(args.contestants, bench.contestants), bench.figures):
            pass
        return
    for evaluations, guidance in OTHERS:
        for name, setting in best_of_some(bench.contestants, kept.read()).items():
            for edit in EDITS:
                bench.figures(name, *setting, edit, 0, evaluations, guidance)


if __name__ == "__main__":
    main()
