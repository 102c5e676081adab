"""Noise found again from the 8-bit picture alone: ``python -m benchmarks.emoji.watermark``.

Samples are made from noise that carries the signs of a key (`odesolvers.editing.embed`), guided and
not, stored as 8-bit pictures, perhaps as JPEG or made smaller and larger again, and inverted without
the pair, without guidance and without labels (`detect`). Figures: the fraction of signs that agree with
the key, and the fraction of pictures found at one false alarm in a million. Every figure is kept as soon
as it is found: a second call goes on where the first was stopped, and several may run at once.
``--write`` makes the tables.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from odesolvers import (
    BDIA,
    BELM,
    DDIM,
    EDICT,
    DampedStepRatio,
    DDIMInversion,
    Euler,
    FixedPointInversion,
    McCallumFoster,
    Objective,
    Rex,
    StepRatio,
    karras_sigmas,
)
from odesolvers.editing import detect, embed
from odesolvers.models.edm import load_edm
from odesolvers.models.emoji.network import WEIGHTS
from odesolvers.models.guidance import ClassifierFreeGuidance

from ..common import Kept, table, towards, write
from .data import Emoji, load_emoji
from .runs import learned, options, same, shown, weights

EVALUATIONS: Final = (9, 19)
GUIDANCE: Final = (1.0, 3.0)
KEY: Final = "the owner of these emoji"
FALSE_ALARMS: Final = 1e-6
BOTTOM: Final = 0.02

SOLVERS: Final[dict[str, tuple[int, Callable[[], Any]]]] = {
    "DDIM inversion": (1, DDIMInversion),
    "BDIA(DDIM, 0.96)": (1, lambda: BDIA(DDIM(), 0.96)),
    "BDIA(DDIM, 1)": (1, lambda: BDIA(DDIM(), 1.0)),
    "BDIA(Euler, StepRatio(0.5))": (1, lambda: BDIA(Euler(), StepRatio(0.5))),
    "BDIA(Euler, StepRatio(1))": (1, lambda: BDIA(Euler(), StepRatio(1))),
    "O-BELM": (1, BELM),
    "BDIA(Euler, DampedStepRatio(0.25))": (1, lambda: BDIA(Euler(), DampedStepRatio(0.25))),
    "BDIA(Euler, DampedStepRatio(0.5))": (1, lambda: BDIA(Euler(), DampedStepRatio(0.5))),
    "BDIA(Euler, DampedStepRatio(1))": (1, lambda: BDIA(Euler(), DampedStepRatio(1.0))),
    "BDIA(Euler, DampedStepRatio(0.5, 2))": (1, lambda: BDIA(Euler(), DampedStepRatio(0.5, 2))),
    "EDICT": (2, EDICT),
    "McCallum-Foster (Euler)": (2, lambda: McCallumFoster(Euler())),
    "Rex (Euler)": (2, lambda: Rex(Euler())),
    "fixed point (DDIM)": (1, lambda: FixedPointInversion(DDIM(), tolerance=1e-4)),
}
"""Evaluations a step each way (of a fixed point: down), and the solver."""
LEARNED: Final = {
    "BDIA(Euler), calibrated": Objective(),
    "BDIA(Euler), calibrated for consistency": Objective(encoding=0.0, consistency=1.0),
}
"""What the weights of BDIA are learned for."""
NAMES: Final = (*SOLVERS, *LEARNED)


def eight_bits(images: Tensor) -> Tensor:
    """Pictures as a file holds them, uint8 ``(B, 32, 32, 3)``."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def jpeg(quality: int) -> Callable[[Tensor], Tensor]:
    """A JPEG file in between."""

    def through(pictures: Tensor) -> Tensor:
        back = []
        for picture in pictures.numpy():
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "JPEG", quality=quality)
            back.append(np.asarray(Image.open(file)))
        return torch.as_tensor(np.stack(back))

    return through


