"""The setup of a run and the comparison of solvers, with nothing printed."""

from __future__ import annotations

import math
import textwrap
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import InversionWarning, Solution, State, parse
from ..extend import Solver
from ..models import ClassifierFreeGuidance
from ..typed import optional, read, whole
from . import choices

Labels = tuple[int, ...] | None


@dataclass
class Setup:
    """Everything that a run needs beside its start: a model and its condition, a solver, a grid."""

    name: str  # of the model
    solver: Solver
    sigmas: Tensor
    labels: Labels  # of the images, in turn
    guidance: float  # from no label to `labels`
    device: torch.device
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.model = choices.MODELS[self.name]
        denoiser, self.images, self.classes = self.model.load()
        self.denoiser = denoiser.to(self.device)

    @classmethod
    def of(cls, args: Namespace, solver: Solver | None = None, *, sampled: bool = False) -> Setup:
        """The setup that the options ask for; `sampled` takes the model's defaults for sampling."""
        name = args.model or choices.default_model()
        model = choices.MODELS[name]
        suited = model.sampled if sampled else {}
        guidance = suited.get("guidance", 1.0) if args.guidance is None else args.guidance
        names = suited.get("labels") if args.labels is None else args.labels
        labels = None if names is None else model.labels(names)
        solver = solver or choices.solver(args) or parse(choices.DEFAULT)
        sigmas, dtype = choices.grid(args, model), getattr(torch, args.dtype or "float32")
        return cls(name, solver, sigmas, labels, guidance, args.device, dtype)

    @classmethod
    def restore(
        cls, args: Namespace, file: Path, *, relabel: bool = False
    ) -> tuple[Setup, State, Tensor]:
        """The setup of the run that saved `file`, its state, and the images in that.

        Options may repeat what the file says, and change the labels and the guidance if `relabel`.
        The run itself refuses a solver and a grid that are not those of the state.
        """
        state, notes = State.load_with_notes(file, args.device)
        name = notes.get("model", args.model)
        if not isinstance(name, str) or name not in choices.MODELS:
            found = "no model" if name is None else f"the model {str(name)[:80]}"
            known = " or ".join(choices.MODELS)
            raise ValueError(f"{file} names {found}; the commands need --model {known}")
        model = choices.MODELS[name]
        stored: dict[str, Any] = {"model": name, "labels": None, "guidance": 1.0} | notes
        try:
            stored["labels"] = read(stored["labels"], optional([whole(0, len(model.names) - 1)]))
            stored["guidance"] = choices.finite(stored["guidance"])
            if stored["labels"] == ():
                raise ValueError("it names no label")
        except ValueError as error:
            raise ValueError(
                f"{file} has notes that do not suit the model {name}: {error}"
            ) from error
        given = {"model": args.model, "guidance": args.guidance}
        given["labels"] = None if args.labels is None else model.labels(args.labels)
        changed = {k: v for k, v in given.items() if v is not None and v != stored[k]}
        for option, value in changed.items():
            if option in notes and not (relabel and option != "model"):
                raise ValueError(
                    f"{file} was made with {option} = {stored[option]}, not {value}: it leads back "
                    f"under the same only; leave out --{option}"
                )
        dtype = state.current.dtype if state.side is None else state.side.dtype
        if args.dtype is not None and getattr(torch, args.dtype) is not dtype:
            raise ValueError(f"{file} holds {dtype}, not {args.dtype}: leave out --dtype")
        solver, images = choices.solver(args) or parse(state.solver), state.current
        if state.side is not None:
            images = solver.arithmetic.load(images, dtype)
        typed = any(getattr(args, k) is not None for k in ("grid", "steps", *choices.LEVELS))
        levels = choices.grid(args, model) if typed else state.sigmas
        sigmas, now = torch.as_tensor(levels, dtype=torch.float64), stored | changed
        setup = cls(name, solver, sigmas, now["labels"], now["guidance"], args.device, dtype)
        if images.shape[1:] != setup.images.shape[1:]:
            shapes = f"{tuple(images.shape[1:])}, {name} are {tuple(setup.images.shape[1:])}"
            raise ValueError(f"{file} holds states of shape {shapes}: give the model that made it")
        return setup, state.fork() if changed else state, images

    def notes(self) -> dict[str, Any]:
        """The settings that `restore` needs and a state does not hold."""
        return {"model": self.name, "labels": self.labels, "guidance": self.guidance}

    def noise(self, count: int, seed: int) -> Tensor:
        """`count` draws at the first level: the same ones on every device, in every dtype."""
        generator = torch.Generator().manual_seed(seed)
        shape = (count, *self.images.shape[1:])
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (noise * self.sigmas[0]).to(self.device, self.dtype)

    def real_images(self, count: int, seed: int) -> tuple[Tensor, tuple[int, ...]]:
        """`count` real images at random, of `labels` in turn if there are any, and their labels."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.images), generator=generator)
        if self.labels is not None:
            members = [order[self.classes[order] == label] for label in self.labels]
            turns = [(members[k % len(members)], k // len(members)) for k in range(count)]
            order = torch.stack([of_label[k % len(of_label)] for of_label, k in turns])
        chosen = order[torch.arange(count) % len(order)]
        return self.images[chosen], tuple(self.classes[chosen].tolist())

    def at_last_level(self, images: Tensor) -> Tensor:
        """Clean images as states at the last level, with its noise if that is not 0.

        A network was trained on images with that noise: without it, codes look less like noise.
        """
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        states = images.double() + noise.double() * self.sigmas[-1]
        return states.to(self.device, self.dtype)

    def extra_args(self, labels: Labels, count: int) -> dict[str, Any]:
        """The denoiser's arguments for `count` images, with `labels` in turn."""
        if labels is None:
            return {}
        turns = [labels[k % len(labels)] for k in range(count)]
        return {"class_labels": torch.tensor(turns, device=self.device)}

    def condition(self, count: int) -> tuple[nn.Module, dict[str, Any]]:
        """The denoiser under the guidance, and its arguments for `count` images."""
        extra = self.extra_args(self.labels, count)
        if self.guidance == 1.0:
            return self.denoiser, extra
        if self.model.unconditional is None or not extra:
            raise ValueError(
                "--guidance leads from no label to --labels: it needs labels, and a model that was "
                f"trained without them as well; got labels = {self.labels} and {self.name}"
            )
        none = torch.full_like(extra["class_labels"], self.model.unconditional)
        guided = ClassifierFreeGuidance(self.denoiser, self.guidance)
        return guided, {"positive": extra, "negative": {"class_labels": none}}

    def run(self, start: Tensor | State, *, down: bool) -> Solution:
        """Samples from `start`, or inverts it, with a progress bar."""
        count = len(start.current if isinstance(start, State) else start)
        denoiser, extra_args = self.condition(count)
        walk = self.solver.sample if down else self.solver.invert
        return walk(denoiser, start, self.sigmas, extra_args=extra_args, progress=True)

    def distance(self, samples: Tensor) -> float:
        """The median distance of samples to their nearest real image, root mean square per pixel."""
        points, images = (x.flatten(1).double().cpu() for x in (samples, self.images))
        median: float = torch.cdist(points, images).amin(1).median().item()
        return median / math.sqrt(points.shape[1])

    def latent(self, code: Tensor) -> tuple[float, float]:
        """Mean and standard deviation of a code over the first level: those of noise are 0 and 1."""
        z = code.double() / self.sigmas[0]
        return z.mean().item(), z.std().item() if z.numel() > 1 else 0.0


