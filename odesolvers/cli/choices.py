"""What the options of the command line may say, and what they stand for."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn

from .. import (
    BDIA,
    DDIM,
    RK3,
    RK4,
    Calibrated,
    DampedStepRatio,
    DPMSolverPP2S,
    Euler,
    GammaRule,
    HeunEDM,
    IntegrationApproximator,
    Midpoint,
    SmoothedOutput,
    State,
    StepRatio,
    exponential_sigmas,
    karras_sigmas,
    polyexponential_sigmas,
    vp_sigmas,
)
from ..gamma import ConstantGamma
from ..models import IdealDenoiser, load_digits, load_letters, random_letters

T = TypeVar("T")

APPROXIMATORS: Final[Mapping[str, IntegrationApproximator]] = {
    "euler": Euler(),
    "ddim": DDIM(),
    "heun-edm": HeunEDM(),
    "midpoint": Midpoint(),
    "dpm-solver-pp2s": DPMSolverPP2S(),
    "rk3": RK3(),
    "rk4": RK4(),
}

GAMMAS: Final[Mapping[str, str]] = {
    "a number in (0, 1]": "the paper's constant, in the scale of the approximator's state",
    "step-ratio-P": "(step ahead / step behind)^P; 2 over euler is O-BELM, 1 is neutral",
    "damped-C-P": "step-ratio-1 above the noise level C, damped as sigma^P below it",
    "FILE.json": "weights that `odesolvers calibrate` learnt",
    "smoothed-RULE": "RULE with the last weight g replaced by g / (1 + g)",
}


@dataclass(frozen=True)
class GridChoice:
    """A function of the number of steps, and the options it takes."""

    make: Callable[..., Tensor]
    takes: tuple[str, ...]
    summary: str


GRIDS: Final[Mapping[str, GridChoice]] = {
    "karras": GridChoice(
        karras_sigmas, ("sigma_min", "sigma_max", "rho"), "even in sigma^(1/rho), as EDM"
    ),
    "exponential": GridChoice(
        exponential_sigmas, ("sigma_min", "sigma_max"), "even in the logarithm of sigma"
    ),
    "polyexponential": GridChoice(
        polyexponential_sigmas,
        ("sigma_min", "sigma_max", "rho"),
        "polynomial in the logarithm of sigma",
    ),
    "vp": GridChoice(vp_sigmas, (), "the continuous variance-preserving schedule"),
}


@dataclass(frozen=True)
class Model:
    """A denoiser, and real images of what it makes.

    Attributes:
        denoiser: takes ``class_labels`` if `labels` are given.
        images: ``(K, C, H, W)`` in [-1, 1].
        labels: ``(K,)``, or None for a model without classes.
        noun: what one image shows.
        finite: whether `images` are all that there is to sample.
        unconditional: the label that stands for no label, where there is one.
    """

    denoiser: nn.Module
    images: Tensor
    labels: Tensor | None
    noun: str
    finite: bool = False
    unconditional: int | None = None


@dataclass(frozen=True)
class ModelChoice:
    """How to get a model, and what has to be installed for it.

    Attributes:
        load: makes the model.
        extra: what to install it with.
        modules: what that brings.
        summary: a line about it.
        names: of its classes, in the order of their labels.
        defaults: options that suit it better than those of the command line.
        sampling: options to sample from noise with, where nothing else was asked for.
    """

    load: Callable[[], Model]
    extra: str
    modules: tuple[str, ...]
    summary: str
    names: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def installed(self) -> bool:
        """Whether everything it needs can be imported."""
        return _importable(self.modules)


def _digits() -> Model:
    images, labels = load_digits()
    return Model(IdealDenoiser(images, labels), images, labels, "digit", finite=True)


def _letters() -> Model:
    model = load_letters()
    images, labels = random_letters(520, seed=HELD_OUT)
    return Model(model, images, labels, "letter", unconditional=-1)


HELD_OUT: Final = 7
"""Seed of the letters that stand for real ones: none was trained on."""

MODELS: Final[Mapping[str, ModelChoice]] = {
    "letters": ModelChoice(
        _letters,
        "letters",
        ("k_diffusion", "safetensors", "matplotlib", "PIL"),
        "a small trained network, capitals in many styles, 32x32, A-Z",
        names="ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        # Down to 0.02 and not to 0: at that level a picture passes for clean, both ways.
        defaults={"approximator": "euler", "steps": 24, "sigma_min": 0.02, "append_zero": False},
        sampling={"labels": "A-Z", "guidance": 3.0},
    ),
    "digits": ModelChoice(
        _digits,
        "digits",
        ("sklearn",),
        "the ideal denoiser of 1,797 handwritten digits, 8x8, 0-9",
        names="0123456789",
    ),
}


@dataclass(frozen=True)
class Loader:
    """A function or class of `odesolvers.models` that makes a denoiser of a model of yours."""

    name: str
    summary: str
    extra: str
    modules: tuple[str, ...] = ()

    @property
    def installed(self) -> bool:
        """Whether everything it needs can be imported."""
        return _importable(self.modules)


LOADERS: Final = (
    Loader("load_edm", "NVlabs' EDM checkpoints: DDPM++, NCSN++, ADM", "edm", ("safetensors",)),
    Loader(
        "load_stable_diffusion",
        "Stable Diffusion 1.x, 2.x and XL, through diffusers",
        "stable-diffusion",
        ("diffusers", "transformers"),
    ),
    Loader("FlowDenoiser", "velocity networks such as SD3 and FLUX", ""),
    Loader(
        "k_diffusion.external",
        "k-diffusion's wrappers, as they are",
        "k-diffusion",
        ("k_diffusion",),
    ),
    Loader("IdealDenoiser", "the best denoiser of images of yours", ""),
    Loader("GaussianMixture", "a mixture of Gaussians, in closed form", ""),
    Loader("Gaussian", "a Gaussian, whose flow is known", ""),
)


def _importable(modules: tuple[str, ...]) -> bool:
    return all(importlib.util.find_spec(module) is not None for module in modules)


def default_model() -> str:
    """The network where what it needs is installed, else the digits."""
    return "letters" if MODELS["letters"].installed else "digits"


DTYPES: Final[Mapping[str, torch.dtype]] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True)
class Settings:
    """What a run has to share with the run that undoes it, beside the grid.

    It is kept as notes in the files that the commands save.
    """

    model: str = "digits"
    approximator: str = "heun-edm"
    gamma: str = "step-ratio-2"
    labels: tuple[int, ...] | None = None
    guidance: float = 1.0

    def solver(self) -> BDIA:
        """BDIA as the options say."""
        return BDIA(pick("approximator", self.approximator, APPROXIMATORS), gamma(self.gamma))

    def notes(self) -> dict[str, Any]:
        """What `Options.settings_of` reads."""
        return asdict(self)


@dataclass(frozen=True)
class Options:
    """The options that commands share, as typed; None where nothing was."""

    model: str | None = None
    approximator: str | None = None
    gamma: str | None = None
    labels: str | None = None
    grid: str | None = None
    steps: int | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float | None = None
    dtype: str | None = None
    device: str = "cpu"
    guidance: float | None = None

    def for_sampling(self) -> Options:
        """With the labels and the guidance that the model is best sampled with, if none were typed."""
        sampling = pick("model", self.model or Settings.model, MODELS).sampling
        return replace(self, **{k: v for k, v in sampling.items() if getattr(self, k) is None})

    def settings(self) -> Settings:
        """What was typed, over the defaults."""
        defaults = self._defaults()
        chosen = {name: defaults[name] for name in ("approximator", "gamma") if name in defaults}
        return Settings(**chosen | self._given())

    def settings_of(self, notes: Mapping[str, Any], *, relabel: bool = False) -> Settings:
        """Those of a saved state, and what was typed where its notes are silent.

        That approximator and gamma fit the state is for the solver to check. The solver knows
        nothing of model and labels: those may not differ, but for labels where `relabel` is set.
        """
        stored = {name: notes[name] for name in Settings.__dataclass_fields__ if name in notes}
        if stored.get("labels") is not None:
            stored["labels"] = tuple(stored["labels"])
        given = self._given(stored.get("model"))
        for name in ("model",) if relabel else ("model", "labels", "guidance"):
            if name in given and name in stored and given[name] != stored[name]:
                raise ValueError(
                    f"the state was made with {name} = {stored[name]}, not {given[name]}: it comes "
                    f"back exactly under the same only; leave out --{name}"
                )
        settings = stored | given
        missing = [f"--{name}" for name in ("approximator", "gamma") if name not in settings]
        if missing:
            raise ValueError(
                f"the file does not say how its state was made: give {' and '.join(missing)}"
            )
        return Settings(**settings)

    def sigmas(self) -> Tensor:
        """The grid that was asked for."""
        name = self.grid or "karras"
        choice = pick("grid", name, GRIDS)
        defaults = self._defaults()
        levels = {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max, "rho": self.rho}
        given = {option: value for option, value in levels.items() if value is not None}
        for option in given:
            if option not in choice.takes:
                raise ValueError(f"the grid {name!r} takes no --{option.replace('_', '-')}")
        takes = (*choice.takes, "append_zero")
        suited = {name: defaults[name] for name in takes if name in defaults}
        steps = defaults.get("steps", 18) if self.steps is None else self.steps
        levels_above_zero = steps if suited.get("append_zero", True) else steps + 1
        return choice.make(levels_above_zero, **suited | given)

    def sigmas_of(self, state: State) -> Tensor:
        """The grid of a state; or, if any was asked for, that one, for the solver to check."""
        asked = self.grid, self.steps, self.sigma_min, self.sigma_max, self.rho
        if any(option is not None for option in asked):
            return self.sigmas()
        return torch.tensor(state.sigmas, dtype=torch.float64)

    def torch_dtype(self, of: Tensor | None = None) -> torch.dtype:
        """The dtype that was asked for; that of a saved tensor `of`, which it may not contradict."""
        chosen = None if self.dtype is None else pick("dtype", self.dtype, DTYPES)
        if of is not None and chosen not in (None, of.dtype):
            raise ValueError(f"the state is in {of.dtype}, not {chosen}: leave out --dtype")
        return chosen or (torch.float32 if of is None else of.dtype)

    def torch_device(self) -> torch.device:
        """The device, if it can be used here."""
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"the device {self.device!r} cannot be used here: {reason}") from error
        return device

    def _defaults(self) -> Mapping[str, Any]:
        return pick("model", self.model or Settings.model, MODELS).defaults

    def _given(self, model: str | None = None) -> dict[str, Any]:
        """What was typed, its labels read with the names of `model`."""
        names = pick("model", self.model or model or Settings.model, MODELS).names
        given: dict[str, Any] = {
            "model": self.model,
            "approximator": self.approximator,
            "gamma": self.gamma,
            "labels": None if self.labels is None else labels(self.labels, names),
            "guidance": self.guidance,
        }
        return {name: value for name, value in given.items() if value is not None}


def pick(kind: str, name: str, table: Mapping[str, T]) -> T:
    """The entry `name` of `table`; an error that lists the entries and the nearest one."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name.lower(), table, n=1, cutoff=0.4)
    raise ValueError(
        f"there is no {kind} {name!r}"
        + (f"; did you mean {near[0]!r}?" if near else "")
        + f" Known: {', '.join(table)}"
    )


