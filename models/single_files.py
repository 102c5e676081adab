"""Stable Diffusion checkpoints in a single file: the names and shapes of their weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from odesolvers.values import shown

from .folders import TENSORS
from .markers import KNOWN, Training, read_training
from .reading import read_header
from .weights import check_complete, check_dtypes, few, is_unused

PARTS = (
    "cond_stage_model.",
    "conditioner.",
    "embedding_manager.",
    "first_stage_model.",
    "model.diffusion_model.",
    "model_ema.",
)
"""Beginnings of the names of weights."""

ROOTS = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.",),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.",),
}
"""The parts of a pipeline by the beginnings of their weights; where two fit, the first counts."""

ASIDE = ("first_stage_model.loss.", "first_stage_model.model_ema.")
"""Beginnings of weights that a VAE has for its own training alone."""

CHILDREN = 100
"""The most names that continue another one by a word; blocks and layers have at most 33."""

WIDTH_OF_2 = ("model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight", 1024)
"""The weight, and the width of its input, by which Stable Diffusion 2 is recognised."""


@dataclass(frozen=True)
class SingleFile:
    """The names and shapes of a single file's tensors, and what it says about itself.

    Attributes:
        shapes: shape of every tensor by its name.
        training: what it says about how its network was trained.
    """

    shapes: Mapping[str, tuple[int, ...]]
    training: Training

    def names_of(self, part: str) -> list[str]:
        """The names of the weights of a part of the pipeline."""
        return self._names.get(part, [])

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self.shapes:
            part = next((part for part, roots in ROOTS.items() if name.startswith(roots)), None)
            if part is not None and not name.startswith(ASIDE):
                found.setdefault(part, []).append(name)
        return found

    @property
    def sizes(self) -> dict[str, list[int]]:
        """The sizes of the weights of each part."""
        return {part: list(self.sized(self.names_of(part))) for part in ROOTS}

    def sized(self, names: Iterable[str]) -> Iterator[int]:
        """The sizes of weights, as networks of diffusers have them."""
        for name in names:
            size = math.prod(self.shapes[name])
            # OpenCLIP keeps the weights of queries, keys and values in one tensor.
            yield from (size // 3,) * 3 if ".in_proj_" in name else (size,)

    @property
    def is_xl(self) -> bool:
        """Whether it is Stable Diffusion XL."""
        return any(key.startswith("conditioner.") for key in self.shapes)

    @property
    def is_2(self) -> bool:
        """Whether it is Stable Diffusion 2, which was published with both predictions."""
        key, width = WIDTH_OF_2
        return self.shapes.get(key, ())[-1:] == (width,)


def read_single_file(path: Path) -> SingleFile:
    """Read what a checkpoint says about itself, without its weights.

    Raises:
        ValueError: if the file is damaged, is no checkpoint in the original layout, or holds weights
            that belong to no part of it.
    """
    from safetensors import safe_open

    metadata, entries = read_header(path)
    shapes = {key: entry.shape for key, entry in entries.items()}
    _check_names(shapes)
    known = [key for key in shapes if key in KNOWN]
    for key in known:
        if entries[key].numel > 100_000:
            raise ValueError(f"its {key} has {entries[key].numel} numbers")
    with safe_open(path, framework="pt") as file:
        values = {key: file.get_tensor(key) for key in known}
    if not any(key.startswith("model.diffusion_model.") for key in shapes):
        raise ValueError("it has no model.diffusion_model, so no network in the original layout")
    others = [key for key in shapes if not key.startswith(PARTS) and key not in KNOWN]
    weights = [key for key in others if entries[key].numel > 1]
    if weights:
        raise ValueError(
            f"it holds {few(weights)}, of more than one number, which belong to no part of Stable "
            "Diffusion, so that it may be another network: take them out of it if they change nothing"
        )
    file = SingleFile(shapes, read_training(metadata, shapes, others, values))
    for part in ROOTS:
        check_dtypes(part, {name: entries[name] for name in file.names_of(part)})
    return file


def _check_names(names: Iterable[str]) -> None:
    """Check that a file has no more blocks and layers than networks have.

    The converters of diffusers compare every name with every block.
    """
    known: set[str] = set()
    children: Counter[str] = Counter()
    for name in names:
        if len(known) > 10 * TENSORS or len(name) > 1000 or name.count(".") > 30:
            raise ValueError("its tensors have more or longer names than those of any network")
        start = name
        while start not in known:
            known.add(start)
            parent, _, _ = start.rpartition(".")
            children[parent] += bool(parent)
            start = parent
    for parent, count in children.items():
        if count > CHILDREN and parent != "model_ema":  # which numbers its weights in one word
            raise ValueError(
                f"it has {count} parts of {shown(parent, 60)}, more than any network: at most "
                f"{CHILDREN} are read"
            )


def check_used(file: SingleFile, pipeline: Any) -> None:
    """Check that a pipeline has all weights of its file, and no others.

    The converters of diffusers rename weights, and leave out those for which they know no name. What
    they took is seen from the sizes.

    Raises:
        ValueError: naming the part.
    """
    for part in ROOTS:
        model = getattr(pipeline, part, None)
        weights = {} if model is None else dict(model.named_parameters())
        check_complete(part, [name for name, weight in weights.items() if weight.is_meta])
        names = file.names_of(part)
        if part.startswith("text_encoder"):
            names = [name for name in names if not _is_passed_over(name, model)]
        left, odd = Counter(weight.numel() for weight in weights.values()), []
        for name in names:
            sizes = list(file.sized([name]))
            left.subtract(sizes)
            if any(left[size] < 0 for size in sizes):
                odd.append(file.shapes[name])
        if odd:
            raise ValueError(
                f"its {part} has weights for which its configuration has no place, {len(odd)} of them, "
                f"as one of shape {odd[0]}: it is another network than its configuration says"
            )
        check_complete(part, [f"one of {size} numbers" for size in left if left[size] > 0])


def _is_passed_over(name: str, encoder: Any) -> bool:
    """Whether a text encoder is complete without a weight."""
    # Stable Diffusion 2 takes the last layer but one, and its configuration has no other after it.
    last = f"cond_stage_model.model.transformer.resblocks.{encoder.config.num_hidden_layers}."
    return name.startswith(last) or is_unused(name, projects=hasattr(encoder, "text_projection"))


def check_guidance(file: SingleFile, unet: Any) -> None:
    """Check that a network has a place for the guidance embedding of its file.

    Raises:
        ValueError: if it has not.
    """
    guided = "model.diffusion_model.time_embed.cond_proj.weight"
    if guided in file.shapes and unet.config.time_cond_proj_dim is None:
        raise ValueError(
            f"it holds {guided}, the embedding of the guidance scale of a distilled network (LCM), and "
            "the configuration of its UNet has none: pass config= with "
            f"time_cond_proj_dim={file.shapes[guided][1]}"
        )
