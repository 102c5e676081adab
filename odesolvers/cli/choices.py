"""The models, grids and solvers of the commands, and the options that name them."""

from __future__ import annotations

import importlib.util
import inspect
import math
import re
import reprlib
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor, nn

import odesolvers as ode

from ..extend import Solver
from ..models import IdealDenoiser, load_digits, load_letters, random_letters

DEFAULT: Final = "BDIA(Euler(), gamma=DampedStepRatio())"

METHODS: Final = "Euler() DDIM() FlowEuler() HeunEDM() Midpoint() DPMSolverPP2S() RK3() RK4()"
RULES: Final = "1 DampedStepRatio()"
OTHERS: Final = "EDICT() McCallumFoster(Euler()) Rex(Euler()) ReversibleHeun()"
"""`odesolvers roundtrip` compares BDIA over each method with each rule, and the others."""

LISTED: Final = {
    "solver": "BDIA BELM EDICT McCallumFoster Rex ReversibleHeun FixedPointInversion DDIMInversion",
    "gamma": "ConstantGamma StepRatio DampedStepRatio HeunStepRatio order_gaining PerStep "
    "SmoothedOutput Calibrated",
    "arithmetic": "FloatingPoint FixedPoint",
}

DTYPES: Final = ("float32", "float64", "bfloat16")
LEVELS: Final = ("sigma_min", "sigma_max", "rho")
GRIDS: Final[Mapping[str, tuple[Callable[..., Tensor], str]]] = {
    "karras": (ode.karras_sigmas, "even in sigma^(1/rho), as in EDM"),
    "exponential": (ode.exponential_sigmas, "even in log sigma"),
    "polyexponential": (ode.polyexponential_sigmas, "polynomial in log sigma"),
    "vp": (ode.vp_sigmas, "the variance-preserving schedule"),
}


@dataclass(frozen=True)
class Model:
    """A model that comes with the package, and the options that suit it."""

    load: Callable[[], tuple[nn.Module, Tensor, Tensor]]
    """Returns the denoiser, real images ``(K, C, H, W)`` in [-1, 1] and their labels ``(K,)``."""
    summary: str
    modules: tuple[str, ...]  # what it needs, from the extra of its own name
    noun: str
    names: str  # of its classes, one character each
    finite: bool = False  # whether the real images are all that there is to sample
    unconditional: int | None = None  # the label that stands for no label
    steps: int = 18
    grid: Mapping[str, Any] = field(default_factory=dict)
    sampled: Mapping[str, Any] = field(default_factory=dict)  # labels and guidance to sample with

    def labels(self, text: str) -> tuple[int, ...]:
        """Labels of the named classes: ``"3"``, ``"A,E,M"``, ``"0-9"``, or a mix of them."""
        found: list[int] = []
        for part in text.split(","):
            match = re.fullmatch(f"([{self.names}])(-([{self.names}]))?", part.strip())
            ends = [self.names.index(match[k] or match[1]) for k in (1, 3)] if match else [1, 0]
            if ends[0] > ends[1]:
                a, b, z = self.names[0], self.names[3], self.names[-1]
                raise ValueError(
                    f"labels are {a} to {z}, got {part!r}: give one, or several as {a},{b} or {a}-{z}"
                )
            found.extend(range(ends[0], ends[1] + 1))
        return tuple(found)


def _letters() -> tuple[nn.Module, Tensor, Tensor]:
    return load_letters(), *random_letters(520, seed=7)  # letters that were not trained on


def _digits() -> tuple[nn.Module, Tensor, Tensor]:
    images, labels = load_digits()
    return IdealDenoiser(images, labels), images, labels


MODELS: Final[dict[str, Model]] = {
    "letters": Model(
        _letters,
        "a small trained network, capitals in many styles, 32x32, A-Z",
        ("matplotlib", "PIL"),
        noun="letter",
        names="ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        unconditional=-1,
        steps=24,
        # Down to 0.02 and not to 0: an image with that much noise passes for clean, both ways.
        grid={"sigma_min": 0.02, "append_zero": False},
        sampled={"labels": "A-Z", "guidance": 3.0},
    ),
    "digits": Model(
        _digits,
        "the ideal denoiser of 1,797 handwritten digits, 8x8, 0-9",
        ("sklearn",),
        noun="digit",
        names="0123456789",
        finite=True,
    ),
}

LOADERS: Final[tuple[tuple[str, str, str, tuple[str, ...]], ...]] = (
    ("load_edm", "NVlabs' EDM checkpoints: DDPM++, NCSN++, ADM", "edm", ("safetensors",)),
    ("load_stable_diffusion", "Stable Diffusion 1.x, 2.x, XL", "stable-diffusion", ("diffusers",)),
    ("FlowDenoiser", "velocity networks such as SD3 and FLUX", "none", ()),
    ("k_diffusion.external", "k-diffusion's wrappers", "k-diffusion", ("k_diffusion",)),
    ("IdealDenoiser", "the ideal denoiser of your own images", "none", ()),
    ("GaussianMixture", "a mixture of Gaussians, in closed form", "none", ()),
    ("Gaussian", "a Gaussian, whose flow is known", "none", ()),
)
"""Denoisers that are made in Python: name, summary, extra, modules."""


def installed(modules: tuple[str, ...]) -> bool:
    """Whether all of `modules` can be imported."""
    return all(importlib.util.find_spec(module) is not None for module in modules)


def default_model() -> str:
    """The trained network if its requirements are installed, else the digits."""
    return "letters" if installed(MODELS["letters"].modules) else "digits"


def read(option: str, text: str, kind: type, what: str) -> Any:
    """The object of type `kind` that the expression `text` names.

    It is read by `odesolvers.parse`; ``load('FILE.json')`` in it is a calibrated rule.
    """
    found = ode.parse(text, {"load": ode.Calibrated.load})
    if not isinstance(found, kind):
        raise ValueError(f"{option} must name {what}, got {text!r}; see `odesolvers list`")
    return found


def solver(args: Namespace) -> Solver | None:
    """The solver that `--solver` or `--weights` names, or None."""
    if args.weights is not None and args.solver is not None:
        raise ValueError("--weights stands for a solver: leave out --solver, or --weights")
    if args.weights is not None:
        rule = ode.Calibrated.load(args.weights)
        return ode.BDIA(ode.parse(rule.base), rule)
    found: Solver | None = None
    if args.solver is not None:
        found = read("--solver", args.solver, Solver, f"a solver such as {DEFAULT}")
    return found


def finite(value: object) -> float:
    """A number, or the text of one, that is neither infinite nor NaN."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"must be a finite number, got {reprlib.repr(value)}")
    return number


def grid(args: Namespace, model: Model) -> Tensor:
    """Noise levels of the grid options, with the defaults of `model` for those not given."""
    name = args.grid or "karras"
    make, _ = GRIDS[name]
    known = inspect.signature(make).parameters
    given = {k: getattr(args, k) for k in LEVELS if getattr(args, k) is not None}
    for option in given:
        if option not in known:
            raise ValueError(f"the grid {name} takes no --{option.replace('_', '-')}: leave it out")
    options = {k: v for k, v in model.grid.items() if k in known} | given
    steps = args.steps or model.steps
    try:
        return make(steps if options.get("append_zero", True) else steps + 1, **options)
    except ArithmeticError as error:  # not of numbers that anybody means
        found = ", ".join(f"{k} = {v:g}" for k, v in given.items())
        raise ValueError(f"the grid {name} cannot be computed for {found}: {error}") from error
