"""Gradients at constant memory, against those that autograd records over the whole run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from odesolvers import (
    BDIA,
    BELM,
    DDIM,
    EDICT,
    RK4,
    DampedStepRatio,
    Euler,
    FixedPoint,
    FixedPointInversion,
    FloatingPoint,
    HeunEDM,
    InversionWarning,
    McCallumFoster,
    PerStep,
    ReversibleHeun,
    Rex,
    SmoothedOutput,
    Solution,
    StepRatio,
    karras_sigmas,
)
from odesolvers.extend import Arithmetic, Solver

from .problems import noise, relative_error

SIGMAS = karras_sigmas(7, 0.1, 5.0, append_zero=False)
SOLVERS: list[Solver] = [
    BDIA(Euler(), DampedStepRatio()),
    BDIA(DDIM(), 0.9),
    BDIA(HeunEDM(), StepRatio(1)),
    BDIA(HeunEDM("behind"), StepRatio(1)),
    BDIA(RK4()),
    BDIA(Euler(), SmoothedOutput(StepRatio(1))),
    BELM(),
    EDICT(),
    McCallumFoster(HeunEDM()),
    ReversibleHeun(),
    Rex(RK4()),
]


class Network(nn.Module):
    """A small denoiser with a condition."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.inner = nn.Linear(3, 8, dtype=dtype)
        self.outer = nn.Linear(8, 3, dtype=dtype)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.4 * torch.randn(p.shape, generator=generator))

    def forward(self, x: Tensor, sigma: Tensor, shift: Tensor | None = None) -> Tensor:
        s = sigma[:, None].to(x.dtype)
        inner = torch.tanh(self.inner(x / (1 + s**2).sqrt()) + torch.log(s))
        output: Tensor = x / (1 + s**2) + s / (1 + s**2).sqrt() * self.outer(inner)
        return output if shift is None else output + shift


def loss_of(solution: Solution) -> Tensor:
    """Of both states of the pair, so that no gradient is lost."""
    partner = solution.state.partner
    assert partner is not None
    pair = solution.x, solution.state.current, partner
    return sum((k * torch.sin(x)).sum() for k, x in enumerate(pair, 1))  # type: ignore[return-value]


def gradients(
    solver: Solver,
    way: str,
    differentiable: Any,
    *,
    dtype: torch.dtype = torch.float64,
    sigmas: Tensor = SIGMAS,
    batch: int = 2,
) -> list[Tensor]:
    """Of the start, the condition and the parameters."""
    network = Network(dtype)
    scale = sigmas[0].item() if way == "sample" else 1.0
    x = noise(batch, 3, sigma=scale, dtype=dtype).requires_grad_()
    shift = noise(batch, 3, sigma=0.1, seed=1, dtype=dtype).requires_grad_()
    run = getattr(solver, way)
    solution = run(network, x, sigmas, extra_args={"shift": shift}, differentiable=differentiable)
    loss_of(solution).backward()
    found = [x.grad, shift.grad, *(p.grad for p in network.parameters())]
    assert all(g is not None for g in found)
    return found  # type: ignore[return-value]


