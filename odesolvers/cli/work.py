"""What the commands do: functions from settings to values, without a word on the screen."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import BDIA, Calibrated, InversionWarning, Solution, State, calibrate
from ..models import ClassifierFreeGuidance
from . import choices
from .choices import Model, Options, Settings


@dataclass(frozen=True)
class Setup:
    """A model on its device, and the noise levels to run it on."""

    model: Model
    sigmas: Tensor
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, options: Options) -> tuple[Setup, Settings]:
        """The model, the grid and the solver that `options` ask for."""
        settings, sigmas = options.settings(), options.sigmas()
        settings.solver()  # a bad name should be heard of before a model is loaded
        return cls._load(settings, sigmas, options, options.torch_dtype()), settings

    @classmethod
    def restore(
        cls, file: Path, options: Options, *, relabel: bool = False
    ) -> tuple[Setup, Settings, State]:
        """The state in `file`, and the model, the grid and the solver that made it."""
        state, notes = State.load_with_notes(file, options.torch_device())
        settings = options.settings_of(notes, relabel=relabel)
        settings.solver()
        dtype = options.torch_dtype(state.current)
        setup = cls._load(settings, options.sigmas_of(state), options, dtype)
        return setup, settings, state

    @classmethod
    def _load(
        cls, settings: Settings, sigmas: Tensor, options: Options, dtype: torch.dtype
    ) -> Setup:
        device = options.torch_device()
        model = choices.pick("model", settings.model, choices.MODELS).load()
        model.denoiser.to(device)
        return cls(model, sigmas, device, dtype)

    def noise(self, count: int, seed: int) -> Tensor:
        """`count` draws at the first noise level: the same ones on every device, in every dtype."""
        if count < 1:
            raise ValueError(f"--count must be 1 or more, got {count}")
        generator = torch.Generator().manual_seed(seed)
        shape = (count, *self.model.images.shape[1:])
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (noise * self.sigmas[0]).to(self.device, self.dtype)

    def extra_args(self, labels: tuple[int, ...] | None, count: int) -> dict[str, Any]:
        """The denoiser's arguments for `count` images, through the labels in turn."""
        if labels is None:
            return {}
        if self.model.labels is None:
            raise ValueError("this model has no classes: leave out --labels")
        known = sorted(set(self.model.labels.tolist()))
        for label in labels:
            if label not in known:
                raise ValueError(f"the model's labels are {known[0]} to {known[-1]}, got {label}")
        turns = torch.tensor([labels[k % len(labels)] for k in range(count)])
        return {"class_labels": turns.to(self.device)}

    def real_images(self, labels: tuple[int, ...] | None, count: int, seed: int) -> Tensor:
        """`count` real images at random, of the labels in turn where there are any."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.model.images), generator=generator)
        if labels is not None and self.model.labels is not None:
            shuffled = self.model.labels[order]
            of_label = {label: order[shuffled == label] for label in labels}
            turns = ((labels[k % len(labels)], k // len(labels)) for k in range(count))
            order = torch.stack([of_label[label][k % len(of_label[label])] for label, k in turns])
        chosen = self.model.images[order[torch.arange(count) % len(order)]]
        return chosen.to(self.device, self.dtype)

    def conditioned(self, settings: Settings, count: int) -> tuple[nn.Module, dict[str, Any]]:
        """The denoiser under the labels and the guidance of `settings`, and its arguments."""
        extra = self.extra_args(settings.labels, count)
        if settings.guidance == 1.0:
            return self.model.denoiser, extra
        if self.model.unconditional is None or not extra:
            raise ValueError(
                "--guidance leads from no label to --labels: it needs labels, and a model that was "
                "trained without them as well"
            )
        none = torch.full_like(extra["class_labels"], self.model.unconditional)
        guided = ClassifierFreeGuidance(self.model.denoiser, settings.guidance)
        return guided, {"positive": extra, "negative": {"class_labels": none}}

    def at_last_level(self, images: Tensor) -> Tensor:
        """Clean images as states at the last noise level: with its noise, where that is not 0.

        A network knows pictures with the noise of that level, not without, and encodes those to
        what looks less like noise.
        """
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        return images.to(self.device, self.dtype) + (noise * self.sigmas[-1]).to(
            self.device, self.dtype
        )

    def held_out(self, settings: Settings, count: int, seed: int) -> tuple[Tensor, Settings]:
        """`count` real images, of the labels of `settings` where there are any, and their labels."""
        if self.model.labels is None:
            raise ValueError("this model has no classes: there is nothing to edit")
        if count < 1:
            raise ValueError(f"--count must be 1 or more, got {count}")
        images = self.real_images(settings.labels, count, seed)
        if settings.labels is None:
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(self.model.images), generator=generator)[:count]
            settings = replace(settings, labels=tuple(self.model.labels[order].tolist()))
        return images, settings

    def distances(self, samples: Tensor) -> Tensor:
        """From each sample to the nearest of the real images: root mean square over its pixels."""
        points, images = (x.flatten(1).double().cpu() for x in (samples, self.model.images))
        nearest: Tensor = torch.cdist(points, images).amin(1)
        return nearest / math.sqrt(points.shape[1])


@dataclass(frozen=True)
class RoundTrip:
    """Noise, its samples, the noise that comes back from their state, and its samples."""

    noise: Tensor
    samples: Tensor
    recovered: Tensor
    resampled: Tensor
    evaluations: tuple[int, int]
    seconds: float

    @property
    def error(self) -> float:
        """``|recovered - noise| / |noise|``."""
        return relative(self.recovered, self.noise)


@dataclass(frozen=True)
class Code:
    """Real images encoded on their own, without the pair of states that a run ends with."""

    mean: float
    std: float
    error: float
    """How far sampling from the code's state ends from the images, relative."""


