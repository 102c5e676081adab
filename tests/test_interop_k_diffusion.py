"""Solvers behind k-diffusion's sampler signature: parity with its own functions, and the way back."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import odesolvers as ode
from odesolvers.extend import Solver
from odesolvers.interop.k_diffusion import as_sampler
from odesolvers.models import FlowDenoiser, flow_sigmas, flow_times

from .problems import mixture, noise

needs_k_diffusion = pytest.mark.skipif(
    find_spec("k_diffusion") is None, reason="k_diffusion is not installed"
)
SIGMAS = ode.karras_sigmas(12, 0.02, 20.0).float()  # k-diffusion's own are float32 and end with 0
SOLVERS = [
    ode.BDIA(ode.Euler(), ode.StepRatio(1)),
    ode.BDIA(ode.HeunEDM(), ode.StepRatio(1)),
    ode.BDIA(ode.DDIM(), 1.0, ode.FixedPoint()),
    ode.EDICT(),
    ode.ReversibleHeun(),
]


@pytest.fixture(params=SOLVERS, ids=repr)
def solver(request: pytest.FixtureRequest) -> Solver:
    found: Solver = request.param
    return found


def start() -> Tensor:
    return noise(4, 3, sigma=20.0)


@needs_k_diffusion
@pytest.mark.parametrize(
    ("method", "name"), [(ode.Euler(), "sample_euler"), (ode.HeunEDM(), "sample_heun")]
)
def test_it_is_used_like_k_diffusions_own_function(
    k_diffusion: ModuleType, method: Solver, name: str
) -> None:
    own: Callable[..., Tensor] = getattr(k_diffusion.sampling, name)
    ours = as_sampler(method)
    called = list(inspect.signature(ours).parameters.values())
    assert [(p.name, p.default) for p in called] == [
        (p.name, p.default) for p in list(inspect.signature(own).parameters.values())[:6]
    ]
    shown: dict[Any, list[dict[str, Any]]] = {own: [], ours: []}
    results = [
        f(mixture(), start(), SIGMAS, extra_args={}, callback=shown[f].append, disable=True)
        for f in (own, ours)
    ]
    assert torch.allclose(*results, rtol=1e-5, atol=1e-6)
    assert len(shown[own]) == len(shown[ours]) == len(SIGMAS) - 1
    for a, b in zip(shown[own], shown[ours], strict=True):
        assert a.keys() == b.keys()
        assert a["i"] == b["i"]
        for key in ("x", "sigma", "sigma_hat", "denoised"):
            assert torch.allclose(a[key].double(), b[key].double(), rtol=1e-5, atol=1e-6), key


def test_rising_sigmas_go_back(solver: Solver, device: torch.device) -> None:
    x, sigmas, solutions = start().to(device), SIGMAS.to(device), list[ode.Solution]()
    sampler = as_sampler(solver, on_end=solutions.append)
    denoiser = mixture().to(device)
    image = sampler(denoiser, x, sigmas)
    assert torch.equal(image, solutions[0].x)
    back = sampler(denoiser, solutions[0].state, sigmas.flip(0))
    assert (back - x).norm() / x.norm() < 1e-9
    again = sampler(denoiser, solutions[1].state, sigmas)
    assert (again - image).norm() / image.norm() < 1e-9
    assert [s.nfe > 0 for s in solutions] == [True] * 3


def test_a_lone_image_is_inverted_as_by_invert_and_comes_back() -> None:
    solver, solutions = ode.BDIA(ode.Euler(), ode.StepRatio(1)), list[ode.Solution]()
    sampler = as_sampler(solver, on_end=solutions.append)
    image = mixture().sample(4, torch.Generator().manual_seed(0))
    code = sampler(mixture(), image, SIGMAS.flip(0))
    assert torch.equal(code, solver.invert(mixture(), image, SIGMAS).x)
    again = sampler(mixture(), solutions[0].state, SIGMAS)
    assert (again - image).norm() / image.norm() < 1e-10
    lost = sampler(mixture(), code, SIGMAS)  # without the pair it is another first step
    assert (lost - image).norm() / image.norm() > 1e-6


@pytest.mark.parametrize("lone", [False, True])
def test_a_callback_counts_the_intervals_of_rising_sigmas(solver: Solver, lone: bool) -> None:
    there = solver.sample(mixture(), start(), SIGMAS)
    shown: list[dict[str, Any]] = []
    rising = SIGMAS.flip(0)
    as_sampler(solver)(mixture(), there.x if lone else there.state, rising, callback=shown.append)
    steps = len(rising) - 1
    first = 1 if not lone and not solver.coupled else 0
    assert [s["i"] for s in shown] == list(range(first, steps))
    if not solver.coupled:
        levels = [float(s["sigma"]) for s in shown if s["i"] > 0]
        assert levels == pytest.approx([float(sigma) for sigma in rising[1:-1]])


def test_a_method_of_one_state_counts_up_too() -> None:
    shown: list[dict[str, Any]] = []
    solver = ode.DDIMInversion()
    x = mixture().sample(2, torch.Generator().manual_seed(0))
    as_sampler(solver)(mixture(), x, SIGMAS.flip(0), callback=shown.append)
    assert [s["i"] for s in shown] == list(range(len(SIGMAS) - 1))


@pytest.mark.parametrize("rule", [1.0, 0.8, ode.StepRatio(1)], ids=repr)
def test_flow_models_run_in_their_own_state_and_time(rule: Any) -> None:
    """``dz/dt = (z - D) / t`` is k-diffusion's equation, and Euler in z is `FlowEuler` in x."""

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        return torch.sin(z) * (1 + t)[:, None]

    def denoiser(z: Tensor, t: Tensor) -> Tensor:
        return z - t[:, None] * velocity(z, t)

    times = flow_times(9, shift=3.0, start=0.97)
    sigmas = flow_sigmas(times)
    z = noise(2, 5)
    solutions: list[ode.Solution] = []
    sampler = as_sampler(ode.BDIA(ode.Euler(), rule), on_end=solutions.append)
    data = sampler(denoiser, z, times)
    other = ode.BDIA(ode.FlowEuler(), rule).sample(
        FlowDenoiser(velocity), z * (1 + sigmas[0]), sigmas
    )
    assert torch.allclose(data, other.x, rtol=1e-9, atol=1e-9)
    back = sampler(denoiser, solutions[0].state, times.flip(0))
    assert (back - z).norm() / z.norm() < 1e-8


