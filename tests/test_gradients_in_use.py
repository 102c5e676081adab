"""Gradients at constant memory in use: which tensors they are found for, and what is refused."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from odesolvers import (
    BDIA,
    DDIM,
    EDICT,
    RK4,
    Euler,
    FixedPoint,
    FixedPointInversion,
    FloatingPoint,
    HeunEDM,
    InversionWarning,
    PerStep,
    ReversibleHeun,
    Rex,
)
from odesolvers.extend import Arithmetic, Solver

from .problems import noise, relative_error
from .test_gradients import SIGMAS, Network, farthest


def test_no_gradient_leads_through_the_integers_of_an_earlier_run() -> None:
    solver, x = BDIA(Euler(), 1.0, FixedPoint()), noise(2, 3, sigma=5.0).requires_grad_()
    first = solver.sample(Network(), x, SIGMAS, stop=3, differentiable="reversible")
    with pytest.raises(ValueError, match="no gradient leads back to an earlier run"):
        solver.sample(pytest.fail, first, SIGMAS, differentiable="reversible")
    assert solver.sample(Network(), first.state, differentiable="reversible").x.requires_grad


WORLD: dict[str, nn.Module] = {}


def closures(network: Network) -> dict[str, Callable[..., Tensor]]:
    class Held:
        def __init__(self) -> None:
            self.network = network

        def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
            return self.network(x, sigma)  # type: ignore[no-any-return]

        def method(self, x: Tensor, sigma: Tensor) -> Tensor:
            return self.network(x, sigma)  # type: ignore[no-any-return]

    def second(network: Network, x: Tensor, sigma: Tensor) -> Tensor:
        return network(x, sigma)  # type: ignore[no-any-return]

    def default(x: Tensor, sigma: Tensor, inner: Network = network) -> Tensor:
        return inner(x, sigma)  # type: ignore[no-any-return]

    def nested(x: Tensor, sigma: Tensor) -> Tensor:
        return (lambda y: WORLD["network"](y, sigma))(x)  # type: ignore[no-any-return]

    class Global:
        def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
            return WORLD["network"](x, sigma)  # type: ignore[no-any-return]

    WORLD["network"] = network
    return {
        "a closure": lambda x, sigma: network(x, sigma),
        "an object": Held(),
        "a method": Held().method,
        "a partial": partial(second, network),
        "a method of the network": network.forward,
        "a default": default,
        "a global of an inner function": nested,
        "a global of the class of an object": Global(),
        "a checkpointed network": lambda x, s: checkpoint(network, x, s, use_reentrant=False),
    }


@pytest.mark.parametrize("kind", list(closures(Network())))
def test_the_parameters_of_a_network_are_found_wherever_it_is(kind: str) -> None:
    network, x = Network(), noise(2, 3, sigma=5.0)
    found = {}
    for way in ("reversible", True):
        solution = BDIA(Euler()).sample(
            closures(network)[kind],
            x,
            SIGMAS,
            differentiable=way,  # type: ignore[arg-type]
        )
        found[way] = list(torch.autograd.grad(solution.x.sin().sum(), list(network.parameters())))
    assert farthest(found["reversible"], found[True]) < 1e-10


@pytest.mark.parametrize(
    "solver", [BDIA(Euler()), BDIA(Euler(), 1.0, FixedPoint()), EDICT(), ReversibleHeun()], ids=repr
)
@pytest.mark.parametrize("way", ["sample", "invert"])
def test_a_hidden_tensor_is_named_where_it_is_the_only_one(solver: Solver, way: str) -> None:
    """Nothing is known to ask for a gradient, and the result would have none."""
    hidden, x = deque([Network()]), noise(2, 3)
    late = torch.exp(torch.ones(3).double().requires_grad_())
    for denoiser, shape in (
        (lambda x, sigma: hidden[0](x, sigma), r"\(3, 8\)|\(8, 3\)|\(3,\)|\(8,\)"),
        (lambda x, sigma: 0.5 * x + late, r"\(3,\)"),
    ):
        with pytest.raises(
            ValueError, match=rf"(?s){shape}.*requires a gradient and was not found"
        ):
            getattr(solver, way)(denoiser, x, SIGMAS, differentiable="reversible")


@pytest.mark.parametrize("way", ["sample", "invert"])
@pytest.mark.parametrize("high", [True, False])
def test_a_hidden_tensor_is_named_at_whatever_level_it_is_used(way: str, high: bool) -> None:
    used, seen = deque([Network()]), []

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(bool(sigma[0] > 1))
        return used[0](x, sigma) if seen[-1] is high else 0.5 * x  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match="requires a gradient and was not found"):
        getattr(BDIA(Euler()), way)(denoiser, noise(2, 3), SIGMAS, differentiable="reversible")
    assert seen.count(high) == 1  # before the rest of the run


def test_a_denoiser_under_no_grad_is_noticed() -> None:
    x, denoiser = noise(2, 3).requires_grad_(), torch.no_grad()(Network().forward)
    solution = BDIA(Euler()).sample(denoiser, x, SIGMAS, differentiable="reversible")
    with pytest.warns(UserWarning, match=r"is it under torch\.no_grad"):
        solution.x.sum().backward()


def test_a_hidden_tensor_is_named_and_not_forgotten() -> None:
    network, hidden = Network(), torch.ones(3).double().requires_grad_()
    for denoiser in (
        lambda x, sigma: network(x, sigma) * hidden,
        lambda x, sigma: network(x, sigma) + torch.exp(hidden),
    ):
        solution = BDIA(Euler()).sample(denoiser, noise(2, 3), SIGMAS, differentiable="reversible")
        with pytest.raises(ValueError, match=r"(?s)\(3,\).*requires a gradient and was not found"):
            solution.x.sum().backward()


def test_no_graph_is_made_where_nothing_asks_for_one() -> None:
    network = Network().requires_grad_(False)
    solution = BDIA(Euler()).sample(network, noise(2, 3), SIGMAS, differentiable="reversible")
    assert not solution.x.requires_grad


def test_frozen_parameters_get_no_gradient() -> None:
    network = Network()
    network.inner.requires_grad_(False)
    solution = BDIA(Euler()).sample(network, noise(2, 3), SIGMAS, differentiable="reversible")
    solution.x.sum().backward()
    assert network.inner.weight.grad is None
    assert network.outer.weight.grad is not None


def test_hooks_and_optimizers_work() -> None:
    """A start is moved so that its sample meets a target."""
    network, seen = Network().requires_grad_(False), []
    target, x = noise(2, 3, seed=5), noise(2, 3, sigma=5.0).requires_grad_()
    x.register_hook(lambda g: seen.append(g.norm()))
    optimizer = torch.optim.Adam([x], lr=0.5)
    losses = []
    for _ in range(60):
        sample = BDIA(Euler()).sample(network, x, SIGMAS, differentiable="reversible").x
        loss = (sample - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert len(seen) == 60


def test_what_cannot_be_is_refused() -> None:
    network, x = Network(), noise(2, 3).requires_grad_()
    for solver in (Euler(), FixedPointInversion(DDIM())):
        with pytest.raises(ValueError, match="has no exact inverse"):
            solver.sample(network, x, SIGMAS, differentiable="reversible")
    forgetful = BDIA(Euler(), PerStep([0.5, 0.0, 0.5, 0.5, 0.5]))
    with pytest.raises(ValueError, match="weight g = 0"):  # before any call
        forgetful.sample(pytest.fail, x, SIGMAS, differentiable="reversible")  # type: ignore[arg-type]
    first = forgetful.sample(network, x, SIGMAS, stop=3)  # and the rest can be undone
    forgetful.sample(network, first.state, SIGMAS, differentiable="reversible").x.sum().backward()
    solution = BDIA(Euler()).sample(network, x, SIGMAS, differentiable="reversible")
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(solution.x.sum(), x, create_graph=True)
    with pytest.raises(TypeError, match="differentiable must be True, False or 'reversible'"):
        BDIA(Euler()).sample(network, x, SIGMAS, differentiable="backwards")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by torch.func.jvp
@pytest.mark.parametrize("solver", [BDIA(HeunEDM()), EDICT()], ids=repr)
def test_transforms_of_torch_func(solver: Solver) -> None:
    """Forward mode goes through the run as through any code; reverse mode records every call."""
    network, x, t = Network().requires_grad_(False), noise(2, 3, sigma=5.0), noise(2, 3, seed=1)

    def end(x: Tensor, differentiable: Any) -> Tensor:
        return solver.sample(network, x, SIGMAS, differentiable=differentiable).x.sin().sum()

    recorded = partial(end, differentiable=True)
    (right,) = torch.autograd.grad(recorded(x.requires_grad_()), x)
    assert relative_error(torch.func.grad(recorded)(x.detach()), right) < 1e-12
    for differentiable in (False, True, "reversible"):
        along = torch.func.jvp(partial(end, differentiable=differentiable), (x.detach(),), (t,))[1]
        assert float(along) == pytest.approx(float((right * t).sum()), rel=1e-12)
    with pytest.raises(RuntimeError, match=r"no transforms of torch\.func"):
        torch.func.grad(partial(end, differentiable="reversible"))(x.detach())
    weights = {name: p.detach() for name, p in network.named_parameters()}

    def of_weights(weights: dict[str, Tensor]) -> Tensor:
        def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
            return torch.func.functional_call(network, weights, (x, sigma))  # type: ignore[no-any-return]

        return solver.sample(denoiser, x, SIGMAS, differentiable="reversible").x

    with pytest.raises(ValueError, match="no forward derivatives of what requires a gradient"):
        torch.func.jvp(of_weights, (weights,), (weights,))
    whole = BDIA(HeunEDM(), 1.0, FixedPoint())
    with pytest.raises(ValueError, match="forward derivatives"):
        torch.func.jvp(
            lambda x: whole.sample(network, x, SIGMAS, differentiable="reversible").x,
            (x.detach(),),
            (t,),
        )


@pytest.mark.parametrize("what", ["weights", "condition"])
@pytest.mark.parametrize("arithmetic", [FloatingPoint(), FixedPoint()], ids=repr)
def test_writes_between_the_run_and_the_backward_pass_are_noticed(
    what: str, arithmetic: Arithmetic
) -> None:
    network, x = Network(), noise(2, 3, sigma=5.0).requires_grad_()
    shift = noise(2, 3, sigma=0.1)
    solution = EDICT(arithmetic=arithmetic).sample(
        network, x, SIGMAS, extra_args={"shift": shift}, differentiable="reversible"
    )
    with torch.no_grad():
        (network.outer.weight if what == "weights" else shift).add_(1e-9)
    with pytest.raises(RuntimeError, match=r"was written to between the run and its backward"):
        solution.x.sum().backward()


def test_a_denoiser_that_changed_is_noticed_by_where_the_run_began() -> None:
    factor, x = [0.5], noise(2, 3, sigma=5.0).requires_grad_()

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return factor[0] * x

    for arithmetic in (FloatingPoint(), FixedPoint()):
        factor[0] = 0.5
        solution = BDIA(Euler(), 1.0, arithmetic).sample(
            denoiser, x, SIGMAS, differentiable="reversible"
        )
        factor[0] = 0.4
        if arithmetic.exact:
            with pytest.raises(RuntimeError, match="did not find its start"):
                solution.x.sum().backward()
        else:
            with pytest.warns(InversionWarning, match="missed its start"):
                solution.x.sum().backward()


def test_hooks_of_parameters_see_whole_gradients() -> None:
    calls = []

    def gradient(differentiable: Any) -> Tensor:
        network = Network()
        network.outer.weight.register_hook(lambda g: calls.append(differentiable) or 0.5 * g)
        solution = BDIA(Euler()).sample(network, noise(2, 3), SIGMAS, differentiable=differentiable)
        solution.x.sin().sum().backward()
        assert network.outer.weight.grad is not None
        return network.outer.weight.grad

    assert relative_error(gradient("reversible"), gradient(True)) < 1e-10
    assert calls.count("reversible") == 1


def test_networks_of_parts_of_the_grid_are_all_found() -> None:
    high, low = Network(), Network()
    networks = {"high": [high], "low": (low,)}

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        part = networks["low" if bool((sigma < 1).all()) else "high"][0]  # type: ignore[index]
        return part(x, sigma)  # type: ignore[no-any-return]

    wanted = [*high.parameters(), *low.parameters()]

    def run(differentiable: Any) -> list[Tensor]:
        start = noise(2, 3, sigma=5.0)
        solution = BDIA(Euler()).sample(denoiser, start, SIGMAS, differentiable=differentiable)
        return list(torch.autograd.grad(solution.x.sin().sum(), wanted))

    assert farthest(run("reversible"), run(True)) < 1e-10


def test_a_denoiser_without_a_graph_and_a_start_of_zeros() -> None:
    def constant(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.full_like(x, 0.3)

    x = torch.zeros(2, 3, dtype=torch.float64).requires_grad_()
    for solver in (BDIA(Euler()), Rex(RK4())):
        for way in ("sample", "invert"):
            found = []
            for kind in ("reversible", True):
                solution = getattr(solver, way)(constant, x, SIGMAS, differentiable=kind)
                with warnings.catch_warnings():  # that the outputs count as constants
                    warnings.simplefilter("ignore", UserWarning)
                    found += torch.autograd.grad(solution.x.sum(), x)
            assert relative_error(found[0], found[1]) < 1e-10


def test_a_denoiser_that_is_not_deterministic_is_noticed_where_asked() -> None:
    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return 0.5 * x + 1e-3 * torch.rand_like(x)

    solver = BDIA(Euler(), 1.0, FixedPoint(check_determinism=True))
    x = noise(2, 3).requires_grad_()
    with pytest.raises(RuntimeError, match="determin"):
        solver.sample(denoiser, x, SIGMAS, differentiable="reversible")
