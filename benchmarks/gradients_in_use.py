"""Three uses of gradients through a sampler, with pictures: ``python -m benchmarks.gradients_in_use``.

On the emoji, over all steps of BDIA over Euler:

- start: the noise is optimised until the sample agrees with the half of a drawing that is known;
- condition: the mix of labels is found that made given pictures from known noise;
- weights: the network is tuned to draw emoji that a classifier can name, and is judged on other noise,
  also by the kind of the nearest drawing of the training set.

Writes ``docs/images/gradients_{start,condition,weights}.png`` and ``docs/tables/gradients_in_use.md``,
with the memory and the time of one step of the first two, each from a process of its own. Takes a
quarter of an hour on one idle core; arguments name parts: start, condition, weights, memory.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from odesolvers import BDIA, Euler, StepRatio, karras_sigmas
from odesolvers.models import emoji_drawings, emoji_groups, emoji_labels, load_emoji

from .common import IMAGES, TABLES, machine, table, write
from .emoji.classifier import load_classifier
from .emoji.data import load_emoji as load_drawings
from .gradients import KINDS, measured, warm_up

SOLVER: Final = BDIA(Euler(), StepRatio(1))
SIGMAS: Final = karras_sigmas(13, 0.02, 80.0, append_zero=False)

network = load_emoji()  # frozen; another denoiser of pictures with labels goes here
SHAPE: Final = (3, 32, 32)
HALVES: Final = (
    "CRYING CAT FACE",
    "FACE WITH DIAGONAL MOUTH",
    "BEARDED PERSON",
    "CROWN",
    "SHORTCAKE",
    "ANCHOR",
)
"""Motifs of which Noto's drawing was withheld from the training."""
SUBGROUPS: Final = tuple(sorted(name for names in emoji_groups().values() for name in names))
WANTED: Final = ("cat-face", "face-smiling", "hand-fingers-open", "heart", "person", "time")


def sampled(kind: str, denoiser: Callable[..., Tensor], x: Tensor, **conditions: Any) -> Tensor:
    """Samples with a gradient, by one of `KINDS`."""

    def checkpointed(*arguments: Tensor, **named: Any) -> Tensor:
        return checkpoint(denoiser, *arguments, use_reentrant=False, **named)  # type: ignore[no-any-return]

    return SOLVER.sample(
        checkpointed if kind == "checkpoint" else denoiser,
        x,
        SIGMAS,
        extra_args=conditions,
        differentiable="reversible" if kind == "reversible" else True,
    ).x


def noise(n: int, seed: int) -> Tensor:
    """Starts of `n` samples, of deviation 1."""
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


