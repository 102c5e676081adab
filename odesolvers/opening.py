"""Models and solvers by name."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

import odesolvers as ode

from .editing import guide
from .extend import Solver
from .models import (
    IdealDenoiser,
    load_digits,
    load_edm,
    load_letters,
    load_stable_diffusion,
)
from .models.emoji import STYLES, TONES, emoji_groups, emoji_labels, load_emoji
from .models.letters import LETTERS

SHORT: Final[Mapping[str, tuple[str, str]]] = {
    "damped": ("BDIA({}, gamma=DampedStepRatio())", "both ways: samples and their codes"),
    "codes": ("BDIA({}, gamma=StepRatio(1))", "codes of pictures before samples"),
    "exact": (
        "BDIA({}, DampedStepRatio(), FixedPoint({}))",
        "as damped, and back to the bit",
    ),
    "paper": ("BDIA(DDIM(), gamma=1.0)", "as published (Zhang et al. 2024)"),
    "belm": ("BELM()", "O-BELM (Wang et al. 2024)"),
    "edict": ("EDICT()", "EDICT (Wallace et al. 2023)"),
    "ddim": ("DDIMInversion()", "DDIM inversion, which is not exact"),
}
"""Short names of solvers: expression, in which {} is the model's one-step method, and summary."""

DEFAULT_MODEL: Final = "letters"
STEPS: Final[Mapping[str, int]] = {"letters": 24, "emoji": 24, "pipelines": 50, "others": 18}
GUIDANCE: Final[Mapping[str, float]] = {"letters": 3.0, "emoji": 3.0, "others": 1.0}
"""The scale of `sample` and `edit` by default, with a prompt; a pipeline has its own."""

GRIDS: Final[Mapping[str, Callable[..., Tensor]]] = {
    "karras": ode.karras_sigmas,
    "exponential": ode.exponential_sigmas,
    "vp": ode.vp_sigmas,
}