def farthest(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(relative_error(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("way", ["sample", "invert"])
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_gradients_are_those_of_autograd(solver: Solver, way: str) -> None:
    ours, theirs = gradients(solver, way, "reversible"), gradients(solver, way, True)
    assert farthest(ours, theirs) < 1e-10
    single = {"dtype": torch.float32}
    ours, theirs = (gradients(solver, way, kind, **single) for kind in ("reversible", True))
    assert farthest(ours, theirs) < 1e-5


@settings(deadline=None, max_examples=40)
@given(
    solver=st.sampled_from(SOLVERS),
    way=st.sampled_from(["sample", "invert"]),
    n=st.integers(2, 9),
    low=st.floats(0.05, 0.5),
    rho=st.floats(1, 9),
    batch=st.integers(1, 3),
    zero=st.booleans(),
)
def test_gradients_on_any_grid(
    solver: Solver, way: str, n: int, low: float, rho: float, batch: int, zero: bool
) -> None:
    sigmas = karras_sigmas(n, low, 5.0, rho, append_zero=zero and way == "sample")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InversionWarning)
        ours, theirs = (
            gradients(solver, way, kind, sigmas=sigmas, batch=batch)
            for kind in ("reversible", True)
        )
    assert farthest(ours, theirs) < 1e-8


@pytest.mark.parametrize(
    "solver", [BDIA(Euler()), BDIA(HeunEDM(), StepRatio(1)), EDICT()], ids=repr
)
@pytest.mark.parametrize("way", ["sample", "invert"])
def test_gradcheck(solver: Solver, way: str) -> None:
    network = Network().requires_grad_(False)

    def run(x: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        arguments = {"extra_args": {"shift": shift}, "differentiable": "reversible"}
        solution = getattr(solver, way)(network, x, SIGMAS, **arguments)
        return solution.x, solution.state.partner

    x, shift = noise(2, 3).requires_grad_(), noise(2, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, shift))


@pytest.mark.parametrize("way", ["sample", "invert"])
@pytest.mark.parametrize(
    "make",
    [lambda a: BDIA(Euler(), 0.75, a), lambda a: EDICT(0.75, a), lambda a: ReversibleHeun(a)],
    ids=["BDIA", "EDICT", "ReversibleHeun"],
)
def test_in_fixed_point_the_rounding_is_the_identity(make: Callable[..., Solver], way: str) -> None:
    ours = gradients_of_x(make(FixedPoint()), way, "reversible")
    assert farthest(ours, gradients_of_x(make(FloatingPoint()), way, True)) < 1e-8


def gradients_of_x(solver: Solver, way: str, differentiable: Any) -> list[Tensor]:
    network, x = Network(), noise(2, 3, sigma=2.0).requires_grad_()
    solution = getattr(solver, way)(network, x, SIGMAS, differentiable=differentiable)
    solution.x.sin().sum().backward()
    return [x.grad, *(p.grad for p in network.parameters())]  # type: ignore[list-item]


def test_fixed_point_gives_gradients_where_floating_point_cannot_go_back() -> None:
    """Over 60 steps at gamma 0.5 the rounding of float32 is amplified by 2^59."""
    sigmas = karras_sigmas(60, 0.1, 5.0, append_zero=False)
    network, x = Network(torch.float32), noise(2, 3, sigma=5.0, dtype=torch.float32)

    def gradient(solver: Solver, differentiable: Any) -> Tensor:
        start = x.clone().requires_grad_()
        solver.sample(network, start, sigmas, differentiable=differentiable).x.sum().backward()
        assert start.grad is not None
        return start.grad

    true = gradient(BDIA(Euler(), 0.5), True)
    exact = gradient(BDIA(Euler(), 0.5, FixedPoint()), "reversible")
    assert relative_error(exact, true) < 1e-4
    with pytest.warns(InversionWarning, match="missed its start by"):
        lost = gradient(BDIA(Euler(), 0.5), "reversible")
    assert not relative_error(lost, true) < 1e-2


def test_a_run_in_two_parts_is_one_graph() -> None:
    solver, network = BDIA(Euler()), Network().requires_grad_(False)

    def gradient(*stops: int) -> Tensor:
        x = noise(2, 3, sigma=5.0).requires_grad_()
        at: Any = x
        for stop in stops:
            solution = solver.sample(network, at, SIGMAS, stop=stop, differentiable="reversible")
            at = solution.state
        (found,) = torch.autograd.grad(solution.x.sin().sum(), x)
        return found

    assert relative_error(gradient(3, 6), gradient(6)) < 1e-12


def test_no_gradient_leads_through_the_integers_of_an_earlier_run() -> None:
    solver, x = BDIA(Euler(), 1.0, FixedPoint()), noise(2, 3, sigma=5.0).requires_grad_()
    first = solver.sample(Network(), x, SIGMAS, stop=3, differentiable="reversible")
    with pytest.raises(ValueError, match="no gradient leads back to an earlier run"):
        solver.sample(Network(), first, SIGMAS, differentiable="reversible")
    assert solver.sample(Network(), first.state, differentiable="reversible").x.requires_grad


def test_there_and_back_has_the_identity_as_its_derivative() -> None:
    solver, network = EDICT(), Network().requires_grad_(False)
    x = noise(2, 3, sigma=5.0).requires_grad_()
    there = solver.sample(network, x, SIGMAS, differentiable="reversible")
    back = solver.invert(network, there.state, SIGMAS, differentiable="reversible")
    weights = noise(2, 3, seed=3)
    (found,) = torch.autograd.grad((weights * back.x).sum(), x)
    assert relative_error(found, weights) < 1e-9


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

    return {
        "a closure": lambda x, sigma: network(x, sigma),
        "an object": Held(),
        "a method": Held().method,
        "a partial": partial(second, network),
        "a method of the network": network.forward,
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


def test_a_hidden_tensor_is_named_and_not_forgotten() -> None:
    network, hidden = Network(), torch.ones(3).double().requires_grad_()
    for denoiser in (
        lambda x, sigma: network(x, sigma) * hidden,
        lambda x, sigma: network(x, sigma) + torch.exp(hidden),
    ):
        solution = BDIA(Euler()).sample(denoiser, noise(2, 3), SIGMAS, differentiable="reversible")
        with pytest.raises(ValueError, match=r"(?s)\(3,\).*requires a gradient and was not found"):
            solution.x.sum().backward()


def test_autocast_is_that_of_the_run() -> None:
    network, seen = Network(torch.float32), []

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return network(x, sigma).float()  # type: ignore[no-any-return]

    def run(differentiable: Any) -> list[Tensor]:
        x = noise(4, 3, sigma=5.0, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            solution = BDIA(Euler()).sample(denoiser, x, SIGMAS, differentiable=differentiable)
        return list(torch.autograd.grad(solution.x.sin().sum(), list(network.parameters())))

    ours = run("reversible")
    assert seen == [True] * 12  # 6 down, and 6 on the way back
    assert (
        farthest(ours, run(True)) < 2e-2
    )  # autograd sums the gradients of cast weights in bfloat16


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


def test_memory_holds_one_call_whatever_the_number_of_steps() -> None:
    """Counted as the tensors that autograd saves, for a graph of the whole run and of one call."""
    network = Network()

    def most(n: int, differentiable: Any) -> int:
        sigmas, alive, peak = karras_sigmas(n, 0.1, 5.0, append_zero=False), [0], [0]

        class Saved:
            def __init__(self, tensor: Tensor) -> None:
                self.tensor = tensor
                alive[0] += 1
                peak[0] = max(peak[0], alive[0])

            def __del__(self) -> None:
                alive[0] -= 1

        hooks = torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor)
        with hooks:
            x = noise(2, 3, sigma=5.0).requires_grad_()
            BDIA(Euler()).sample(
                network, x, sigmas, differentiable=differentiable
            ).x.sum().backward()
        return peak[0]

    assert most(40, "reversible") == most(10, "reversible") < 20
    assert most(40, True) > 3 * most(10, True)


def test_what_cannot_be_is_refused() -> None:
    network, x = Network(), noise(2, 3).requires_grad_()
    for solver in (Euler(), FixedPointInversion(DDIM())):
        with pytest.raises(ValueError, match="has no exact inverse"):
            solver.sample(network, x, SIGMAS, differentiable="reversible")
    forgetful = BDIA(Euler(), PerStep([0.5, 0.0, 0.5, 0.5, 0.5]))
    with pytest.raises(ValueError, match="weight g = 0"):
        forgetful.sample(network, x, SIGMAS, differentiable="reversible")
    solution = BDIA(Euler()).sample(network, x, SIGMAS, differentiable="reversible")
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(solution.x.sum(), x, create_graph=True)
    with pytest.raises(TypeError, match="differentiable must be True, False or 'reversible'"):
        BDIA(Euler()).sample(network, x, SIGMAS, differentiable="backwards")  # type: ignore[arg-type]


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


@pytest.mark.parametrize("way", ["sample", "invert"])
def test_x_is_storage_of_its_own(way: str) -> None:
    x = noise(2, 3, sigma=2.0).requires_grad_()
    for solver in (BDIA(Euler()), EDICT()):
        solution = getattr(solver, way)(Network(), x, SIGMAS, differentiable="reversible")
        before = [t.detach().clone() for t in (solution.state.current, solution.state.partner)]
        solution.x.clamp_(-0.1, 0.1)
        after = solution.state.current, solution.state.partner
        assert all(map(torch.equal, before, after))


def test_a_denoiser_without_a_graph_and_a_start_of_zeros() -> None:
    def constant(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.full_like(x, 0.3)

    x = torch.zeros(2, 3, dtype=torch.float64).requires_grad_()
    for solver in (BDIA(Euler()), Rex(RK4())):
        for way in ("sample", "invert"):
            found = []
            for kind in ("reversible", True):
                solution = getattr(solver, way)(constant, x, SIGMAS, differentiable=kind)
                found += torch.autograd.grad(solution.x.sum(), x)
            assert relative_error(found[0], found[1]) < 1e-10


def test_a_denoiser_that_is_not_deterministic_is_noticed_where_asked() -> None:
    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return 0.5 * x + 1e-3 * torch.rand_like(x)

    solver = BDIA(Euler(), 1.0, FixedPoint(check_determinism=True))
    x = noise(2, 3).requires_grad_()
    with pytest.raises(RuntimeError, match="determin"):
        solver.sample(denoiser, x, SIGMAS, differentiable="reversible")


def test_it_is_a_gradient_of_the_flow() -> None:
    """Of the sum of a Gaussian's samples, whose flow scales the start by a known factor."""
    from odesolvers.models import Gaussian

    sigmas = karras_sigmas(400, 0.01, 20.0, append_zero=False)
    x = noise(2, 3, sigma=20.0).requires_grad_()
    solution = BDIA(Euler(), StepRatio(1)).sample(
        Gaussian(0.0, 0.5), x, sigmas, differentiable="reversible"
    )
    (found,) = torch.autograd.grad(solution.x.sum(), x)
    right = math.sqrt((0.25 + sigmas[-1] ** 2) / (0.25 + sigmas[0] ** 2))
    assert relative_error(found, torch.full_like(found, right)) < 1e-3
