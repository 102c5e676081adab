"""Models as pictures and prompts meet them, and those that are in the package."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

import odesolvers as ode

from .editing import guide
from .models import IdealDenoiser, load_digits, load_emoji
from .models.emoji import STYLES, TONES, emoji_groups, emoji_labels

DEFAULT_MODEL: Final = "emoji"
STEPS: Final[Mapping[str, int]] = {"emoji": 24, "pipelines": 50, "others": 18}
GUIDANCE: Final[Mapping[str, float]] = {"emoji": 3.0, "others": 1.0}
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
                "guidance leads away from no prompt, which this model does not have: leave guidance "
                "at 1, or give a negative prompt to lead away from"
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
            noise = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
            found.append(sigma * noise)
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
        generator = torch.Generator().manual_seed(0)
        draw = torch.randn(x.shape[1:], generator=generator, device="cpu")
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


def level_of(state: ode.State) -> float:
    """The noise level of a state, of a pair that of the noisier: of a code its own, also of a part."""
    return state.sigmas[state.index - (state.partner is not None and not state.coupled)]


def _emoji() -> Model:
    """The network of emoji; down to 0.02 and not to 0, for so much noise passes for clean."""
    network = load_emoji()
    none = torch.zeros(1, network.label_dim)

    def condition(prompts: Sequence[str | None]) -> dict[str, Any]:
        rows = [none if prompt is None else _emoji_label(prompt) for prompt in prompts]
        return {"class_labels": torch.cat(rows)}

    grid = {"sigma_min": 0.02, "append_zero": False}
    scale, steps = GUIDANCE["emoji"], STEPS["emoji"]
    return Model(network, (3, 32, 32), condition, guidance=scale, steps=steps, grid=grid)


def _emoji_label(prompt: str) -> Tensor:
    """The label of ``"cat-face"``, ``"cat-face, twemoji"`` or ``"person, medium-dark"``."""
    subgroup, *more = (word.strip() for word in prompt.split(","))
    style, tones = [w for w in more if w in STYLES], [w for w in more if w in TONES]
    subgroups = [name for names in emoji_groups().values() for name in names]
    if subgroup not in subgroups or len(style) > 1 or len(style) + len(tones) < len(more):
        near = [name for name in subgroups if subgroup and name.startswith(subgroup)]
        near = near or difflib.get_close_matches(subgroup, subgroups, n=1, cutoff=0.4)
        guess = f"; did you mean {near[0]!r}?" if near and near[0] != subgroup else ";"
        raise ValueError(
            f"prompts of this model are subgroups of emoji such as cat-face, and after commas a style "
            f"({', '.join(STYLES)}) and skin tones ({', '.join(TONES)}), got {prompt!r:.80}{guess} "
            "`odesolvers list` names all"
        )
    label: Tensor = emoji_labels(subgroup, *style, tone=tones or "none")
    return label


def _digits() -> Model:
    classes = classes_of({str(k): k for k in range(10)}, None)
    return Model(IdealDenoiser(*load_digits()), (1, 8, 8), classes)


def classes_of(
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


BUNDLED: Final[Mapping[str, tuple[Callable[[], Model], str]]] = {
    "emoji": (_emoji, "a small trained network, 32 x 32, prompts such as cat-face"),
    "digits": (_digits, "the ideal denoiser of 1,797 digits, 8 x 8, prompts 0 to 9"),
}
"""The models of the package."""