@pytest.mark.parametrize("given", [{}, {"scale": 2.0}])
def test_extra_args_reach_the_model(given: dict[str, float]) -> None:
    def model(x: Tensor, sigma: Tensor, scale: float = 1.0) -> Tensor:
        return scale * x / (1 + sigma[:, None] ** 2)

    sampler = as_sampler(ode.BDIA(ode.Euler()))
    expected = ode.BDIA(ode.Euler()).sample(model, start(), SIGMAS, extra_args=given).x
    assert torch.equal(sampler(model, start(), SIGMAS, given), expected)


@pytest.mark.parametrize(
    ("disable", "terminal", "bar"),
    [(False, False, True), (True, True, False), (None, False, False), (None, True, True)],
)
def test_disable_is_the_switch_of_the_progress_bar(
    disable: bool | None,
    terminal: bool,
    bar: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    as_sampler(ode.BDIA(ode.Euler()))(mixture(), start(), SIGMAS, disable=disable)
    assert ("12/12" in capsys.readouterr().err) == bar


def test_refusals_say_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"as_sampler needs a solver such as BDIA.*'euler'"):
        as_sampler("euler")  # type: ignore[arg-type]
    sampler = as_sampler(ode.BDIA(ode.Euler()))
    for sigmas in ([], [1.0]):
        with pytest.raises(ValueError, match="at least two noise levels"):
            sampler(mixture(), start(), sigmas)
    for sigmas in ([2.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 2.0]):
        with pytest.raises(ValueError, match="must decrease strictly"):
            sampler(mixture(), start(), sigmas)
    with pytest.raises(ValueError, match=r"wrap it as BDIA\(Euler\(\)\)"):
        as_sampler(ode.Euler())(mixture(), start(), SIGMAS.flip(0))
    state = ode.BDIA(ode.Euler()).sample(mixture(), start(), SIGMAS).state
    with pytest.raises(ValueError, match="another grid"):
        sampler(mixture(), state, SIGMAS[1:].flip(0))


def test_an_exception_of_the_model_passes_through() -> None:
    class Interrupted(BaseException):
        pass

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        raise Interrupted

    ended: list[ode.Solution] = []
    with pytest.raises(Interrupted):
        as_sampler(ode.BDIA(ode.Euler()), ended.append)(model, start(), SIGMAS)
    assert ended == []