def resized(size: int) -> Callable[[Tensor], Tensor]:
    """Another size in between."""

    def through(pictures: Tensor) -> Tensor:
        back = [
            np.asarray(
                Image.fromarray(picture)
                .resize((size, size), Image.Resampling.BICUBIC)
                .resize(picture.shape[:2], Image.Resampling.BICUBIC)
            )
            for picture in pictures.numpy()
        ]
        return torch.as_tensor(np.stack(back))

    return through


ATTACKS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "8 bits": lambda pictures: pictures,
    "JPEG 90": jpeg(90),
    "JPEG 70": jpeg(70),
    "64 pixels": resized(64),
    "24 pixels": resized(24),
}


class Bench:
    """The network, the labels and the figures found so far."""

    def __init__(self, network: Path, kept: Kept, count: int) -> None:
        same(kept, network=weights(network), count=count)
        self.network, self.kept, self.count = load_edm(network), kept, count
        self.emoji: Emoji = load_emoji()

    def figures(self, name: str, evaluations: int, guidance: float) -> None:
        """The two figures after each attack, unless another process is at them."""
        cost, make = SOLVERS.get(name, (1, None))
        sigmas = karras_sigmas(evaluations // cost + 1, BOTTOM, append_zero=False)
        if make is None:
            network, emoji, of = self.network, self.emoji, f"watermark|{name}"
            solver = learned(self.kept, of, network, emoji, sigmas, objective=LEARNED[name])
            if solver is None:
                return
        else:
            solver = make()
        key = key_of(name, evaluations, guidance)
        self.kept(key, lambda: shown(key, self._run(solver, sigmas, guidance)))

    def _run(self, solver: Any, sigmas: Tensor, guidance: float) -> dict[str, list[float]]:
        rows = np.random.default_rng(11).choice(len(self.emoji.labels), self.count, replace=False)
        labels = torch.as_tensor(self.emoji.labels[rows])
        noise = torch.randn(len(rows), 3, 32, 32, generator=torch.Generator().manual_seed(12))
        guided = ClassifierFreeGuidance(self.network, guidance)
        found = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # contestants are run as they are
            # Pictures come from the solver's own sampler; that of DDIM inversion is DDIM.
            start = noise * sigmas[0].float()
            pictures = eight_bits(
                embed(solver, guided, start, sigmas, KEY, source=towards(labels)).x
            )
            for attack, change in ATTACKS.items():
                seen = change(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
                detection = detect(solver, self.network, seen, sigmas, KEY)
                bits = (detection.agreeing / detection.elements).mean()
                caught = (detection.log10_p_value <= math.log10(FALSE_ALARMS)).double().mean()
                found[attack] = [float(bits), float(caught)]
        return found


def key_of(name: str, evaluations: int, guidance: float) -> str:
    """The key of figures."""
    return f"{name}|{evaluations}|{guidance:g}"


def report(found: Mapping[str, Any], evaluations: Sequence[int], folder: Path) -> None:
    """The tables; a cell without figures is empty."""
    for guidance in GUIDANCE:
        lines = []
        for n in evaluations:
            for name in NAMES:
                figures = found.get(key_of(name, n, guidance), {})
                pairs = [figures.get(attack) for attack in ATTACKS]
                cells = [f"{pair[0]:.1%} / {pair[1]:.0%}" if pair else "" for pair in pairs]
                lines.append([name, str(n), *cells])
        heads = ["", "evaluations", *ATTACKS]
        write(folder / f"emoji_watermark_{guidance:g}.md", table(heads, lines))


def main() -> None:
    """The command line."""
    parser = options(__doc__, "emoji_watermark", count=24)
    parser.add_argument("--network", type=Path, default=WEIGHTS)
    parser.add_argument("--evaluations", nargs="+", type=int, default=EVALUATIONS)
    args = parser.parse_args()
    kept = Kept(args.results)
    if args.write:
        report(kept.read(), args.evaluations, args.tables)
        return
    bench = Bench(args.network, kept, args.count)
    for guidance in GUIDANCE:
        for evaluations in args.evaluations:
            for name in NAMES:
                bench.figures(name, evaluations, guidance)


if __name__ == "__main__":
    main()