@dataclass(frozen=True)
class Row:
    """What `compare` finds out about one solver."""

    settings: Settings
    trip: RoundTrip
    distances: Tensor
    code: Code


def round_trip(setup: Setup, solver: BDIA, noise: Tensor, extra: dict[str, Any]) -> RoundTrip:
    """Sample from `noise`, invert the state, and sample from the recovered noise alone."""
    denoiser, sigmas = setup.model.denoiser, setup.sigmas
    start = _now(setup.device)
    there = solver.sample(denoiser, noise, sigmas, extra_args=extra)
    back = solver.invert(denoiser, there.state, sigmas, extra_args=extra)
    seconds = _now(setup.device) - start
    again = solver.sample(denoiser, back.x, sigmas, extra_args=extra)
    return RoundTrip(noise, there.x, back.x, again.x, (there.nfe, back.nfe), seconds)


def encode(setup: Setup, solver: BDIA, images: Tensor, extra: dict[str, Any]) -> Code:
    """Invert lone images, and sample again from where they end."""
    denoiser, sigmas = setup.model.denoiser, setup.sigmas
    code = solver.invert(denoiser, images, sigmas, extra_args=extra)
    again = solver.sample(denoiser, code.state, sigmas, extra_args=extra)
    mean, std = latent(code.x, sigmas)
    return Code(mean, std, relative(again.x, images))


def compare(setup: Setup, settings: Iterable[Settings], count: int, seed: int) -> Iterator[Row]:
    """One row for each of `settings`: the same noise, the same real images."""
    noise = setup.noise(count, seed)
    for chosen in settings:
        extra = setup.extra_args(chosen.labels, count)
        images = setup.real_images(chosen.labels, count, seed)
        solver = chosen.solver()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InversionWarning)  # the rows say how far off it is
            trip = round_trip(setup, solver, noise, extra)
            code = encode(setup, solver, images, extra)
        yield Row(chosen, trip, setup.distances(trip.samples), code)


def every_solver(chosen: Settings) -> list[Settings]:
    """BDIA over every approximator with γ = 1 and with the step ratio; `chosen` among them."""
    settings = [
        replace(chosen, approximator=name, gamma=gamma)
        for gamma in ("1", "step-ratio-2")
        for name in choices.APPROXIMATORS
    ]
    solvers = [other.solver() for other in settings]
    return settings if chosen.solver() in solvers else [*settings, chosen]


def latent(x: Tensor, sigmas: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of a state at the first noise level, in its units: 0 and 1."""
    z = x.double() / sigmas[0]
    return z.mean().item(), z.std().item() if z.numel() > 1 else 0.0


def relative(x: Tensor, reference: Tensor) -> float:
    """``|x - reference| / |reference|``."""
    error: float = ((x.double() - reference.double()).norm() / reference.double().norm()).item()
    return error


def go(setup: Setup, settings: Settings, start: Tensor | State, *, down: bool) -> Solution:
    """Sample from `start`, or invert it, with a progress bar."""
    tensor = start.current if isinstance(start, State) else start
    denoiser, extra = setup.conditioned(settings, tensor.shape[0])
    solver = settings.solver()
    run = solver.sample if down else solver.invert
    return run(denoiser, start, setup.sigmas, extra_args=extra, progress=True)


@dataclass(frozen=True)
class Edit:
    """Images encoded under one label, and sampled from their code under others."""

    images: Tensor
    code: Tensor
    back: Tensor
    edits: list[Tensor]
    """One for each target label, of the shape of `images`."""

    nfe: int


def calibrated(
    setup: Setup, settings: Settings, count: int, seed: int, max_runs: int
) -> Calibrated:
    """Weights for the approximator of `settings`, learnt on `count` draws of noise."""
    noise = setup.noise(count, seed)
    denoiser, extra_args = setup.conditioned(settings, count)
    base = settings.solver().approximator
    return calibrate(
        denoiser,
        noise,
        setup.sigmas,
        base=base,
        extra_args=extra_args,
        max_runs=max_runs,
        progress=True,
    )


def edit(
    setup: Setup, settings: Settings, images: Tensor, targets: Sequence[int], guidance: float
) -> Edit:
    """Invert `images` under ``settings.labels``, and sample under each of `targets`.

    Guidance above 1 leads away from the prediction under the own label of an image.
    """
    solver, sigmas, count = settings.solver(), setup.sigmas, len(images)
    denoiser = setup.model.denoiser
    own = setup.extra_args(settings.labels, count)
    code = solver.invert(denoiser, images, sigmas, extra_args=own, progress=True)
    back = solver.sample(denoiser, code.state, sigmas, extra_args=own, progress=True)
    nfe, edits = code.nfe + back.nfe, []
    guided = ClassifierFreeGuidance(denoiser, guidance)
    for target in targets:
        branches = {"positive": setup.extra_args((target,), count), "negative": own}
        edited = solver.sample(guided, code.state, sigmas, extra_args=branches, progress=True)
        edits.append(edited.x)
        nfe += edited.nfe
    return Edit(images, code.x, back.x, edits, nfe)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
