"""Behaviour of a run: memory, writes by others, gradients, and devices that are not waited for."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from odesolvers import (
    BDIA,
    EDICT,
    RK3,
    RK4,
    Euler,
    FixedPoint,
    HeunEDM,
    ReversibleHeun,
    StepRatio,
    karras_sigmas,
)
from odesolvers.extend import Solver

from .problems import gaussian, mixture, noise

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SOLVERS: list[Solver] = [BDIA(Euler(), 0.96), BDIA(HeunEDM()), EDICT(), ReversibleHeun()]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_memory_does_not_grow_with_the_steps(solver: Solver) -> None:
    """Tensors of the size of a state that are alive at any call of the denoiser."""
    x = noise(1, 1000, sigma=80.0)

    def most_alive(run: Callable[..., Any], start: Any, n: int) -> int:
        counts = []

        def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
            alive = {
                t.untyped_storage().data_ptr()
                for t in gc.get_objects()
                if type(t) is Tensor and t.numel() == 1000
            }
            counts.append(len(alive))
            return 0.5 * x

        gc.freeze()  # what was there before is not looked at again
        run(denoiser, start, karras_sigmas(n))
        gc.unfreeze()
        return max(counts)

    few, many = (most_alive(solver.sample, x, n) for n in (5, 30))
    assert many == few
    states = [solver.sample(lambda x, sigma: 0.5 * x, x, karras_sigmas(n)).state for n in (5, 30)]
    few, many = (most_alive(solver.invert, s, n) for s, n in zip(states, (5, 30), strict=True))
    assert many == few


@pytest.mark.parametrize(
    "solver",
    [BDIA(Euler()), BDIA(HeunEDM(), 0.9), BDIA(RK4()), BDIA(RK4(), 0.9)],
    ids=repr,
)
def test_denoisers_may_return_their_input(solver: BDIA) -> None:
    """What lies in the storage of a point is not written over while it is needed."""
    x, grid = noise(2, 5, sigma=80.0), karras_sigmas(6)

    def copy(x: Tensor, sigma: Tensor) -> Tensor:
        return x.clone() if float(sigma[0]) > 1 else 0.5 * x

    def same(x: Tensor, sigma: Tensor) -> Tensor:
        return x if float(sigma[0]) > 1 else 0.5 * x

    there = solver.sample(copy, x, grid)
    assert torch.equal(solver.sample(same, x, grid).x, there.x)
    back = solver.invert(copy, there.state, grid)
    assert torch.equal(solver.invert(same, there.state, grid).x, back.x)


def test_a_failure_that_does_not_come_again() -> None:
    calls = []

    def once(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(sigma)
        return torch.full_like(x, float("inf")) if len(calls) == 3 else 0.5 * x

    seen: list[int] = []
    with pytest.raises(FloatingPointError, match="made again it did not"):
        BDIA(Euler()).sample(
            once, noise(2, 5), karras_sigmas(5), callback=lambda info: seen.append(info["i"])
        )
    assert len(calls) == 10
    assert seen == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "solver", [BDIA(Euler(), StepRatio(1)), BDIA(HeunEDM("both")), EDICT()], ids=repr
)
def test_gradients_on_request(solver: Solver) -> None:
    grid = karras_sigmas(3, 0.5, 5.0)
    x = noise(2, 3).requires_grad_()
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def sample(x: Tensor, scale: Tensor) -> Tensor:
        return solver.sample(lambda x, sigma: torch.tanh(scale * x), x, grid, differentiable=True).x

    def there_and_back(x: Tensor, scale: Tensor) -> Tensor:
        def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
            return torch.tanh(scale * x)

        state = solver.sample(denoiser, x, grid, differentiable=True).state
        return solver.invert(denoiser, state, grid, differentiable=True).x

    assert torch.autograd.gradcheck(sample, (x, scale))
    (gradient,) = torch.autograd.grad(there_and_back(x, scale).sum(), x)
    torch.testing.assert_close(gradient, torch.ones_like(x), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="autograd has no gradient of a run in FixedPoint"):
        BDIA(Euler(), arithmetic=FixedPoint()).sample(mixture(), x, grid, differentiable=True)


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("solver", [BDIA(Euler(), 0.96), BDIA(HeunEDM()), EDICT()], ids=repr)
def test_no_step_waits_for_the_device(solver: Solver) -> None:
    """From the first call of the denoiser to the last: an error of torch where one does."""
    x, grid = noise(4, 64, sigma=80.0, dtype=torch.float32).cuda(), karras_sigmas(10)

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        denoiser.calls += 1  # type: ignore[attr-defined]
        last = denoiser.calls == denoiser.all  # type: ignore[attr-defined]
        torch.cuda.set_sync_debug_mode("default" if last else "error")
        return x / (1 + sigma.unsqueeze(1) ** 2)

    def counted(run: Callable[..., Any], start: Any) -> Any:
        nfe = run(lambda x, sigma: x / (1 + sigma.unsqueeze(1) ** 2), start, grid).nfe
        denoiser.calls, denoiser.all = 0, nfe  # type: ignore[attr-defined]
        return run(denoiser, start, grid)

    try:
        there = counted(solver.sample, x)
        counted(solver.invert, there.state)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("n", [5, 50])
def test_memory_on_the_gpu(n: int) -> None:
    x = noise(1, 2**22, sigma=80.0, dtype=torch.float32).cuda()
    solver, grid = BDIA(Euler(), 0.96), karras_sigmas(n)
    solver.sample(lambda x, sigma: x, x, grid)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    solver.sample(lambda x, sigma: x, x, grid)
    assert torch.cuda.max_memory_allocated() - before <= 3.1 * x.nbytes


def test_writes_to_levels_reach_no_other_call() -> None:
    x, grid = noise(2, 5), karras_sigmas(4)
    for solver in SOLVERS:
        expected = solver.sample(gaussian(), x, grid).x
        calls: list[Tensor] = []

        def denoiser(x: Tensor, sigma: Tensor, calls: list[Tensor] = calls) -> Tensor:
            found = gaussian()(x, sigma)
            calls.append(sigma)
            for level in calls:
                level.zero_()
            return found

        assert torch.equal(solver.sample(denoiser, x, grid).x, expected)


def test_writes_of_a_callback_reach_no_state() -> None:
    x, grid = noise(2, 5), karras_sigmas(4)

    def write(info: dict[str, Any]) -> None:
        for name in ("x", "denoised", "sigma", "sigma_hat"):
            info[name].zero_()

    for solver in SOLVERS:
        plain = solver.sample(gaussian(), x, grid)
        watched = solver.sample(gaussian(), x, grid, callback=write)
        assert torch.equal(watched.x, plain.x)
        back = solver.invert(gaussian(), plain.state, grid, callback=write)
        assert torch.equal(back.x, solver.invert(gaussian(), plain.state, grid).x)


def test_what_the_caller_keeps_is_never_written_to() -> None:
    """Every tensor that the denoiser sees or returns keeps its values."""
    for solver in SOLVERS:
        kept: list[tuple[Tensor, Tensor]] = []

        def denoiser(x: Tensor, sigma: Tensor, kept: list[tuple[Tensor, Tensor]] = kept) -> Tensor:
            found = mixture()(x, sigma)
            kept.extend((tensor, tensor.clone()) for tensor in (x, sigma, found))
            return found

        there = solver.sample(denoiser, noise(2, 3, sigma=80.0), karras_sigmas(5))
        solver.invert(denoiser, there.state, karras_sigmas(5))
        assert all(torch.equal(tensor, copy) for tensor, copy in kept)


def test_runs_in_inference_mode() -> None:
    x, grid = noise(2, 3, sigma=80.0), karras_sigmas(5)
    for solver in SOLVERS:
        plain = solver.sample(mixture(), x, grid)
        with torch.inference_mode():
            there = solver.sample(mixture(), x, grid)
            back = solver.invert(mixture(), there.state, grid)
        assert torch.equal(there.x, plain.x)
        assert torch.equal(solver.invert(mixture(), there.state, grid).x, back.x)


@pytest.mark.filterwarnings("ignore::odesolvers.InversionWarning")  # one step is no encoding
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    """``100 x - 99 D``: terms that overflow float16, and in bfloat16 differ by more than their sum."""
    x = torch.linspace(-1000, 1000, 7, dtype=dtype).reshape(1, 7)
    up = BDIA(Euler()).invert(lambda x, sigma: x.clone(), x, [10.0, 0.1]).x
    assert torch.equal(up, x)


def test_a_denoiser_that_writes_does_not_reach_states_that_a_caller_holds() -> None:
    def careful(x: Tensor, sigma: Tensor) -> Tensor:
        return 0.5 * x

    def careless(x: Tensor, sigma: Tensor) -> Tensor:
        return x.mul_(0.5)

    solver, sigmas = BDIA(Euler()), [8.0, 4.0, 2.0, 1.0]
    state = solver.sample(careful, torch.ones(2, 3), sigmas, stop=2).state
    assert state.partner is not None
    kept = state.current.clone(), state.partner.clone()
    for run in (solver.sample, solver.invert):
        with pytest.raises(ValueError, match="wrote to its input"):
            run(careless, state, sigmas)
        assert torch.equal(state.current, kept[0])
        assert torch.equal(state.partner, kept[1])


WRITES: dict[str, Callable[[Tensor], object]] = {
    "mul_": lambda x: x.mul_(1.01),
    "part": lambda x: x[0].zero_(),
    "out": lambda x: torch.add(x, 1.0, out=x),
    "index": lambda x: x.__setitem__((0, 0), 3.0),
    "view": lambda x: x.view(-1).clamp_(0.0, 1.0),
    "copy_": lambda x: x.copy_(torch.ones_like(x)),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("solver", [*SOLVERS, BDIA(Euler(), 0.9, FixedPoint())], ids=repr)
def test_writes_to_the_input_are_noticed_in_inference_mode_too(
    solver: Solver, write: Callable[[Tensor], object], inference: bool
) -> None:
    """At the first call, where the input is the state, and at a later one, where it may be another."""
    x, grid = noise(2, 3, sigma=80.0), karras_sigmas(5)
    there = solver.sample(mixture(), x, grid).state
    for late in (0, 1, 3):
        for run, start in ((solver.sample, x), (solver.invert, there)):
            calls = [0]

            def denoiser(
                x: Tensor, sigma: Tensor, /, late: int = late, calls: Any = calls, **_: Any
            ) -> Tensor:
                assert torch.is_inference_mode_enabled() == inference
                found = mixture()(x, sigma)
                calls[0] += 1
                if calls[0] == late + 1:
                    write(x)
                return found

            with (
                torch.inference_mode(inference),
                torch.no_grad(),
                pytest.raises(ValueError, match="wrote to its input"),
            ):
                run(denoiser, start, grid)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_inference_mode_stays_on_for_what_the_caller_gave_and_ends_before_the_result(
    solver: Solver,
) -> None:
    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))  # an inference tensor, written to

        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            assert torch.is_inference_mode_enabled()
            assert not torch.is_grad_enabled()
            self.calls += 1
            return mixture()(x, sigma)

    def callback(info: dict[str, Any]) -> None:
        assert torch.is_inference_mode_enabled()
        total.add_(info["x"].sum())

    with torch.inference_mode():
        total, x, network = torch.zeros(()), noise(2, 3, sigma=80.0), Network()
        there = solver.sample(network, x, karras_sigmas(5), callback=callback)
        assert torch.is_inference_mode_enabled()
    assert int(network.calls) == there.nfe
    assert not there.x.is_inference()
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("solver", [*SOLVERS, RK4()], ids=repr)
def test_gradients_that_a_denoiser_asks_for_are_its_own(solver: Solver) -> None:
    """As guidance by a classifier does."""

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        with torch.enable_grad():
            x.requires_grad_()
            (slope,) = torch.autograd.grad((x**2).sum(), x)
            return mixture()(x, sigma) - 0.01 * slope

    there = solver.sample(denoiser, noise(2, 3, sigma=80.0), karras_sigmas(5))
    assert not there.x.requires_grad
    assert not there.state.current.requires_grad
    assert there.state.partner is None or not there.state.partner.requires_grad


def parts(kind: str, shape: tuple[int, int]) -> Callable[[int], Tensor]:
    """The n-th of three outputs that lie in one buffer."""
    rows, columns = shape
    if kind == "rows of a buffer":
        return lambda n: buffer[n * rows : (n + 1) * rows]
    if kind == "columns of a buffer":
        return lambda n: buffer.view(rows, 3 * columns)[:, n * columns : (n + 1) * columns]
    if kind == "every third row":
        return lambda n: buffer[n::3]
    if kind == "every third column":
        return lambda n: buffer.view(rows, 3 * columns)[:, n::3]
    if kind == "one and the same":
        return lambda n: buffer[:rows]
    if kind == "rows that overlap":
        return lambda n: buffer[n : n + rows]
    assert kind == "columns that overlap"
    return lambda n: buffer.view(rows, 3 * columns)[:, n : n + columns]


buffer = torch.empty(12, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "apart"),
    [
        ("rows of a buffer", True),
        ("columns of a buffer", True),
        ("every third row", True),
        ("every third column", True),
        ("one and the same", False),
        ("rows that overlap", False),
        ("columns that overlap", False),
    ],
)
@pytest.mark.parametrize("solver", [HeunEDM(), BDIA(HeunEDM("both")), EDICT(), RK3()], ids=repr)
def test_outputs_may_lie_in_parts_of_one_buffer_that_do_not_overlap(
    solver: Solver, kind: str, apart: bool
) -> None:
    x, grid = noise(4, 3, sigma=80.0), karras_sigmas(4)
    part, calls = parts(kind, (4, 3)), [0]

    def denoiser(x: Tensor, sigma: Tensor, /, **_: Any) -> Tensor:
        calls[0] += 1
        return part(calls[0] % 3).copy_(mixture()(x, sigma))

    if apart or solver == EDICT():  # which needs one output at a time
        assert torch.equal(solver.sample(denoiser, x, grid).x, solver.sample(mixture(), x, grid).x)
    else:
        with pytest.raises(ValueError, match="storage of an earlier output"):
            solver.sample(denoiser, x, grid)


@pytest.mark.parametrize("wrong", ["reverse", 1, None])
def test_differentiable_is_true_or_false(wrong: object) -> None:
    with pytest.raises(TypeError, match="differentiable must be True, False or 'reversible', got"):
        Euler().sample(gaussian(), noise(2, 5), [8.0, 4.0], differentiable=wrong)  # type: ignore[arg-type]


def test_no_gradient_is_promised_in_inference_mode() -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        Euler().sample(gaussian(), noise(2, 5), [8.0, 4.0], differentiable=True)