@dataclass
class Model:
    """A denoiser, and all that is needed to bring pictures and prompts to it.

    Attributes:
        denoiser: the denoiser.
        shape: of pictures, (C, H, W).
        condition: the arguments of the denoiser for some prompts, None for none.
        guidance: the scale of `sample` and `edit` by default, with a prompt.
        steps: by default.
        method: the one-step method that suits the model.
        grid: the levels by default, as arguments of `karras_sigmas`; or a function of the steps.
        encode, decode: pictures in [-1, 1] to states at level 0 and back; None where they are these.
        noise: draws states at a level with a generator; None for pictures.
        dtype: of states, by default.
        device: of the network.
    """

    denoiser: Any
    shape: tuple[int, ...]
    condition: Callable[[Sequence[str | None]], dict[str, Any]]
    guidance: float = GUIDANCE["others"]
    steps: int = STEPS["others"]
    method: str = "Euler()"
    grid: Any = field(default_factory=dict)
    encode: Callable[[Tensor], Tensor] | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    noise: Callable[[int, float, torch.Generator], Tensor] | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def arguments(self, prompts: Sequence[str | None]) -> dict[str, Any]:
        """The arguments of the denoiser for some prompts, on its device."""
        found = self.condition(prompts)
        return {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in found.items()}

    def guided(
        self, prompts: Sequence[str | None], scale: float | None, negative: str | None
    ) -> tuple[Any, Any]:
        """The denoiser under guidance, and its arguments for some prompts."""
        target, away = self.arguments(prompts), self.arguments([negative] * len(prompts))
        scale = self.scale(scale, *prompts)
        if scale != 1 and target.keys() != away.keys():
            raise ValueError(
                "guidance leads away from no prompt, which this model does not have: leave --guidance at "
                "1, or name a prompt to lead away from by --negative"
            )
        return guide(self.denoiser, scale, target, away)

    def edited(
        self, prompt: str | None, to: str | None, scale: float | None, negative: str | None
    ) -> dict[str, Any]:
        """The arguments of `odesolvers.editing.edit` for an edit from one prompt to another."""
        self.guided([to], scale, negative)  # refuses what cannot be guided
        found: dict[str, Any] = {"source": self.arguments([prompt]), "target": self.arguments([to])}
        return found | {
            "negative": self.arguments([negative]),
            "guidance": self.scale(scale, to),
        }

    def scale(self, scale: float | None, *prompts: str | None) -> float:
        """A scale of guidance as given; else that of the model, and 1 without prompts."""
        if scale is not None:
            return scale
        return self.guidance if any(prompts) else 1.0

    def draw(self, seeds: Iterable[int], sigma: float, dtype: torch.dtype) -> Tensor:
        """Noise of a level, of a seed for each picture: the same on every device."""
        found = []
        for generator in (torch.Generator().manual_seed(seed) for seed in seeds):
            if self.noise is not None:
                found.append(self.noise(1, sigma, generator))
                continue
            shape = (1, *self.shape)
            found.append(sigma * torch.randn(shape, generator=generator, dtype=torch.float64))
        return torch.cat(found).to(self.device, dtype)

    def deviation(self, sigma: float) -> float:
        """The standard deviation of states that are noise of a level, as a code should be."""
        if self.noise is None:
            return sigma
        return 1 + sigma if self.method == "FlowEuler()" else (1 + sigma**2) ** 0.5

    def enter(self, pictures: Tensor, sigma: float, dtype: torch.dtype) -> Tensor:
        """Pictures as states at the last level, `sigma`, with its noise if that is not 0.

        A network was trained on pictures with that noise: without it codes look less like noise.
        """
        x = pictures.to(self.device, dtype)
        x = x if self.encode is None else self.encode(x)
        return x + self._last_noise(x, sigma)

    def leave(self, x: Tensor, sigma: float = 0.0) -> Tensor:
        """States as pictures on the CPU, float64; `sigma` takes the noise of `enter` away again."""
        x = x - self._last_noise(x, sigma)
        return (x if self.decode is None else self.decode(x)).double().cpu()

    def _last_noise(self, x: Tensor, sigma: float) -> Tensor | float:
        if self.noise is not None or sigma == 0:  # latents end where they are clean
            return 0.0
        draw = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(0))
        return sigma * draw.to(x)

    def mask(self, pixels: Tensor) -> Tensor:
        """A mask (H, W) of pixels as one of states: of latents, all that an edited pixel touches."""
        if self.noise is None:
            return pixels
        found: Tensor = self.denoiser.mask(pixels)
        return found

    def sigmas(self, steps: int, name: str | None, options: Mapping[str, float]) -> Tensor:
        """The grid of some steps, of the model or of the named kind with its own options."""
        if callable(self.grid):
            if name or options:
                raise ValueError(
                    "a pipeline's scheduler makes its grid: leave out --grid and --sigma"
                )
            levels: Tensor = self.grid(steps)
            return levels
        make = GRIDS[name or "karras"]
        known = inspect.signature(make).parameters
        for option in options:
            if option not in known:
                raise ValueError(f"the grid {name} takes no --{option.replace('_', '-')}")
        settings = {k: v for k, v in self.grid.items() if k in known} | dict(options)
        return make(steps + (not settings.get("append_zero", True)), **settings)


def _trained(name: str, denoiser: Any, condition: Callable[..., dict[str, Any]]) -> Model:
    """A network of the package; down to 0.02 and not to 0, for so much noise passes for clean."""
    grid = {"sigma_min": 0.02, "append_zero": False}
    scale, steps = GUIDANCE[name], STEPS[name]
    return Model(denoiser, (3, 32, 32), condition, guidance=scale, steps=steps, grid=grid)


def _letters() -> Model:
    classes = _classes({letter: k for k, letter in enumerate(LETTERS)}, -1)
    return _trained("letters", load_letters(), classes)


def _emoji() -> Model:
    network = load_emoji()
    none = torch.zeros(1, network.label_dim)

    def condition(prompts: Sequence[str | None]) -> dict[str, Any]:
        rows = [none if prompt is None else _emoji_label(prompt) for prompt in prompts]
        return {"class_labels": torch.cat(rows)}

    return _trained("emoji", network, condition)


def _emoji_label(prompt: str) -> Tensor:
    """The label of ``"cat-face"``, ``"cat-face, twemoji"`` or ``"person, medium-dark"``."""
    subgroup, *more = (word.strip() for word in prompt.split(","))
    style, tones = [w for w in more if w in STYLES], [w for w in more if w in TONES]
    subgroups = [name for names in emoji_groups().values() for name in names]
    if subgroup not in subgroups or len(style) > 1 or len(style) + len(tones) < len(more):
        near = difflib.get_close_matches(subgroup, subgroups, n=1, cutoff=0.4)
        guess = f"; did you mean {near[0]!r}?" if near and near[0] != subgroup else ";"
        raise ValueError(
            f"prompts of this model are subgroups of emoji such as cat-face, and after commas a style "
            f"({', '.join(STYLES)}) and skin tones ({', '.join(TONES)}), got {prompt!r:.80}{guess} "
            "`odesolvers list` names all"
        )
    return emoji_labels(subgroup, *style, tone=tones or "none")