@dataclass(frozen=True)
class Row:
    """The measurements of one solver; errors are relative."""

    section: str
    name: str  # in the section
    solver: Solver
    noise: Tensor
    samples: Tensor
    recovered: Tensor
    resampled: Tensor
    evaluations: tuple[int, int]
    seconds: float
    error: float  # of the recovered noise
    distance: float  # see `Setup.distance`
    latent: tuple[float, float]  # of real images encoded on their own
    again: float  # error of those images, sampled from the state of their encoding


def compared(chosen: Solver) -> list[tuple[str, str, Solver]]:
    """The solvers to compare, `chosen` among them: section, name, solver."""
    methods, others = choices.METHODS.split(), choices.OTHERS.split()
    found = [
        (f"gamma={rule}", method, parse(f"BDIA({method}, {rule})"))
        for rule in choices.RULES.split()
        for method in methods
    ]
    found += [("other solvers", text, parse(text)) for text in others]
    known = chosen in [solver for _, _, solver in found]
    return found if known else [*found, ("--solver", short(chosen), chosen)]


def compare(
    setup: Setup, solvers: list[tuple[str, str, Solver]], count: int, seed: int
) -> Iterator[Row]:
    """A row for each of `solvers`, from the same noise and the same real images."""
    noise, sigmas = setup.noise(count, seed), setup.sigmas
    images = setup.at_last_level(setup.real_images(count, seed)[0])
    denoiser, extra = setup.condition(count)
    for section, name, solver in solvers:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InversionWarning)  # the row says how far off it is
            start = _now(setup.device)
            there = solver.sample(denoiser, noise, sigmas, extra_args=extra)
            back = solver.invert(denoiser, there.state, sigmas, extra_args=extra)
            seconds = _now(setup.device) - start
            resampled = solver.sample(denoiser, back.x, sigmas, extra_args=extra).x
            code = solver.invert(denoiser, images, sigmas, extra_args=extra)
            again = solver.sample(denoiser, code.state, sigmas, extra_args=extra).x
        tensors, calls = (noise, there.x, back.x, resampled), (there.nfe, back.nfe)
        error, distance = relative(back.x, noise), setup.distance(there.x)
        latent, miss = setup.latent(code.x), relative(again, images)
        yield Row(section, name, solver, *tensors, calls, seconds, error, distance, latent, miss)


def relative(x: Tensor, reference: Tensor) -> float:
    """``|x - reference| / |reference|``"""
    error: float = ((x.double() - reference.double()).norm() / reference.double().norm()).item()
    return error


def short(solver: Solver) -> str:
    """The expression of a solver in 60 characters at most."""
    return textwrap.shorten(repr(solver), 60, placeholder=" ...")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
