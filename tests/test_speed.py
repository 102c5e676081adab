"""What a run does beside the denoiser: operations, memory, work on the host."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from watch import Watch

from odesolvers import (
    BDIA,
    DDIM,
    EDICT,
    RK4,
    Combination,
    Compiled,
    CoupledSolver,
    DPMSolverPP2S,
    Euler,
    FixedPoint,
    Grid,
    HeunEDM,
    IntegrationApproximator,
    InvertibleSolver,
    ReversibleHeun,
    Solver,
    StepRatio,
    integrate,
    karras_sigmas,
)
from odesolvers.combination import HERE
from odesolvers.step import Evaluation, Step

from .problems import gaussian, mixture, noise, relative_error

VIEWS = {"aten.detach", "aten.alias", "aten.slice", "aten.split", "aten.unbind", "aten.view"}
SIX_STEPS = Grid.of(karras_sigmas(6))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def watched(
    run: Callable[..., Any], start: Any, n: int, elements: int, *, outputs: bool = False
) -> Watch:
    watch = Watch(lambda x, sigma: 0.5 * x, start, elements, outputs=outputs)
    with watch:
        run(watch.denoise, start, karras_sigmas(n))
    return watch


@pytest.mark.parametrize(
    ("solver", "most"),
    [
        (Euler(), 1),
        (BDIA(Euler()), 2),  # g = 1 multiplies nothing
        (BDIA(Euler(), 0.96), 2),
        (BDIA(DDIM()), 2),
        (HeunEDM(), 3),
        (BDIA(HeunEDM()), 6),
        (BDIA(HeunEDM(), 0.96), 6),
        (BDIA(HeunEDM(), 0.96, batched=True), 6),
    ],
    ids=repr,
)
@pytest.mark.parametrize("invert", [False, True])
def test_operations_of_a_step(solver: Solver, most: int, invert: bool) -> None:
    x = noise(2, 5, sigma=80.0)
    counts = []
    for n in (10, 20):
        if not invert:
            watch = watched(solver.sample, x, n, 10)
        elif isinstance(solver, InvertibleSolver):
            state = solver.sample(lambda x, sigma: 0.5 * x, x, karras_sigmas(n)).state
            watch = watched(solver.invert, state, n, 10)
        else:
            pytest.skip("a one-step method has no inverse")
        counts.append(sum(c for name, c in watch.operations.items() if name not in VIEWS))
    assert (counts[1] - counts[0]) / 10 == most


@pytest.mark.parametrize(
    ("solver", "most"),
    [
        (Euler(), 3),
        (BDIA(Euler(), 0.96), 3),
        (BDIA(DDIM()), 3),
        (BDIA(HeunEDM(), 0.96), 3),
        (BDIA(RK4()), 3),
        (BDIA(HeunEDM(), batched=True), 5),  # two points stand beside each other
        (ReversibleHeun(), 3),
    ],
    ids=repr,
)
def test_tensors_alive_do_not_grow_with_the_steps(solver: Solver, most: int) -> None:
    x = noise(1, 1000, sigma=80.0)
    for n in (5, 30):
        assert watched(solver.sample, x, n, 1000).peak <= most * x.nbytes
        if isinstance(solver, InvertibleSolver):
            state = solver.sample(lambda x, sigma: 0.5 * x, x, karras_sigmas(n)).state
            assert watched(solver.invert, state, n, 1000).peak <= most * x.nbytes


@pytest.mark.parametrize(
    ("solver", "most"),
    [(Euler(), 4), (BDIA(Euler(), 0.96), 4), (BDIA(DDIM()), 4), (BDIA(HeunEDM()), 6)],
    ids=repr,
)
def test_tensors_alive_with_the_outputs(solver: Solver, most: int) -> None:
    """One beside the three, over a base of one evaluation; over Heun's three evaluations, three."""
    x = noise(1, 1000, sigma=80.0)
    for n in (5, 30):
        assert watched(solver.sample, x, n, 1000, outputs=True).peak <= most * x.nbytes


