"""The figure of README: digits from noise, the noise recovered from them, and the digits again.

python -m benchmarks.figures.round_trip          # seconds; writes roundtrip.png
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib.figure import Figure
from torch import Tensor

from odesolvers import BDIA, DampedStepRatio, Euler, karras_sigmas
from odesolvers.models import IdealDenoiser, load_digits

from ..common import IMAGES

INK, ACCENT = "#1d2433", "#c2410c"


def main() -> None:
    """Runs the round trip and draws it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=IMAGES / "roundtrip.png", help="file to write")
    path: Path = parser.parse_args().out
    path.parent.mkdir(parents=True, exist_ok=True)
    solver, sigmas = BDIA(Euler(), gamma=DampedStepRatio()), karras_sigmas(18)
    denoiser = IdealDenoiser(load_digits()[0])
    generator = torch.Generator().manual_seed(0)
    noise = (80 * torch.randn(36, 1, 8, 8, generator=generator, dtype=torch.float64)).float()
    there = solver.sample(denoiser, noise, sigmas)
    back = solver.invert(denoiser, there.state, sigmas)
    again = solver.sample(denoiser, back.x, sigmas)
    calls = there.nfe, back.nfe
    draw(noise / 80, there.x, back.x / 80, again.x, calls).savefig(path)
    print(f"wrote {path}: 36 digits from noise, the noise found again, and the digits again")


def draw(
    noise: Tensor, samples: Tensor, recovered: Tensor, again: Tensor, calls: tuple[int, int]
) -> Figure:
    """Four panels in the order of the run, and the two differences."""
    title = "From noise to digits and back: BDIA(Euler(), gamma=DampedStepRatio())"
    gaps = [difference(recovered, noise, "(3 − 1)"), difference(again, samples, "(4 − 2)")]
    panels: list[tuple[Tensor, str, str, str]] = [
        (noise / 3, "Noise", "1", "gray"),
        (recovered / 3, "Recovered noise", "3", "gray"),
        (*gaps[0], "RdBu_r"),
        (samples, "Sampled digits", "2", "gray"),
        (again, "Sampled again", "4", "gray"),
        (*gaps[1], "RdBu_r"),
    ]
    figure = Figure(figsize=(12.0, 8.6), dpi=110, facecolor="white")
    figure.text(0.02, 0.955, title, fontsize=16, weight="bold", color=INK, va="center")
    axes = figure.subplots(2, 3)
    figure.subplots_adjust(left=0.02, right=0.98, top=0.865, bottom=0.02, wspace=0.3, hspace=0.27)
    for ax, (images, name, note, colours) in zip(axes.flat, panels, strict=True):
        ax.imshow(sheet(images), cmap=colours, vmin=-1, vmax=1, interpolation="nearest")
        ax.set_axis_off()
        say(ax, 0.1 if note.isdigit() else 0.0, 1.06, name, fontsize=14)
        if note.isdigit():
            badge = {"boxstyle": "circle,pad=0.22", "facecolor": ACCENT, "edgecolor": "none"}
            bold = {"color": "white", "weight": "bold", "fontsize": 13, "ha": "center"}
            say(ax, 0.035, 1.06, note, bbox=badge, **bold)
        else:
            say(ax, 1.0, 1.06, note, ha="right", alpha=0.6)
    (first, third, _), (second, fourth, _) = axes
    for above, below in ((first, second), (third, fourth)):
        arrow(above, (0.88, -0.03), below, (0.88, 1.03))
        say(above, 0.84, -0.115, f"sample, {calls[0]} calls", ha="right", color=ACCENT)
    arrow(second, (1.05, 0.8), third, (-0.05, 0.2))
    say(second, 1.15, 0.62, f"invert,\n{calls[1]} calls", ha="center", color=ACCENT)
    return figure


def sheet(images: Tensor) -> Any:
    """36 images of 8 x 8 in rows of six, with a column of NaN between."""
    padded = torch.nn.functional.pad(images[:, 0].clamp(-1, 1), (0, 1, 0, 1), value=math.nan)
    return padded.reshape(6, 6, 9, 9).permute(0, 2, 1, 3).reshape(54, 54)[:-1, :-1].numpy()


def difference(a: Tensor, b: Tensor, name: str) -> tuple[Tensor, str, str]:
    """``a - b`` times the power of ten that makes it visible; its heading; its largest value."""
    gap = a.double() - b.double()
    power = max(0, math.floor(-math.log10(gap.abs().flatten().quantile(0.95).item())))
    heading = f"{name} × $10^{{{power}}}$"
    return gap * 10.0**power, heading, f"largest: {gap.abs().max().item():.0e}"


def arrow(tail: Any, start: tuple[float, float], head: Any, end: tuple[float, float]) -> None:
    """An arrow between places in two axes."""
    style = {"arrowstyle": "-|>", "mutation_scale": 18, "color": ACCENT, "linewidth": 2.0}
    ends = {"xycoords": head.transAxes, "textcoords": tail.transAxes}
    head.annotate("", end, start, arrowprops=style, annotation_clip=False, **ends)


def say(ax: Any, x: float, y: float, text: str, **style: Any) -> None:
    """Text at a place in axes."""
    default = {"color": INK, "fontsize": 12, "va": "center", "transform": ax.transAxes}
    ax.text(x, y, text, **(default | style))


if __name__ == "__main__":
    main()