class Start:
    """The noise, kept at its length, for samples that agree with `known` parts of a picture."""

    steps, rate = 50, 0.05

    def __init__(self) -> None:
        drawings = emoji_drawings()
        rows = [2 * drawings.names.index(name) for name in HALVES]
        self.picture, self.labels = drawings.images[rows], drawings.labels[rows]
        self.known = torch.zeros(SHAPE[-2:])
        self.known[: SHAPE[1] // 2] = 1.0
        self.z = noise(len(rows), seed=0).requires_grad_()
        self.variables = [self.z]

    def samples(self, kind: str) -> Tensor:
        length = self.z.flatten(1).norm(dim=1)[:, None, None, None]
        x = self.z / length * self.z[0].numel() ** 0.5  # where noise is, as in DOODL
        return sampled(kind, network, SIGMAS[0].float() * x, class_labels=self.labels)

    def loss(self, samples: Tensor) -> Tensor:
        return (self.known * (samples - self.picture)).square().mean()


class Condition:
    """The mix of all subgroups that made `pictures` from known noise, by its logits."""

    steps, rate = 30, 0.3

    def __init__(self) -> None:
        self.z, self.label = noise(4, seed=0), SUBGROUPS.index("cat-face")
        self.rows = emoji_labels(SUBGROUPS)
        with torch.no_grad():
            true = {"class_labels": self.rows[self.label].expand(4, -1)}
            start = SIGMAS[0].float() * self.z
            self.pictures = SOLVER.sample(network, start, SIGMAS, extra_args=true).x
        self.logits = torch.zeros(len(SUBGROUPS), requires_grad=True)
        self.variables = [self.logits]

    def samples(self, kind: str) -> Tensor:
        labels = (self.logits.softmax(0) @ self.rows).expand(4, -1)
        return sampled(kind, network, SIGMAS[0].float() * self.z, class_labels=labels)

    def loss(self, samples: Tensor) -> Tensor:
        return (samples - self.pictures).square().mean()


class Weights:
    """All weights of the network, for samples of `WANTED` to be named as such by a classifier."""

    steps, rate = 40, 1e-4

    def __init__(self) -> None:
        self.tuned = load_emoji().requires_grad_(True)
        self.emoji = load_drawings()
        self.classifier = load_classifier(self.emoji)
        self.true = torch.tensor([self.emoji.subgroups.index(name) for name in WANTED])
        self.variables = list(self.tuned.parameters())
        self.generator = torch.Generator().manual_seed(1)

    def samples(self, kind: str) -> Tensor:
        z = torch.randn(len(WANTED), *SHAPE, generator=self.generator)
        return sampled(kind, self.tuned, SIGMAS[0].float() * z, class_labels=emoji_labels(WANTED))

    def loss(self, samples: Tensor) -> Tensor:
        return F.cross_entropy(self.odds(samples), self.true)

    def odds(self, samples: Tensor) -> Tensor:
        """The logarithms of the odds of all subgroups, by the classifier."""
        subgroup: Tensor = self.classifier(samples.clamp(-1, 1))[2]
        return subgroup

    def nearest(self, samples: Tensor) -> Tensor:
        """The subgroup of the drawing of the training set that is closest to each sample."""
        rows = np.flatnonzero(~self.emoji.held_out)
        distances = torch.cdist(samples.flatten(1), self.emoji.on_ground(rows).flatten(1))
        return torch.as_tensor(self.emoji.subgroup[rows])[distances.argmin(1)]


USES: Final = {"start": Start, "condition": Condition}
"""Those that are measured; `benchmarks.gradients` measures the gradient of the weights."""


def step(use: Any, optimizer: torch.optim.Optimizer, kind: str) -> tuple[Tensor, float]:
    """One step of the optimisation; the samples before it, and their loss."""
    samples = use.samples(kind)
    loss = use.loss(samples)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return samples.detach(), loss.item()


def optimise(use: Any, shown: tuple[int, ...]) -> tuple[dict[str, Tensor], list[float]]:
    """Samples before the steps `shown`, by the titles of their rows, and all losses."""
    optimizer = torch.optim.Adam(use.variables, lr=use.rate)
    rows, losses, start = {}, [], time.perf_counter()
    for k in range(use.steps + 1):
        samples, loss = step(use, optimizer, "reversible")
        losses.append(loss)
        if k in shown:
            rows[f"step {k}"] = samples
    seconds = time.perf_counter() - start
    print(f"{type(use).__name__}: loss {losses[0]:.3g} -> {losses[-1]:.3g} in {seconds:.0f} s")
    return rows, losses


def draw(rows: dict[str, Tensor], axes: Any) -> None:
    """Pictures as rows of one image, each with its title at the left."""
    lines = [torch.cat(list(F.pad(row, (1, 1, 1, 1), value=1.0)), 2) for row in rows.values()]
    image = torch.cat(lines, 1).clamp(-1, 1).add(1).div(2)
    axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    height = SHAPE[1] + 2
    axes.set_yticks([height * (k + 0.5) for k in range(len(rows))], list(rows))
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def picture_of_start() -> None:
    """The known half, and what samples make of it."""
    use = Start()
    rows, _ = optimise(use, (0, 10, 25, use.steps))
    figure, axes = plt.subplots(figsize=(5.2, 4.9), layout="constrained")
    draw({"drawing": use.picture, "known": use.picture * use.known, **rows}, axes)
    figure.savefig(IMAGES / "gradients_start.png", dpi=90)


def picture_of_condition() -> None:
    """Given pictures, samples of the same noise, and the weights of the labels."""
    use = Condition()
    mixes: list[Tensor] = []
    use.logits.register_hook(lambda _: mixes.append(use.logits.detach().softmax(0)))
    rows, _ = optimise(use, (0, 5, 10, use.steps))
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 3.5), layout="constrained")
    draw({"given": use.pictures, **rows}, left)
    for k, name in enumerate(SUBGROUPS):
        true = k == use.label
        right.plot([mix[k] for mix in mixes], color="C0" if true else "0.8", zorder=2 + true)
        if true:
            right.text(use.steps, mixes[-1][k], f" {name}", color="C0", va="center")
    right.set(xlabel="step", ylabel="weight of each label", ylim=(0, 1))
    right.spines[["top", "right"]].set_visible(False)
    figure.savefig(IMAGES / "gradients_condition.png", dpi=90)
    print(f"weight of {SUBGROUPS[use.label]}: {mixes[-1][use.label]:.2f}")


