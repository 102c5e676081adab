"""The inputs of a command, and the model, the grid and the solver that its options ask for."""

from __future__ import annotations

import hashlib
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from tqdm import tqdm

import odesolvers as ode

from ..bundled import BUNDLED, Model
from ..extend import Solver
from ..opening import SHORT, open_model, solver_and_grid, solver_of
from ..pictures import fitted, load_images, proportional, to_picture
from ..results import Item, OtherSettings, Outputs, digest_of, files_in
from ..typed import optional, printable, read
from ..values import shown
from .outputs import say

GRID: Final = ("steps", "grid", "sigma_min", "sigma_max", "rho")
_ASIDE: Final = ("files", "out", "again", "batch", "count", "device")
"""Options on which a single result does not depend."""
_NOTES: Final = {
    "model": printable,
    "size": optional((int, int)),
    "prompt": optional(str),
    "negative": optional(str),
    "guidance": float,
}
"""What the notes of a state hold: the conditions of its run."""


@dataclass(frozen=True)
class Setup:
    """A model, a grid, a solver and the dtype of states; and the conditions of a run, see `_NOTES`."""

    model: Model
    sigmas: Tensor
    solver: Solver
    dtype: torch.dtype
    conditions: Mapping[str, Any]

    @property
    def ends(self) -> tuple[float, float]:
        """The first and the last level."""
        return float(self.sigmas[0]), float(self.sigmas[-1])

    @property
    def prompt(self) -> str | None:
        """The prompt, or None."""
        prompt: str | None = self.conditions["prompt"]
        return prompt

    def under(self, **changed: Any) -> Setup:
        """The same under other conditions."""
        return replace(self, conditions={**self.conditions, **changed})

    def guided(self, *prompts: str | None) -> tuple[Any, Any]:
        """The denoiser under guidance, and its arguments, for some prompts or for the own one.

        Raises:
            ValueError: if options would change nothing.
        """
        prompts = prompts or (self.prompt,)
        given, negative = self.conditions["guidance"], self.conditions["negative"]
        scale = self.model.scale(given, *prompts)
        if scale == 1 and negative is not None:
            raise ValueError("--negative changes nothing without guidance: give --guidance")
        if scale != 1 and negative is None and not any(prompts):
            raise ValueError("--guidance changes nothing without a prompt: give --prompt")
        return self.model.guided(prompts, scale, negative)


@dataclass(frozen=True)
class Input:
    """An input that is read: noise, a picture at the last level, ``(1, ...)``, or a state."""

    item: Item
    setup: Setup  # of a state, that which it was made with
    x: Any
    picture: Tensor | None = None  # in the size of the model, (1, C, H, W)
    size: tuple[int, ...] = ()  # height and width in its file
    changed: Mapping[str, Any] = field(default_factory=dict)  # conditions that options change