def _digits() -> Model:
    classes = _classes({str(k): k for k in range(10)}, None)
    return Model(IdealDenoiser(*load_digits()), (1, 8, 8), classes)


BUNDLED: Final[Mapping[str, tuple[Callable[[], Model], str]]] = {
    "letters": (_letters, "a small trained network, 32 x 32, prompts A to Z"),
    "emoji": (_emoji, "a network in training, 32 x 32, prompts such as cat-face"),
    "digits": (_digits, "the ideal denoiser of 1,797 digits, 8 x 8, prompts 0 to 9"),
}
"""The models of the package."""


def open_model(
    name: str,
    device: torch.device,
    network: torch.dtype | None,
    size: Any,
    place: torch.device | None = None,
) -> Model:
    """The model that `--model` names.

    Args:
        name: a bundled name; ``package.module:function``; a ``.pkl`` or ``.safetensors`` file or URL of
            EDM; a folder, a single file or a hub id of a pipeline of diffusers.
        device: of the network.
        network: its dtype; by default float16 of pipelines on a GPU, and float32.
        size: height and width of the pictures of a pipeline, or None for its own.
        place: where the network is put; by default `device`, for which defaults are chosen.

    Raises:
        ValueError: if it is none of these, or cannot be read.
    """
    path = Path(name)
    if name in BUNDLED:
        model = BUNDLED[name][0]()
    elif ":" in name and "/" not in name:
        model = _own(name)
    elif path.suffix == ".pkl" or _is_edm(path) or (name.startswith("https://") and path.suffix):
        denoiser = load_edm(name, dtype=network or torch.float32)
        width, side = denoiser.label_dim, denoiser.img_resolution
        classes = _classes({str(k): k for k in range(width)}, None, one_hot=width)
        model = Model(denoiser, (denoiser.img_channels, side, side), classes)
    else:
        half = torch.float16 if device.type == "cuda" else torch.float32
        return _pipeline(name, place or device, network or half, size)
    if size is not None:
        raise ValueError(f"--size is for pipelines; pictures of {name} are {model.shape}")
    if network is not None and (name in BUNDLED or ":" in name):
        raise ValueError(f"--network is for EDM files and pipelines, not for {name}")
    if isinstance(model.denoiser, torch.nn.Module):
        model.denoiser.to(place or device)
    model.device = place or device
    return model


def solver_of(name: str, method: str, sigmas: Tensor) -> Solver:
    """The solver of a short name or of an expression, in which ``load('FILE')`` is a calibration."""
    if name in SHORT:
        bits = 40 if float(sigmas[0]) < 8192 else 32  # room above the levels of flow matching
        name = SHORT[name][0].format(method, "" if bits == 40 else bits)
    try:
        found = ode.parse(name, {"load": ode.Calibrated.load})
    except (TypeError, ValueError) as error:
        raise ValueError(f"--solver: {error}; or {', '.join(SHORT)}") from error
    if isinstance(found, ode.Calibrated):
        found = ode.BDIA(ode.parse(found.base), found)
    if not isinstance(found, Solver):
        raise ValueError(
            f"--solver must name a solver such as 'BDIA(Euler(), gamma=1.0)' or "
            f"{', '.join(SHORT)}, got {name!r:.80}; see `odesolvers list`"
        )
    return found


def _classes(
    known: Mapping[str, int], none: int | None, one_hot: int = 0
) -> Callable[[Sequence[str | None]], dict[str, Any]]:
    """The condition of a network of classes by name; `none` is the label of no class."""

    def condition(prompts: Sequence[str | None]) -> dict[str, Any]:
        if none is None and all(prompt is None for prompt in prompts):
            return {}
        for prompt in prompts:
            if prompt not in known and (prompt is not None or (none is None and not one_hot)):
                names = list(known)
                listed = f"{names[0]} to {names[-1]}" if names else "none: it has no classes"
                raise ValueError(f"prompts of this model are {listed}, got {prompt!r}")
        labels = [none if prompt is None else known[prompt] for prompt in prompts]
        if not one_hot:
            return {"class_labels": torch.tensor(labels)}
        rows = torch.zeros(len(labels), one_hot)
        for row, label in zip(rows, labels, strict=True):
            if label is not None:
                row[label] = 1
        return {"class_labels": rows}

    return condition


