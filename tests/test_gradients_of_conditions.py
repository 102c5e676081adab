"""Gradients of conditions at constant memory; settings, which are numbers, are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from odesolvers import BDIA, EDICT, Euler, GammaRule, Solution
from odesolvers.extend import Solver
from odesolvers.models import ClassifierFreeGuidance

from .problems import noise
from .test_gradients import SIGMAS, Network, farthest


def test_conditions_may_be_nested_and_shared() -> None:
    network = Network().requires_grad_(False)
    shift, factor = noise(2, 3).requires_grad_(), torch.tensor(0.3).double().requires_grad_()

    def denoiser(x: Tensor, sigma: Tensor, added: dict[str, Any]) -> Tensor:
        first, second = added["shifts"]
        return network(x, sigma, added["factor"] * (first + 2 * second))  # type: ignore[no-any-return]

    def run(differentiable: Any) -> list[Tensor]:
        added = {"shifts": [shift, shift], "factor": factor, "name": "kept"}
        start = noise(2, 3, sigma=5.0)
        solution = BDIA(Euler()).sample(
            denoiser, start, SIGMAS, extra_args={"added": added}, differentiable=differentiable
        )
        return list(torch.autograd.grad(solution.x.square().sum(), [shift, factor]))

    assert farthest(run("reversible"), run(True)) < 1e-10


def test_a_network_in_extra_args_is_found() -> None:
    network = Network()

    def denoiser(x: Tensor, sigma: Tensor, given: dict[str, nn.Module]) -> Tensor:
        return given["network"](x, sigma)  # type: ignore[no-any-return]

    def run(differentiable: Any) -> list[Tensor]:
        extra_args = {"given": {"network": network}}
        solution = BDIA(Euler()).sample(
            denoiser,
            noise(2, 3, sigma=5.0),
            SIGMAS,
            extra_args=extra_args,
            differentiable=differentiable,
        )
        return list(torch.autograd.grad(solution.x.sin().sum(), list(network.parameters())))

    assert farthest(run("reversible"), run(True)) < 1e-10


def test_a_condition_computed_before_the_run_belongs_in_extra_args() -> None:
    encoder, network = nn.Linear(3, 3).double(), Network().requires_grad_(False)
    late = torch.tanh(encoder(torch.ones(3).double()))
    solution = BDIA(Euler()).sample(
        lambda x, sigma: network(x, sigma) + late + 0 * encoder.bias,
        noise(2, 3),
        SIGMAS,
        differentiable="reversible",
    )
    with pytest.raises(RuntimeError, match="pass that tensor in extra_args"):
        solution.x.sum().backward()


@dataclass(frozen=True, repr=False, eq=False)
class Learned(GammaRule):
    """A rule with a tensor, or a network, as its setting."""

    given: Any

    def weights(self, grid: Any, scale: Any) -> list[float]:
        return [0.5] * (grid.steps - 1)


@pytest.mark.parametrize("differentiable", [True, "reversible"])
def test_numbers_that_require_a_gradient_are_refused(differentiable: Any) -> None:
    """Of a run under no_grad too, for `differentiable` asks for them."""
    network, x = Network(), noise(2, 3, sigma=5.0)
    levels = SIGMAS.clone().requires_grad_()
    ways: list[tuple[str, Callable[..., Solution]]] = [
        ("sigmas", lambda **args: BDIA(Euler()).sample(network, x, levels, **args)),
        ("sigmas", lambda **args: EDICT().invert(network, x, list(levels), **args)),
        (
            "given of Learned",
            lambda **args: BDIA(Euler(), Learned(levels)).sample(network, x, SIGMAS, **args),
        ),
        (
            "given of Learned",
            lambda **args: BDIA(Euler(), Learned(network)).sample(network, x, SIGMAS, **args),
        ),
    ]
    for name, way in ways:
        with torch.no_grad(), pytest.raises(ValueError, match=f"{name} requires a gradient"):
            way(differentiable=differentiable)
        way()  # nothing is asked


WORLD: dict[str, Any] = {}


class Plain:
    __slots__ = ("rule",)

    def __init__(self, rule: Any) -> None:
        self.rule = rule


@pytest.mark.parametrize("differentiable", [True, "reversible"])
@pytest.mark.parametrize(
    "held",
    [
        lambda weight: {"a": [weight]},
        lambda weight: Plain(weight),
        lambda weight: lambda k: weight * k,
        lambda weight: WORLD.update(weight=weight) or (lambda k: WORLD["weight"] * k),
        lambda weight: partial(max, weight),
        lambda weight: Learned(({"a": nn.ParameterList([weight])},)),
    ],
    ids=["dict", "slots", "function", "global", "partial", "rule in a rule"],
)
def test_settings_of_settings_are_refused_too(held: Any, differentiable: Any) -> None:
    """Whether or not the steps of the solver are known from a run before."""
    solver = BDIA(Euler(), Learned(held(nn.Parameter(torch.tensor(0.5)))))
    x = noise(2, 3, sigma=5.0)
    solver.sample(Network(), x, SIGMAS)
    with pytest.raises(ValueError, match="requires a gradient, which would be lost"):
        solver.sample(Network(), x, SIGMAS, differentiable=differentiable)


@pytest.mark.parametrize("scale", [2.5, 1.0, [2.5, 0.5]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", [BDIA(Euler()), EDICT()], ids=repr)
def test_the_gradient_of_a_guidance_scale(solver: Solver, scale: Any, dtype: torch.dtype) -> None:
    """As autograd's, and as that of the guidance written out in the denoiser."""
    network, shift = Network().requires_grad_(False), noise(2, 3)
    guided = ClassifierFreeGuidance(network, 7.0)

    def written(x: Tensor, sigma: Tensor, scale: Tensor) -> Tensor:
        one, other = network(x, sigma, -shift), network(x, sigma, shift)
        return one + scale.double().reshape(-1, 1) * (other - one)  # type: ignore[no-any-return]

    def run(denoiser: Any, differentiable: Any, **conditions: Any) -> list[Tensor]:
        own = torch.tensor(scale, dtype=dtype).requires_grad_()
        x = noise(2, 3, sigma=5.0)
        solution = solver.sample(
            denoiser,
            x,
            SIGMAS,
            extra_args={"scale": own, **conditions},
            differentiable=differentiable,
        )
        return list(torch.autograd.grad(solution.x.square().sum(), own))

    branches = {"positive": {"shift": shift}, "negative": {"shift": -shift}}
    right = run(written, True)
    assert float(right[0].abs().min()) > 1e-3
    for differentiable in (True, "reversible"):
        assert farthest(run(guided, differentiable, **branches), right) < (
            1e-10 if dtype == torch.float64 else 1e-5
        )
