"""The trained network of emoji, in the format of NVlabs' EDM, and drawings to try it on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..base import check_floating_dtype
from ..edm import Preconditioner, load_edm

WEIGHTS: Final = Path(__file__).parent / "emoji.safetensors"
LOG: Final = Path(__file__).parent / "emoji.json"
DRAWINGS: Final = Path(__file__).parent / "drawings.npz"


class Drawings(NamedTuple):
    """Emoji in both styles: row 2 k is a motif by Noto, row 2 k + 1 the same motif by Twemoji.

    Attributes:
        images: float32 ``(N, 3, 32, 32)``, from -1 to 1, on white.
        labels: float32 ``(N, label_dim)``.
        names: the name of each motif, ``N / 2`` of them.
        withheld: bool ``(N,)``: whether the drawing was withheld from the training; the other drawing
            of its motif was not.
    """

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]
    withheld: Tensor


def load_emoji(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Preconditioner:
    """Load the trained network of emoji, frozen and in evaluation mode.

    It denoises pictures of 32 x 32 pixels in colour on white; `emoji_labels` gives its labels, and None
    or zeros are no label, for guidance: ``ClassifierFreeGuidance(load_emoji(), 3.0)``.

    Args:
        device: the device of the network.
        dtype: the dtype that the network computes in, independent of that of the solver's state.

    Raises:
        TypeError: if `dtype` is not a floating point dtype.
    """
    check_floating_dtype(dtype)
    return load_edm(WEIGHTS).to(device, dtype)


def emoji_drawings() -> Drawings:
    """Drawings of 48 motifs in both styles, one of each pair withheld from the training.

    Noto Emoji: copyright Google LLC, Apache License 2.0. Twemoji: copyright Twitter, Inc and other
    contributors, CC-BY 4.0; reduced in size.
    """
    with np.load(DRAWINGS, allow_pickle=False) as stored:
        images = torch.from_numpy(stored["images"]).float() / 127.5 - 1
        return Drawings(
            images,
            torch.from_numpy(stored["labels"]),
            tuple(str(name) for name in stored["names"]),
            torch.from_numpy(stored["withheld"]),
        )


def training_log() -> dict[str, Any]:
    """The log of the training: settings, and the losses over the images seen."""
    log: dict[str, Any] = json.loads(LOG.read_text())
    return log
