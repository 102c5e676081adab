"""Objects are known by their settings, also those that a user writes as plain classes."""

from __future__ import annotations

import enum
import importlib
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from odesolvers import (
    BDIA,
    DDIM,
    EDICT,
    DampedStepRatio,
    Euler,
    FixedPoint,
    FloatingPoint,
    GammaRule,
    Grid,
    HeunEDM,
    PerStep,
    State,
    StepRatio,
    karras_sigmas,
    parse,
)
from odesolvers.extend import Arithmetic, Combination, IntegrationApproximator, Shear, Solver

from .problems import gaussian, mixture, noise, relative_error

GRID = karras_sigmas(6, 0.1, 10.0, append_zero=False)
X = noise(2, 3, sigma=10.0)


class Low(GammaRule):
    """A rule of a user who knows no dataclass: a constant in x."""

    def __init__(self, low: Any) -> None:
        self.low = low

    def weights(self, grid: Grid, scale: Callable[[float], float]) -> list[float]:
        return [float(self.low)] * (grid.steps - 1)


class Slotted(GammaRule):
    """The same, without a dictionary of attributes."""

    __slots__ = ("low",)

    def __init__(self, low: float) -> None:
        self.low = low

    def weights(self, grid: Grid, scale: Callable[[float], float]) -> list[float]:
        return [self.low] * (grid.steps - 1)


class Scaled(StepRatio):
    """A rule of this package with a setting more, again without a decorator."""

    def __init__(self, low: float) -> None:
        super().__init__(1.0)
        object.__setattr__(self, "low", low)

    def weights(self, grid: Grid, scale: Callable[[float], float]) -> list[float]:
        return [self.low * g for g in super().weights(grid, scale)]  # type: ignore[attr-defined]


class Theta(IntegrationApproximator):
    """A method with a setting: Euler's step, with a slope that is `low` times too large."""

    order = 1
    evaluations = 1

    def __init__(self, low: float) -> None:
        self.low = low

    def increment(self, x: Combination, sigma: float, target: float, D: Any) -> Combination:
        return self.low * Euler().increment(x, sigma, target, D)


class Coarse(Arithmetic):
    """Floating point with weights that are multiples of `low`."""

    def __init__(self, low: float) -> None:
        self.low = low

    def weight(self, g: float) -> float:
        return self.low * max(1, round(g / self.low))

    def forward(self, gain: float, a: Any, rest: torch.Tensor, memory: Any) -> torch.Tensor:
        return FloatingPoint().forward(gain, a, rest, memory)

    def inverse(
        self, gain: float, c: torch.Tensor, rest: torch.Tensor, memory: Any
    ) -> torch.Tensor:
        return FloatingPoint().inverse(gain, c, rest, memory)


class Damped(Solver):
    """A solver with a setting: ``x_{i-1} = low x_{i+1} + (1 - low) x_i + Δ``."""

    def __init__(self, low: float) -> None:
        self.low = low

    def start(self, sigma: float, target: float) -> Shear:
        return Euler().start(sigma, target)

    def steps(self, grid: Grid) -> list[tuple[Shear, ...]]:
        def step(sigma: float, target: float) -> Shear:
            own, low = Euler().increment, self.low
            return Shear.of(lambda x, D: (1 - low) * x + own(x, sigma, target, D), gain=low)

        first, *others = grid.intervals()
        return [(self.start(*first),), *((step(*levels),) for levels in others)]


def make_rule(low: Any) -> BDIA:
    return BDIA(Euler(), Low(low))


MAKERS: list[tuple[Callable[[float], Solver], Callable[[Any], Any]]] = [
    (make_rule, lambda solver: solver.gamma),
    (lambda low: BDIA(Euler(), Slotted(low)), lambda solver: solver.gamma),
    (lambda low: BDIA(Theta(low), 0.9), lambda solver: solver.approximator),
    (lambda low: BDIA(Euler(), 0.63, Coarse(low)), lambda solver: solver.arithmetic),
    (lambda low: EDICT(0.87, Coarse(low)), lambda solver: solver.arithmetic),
    (Damped, lambda solver: solver),
]
NAMES = ["rule", "slots", "method", "arithmetic", "arithmetic of EDICT", "solver"]


@pytest.mark.parametrize(("make", "part"), MAKERS, ids=NAMES)
def test_a_setting_that_changes_after_a_run_is_noticed(
    make: Callable[[float], Any], part: Callable[[Any], Any]
) -> None:
    solver = make(0.5)
    before = solver.sample(mixture(), X, GRID)
    part(solver).low = 0.1
    after = solver.sample(mixture(), X, GRID)
    assert torch.equal(after.x, make(0.1).sample(mixture(), X, GRID).x)
    assert not torch.equal(after.x, before.x)
    with pytest.raises(ValueError, match=r"another solver: it was made by .*low=0\.5.*low=0\.1"):
        solver.invert(mixture(), before.state, GRID)
    part(solver).low = 0.5
    assert relative_error(solver.invert(mixture(), before.state, GRID).x, X) < 1e-9