@pytest.mark.parametrize("solver", [BDIA(Euler(), 0.96), BDIA(DDIM())], ids=repr)
def test_an_output_is_given_back_before_the_next_is_asked_for(solver: BDIA) -> None:
    outputs: list[weakref.ref[Tensor]] = []

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        assert all(output() is None for output in outputs)
        denoised = 0.5 * x
        outputs.append(weakref.ref(denoised))
        return denoised

    x, grid = noise(2, 5, sigma=80.0), karras_sigmas(6)
    there = solver.sample(denoiser, x, grid)
    solver.invert(denoiser, there.state, grid)
    assert len(outputs) == 11


def test_coefficients_are_worked_out_once_for_a_grid() -> None:
    traced = []

    class Counting(IntegrationApproximator):
        order = 1
        evaluations = 1

        def increment(self, x: Any, sigma: float, target: float, denoise: Any) -> Any:
            traced.append(sigma)
            return (target - sigma) * (x - denoise(x, sigma)) / sigma

    solver, x = BDIA(Counting()), noise(2, 5, sigma=80.0)
    state = solver.sample(gaussian(), x, karras_sigmas(6)).state
    first = len(traced)
    assert first > 0
    solver.sample(gaussian(), x, karras_sigmas(6))
    solver.invert(gaussian(), state, karras_sigmas(6))
    assert len(traced) == first
    solver.sample(gaussian(), x, karras_sigmas(7))
    assert len(traced) > first


def test_settings_that_change_are_noticed() -> None:
    class Scaled(IntegrationApproximator):
        order = 1
        evaluations = 1
        factor = 1.0

        def increment(self, x: Any, sigma: float, target: float, denoise: Any) -> Any:
            return self.factor * (target - sigma) * (x - denoise(x, sigma)) / sigma

    method, x = Scaled(), noise(2, 5, sigma=80.0)
    before = method.sample(gaussian(), x, karras_sigmas(6)).x
    method.factor = 0.5
    assert relative_error(method.sample(gaussian(), x, karras_sigmas(6)).x, before) > 1e-3