def picture_of_weights() -> None:
    """Samples of one noise before and after, and the shares that are named as their labels."""
    use, count = Weights(), 16
    labels, true, z = (
        emoji_labels(WANTED * count),
        use.true.repeat(count),
        noise(6 * count, seed=50),
    )

    def judged() -> tuple[Tensor, str]:
        x = torch.cat(
            [
                SOLVER.sample(
                    use.tuned, SIGMAS[0].float() * part, SIGMAS, extra_args={"class_labels": which}
                ).x
                for part, which in zip(z.split(24), labels.split(24), strict=True)
            ]
        )
        named = (use.odds(x).argmax(1) == true).float().mean()
        near = (use.nearest(x) == true).float().mean()
        return x, f"by the classifier {named:.0%}, by the nearest drawing {near:.0%}"

    before, share_before = judged()
    optimise(use, ())
    after, share_after = judged()
    print(f"named as their label, before: {share_before}; after: {share_after}")
    figure, axes = plt.subplots(2, 1, figsize=(7.6, 3.4), layout="constrained")
    for one, x, share in zip(
        axes, (before, after), (f"before: {share_before}", f"after: {share_after}"), strict=True
    ):
        # Columns are of one label, three for each.
        order = torch.arange(6 * count).reshape(count, 6).T
        draw({str(k): x[order[:, 3 * k : 3 * k + 3].flatten()] for k in range(3)}, one)
        one.set_yticks([])
        one.set_title(share, fontsize=9, loc="left")
    width = SHAPE[2] + 2
    axes[1].set_xticks([width * (3 * k + 1.5) for k in range(6)], WANTED)
    figure.savefig(IMAGES / "gradients_weights.png", dpi=80)


def resident() -> int:
    """The most kilobytes that this process has held since it was last asked to forget them."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0])


def measure(name: str, kind: str) -> dict[str, float]:
    """Megabytes of one step in this process, above a call of the network; processor time of another."""
    torch.set_num_threads(1)
    use = USES[name]()
    optimizer = torch.optim.Adam(use.variables, lr=use.rate)
    warm_up()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of reading the drawings
    with torch.no_grad():
        network(noise(6, seed=0), torch.ones(6))
    before = resident()
    step(use, optimizer, kind)
    peak = resident()
    start = time.process_time()
    step(use, optimizer, kind)
    return {"megabytes": (peak - before) / 1024, "seconds": time.process_time() - start}


def memory() -> None:
    """Print the table of memory and time, and write it."""
    rows = []
    for name in USES:
        found = {kind: measured("benchmarks.gradients_in_use", name, kind) for kind in KINDS}
        for kind, title in KINDS.items():
            ratio = found[kind]["seconds"] / found["checkpoint"]["seconds"]
            rows.append([name, title, f"{found[kind]['megabytes']:.0f}", f"{ratio:.2f}"])
            print(rows[-1], flush=True)
    header = ["optimised", "gradient", "MB", "time / checkpointed"]
    write(TABLES / "gradients_in_use.md", f"{machine()}.\n\n{table(header, rows, words=(0, 1))}\n")


def main() -> None:
    """All pictures and the table, or the one that is named."""
    parts = {
        "start": picture_of_start,
        "condition": picture_of_condition,
        "weights": picture_of_weights,
        "memory": memory,
    }
    for part in sys.argv[1:] or parts:
        parts[part]()


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[2] in KINDS:
        print(json.dumps(measure(*sys.argv[1:])))
    else:
        main()