@pytest.mark.parametrize(("make", "part"), MAKERS, ids=NAMES)
def test_equal_settings_are_one_solver(
    make: Callable[[float], Any], part: Callable[[Any], Any]
) -> None:
    solver, same, other = make(0.5), make(0.5), make(0.25)
    assert solver == same
    assert hash(solver) == hash(same)
    assert len({solver, same, other}) == 2
    assert solver != other
    known = {cls.__name__: cls for cls in (Low, Slotted, Theta, Coarse, Damped)}
    assert parse(repr(solver), known) == solver
    state = solver.sample(mixture(), X, GRID).state
    assert relative_error(same.invert(mixture(), state, GRID).x, X) < 1e-9


def test_a_plain_subclass_of_a_rule_is_told_apart_by_what_it_adds() -> None:
    first, second = BDIA(Euler(), Scaled(0.5)), BDIA(Euler(), Scaled(0.25))
    assert first != second
    assert first == BDIA(Euler(), Scaled(0.5))
    samples = [solver.sample(mixture(), X, GRID).x for solver in (first, second)]
    assert not torch.equal(*samples)


@dataclass
class Point:
    x: float


class Curve:
    """Settings of a rule that are an object of their own, and one that can be called."""

    def __init__(self, x: float) -> None:
        self.x = x

    def __call__(self) -> float:
        return self.x


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda x: x, "2"),
        (lambda x: float(x), "2"),
        (lambda x: np.float32(x), "2"),
        (lambda x: torch.tensor(x), "2"),
        (lambda x: str(x), "'2'"),
        (lambda x: bytes([x]), r"b'\x02'"),
        (lambda x: complex(x, 1), "(2+1j)"),
        (lambda x: [x, 1], "(2, 1)"),
        (lambda x: (x,), "(2,)"),
        (lambda x: np.arange(x), "(0, 1)"),
        (lambda x: {"b": 1, "a": x}, "{'a': 2, 'b': 1}"),
        (lambda x: {x, 7}, "set((2, 7,))"),
        (lambda x: range(x), "range(0, 2)"),
        (lambda x: Path(f"/a/{x}"), repr(Path("/a/2"))),
        (lambda x: Point(x), "Point(2)"),
        (lambda x: Curve(x), "Curve(x=2)"),
        (lambda x: [Curve(Point(x))], "(Curve(x=Point(2)),)"),
        (lambda x: SimpleNamespace(x=x), "SimpleNamespace(x=2)"),
        (lambda x: torch.device("cuda", x), "device(type='cuda', index=2)"),
    ],
)
def test_settings_of_any_kind_are_told_apart_by_value(
    make: Callable[[Any], Any], text: str
) -> None:
    """Written in full, so that another process writes the same."""
    assert make_rule(make(2)) == make_rule(make(2))
    assert make_rule(make(2)) != make_rule(make(3))
    assert repr(make_rule(make(2))) == f"BDIA(Euler(), gamma=Low(low={text}))"


def test_a_setting_within_a_setting_that_changes_is_noticed() -> None:
    for inner in (Point(2), Curve(2)):
        rule = Low([inner])
        before = hash(rule)
        inner.x = 3
        assert hash(rule) != before


def test_numbers_are_settings_by_value() -> None:
    for make in (
        lambda one: DampedStepRatio(one, one),
        lambda one: StepRatio(one),
        lambda one: PerStep([one] * 4),
        lambda one: one,
    ):
        forms = [BDIA(Euler(), make(one)) for one in (1, 1.0, np.float64(1), np.int64(1))]
        state = forms[0].sample(mixture(), X, GRID).state
        for solver in forms:
            assert solver == forms[0]
            assert relative_error(solver.invert(mixture(), state, GRID).x, X) < 1e-9


def test_a_function_is_a_setting_that_is_equal_to_itself_alone() -> None:
    """Nobody can read what it does."""
    first, second = (lambda: 0.5), (lambda: 0.5)
    assert Low(first) == Low(first)
    assert Low(first) != Low(second)
    assert Low(math.sqrt) == Low(math.sqrt)
    assert Low(math.sqrt) != Low(math.sin)
    assert Low(np.sqrt) != Low(np.sin)
    assert Low(float) != Low(int)


def test_classes_of_one_name_are_two() -> None:
    def make(factor: float) -> BDIA:
        class Mine(GammaRule):
            def weights(self, grid: Grid, scale: Callable[[float], float]) -> list[float]:
                return [factor] * (grid.steps - 1)

        return BDIA(Euler(), Mine())

    first, second = make(0.5), make(0.25)
    assert repr(first) == repr(second)
    assert first != second
    samples = [solver.sample(mixture(), X, GRID).x for solver in (first, second)]
    assert not torch.equal(*samples)


def test_defaults_are_left_out_and_order_does_not_matter() -> None:
    assert repr(BDIA(HeunEDM(), 1.0, FloatingPoint())) == "BDIA(HeunEDM())"
    assert repr(BDIA(DDIM(), arithmetic=FixedPoint(), gamma=0.5)) == (
        "BDIA(DDIM(), gamma=ConstantGamma(0.5), arithmetic=FixedPoint())"
    )
    assert BDIA(Euler()) != Euler()
    assert BDIA(Euler()) != "BDIA(Euler())"