@pytest.mark.parametrize(
    "solver",
    [BDIA(Euler()), BDIA(HeunEDM(), 0.9), BDIA(RK4()), BDIA(RK4(), 0.9, batched=True)],
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


def test_an_output_is_not_taken_for_that_of_the_state_written_over_its_own() -> None:
    """Evaluated at one level before and after a stage that writes to the storage of the state."""

    class Reflecting(CoupledSolver):
        def steps(self, grid: Grid) -> list[tuple[Step, ...]]:
            reflect = Step((), rest=2.0 * HERE, gain=-1.0)
            return [
                (along, reflect, along)
                for sigma, _ in grid.intervals()
                for along in [Step((Evaluation(HERE, sigma),), Combination({1: 0.1}), gain=1.0)]
            ]

    x, grid = noise(2, 5, sigma=80.0), karras_sigmas(4)
    states: list[Tensor] = []
    kept = Reflecting().sample(gaussian(), x, grid, callback=lambda info: states.append(info["x"]))
    assert torch.equal(Reflecting().sample(gaussian(), x, grid).x, kept.x)


def test_what_no_later_state_shows_is_looked_at() -> None:
    """DPM-Solver++(2S) uses its first output for a point alone, and this denoiser forgives a bad one."""
    grid = karras_sigmas(5, append_zero=False)

    def forgiving(x: Tensor, sigma: Tensor) -> Tensor:
        bad = float(sigma[0]) == float(grid[2].float())
        return torch.full_like(x, float("nan")) if bad else 0.5 * x.nan_to_num(0.0)

    x = noise(2, 5, sigma=80.0, dtype=torch.float32)
    with pytest.raises(FloatingPointError, match="output is not finite at level 2 of the grid"):
        DPMSolverPP2S().sample(forgiving, x, grid)

    def clamped(x: Tensor, sigma: Tensor) -> Tensor:
        return -3e38 * x if float(sigma[0]) > 10 else x.clamp(-1, 1)

    with pytest.raises(FloatingPointError, match="not finite"):  # the step to 0 forgets the state
        Euler().sample(clamped, x, karras_sigmas(5))


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


@pytest.mark.parametrize("arithmetic", [FixedPoint(), None], ids=["fixed", "floating"])
@pytest.mark.parametrize("base", [HeunEDM(), RK4()], ids=repr)
def test_stages_in_one_call(base: IntegrationApproximator, arithmetic: FixedPoint | None) -> None:
    options: dict[str, Any] = {} if arithmetic is None else {"arithmetic": arithmetic}
    plain, stacked = BDIA(base, 0.9, **options), BDIA(base, 0.9, batched=True, **options)
    grid, x = karras_sigmas(6, append_zero=False), noise(3, 5, sigma=80.0)
    x = x if arithmetic is None else arithmetic.snap(x)
    sizes: list[int] = []

    def denoiser(x: Tensor, sigma: Tensor, shift: Tensor, name: str) -> Tensor:
        assert shift.shape == x.shape[:1] == sigma.shape
        assert name == "a"
        sizes.append(len(x))
        return gaussian()(x, sigma) + shift.unsqueeze(1)

    options = {"extra_args": {"shift": torch.linspace(0, 1, 3, dtype=torch.float64), "name": "a"}}
    expected = plain.sample(denoiser, x, grid, **options)
    sizes.clear()
    solution = stacked.sample(denoiser, x, grid, **options)
    assert relative_error(solution.x, expected.x) < 1e-12
    assert solution.nfe == expected.nfe
    later = [3] + [6] * (base.evaluations - 1)
    assert sizes == [3] * base.evaluations + later * 4
    back = stacked.invert(denoiser, solution.state, grid, **options)
    assert relative_error(back.x, x) < 1e-12
    if arithmetic is not None:
        assert torch.equal(back.x, x)
    with pytest.raises(ValueError, match="another solver"):
        plain.invert(denoiser, solution.state, grid, **options)


def test_arguments_that_cannot_be_repeated() -> None:
    x, grid = noise(3, 5, sigma=80.0), karras_sigmas(6)
    solver = BDIA(HeunEDM(), batched=True)
    with pytest.raises(ValueError, match=r"extra_args.y must have the batch of x, 3, or 1"):
        solver.sample(lambda x, sigma, y: 0.5 * x, x, grid, extra_args={"y": torch.zeros(2)})


@pytest.mark.parametrize(
    "solver", [BDIA(Euler(), StepRatio(1)), BDIA(HeunEDM(), batched=True), EDICT()], ids=repr
)
def test_gradients_on_request(solver: InvertibleSolver) -> None:
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
    with pytest.raises(ValueError, match="no gradient, for it rounds every state"):
        BDIA(Euler(), arithmetic=FixedPoint()).sample(mixture(), x, grid, differentiable=True)


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("solver", [BDIA(Euler(), 0.96), BDIA(HeunEDM()), EDICT()], ids=repr)
def test_no_step_waits_for_the_device(solver: InvertibleSolver) -> None:
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


@pytest.fixture
def imagined_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Tensors without values or addresses, on a GPU that need not be there: to read one is an error.

    The states at both ends of a run are read, see the next test, and nothing else is.
    """
    monkeypatch.setattr(integrate, "_is_finite", lambda x: True)
    monkeypatch.setattr(integrate, "_share_storage", lambda a, b: False)
    with FakeTensorMode():
        yield torch.device("cuda")


@pytest.mark.filterwarnings("ignore::odesolvers.InversionWarning")
@pytest.mark.parametrize(
    "solver",
    [Euler(), BDIA(Euler(), 0.96), BDIA(HeunEDM(), batched=True), BDIA(DPMSolverPP2S()), EDICT()],
    ids=repr,
)
def test_no_value_is_read_on_a_gpu(imagined_gpu: torch.device, solver: Solver) -> None:
    x, grid = torch.randn(2, 3, device=imagined_gpu), SIX_STEPS

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.device.type == "cuda"
        return x / (1 + sigma.unsqueeze(1) ** 2)

    there = solver.sample(denoiser, x, grid)
    if isinstance(solver, InvertibleSolver):
        solver.invert(denoiser, there.state, grid)
        solver.invert(denoiser, there.x, grid)
    with pytest.raises(DataDependentOutputException):
        solver.sample(lambda x, sigma: x * sigma[0].item(), x, grid)


@pytest.mark.parametrize("solver", [BDIA(Euler(), 0.96), BDIA(HeunEDM()), EDICT()], ids=repr)
def test_states_are_looked_at_before_the_first_call_and_after_the_last(
    monkeypatch: pytest.MonkeyPatch, solver: InvertibleSolver
) -> None:
    calls, looks = [], []
    look = integrate._is_finite
    monkeypatch.setattr(integrate, "_is_finite", lambda x: looks.append(len(calls)) or look(x))

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(sigma)
        return 0.5 * x

    x, grid = noise(2, 3), karras_sigmas(6)
    there = solver.sample(denoiser, x, grid)
    assert set(looks) == {0, there.nfe}
    calls.clear()
    looks.clear()
    back = solver.invert(denoiser, there.state, grid)
    assert set(looks) == {0, back.nfe}


def test_the_letters_read_no_value_on_a_gpu(imagined_gpu: torch.device) -> None:
    pytest.importorskip("k_diffusion")
    from odesolvers.models.letters.network import LettersDenoiser

    with imagined_gpu:
        model = LettersDenoiser()
    x = torch.randn(2, 3, 32, 32, device=imagined_gpu)
    labels = {"class_labels": torch.tensor([0, 3], device=imagined_gpu)}
    there = BDIA(Euler()).sample(model, x, SIX_STEPS, extra_args=labels)
    BDIA(Euler()).invert(model, there.state, SIX_STEPS, extra_args=labels)


def test_levels_that_were_written_to_are_not_used_again() -> None:
    x, grid = noise(2, 5), karras_sigmas(4)
    expected = BDIA(Euler()).sample(gaussian(), x, grid).x
    with pytest.raises(ValueError, match=r"wrote to its input at level 0.*sigma.clone\(\)"):
        BDIA(Euler()).sample(lambda x, sigma: x * sigma.mul_(0.5).unsqueeze(1), x, grid)

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(sigma)
        if len(calls) > 1:
            calls[0].copy_(sigma)  # of another call
        return 0.5 * x

    recorded = partial(BDIA(Euler()).sample, execution=Compiled(backend="eager"))
    for run in (BDIA(Euler()).sample, BDIA(HeunEDM()).sample, recorded):
        calls: list[Tensor] = []
        with pytest.raises((ValueError, RuntimeError), match="wrote to its input at level"):
            run(denoiser, x, grid)
        assert len(calls) == 2
    handed: list[Tensor] = []
    BDIA(Euler()).sample(lambda x, sigma: handed.append(sigma) or 0.5 * x, x, grid)
    handed[2].zero_()  # after the run
    assert torch.equal(BDIA(Euler()).sample(gaussian(), x, grid).x, expected)


@pytest.mark.parametrize("solver", [BDIA(Euler()), BDIA(HeunEDM(), batched=True)])
@pytest.mark.parametrize("steps", [1, 3])
def test_levels_are_plain_tensors(solver: BDIA, steps: int) -> None:
    seen = []

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma)
        return 0.5 * x

    solver.sample(denoiser, noise(4, 2), Grid.of([5.0, 2.0, 1.0, 0.5][: steps + 1]))
    assert all(sigma.is_contiguous() and sigma.stride() == (1,) for sigma in seen)


def test_levels_of_a_large_batch_take_no_memory() -> None:
    x, grid = noise(2**17, 2, sigma=80.0), karras_sigmas(40)
    sizes = []

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.shape == x.shape[:1]
        sizes.append(sigma.untyped_storage().nbytes())
        return x / (1 + sigma.unsqueeze(1) ** 2)

    large = BDIA(Euler()).sample(denoiser, x, grid).x
    assert set(sizes) == {8 * 40}
    assert torch.equal(BDIA(Euler()).sample(denoiser, x[:3], grid).x, large[:3])
