"""The models of jobs, by name: a denoiser, and what leads from pictures and conditions to its inputs."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

import odesolvers as ode

from .inputs import Condition

Branches = tuple[dict[str, Any], dict[str, Any]]


def _none(conditions: Sequence[Condition]) -> Branches:
    if any(condition is not None for condition in conditions):
        raise ValueError(f"this model takes no labels and no prompts, got {conditions[0]!r}")
    return {}, {}


@dataclass(frozen=True, eq=False)
class Model:
    """A denoiser with its pictures, its grid and its conditions.

    Attributes:
        denoiser: see `odesolvers.Denoiser`; on its device.
        shape: that of its pictures, (C, H, W), with one channel or three.
        sigmas: returns its grid of n steps.
        data_std: see `odesolvers.models.init_noise`.
        encode: returns the states at the level 0 of pictures ``(B, C, H, W)`` in [-1, 1].
        branches: returns the extra arguments of the denoiser for conditions, one for each element, and
            those of no condition, to guide away from.
    """

    denoiser: Any
    shape: tuple[int, int, int]
    sigmas: Callable[[int], Tensor]
    data_std: float = 0.0
    encode: Callable[[Tensor], Tensor] = lambda pictures: pictures
    branches: Callable[[Sequence[Condition]], Branches] = _none

    def digest(self) -> str:
        """The SHA-256 of all weights and buffers; of a denoiser that is no module, of none."""
        digest = hashlib.sha256()
        if isinstance(self.denoiser, nn.Module):
            for name, tensor in sorted(self.denoiser.state_dict().items()):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                data = tensor.detach().cpu().contiguous().flatten()
                digest.update(data.view(torch.uint8).numpy().data)
        return digest.hexdigest()


def load_model(name: str, device: torch.device | str = "cpu") -> Model:
    """The model of a name.

    Args:
        name: letters, digits or emoji; ``edm:FILE``, see `odesolvers.models.load_edm`;
            ``stable-diffusion:PATH``, see `odesolvers.models.load_stable_diffusion`; or
            ``MODULE:FUNCTION`` for a function of yours that takes a device and returns a `Model`.
        device: the device of the denoiser.

    Raises:
        ValueError: if there is no such model.
        ImportError: if it needs a library that is not installed.
    """
    kind, colon, rest = name.partition(":")
    if kind in LOADERS and bool(colon) == (kind in ("edm", "stable-diffusion")):
        return LOADERS[kind](rest, device)
    if colon and kind not in LOADERS:
        found = getattr(importlib.import_module(kind), rest)(device)
        if isinstance(found, Model):
            return found
        raise TypeError(f"{name} must return an odesolvers.jobs.Model, got {type(found).__name__}")
    raise ValueError(
        f"there is no model {name!r}: give letters, digits, emoji, edm:FILE, stable-diffusion:PATH or "
        "MODULE:FUNCTION"
    )


def _letters(_: str, device: Any) -> Model:
    denoiser = ode.models.load_letters(device)

    def branches(conditions: Sequence[Condition]) -> Branches:
        labels = _labels([-1 if c is None else c for c in conditions], 26, device)
        return {"class_labels": labels}, {"class_labels": torch.full_like(labels, -1)}

    # Down to 0.02 and not to 0: an image with that much noise passes for clean, both ways.
    return Model(denoiser, (3, 32, 32), _levels(0.02, 80.0), branches=branches)


def _digits(_: str, device: Any) -> Model:
    images, classes = ode.models.load_digits()
    denoiser = ode.models.IdealDenoiser(images, classes).to(device)

    def branches(conditions: Sequence[Condition]) -> Branches:
        if all(condition is None for condition in conditions):
            return {}, {}
        return {"class_labels": _labels(conditions, 10, device)}, {}

    return Model(denoiser, (1, 8, 8), ode.karras_sigmas, branches=branches)


def _emoji(_: str, device: Any) -> Model:
    emoji = importlib.import_module("odesolvers.models.emoji")
    return _edm(str(emoji.network.WEIGHTS), device)


def _edm(file: str, device: Any) -> Model:
    denoiser = ode.models.load_edm(file, device=device)
    width, size = denoiser.label_dim, denoiser.img_resolution

    def branches(conditions: Sequence[Condition]) -> Branches:
        if not width or all(condition is None for condition in conditions):
            return _none(conditions)
        rows = nn.functional.one_hot(_labels(conditions, width, device), width).float()
        return {"class_labels": rows}, {"class_labels": torch.zeros_like(rows)}

    low, high = max(denoiser.sigma_min, 0.002), min(denoiser.sigma_max, 80.0)
    return Model(
        denoiser, (denoiser.img_channels, size, size), _levels(low, high), branches=branches
    )


def _stable_diffusion(path: str, device: Any) -> Model:
    denoiser = ode.models.load_stable_diffusion(path, device=device)
    factor = denoiser.pipeline.vae_scale_factor
    _, height, width = denoiser.latent_shape()

    def branches(conditions: Sequence[Condition]) -> Branches:
        prompts = ["" if condition is None else str(condition) for condition in conditions]
        encoded = denoiser.encode_prompt(prompts)
        return encoded["positive"], encoded["negative"]

    return Model(
        denoiser,
        (3, factor * height, factor * width),
        denoiser.sigmas,
        data_std=1.0,
        encode=denoiser.encode,
        branches=branches,
    )


LOADERS: Final[Mapping[str, Callable[[str, Any], Model]]] = {
    "letters": _letters,
    "digits": _digits,
    "emoji": _emoji,
    "edm": _edm,
    "stable-diffusion": _stable_diffusion,
}


def _levels(low: float, high: float) -> Callable[[int], Tensor]:
    """Karras levels of n steps from `high` to `low`: for networks that were not trained below it."""
    return lambda n: ode.karras_sigmas(n + 1, sigma_min=low, sigma_max=high, append_zero=False)


def _labels(conditions: Sequence[Condition], count: int, device: Any) -> Tensor:
    """Labels below `count`, or -1 where the model has it for none, as int64."""
    for condition in conditions:
        if not isinstance(condition, int) or not -1 <= condition < count:
            raise ValueError(
                f"labels are whole numbers from 0 to {count - 1}, got {condition!r}"
                " (None of an element without one)"
            )
    return torch.tensor(conditions, device=device)
