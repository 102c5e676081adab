"""What learned weights and levels carry over to, and how many states are enough."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from odesolvers import BDIA, RK4, Calibrated, Euler, calibrate, karras_sigmas
from odesolvers.models import IdealDenoiser, load_digits

from ..common import Denoiser, Kept, Problem, reference, relative_errors
from .measure import errors_of, geometric, learned, row, rule_key

STEPS, STATES = 8, 64
COUNTS = (4, 8, 16, 32, 64)
LONGER = (6, 8, 14, 20, 40)
LEARNED_IN = 10
"""The number of steps whose weights and levels are used for others."""


@dataclass(frozen=True)
class Setting:
    """A model of the digits, and labels and guidance to use it with."""

    name: str
    half: int = 0
    labels: tuple[int, ...] = (0, 1, 2, 3, 4)
    guidance: float = 1.0

    def denoiser(self) -> Denoiser:
        """The posterior mean over one half of the digits, under classifier-free guidance."""
        x, y = (part[self.half :: 2] for part in load_digits())
        model, w = IdealDenoiser(x, y), self.guidance

        def denoiser(x: Tensor, sigma: Tensor, class_labels: Tensor) -> Tensor:
            if w == 0:
                return model(x, sigma)
            conditional = model(x, sigma, class_labels=class_labels)
            return conditional if w == 1 else w * conditional + (1 - w) * model(x, sigma)

        return denoiser

    def arguments(self, n: int) -> dict[str, Tensor]:
        return {"class_labels": torch.tensor(self.labels)[torch.arange(n) % len(self.labels)]}


LEARNED = Setting("as learned: labels 0 to 4, guidance 1")
OTHERS = (
    Setting("labels 5 to 9", labels=(5, 6, 7, 8, 9)),
    Setting("no label", guidance=0.0),
    Setting("guidance 1.5", guidance=1.5),
    Setting("guidance 3", guidance=3.0),
    Setting("a model of the other half of the data", half=1),
)


def noise(seed: int, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 80 * torch.randn(n, 1, 8, 8, generator=generator, dtype=torch.float64)


def fitted(setting: Setting, levels: bool) -> Calibrated:
    sigmas = karras_sigmas(STEPS + 1, 0.02, 80.0, append_zero=False)
    args = setting.arguments(16)
    return calibrate(setting.denoiser(), noise(2000, 16), sigmas, levels=levels, extra_args=args)


def carried(setting: Setting, kept: Kept) -> dict[str, list[float]]:
    """Errors under `setting` of what was learned on `LEARNED`, and of levels learned there."""
    rules: dict[str, Callable[[], Calibrated]] = {
        "weights alone": lambda: rule_of(LEARNED, False, kept),
        "with levels": lambda: rule_of(LEARNED, True, kept),
        "learned there": lambda: rule_of(setting, True, kept),
    }
    denoiser, x, args = setting.denoiser(), noise(0, STATES), setting.arguments(STATES)
    fine = karras_sigmas(301, 0.02, 80.0, append_zero=False)
    clean = RK4().sample(denoiser, x, fine, extra_args=args).x
    return {name: errors(denoiser, args, make(), x, clean) for name, make in rules.items()}


def rule_of(setting: Setting, levels: bool, kept: Kept) -> Calibrated:
    """A rule that is learned once."""

    def make() -> Any:
        rule = fitted(setting, levels)
        return {"levels": rule.levels, "values": rule.values}

    found = kept(f"digits, {setting}, {STEPS} steps, levels = {levels}", make)
    return Calibrated("Euler()", tuple(found["levels"]), tuple(found["values"]))


def errors(
    denoiser: Denoiser, args: Mapping[str, Tensor], rule: Calibrated, x: Tensor, clean: Tensor
) -> list[float]:
    solver = BDIA(Euler(), rule)
    sample = solver.sample(denoiser, x, rule.sigmas, extra_args=args).x
    code = solver.invert(denoiser, clean, rule.sigmas, extra_args=args).x
    return [geometric(relative_errors(sample, clean)), geometric(relative_errors(code, x))]


def other_steps(problem: Problem, steps: int, kept: Kept) -> dict[str, list[float]]:
    """Errors on `steps` steps: of what was learned on `LEARNED_IN`, and of levels learned on as many."""
    truth = reference(problem, 0)
    weights = learned(problem, LEARNED_IN, levels=False, kept=kept)
    both = learned(problem, LEARNED_IN, levels=True, kept=kept)
    assert weights is not None
    assert both is not None
    found = {
        "weights alone": errors_of(BDIA(Euler(), weights), problem, problem.sigmas(steps), truth),
        "with levels": errors_of(BDIA(Euler(), both), problem, both.sigmas_in(steps), truth),
    }
    if steps <= 20:
        own = learned(problem, steps, levels=True, kept=kept)
        assert own is not None
        found["learned there"] = errors_of(BDIA(Euler(), own), problem, own.sigmas, truth)
    return found


def with_states(problem: Problem, states: int, kept: Kept) -> list[list[float]]:
    """Errors on the states of the fit, and on others."""
    rule = learned(problem, STEPS, levels=True, states=states, kept=kept)
    assert rule is not None
    key = row(problem, STEPS, f"BDIA of {states} states", "weights and levels", 0)
    unseen = kept(
        key, lambda: errors_of(BDIA(Euler(), rule), problem, rule.sigmas, reference(problem, 0))
    )
    return [kept.read()[rule_key(problem, STEPS, states, True)]["errors"], unseen]
