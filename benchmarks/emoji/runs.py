"""What the measurements on emoji share: their options, what figures belong to, and calibration."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from odesolvers import BDIA, Calibrated, Euler, IntegrationApproximator, Objective, calibrate
from odesolvers.models.edm import Preconditioner

from ..common import TABLES, Kept
from ..common.problems import CALIBRATION_SEED
from .data import Emoji

STATES, RUNS = 4, 40
"""Of a calibration; a network of emoji takes a quarter of a second for so many states."""


def options(doc: str | None, name: str, count: int) -> argparse.ArgumentParser:
    """A command line whose figures are kept in ``docs/tables/NAME.jsonl``."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--results", type=Path, default=TABLES / f"{name}.jsonl", help="figures")
    parser.add_argument("--count", type=int, default=count, help="pictures for each figure")
    parser.add_argument("--tables", type=Path, default=TABLES, help="folder of the tables")
    parser.add_argument("--write", action="store_true", help="only the tables, from the figures")
    return parser


def weights(path: Path) -> int:
    """Identifies the weights in a file."""
    return crc32(path.read_bytes())


def same(kept: Kept, **settings: Any) -> None:
    """Refuses to add to figures that were measured on something else."""
    for name, value in settings.items():
        found = kept(name, lambda value=value: value)
        if found not in (value, None):
            raise SystemExit(
                f"{kept.path} holds figures of other {name} ({found}, not {value}): move it away, or "
                "name another file by --results"
            )


def shown(key: str, value: Any) -> Any:
    """`value`, printed."""
    print(key, value, flush=True)
    return value


def learned(
    kept: Kept,
    of: str,
    network: Preconditioner,
    emoji: Emoji,
    sigmas: Tensor,
    base: IntegrationApproximator = Euler(),  # noqa: B008
    objective: Objective = Objective(),  # noqa: B008
) -> BDIA | None:
    """BDIA, its weights learned on other noise and labels; None while another process is at it."""

    def learn() -> list[float]:
        rows = np.random.default_rng(5).choice(
            np.flatnonzero(~emoji.held_out), STATES, replace=False
        )
        generator = torch.Generator().manual_seed(CALIBRATION_SEED)
        rule = calibrate(
            network,
            sigmas[0].float() * torch.randn(STATES, 3, 32, 32, generator=generator),
            sigmas,
            base=base,
            objective=objective,
            extra_args={"class_labels": torch.as_tensor(emoji.labels[rows])},
            max_runs=RUNS,
            reference_steps=64,
        )
        return list(rule.values)

    steps, top = len(sigmas) - 1, float(sigmas[0])
    values = kept(f"{of}|weights of {base!r}|{steps} steps from {top:g}", learn)
    if values is None:
        return None
    return BDIA(base, Calibrated(repr(base), tuple(sigmas.tolist()), tuple(values)))