OWN = """
from odesolvers import FloatingPoint, GammaRule
from odesolvers.extend import Arithmetic


class Rule(GammaRule):
    def __init__(self, low, names):
        self.low, self.names = low, names

    def weights(self, grid, scale):
        return [self.low] * (grid.steps - 1)


class Plain(Arithmetic):
    def __init__(self, low):
        self.low = low

    def forward(self, gain, a, rest, memory):
        return FloatingPoint().forward(gain, a, rest, memory)

    def inverse(self, gain, c, rest, memory):
        return FloatingPoint().inverse(gain, c, rest, memory)
"""

ELSEWHERE = """
import sys
import torch
from own import Plain, Rule
from odesolvers import BDIA, Euler, State, karras_sigmas

state = State.load("state.safetensors")
denoiser = lambda x, sigma: 0.5 * x
grid = karras_sigmas(6, 0.1, 10.0, append_zero=False)
solver = BDIA(Euler(), Rule(0.5, {"b", "a", "c"}), Plain({"tiny": 1e-3}))
torch.save(solver.invert(denoiser, state, grid).x, "noise.pt")
try:
    BDIA(Euler(), Rule(0.25, {"b", "a", "c"}), Plain({"tiny": 1e-3})).invert(denoiser, state, grid)
except ValueError as error:
    print(error)
"""


def test_another_process_undoes_a_saved_state_by_an_equal_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("own")
    monkeypatch.delitem(sys.modules, "own")
    solver = BDIA(Euler(), own.Rule(0.5, {"a", "b", "c"}), own.Plain({"tiny": 0.001}))
    state = solver.sample(lambda x, sigma: 0.5 * x, X, GRID).state
    state.save(tmp_path / "state.safetensors")
    assert State.load(tmp_path / "state.safetensors").solver == repr(solver)
    command = [sys.executable, "-c", ELSEWHERE]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert relative_error(torch.load(tmp_path / "noise.pt"), X) < 1e-9
    assert "another solver" in run.stdout


class Mode(str):
    """A setting of a type of its own."""


class Way(enum.Enum):
    FAST = 1
    SLOW = 2


class OfAnything(GammaRule):
    """A constant, and a setting that decides it."""

    def __init__(self, setting: Any, read: Callable[[Any], float]) -> None:
        self.setting = setting
        self._read = read

    def weights(self, grid: Grid, scale: object) -> list[float]:
        return [self._read(self.setting)] * (grid.steps - 1)


class Hidden(GammaRule):
    __slots__ = ("__g",)

    def __init__(self, g: float) -> None:
        self.__g = g

    def weights(self, grid: Grid, scale: object) -> list[float]:
        return [self.__g] * (grid.steps - 1)


def read_float(setting: Any) -> float:
    return float(setting.decode() if isinstance(setting, bytes) else setting)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Hidden(0.5), Hidden(0.9)),
        (OfAnything(Mode("0.5"), read_float), OfAnything(Mode("0.9"), read_float)),
        (OfAnything(Mode("0.5"), read_float), OfAnything("0.5", read_float)),
        (OfAnything(b"0.5", read_float), OfAnything(b"0.9", read_float)),
        (OfAnything(Way.FAST, id), OfAnything(Way.SLOW, id)),
    ],
)
def test_settings_of_every_type_are_told_apart(one: GammaRule, other: GammaRule) -> None:
    assert one != other
    assert BDIA(Euler(), one) != BDIA(Euler(), other)


def test_a_member_of_an_enumeration_is_named() -> None:
    assert "Way.FAST" in repr(OfAnything(Way.FAST, id))


def test_a_network_that_learns_is_another_setting() -> None:
    network = torch.nn.Linear(1, 1)
    rule = OfAnything(network, lambda net: float(net.weight.sigmoid()))
    grid, x = Grid.of([8.0, 2.0, 0.5, 0.0]), torch.ones(2, 5, dtype=torch.float64)
    first = BDIA(Euler(), rule).sample(gaussian(), x, grid)
    with torch.no_grad():
        network.weight.add_(3.0)
    second = BDIA(Euler(), rule).sample(gaussian(), x, grid)
    assert not torch.equal(first.x, second.x)
    with pytest.raises(ValueError, match="another solver"):
        BDIA(Euler(), rule).invert(gaussian(), first.state, grid)


@pytest.mark.parametrize("holder", [list, dict, SimpleNamespace])
def test_settings_that_contain_themselves_are_refused(holder: type) -> None:
    held: Any = holder()
    rule = Low(held)
    if isinstance(held, list):
        held.append(rule)
    elif isinstance(held, dict):
        held["rule"] = rule
    else:
        held.rule = rule
    with pytest.raises(ValueError, match="the settings of BDIA contain themselves"):
        BDIA(Euler(), rule).sample(lambda x, sigma: 0.5 * x, X, GRID)
    with pytest.raises(ValueError, match="the settings of Low contain themselves"):
        repr(rule)