def gamma(text: str) -> float | GammaRule:
    """A number, a rule by its name, or the file of a calibrated one; see `GAMMAS`."""
    if text.startswith("smoothed-"):
        return SmoothedOutput(gamma(text.removeprefix("smoothed-")))
    if text.endswith(".json"):
        return Calibrated.load(text)
    power = text.removeprefix("step-ratio-")
    try:
        if text.startswith("damped-"):
            cutoff, _, damping = text.removeprefix("damped-").partition("-")
            return DampedStepRatio(float(cutoff), float(damping))
        return StepRatio(float(power)) if power != text else ConstantGamma(float(text)).gamma
    except ValueError as error:
        forms = " or ".join(f"{form} ({meaning})" for form, meaning in GAMMAS.items())
        raise ValueError(f"--gamma {text} is not usable: give {forms}") from error


def labels(text: str, names: str) -> tuple[int, ...]:
    """The places in `names` of classes such as ``"3"``, ``"A,E,M"``, ``"0-9"`` or a mix of them."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        ends = [names.find(name) if len(name) == 1 else -1 for name in (first, last or first)]
        if min(ends) < 0 or ends[0] > ends[1] or (dash and not last):
            known = f"{names[0]} to {names[-1]}" if names else "none"
            raise ValueError(
                f"labels are {known}, got {part!r}: give one, or several as {names[:1]},{names[3:4]} "
                f"or {names[:1]}-{names[-1:]}"
            )
        found.extend(range(ends[0], ends[1] + 1))
    return tuple(found)