def _own(name: str) -> Model:
    """The model of a function of the user, see docs/command_line.md."""
    module, _, function = name.partition(":")
    sys.path.insert(0, "")  # as `python -m` does
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--model {name} cannot be imported: {error}") from error
    finally:
        sys.path.remove("")
    denoiser = make()
    shape = getattr(denoiser, "shape", None)
    if not callable(denoiser) or shape is None or len(shape) != 3:
        raise ValueError(
            f"{name}() must return a denoiser with an attribute `shape`, (C, H, W) of its pictures"
        )

    def condition(prompts: Sequence[str | None]) -> dict[str, Any]:
        if hasattr(denoiser, "condition"):
            found: dict[str, Any] = denoiser.condition(list(prompts))
            return found
        if any(prompt is not None for prompt in prompts):
            raise ValueError(f"{name} takes no prompts: its denoiser has no method `condition`")
        return {}

    grid = {
        k: float(getattr(denoiser, k)) for k in ("sigma_min", "sigma_max") if hasattr(denoiser, k)
    }
    given = {k: getattr(denoiser, k) for k in ("encode", "decode") if hasattr(denoiser, k)}
    return Model(denoiser, tuple(shape), condition, grid=grid, **given)


def _is_edm(path: Path) -> bool:
    """Whether a file is one of `save_edm`, by its header."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, 2**24))
    try:
        return "odesolvers.edm" in json.loads(header).get("__metadata__", {})
    except (ValueError, AttributeError):
        return False


def _pipeline(name: str, device: torch.device, dtype: torch.dtype, size: Any) -> Model:
    """A pipeline of diffusers: Stable Diffusion by our loader, others by diffusers' own."""
    from .models.stable_diffusion import import_diffusers
    from .pipelines import PipelineDenoiser

    path = Path(name)
    local = path.exists() or path.suffix in (".safetensors", ".ckpt")
    if not local and name.count("/") != 1:
        raise ValueError(
            f"--model {name}: there is no such file or folder, and it is no hub id (owner/name), no "
            f"package.module:function and none of {', '.join(BUNDLED)}"
        )
    diffusers = import_diffusers()
    kind = ""
    if path.is_dir() or not local:
        try:
            index: Any = diffusers.DiffusionPipeline.load_config(name)
        except OSError as error:  # of the hub, of the connection, and of folders without an index
            where = (
                "holds no pipeline" if path.is_dir() else "was not found on the Hugging Face hub"
            )
            raise FileNotFoundError(f"--model {name} {where}: {error}") from error
        kind = index["_class_name"] if isinstance(index["_class_name"], str) else "a custom one"
        if not hasattr(diffusers, kind):
            raise ValueError(
                f"{name} is a pipeline of another library ({kind}), which is not loaded"
            )
    if kind in ("", "StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        pipeline = load_stable_diffusion(name, dtype=dtype).pipeline
    else:
        made = getattr(diffusers, kind)
        parts = inspect.signature(made.__init__).parameters.values()
        absent = [
            part.name
            for part in list(parts)[1:]
            if part.default in (part.empty, None) and index.get(part.name) in (None, [None, None])
        ]
        with warnings.catch_warnings():  # of `torch_dtype`, the name that works in all versions
            warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")
            pipeline = made.from_pretrained(
                name,
                torch_dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                **dict.fromkeys(absent),
            )
    pipeline.set_progress_bar_config(disable=True)
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < _bytes(pipeline):
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
    if hasattr(pipeline.vae, "enable_tiling"):
        pipeline.vae.enable_tiling()  # of pictures above its own size alone
    denoiser = PipelineDenoiser(pipeline, size)

    def condition(prompts: Sequence[str | None]) -> dict[str, Any]:
        return {"prompt": [prompt or "" for prompt in prompts]}

    signature = inspect.signature(type(pipeline).__call__).parameters
    flow = type(denoiser.schedule).__name__ == "FlowSchedule"
    return Model(
        denoiser,
        (3, *denoiser.size),
        condition,
        guidance=float(signature["guidance_scale"].default),
        steps=STEPS["pipelines"],
        method="FlowEuler()" if flow else "DDIM()",
        grid=denoiser.sigmas,
        encode=denoiser.encode,
        decode=denoiser.decode,
        noise=denoiser.noise,
        dtype=torch.float32 if device.type == "mps" else torch.float64,
        device=device,
    )


def _bytes(pipeline: Any) -> int:
    """Memory that the networks of a pipeline and a run need, roughly."""
    parts = (part for part in pipeline.components.values() if isinstance(part, torch.nn.Module))
    weights = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    return int(1.3 * weights)