class Task:
    """A command at work: it opens a model once, and goes on after files that cannot be read."""

    outputs: Outputs

    def __init__(self, args: Namespace) -> None:
        self.args, self.total, self.skipped = args, 0, list[str]()
        self._open = lru_cache(maxsize=1)(open_model)
        self._cropped = False
        self._grid = {k: getattr(args, k) for k in GRID if getattr(args, k) is not None}

    @cached_property
    def setup(self) -> Setup:
        """The setup that the options ask for."""
        args, own = self.args, {name: getattr(self.args, name) for name in _NOTES}
        device = args.device or torch.device("cpu")
        model = self._open(args.model, device, args.network, args.size)
        solver, sigmas = solver_and_grid(model, args.solver, *self._asked())
        return Setup(model, sigmas, solver, args.dtype or model.dtype, {**own, "prompt": None})

    def _asked(self) -> tuple[int | None, str | None, dict[str, float]]:
        """The steps, the kind and the levels of the grid that the options ask for."""
        levels = {k: v for k, v in self._grid.items() if k not in ("steps", "grid")}
        return self.args.steps, self.args.grid, levels

    def refuse(self, options: str, reason: str) -> None:
        """Refuses options that are given and would change nothing."""
        for option in options.split():
            if option in self.args.given:
                raise ValueError(f"{_options([option])} {reason}")

    def inputs(self, kind: str) -> list[Item]:
        """The "pictures", the "states" or the "pictures and states" that the command names."""
        args, items = self.args, list[Item]()
        files = files_in(args.files, kind)
        self.total = len(files)
        if all(path.suffix == ".safetensors" for path in files):
            self.refuse("fit mask", "is for pictures, not for states")
        prompts, to = (in_turn(name, getattr(args, name), len(files)) for name in ("prompt", "to"))
        for path, *own in zip(files, prompts, to, strict=True):
            if ("states" if path.suffix == ".safetensors" else "pictures") not in kind:
                self.skipped.append(f"{path} is none of the {kind} that the command takes")
                continue
            several = [p for p, given in zip(own, (prompts, to), strict=True) if len({*given}) > 1]
            try:
                items.append(Item(path.stem, path, " ".join([digest_of(path), *several]), *own))
            except OSError as error:
                self._skip(error)
        if not items:
            self.end()  # which says why
        return items

    def results(self, items: Sequence[Item], sources: Sequence[Item] = ()) -> list[Item]:
        """Those of `items` that are to be made, of `sources` if not each of itself."""
        args, sources = self.args, sources or items
        settings: dict[str, Any] = {"command": args.prog.removeprefix("odesolvers ")}
        for key in sorted(args.options.difference(_ASIDE)):
            value = getattr(args, key)
            if key == "mask" and value is not None:
                value = digest_of(value)
            elif key == "solver":
                value = _plain(value)
            elif key == "compare":
                value = [_plain(name) for name in value]
            elif key == "key":  # which is no secret any more where it stands in a file
                value = hashlib.sha256(f"odesolvers {value}".encode()).hexdigest()
            elif key in ("prompt", "to") and value is not None and len(value) == 1:
                (value,) = value
            if value is not None:
                plain = isinstance(value, int | float | str | list | tuple)
                settings[key] = value if plain else str(value)
        if sources is not items:  # of other pictures, where one's own digests do not tell
            settings["pictures"] = " ".join(item.digest for item in sources)
        paths = [item.path for item in sources if item.path is not None]
        try:
            self.outputs = Outputs(args.out, items, paths, settings, again=args.again)
        except OtherSettings:
            if args.model in BUNDLED and not all(item.of_state for item in sources):
                for prompts in zip(*((item.prompt, item.to) for item in sources), strict=True):
                    self.setup.model.arguments(prompts)
            raise  # unless a setting cannot be used at all, which says more
        if done := len(items) - len(self.outputs.missing):
            say(f"{done} of {len(items)} are finished in {self.outputs.folder}")
        return self.outputs.missing

    def each(self, items: Sequence[Item], free: str = "") -> Iterator[Input]:
        """Reads inputs one after the other; of states, the conditions `free` may be changed."""
        if not all(item.of_state for item in items):
            setup = self.setup  # opened once, and before the bar
        for item in tqdm(items, desc=self.args.prog.split()[-1], unit="picture", disable=None):
            if item.path is None:
                x = setup.model.draw([int(item.name)], setup.ends[0], setup.dtype)
                yield Input(item, setup.under(prompt=item.prompt), x)
                continue
            try:
                found = self._state(item.path) if item.of_state else self._picture(item.path)
            except (OSError, ValueError) as error:  # of one file: the others are worked on
                self._skip(error)
                continue
            if item.of_state:
                yield self._as_made(item, *found, free)
            else:
                x = setup.model.enter(found[0], setup.ends[1], setup.dtype)
                yield Input(item, setup.under(prompt=item.prompt), x, *found)

    def _picture(self, path: Path) -> tuple[Any, Any]:
        """The picture in a file in the size of the model, and the size that it has there."""
        found, shape, fit = load_images(path), self.setup.model.shape, self.args.fit
        if len(found) != 1:
            raise ValueError(f"{path} holds {len(found)} pictures: save each as a file of its own")
        height, width = size = tuple(found.shape[2:])
        picture = fitted(found, shape, fit, path)
        if fit == "crop" and not self._cropped and not proportional(size, shape[1:]):
            self._cropped = True  # said once
            where = f"{path} is {width} x {height} pixels: the centre of such pictures is taken"
            tqdm.write(f"{where}; --fit pad takes all", file=sys.stderr)
        return picture, size

    def _state(self, path: Path) -> tuple[Any, Any]:
        """The state in a file, and its notes."""
        state, notes = ode.State.load_with_notes(path, self.args.device)
        try:
            return state, read(notes, _NOTES)
        except ValueError as error:
            raise ValueError(f"{path} was not saved by a command: {error}") from error

    def _skip(self, error: Exception) -> None:
        self.skipped.append(shown(" ".join(str(error).split()), 500))

    def _as_made(self, item: Item, state: ode.State, stored: Mapping[str, Any], free: str) -> Input:
        """A state with the model, grid and solver that it was made with; refuses any others."""
        args = self.args
        if "model" not in args.given and stored["model"] not in BUNDLED:
            # A file does not choose which code is run.
            made = f"{item.path} was made by another model"
            raise ValueError(f"{made}: give --model {stored['model']}")
        held = state.current.dtype if state.side is None else state.side.dtype
        given = {name: getattr(args, name) for name in _NOTES if name in args.given}
        given |= {"dtype": args.dtype or held, "prompt": item.prompt or stored["prompt"]}
        model = self._open(stored["model"], args.device, args.network, stored["size"])
        sigmas = torch.tensor(state.sigmas, dtype=torch.float64)
        own = {**stored, "dtype": held, "solver": state.solver}
        if "solver" in args.given:
            given["solver"] = repr(solver_of(args.solver, model.method, sigmas))
        changed = {name: value for name, value in given.items() if value != own[name]}
        for name in changed.keys() - free.split():
            raise ValueError(
                f"{item.path} was made with {name} = {own[name]}, not {changed[name]}: it leads back "
                f"under the same only; leave out {_options([name])}"
            )
        steps, grid, levels = self._asked()
        wanted = model.sigmas(steps or len(sigmas) - 1, grid, levels) if self._grid else sigmas
        if wanted.tolist() != sigmas.tolist():
            its = f"{len(sigmas) - 1} steps from {sigmas[0]:.6g} to {sigmas[-1]:.6g}"
            raise ValueError(
                f"{item.path} was made on a grid of its own, {its}: leave out {_options(self._grid)}"
            )
        setup = Setup(model, sigmas, ode.parse(state.solver), held, stored)
        return Input(item, setup, state, changed=changed)

    def write(self, item: Item, image: Tensor, state: ode.State | None, setup: Setup) -> None:
        """Writes an image (C, H, W) as the result of an item, and its state."""
        conditions = setup.conditions
        scale = float(setup.model.scale(conditions["guidance"], setup.prompt))
        self.outputs.write(item, to_picture(image), state, {**conditions, "guidance": scale})

    def end(self) -> None:
        """Says what was written, and then which files were skipped, which is an error."""
        if self.skipped and self.total == 1:
            raise ValueError(self.skipped[0])
        if hasattr(self, "outputs"):
            say(self.outputs.summary())
        for reason in self.skipped:
            print(f"Skipped: {reason}", file=sys.stderr)
        if self.skipped:
            raise ValueError(f"{len(self.skipped)} of {self.total} files were skipped, see above")


def in_turn(option: str, given: Sequence[str] | None, count: int, most: int = 0) -> list[Any]:
    """What a repeated option gives to each of `count` pictures: one for all, or one for each.

    With `most` it may be as many that are taken in turn.
    """
    values: Sequence[Any] = given or [None]
    if len(values) not in (1, count) and len(values) > most:
        times = f"{len(values)} times, for {count} picture{'s' * (count > 1)}"
        raise ValueError(
            f"{_options([option])} is given {times}: give one for all of them, or one for each in order"
        )
    return [values[k % len(values)] for k in range(count)]


def _plain(name: str) -> str:
    """A short name of a solver, or the `repr` of an expression; refuses what is neither."""
    return name if name in SHORT else repr(solver_of(name, "Euler()", torch.ones(1)))


def _options(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)
