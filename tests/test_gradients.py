"""Gradients at constant memory, against those that autograd records over the whole run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from odesolvers import (
    BDIA,
    DDIM,
    EDICT,
    DampedStepRatio,
    Euler,
    FixedPoint,
    FloatingPoint,
    HeunEDM,
    InversionWarning,
    McCallumFoster,
    ReversibleHeun,
    SmoothedOutput,
    Solution,
    StepRatio,
    karras_sigmas,
)
from odesolvers.extend import Solver

from . import test_approximators, test_belm, test_coupled, test_mali
from .contract import InvertibleContract
from .problems import noise, relative_error

SIGMAS = karras_sigmas(7, 0.1, 5.0, append_zero=False)


def exact_solvers() -> list[Solver]:
    """Those of every class of the contract, and some with weights that change along the grid."""
    modules = test_approximators, test_belm, test_coupled, test_mali  # where they are
    classes = [c for m in modules for c in vars(m).values() if isinstance(c, type)]
    held = [c.solver for c in classes if issubclass(c, InvertibleContract) and hasattr(c, "solver")]
    more = [
        BDIA(Euler(), DampedStepRatio()),
        BDIA(DDIM(), 0.9),
        BDIA(HeunEDM("behind"), StepRatio(1)),
        BDIA(Euler(), SmoothedOutput(StepRatio(1))),
        McCallumFoster(HeunEDM()),
    ]
    return list({repr(solver): solver for solver in [*held, *more]}.values())


SOLVERS = exact_solvers()


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
        s = sigma.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
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
    shape: tuple[int, ...] = (2, 3),
) -> list[Tensor]:
    """Of the start, the condition and the parameters."""
    network = Network(dtype)
    scale = sigmas[0].item() if way == "sample" else 1.0
    x = noise(*shape, sigma=scale, dtype=dtype).requires_grad_()
    shift = noise(*shape, sigma=0.1, seed=1, dtype=dtype).requires_grad_()
    run = getattr(solver, way)
    solution = run(network, x, sigmas, extra_args={"shift": shift}, differentiable=differentiable)
    loss_of(solution).backward()
    found = [x.grad, shift.grad, *(p.grad for p in network.parameters())]
    assert all(g is not None for g in found)
    return found  # type: ignore[return-value]


def farthest(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(relative_error(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.filterwarnings("ignore::odesolvers.InversionWarning")  # codes over a few steps
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
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    zero=st.booleans(),
)
def test_gradients_on_any_grid_and_shape(
    solver: Solver, way: str, n: int, low: float, rho: float, shape: list[int], zero: bool
) -> None:
    sigmas = karras_sigmas(n, low, 5.0, rho, append_zero=zero and way == "sample")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InversionWarning)
        ours, theirs = (
            gradients(solver, way, kind, sigmas=sigmas, shape=(*shape, 3))
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


def test_there_and_back_has_the_identity_as_its_derivative() -> None:
    solver, network = EDICT(), Network().requires_grad_(False)
    x = noise(2, 3, sigma=5.0).requires_grad_()
    there = solver.sample(network, x, SIGMAS, differentiable="reversible")
    back = solver.invert(network, there.state, SIGMAS, differentiable="reversible")
    weights = noise(2, 3, seed=3)
    (found,) = torch.autograd.grad((weights * back.x).sum(), x)
    assert relative_error(found, weights) < 1e-9


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


@pytest.mark.parametrize("way", ["sample", "invert"])
def test_x_is_storage_of_its_own(way: str) -> None:
    x = noise(2, 3, sigma=2.0).requires_grad_()
    for solver in (BDIA(Euler()), EDICT()):
        solution = getattr(solver, way)(Network(), x, SIGMAS, differentiable="reversible")
        before = [t.detach().clone() for t in (solution.state.current, solution.state.partner)]
        solution.x.clamp_(-0.1, 0.1)
        after = solution.state.current, solution.state.partner
        assert all(map(torch.equal, before, after))


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
