"""Whether the weights in files are those of the network that a configuration describes."""

from __future__ import annotations

import contextlib
import math
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .edm.checks import brief
from .reading import Entry

DTYPES = ("F16", "BF16", "F32", "F64")
"""The dtypes of weights, by their names in safetensors."""

MOST = {"unet": 2000, "vae": 400, "text_encoder": 600, "text_encoder_2": 600}
"""The most weights of each part, which take time to build; those of XL have 1680, 248, 196 and 517."""

SPARE = 64
"""How many weights a configuration may ask for that its files lack. Any that is missing is refused, but
a few with their names, which only the libraries know."""

UNUSED = ("position_ids", "logit_scale", "attn_mask")
"""Last words of the names of tensors in files of text encoders that encode nothing: positions, which are
counted, and what compares texts with images. The libraries ignore them as well."""

IMAGES = ("vision_model", "visual_projection")
"""Words in those of the other half of CLIP, which encodes images."""


def is_unused(name: str, *, projects: bool) -> bool:
    """Whether a tensor of a text encoder is known to be of no use to it.

    Args:
        name: its name.
        projects: whether the encoder projects its text, as the second of XL alone.
    """
    words = name.split(".")
    projection = "text_projection" in words[-2:] and not projects
    return words[-1] in UNUSED or not set(words).isdisjoint(IMAGES) or projection


def check_dtypes(part: str, entries: Mapping[str, Entry]) -> None:
    """Check that weights are floating point of 16, 32 or 64 bits.

    Others are numbers of which the file does not say how they become weights.

    Raises:
        ValueError: naming the part and the weight.
    """
    for name, entry in entries.items():
        if entry.dtype not in DTYPES and name.split(".")[-1] not in UNUSED:
            raise ValueError(
                f"its {part} has {brief(name)} in {entry.dtype}, and weights are read in "
                f"{', '.join(DTYPES)}: convert it, by the scales that belong to it if it is quantised"
            )


def check_shapes(part: str, model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that weights have the shapes that a network has under their names.

    Raises:
        ValueError: naming the part and the weight.
    """
    for name, weight in model.named_parameters():
        shape = tuple(weight.shape)
        if shapes.get(name, shape) != shape:
            raise ValueError(
                f"its {part} has {name} of shape {shapes[name]}, and its configuration asks for "
                f"{shape}: it is another network than its configuration says"
            )


def check_report(
    part: str, model: nn.Module, report: Mapping[str, Any], names: Iterable[str]
) -> None:
    """Check what `from_pretrained` reports of a part.

    Args:
        part: the name of the part.
        model: its network.
        report: what the library says of its loading.
        names: the names of all tensors in the files of the part.

    Raises:
        ValueError: if weights are missing, have no place or another shape in the network, or are there
            twice.
    """
    check_complete(part, report["missing_keys"])
    unused = part.startswith("text_encoder")
    projects = hasattr(model, "text_projection")
    odd = {
        name
        for name in report["unexpected_keys"]
        if not (unused and is_unused(name, projects=projects))
    }
    odd |= {key[0] if isinstance(key, tuple) else key for key in report.get("mismatched_keys", ())}
    check_places(part, odd)
    own = {name for name, _ in model.named_parameters()}
    used = {name for name in names if not (unused and is_unused(name, projects=projects))}
    if len(used) > len(own):
        # The libraries rename what older versions wrote, and which of two names wins is theirs to say.
        raise ValueError(
            f"its {part} has {len(used) - len(own)} of its {len(own)} weights under two names, of which "
            f"one is among {few(sorted(used - own))}: remove one of each, as their values may differ"
        )


def check_complete(part: str, names: Iterable[str]) -> None:
    """Raise an error if `names`, the missing weights of a part, is not empty."""
    missing = sorted(names)
    if missing:
        raise ValueError(f"weights of the {part} are missing: {few(missing)}")


def check_places(part: str, names: Iterable[str]) -> None:
    """Raise an error if `names`, the weights of a part that its network has not, is not empty."""
    odd = sorted(names)
    if odd:
        raise ValueError(
            f"its {part} has weights for which its configuration has no place, such as {few(odd)}: it "
            "is another network than its configuration says"
        )


def few(names: list[str]) -> str:
    """The first names of a list, and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@torch.no_grad()
def check_finite(part: str, model: nn.Module) -> None:
    """Check that the weights of a part are numbers.

    Raises:
        ValueError: naming the part and the weight.
    """
    for name, value in model.named_parameters():
        # Both limits are NaN where there is one, and nothing is copied.
        if value.numel() and not all(math.isfinite(limit) for limit in value.aminmax()):
            raise ValueError(
                f"its {part} has NaN or infinity in {name}, in {value.dtype}"
                + (": load it in dtype=torch.float32" if value.dtype == torch.float16 else "")
            )


@contextlib.contextmanager
def bounded(part: str, sizes: Iterable[int]) -> Iterator[None]:
    """Stops the building of a network at the first weights for which there are no numbers.

    Whatever a configuration asks for, no more is built than the file that belongs to it has.

    Args:
        part: the name of the part.
        sizes: how many numbers each tensor in the files of the part has.

    Raises:
        ValueError: within, from the constructor of the network.
    """
    left, built, odd = Counter(sizes), 0, 0
    thread = threading.get_ident()

    def count(module: nn.Module, name: str, value: Tensor | None) -> None:
        nonlocal built, odd
        if value is None or threading.get_ident() != thread:
            return
        built += 1
        left[value.numel()] -= 1
        odd += left[value.numel()] < 0
        if odd > SPARE or built > MOST[part]:
            raise ValueError(
                f"the configuration of its {part} asks for "
                + (
                    f"more than {MOST[part]} weights"
                    if built > MOST[part]
                    else "many weights of other sizes than its files have: it is that of another network"
                )
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
