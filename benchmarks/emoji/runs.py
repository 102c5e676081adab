"""What the measurements on emoji share: guidance, calibration, and figures that are kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from odesolvers import Calibrated, calibrate
from odesolvers.models.edm import Preconditioner

from ..common import save
from ..common.problems import CALIBRATION_SEED
from .data import Emoji


class Figures:
    """Figures by name in a JSON file, which is written after each, so that a command goes on there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, key: str, measure: Callable[[], Any]) -> Any:
        """The figure of that name, measured if it is not there."""
        if key not in self.found:
            self.found[key] = measure()
            save(self.path, json.dumps(self.found, indent=1) + "\n")
            print(key, self.found[key], flush=True)
        return self.found[key]


def learned(network: Preconditioner, emoji: Emoji, sigmas: Tensor, **options: Any) -> Calibrated:
    """Weights that are learned on noise and labels of their own; `options` of `calibrate`."""
    rows = np.random.default_rng(5).choice(np.flatnonzero(~emoji.held_out), 24, replace=False)
    noise = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(CALIBRATION_SEED))
    labels = torch.as_tensor(emoji.labels[rows])
    return calibrate(
        network,
        sigmas[0].float() * noise,
        sigmas,
        extra_args={"class_labels": labels},
        **options,
    )
