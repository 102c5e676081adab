"""States between runs: what a run accepts, what it gives back when it fails, and parts of a batch."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from odesolvers import (
    BDIA,
    DDIM,
    EDICT,
    DDIMInversion,
    Euler,
    FixedPoint,
    FixedPointInversion,
    HeunEDM,
    PerStep,
    ReversibleHeun,
    Solution,
    State,
    StepRatio,
    karras_sigmas,
)
from odesolvers.extend import Solver
from odesolvers.models import GaussianMixture

from .problems import mixture, noise

GRID = karras_sigmas(6)
FLOATING: list[Solver] = [
    DDIM(),
    HeunEDM(),
    BDIA(Euler(), 0.9),
    BDIA(HeunEDM(), StepRatio(1)),
    EDICT(),
    ReversibleHeun(),
    DDIMInversion(),
    FixedPointInversion(Euler(), tolerance=1e-3, max_iterations=4),
]
EXACT: list[Solver] = [
    BDIA(Euler(), 0.3, FixedPoint()),
    BDIA(HeunEDM(), StepRatio(2), FixedPoint()),
    EDICT(0.7, arithmetic=FixedPoint()),
    ReversibleHeun(arithmetic=FixedPoint()),
]
PAIRS = [*FLOATING[2:6], *EXACT]
each_solver = pytest.mark.parametrize("solver", [*FLOATING, *EXACT], ids=repr)
each_pair = pytest.mark.parametrize("solver", PAIRS, ids=repr)
quiet = pytest.mark.filterwarnings("ignore::odesolvers.InversionWarning")


def each_element(x: Tensor, sigma: Tensor) -> Tensor:
    """A denoiser whose rows have the same bits in every batch, which no product of matrices assures."""
    sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
    return (x + torch.tanh(x)) / (1 + sigma**2)


def same(a: State, b: State) -> bool:
    """Equal to the bit, side information included."""
    if (a.index, a.sigmas, a.solver, a.coupled) != (b.index, b.sigmas, b.solver, b.coupled):
        return False
    tensors = [(a.current, b.current), (a.partner, b.partner)]
    if a.side is not None and b.side is not None:
        x, y = a.side, b.side
        if (x.done, x.bound, x.origin, x.dtype) != (y.done, y.bound, y.origin, y.dtype):
            return False
        tensors += [
            (x.packed, y.packed),
            (x.checksum, y.checksum),
            *zip(x.words, y.words, strict=True),
        ]
    return (a.side is None) == (b.side is None) and all(
        x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in tensors
    )


# --- runs that fail --------------------------------------------------------------------------------


class Failing:
    """A denoiser that raises at its n-th call."""

    def __init__(self, inner: Callable[..., Tensor], call: int, error: BaseException) -> None:
        self.inner, self.call, self.error = inner, call, error

    def __call__(self, x: Tensor, sigma: Tensor, /, **_: Any) -> Tensor:
        self.call -= 1
        if self.call == 0:
            raise self.error
        return self.inner(x, sigma)


@quiet
@each_solver
@pytest.mark.parametrize("error", [RuntimeError("memory"), KeyboardInterrupt()], ids=repr)
def test_a_denoiser_that_fails_loses_no_finished_step(solver: Solver, error: BaseException) -> None:
    """At any of its calls, down the grid and up it, from tensors and from states."""
    denoiser, x = mixture(), noise(2, 3, sigma=80.0)
    there = solver.sample(denoiser, x, GRID)
    starts: list[tuple[Any, Any]] = [(solver.sample, x)]
    if solver.states == 2 or solver.iterative:
        starts += [(solver.invert, there.state), (solver.invert, there.x)]
    for run, start in starts:
        whole = run(denoiser, start, GRID)
        seen = set()
        for call in range(1, whole.nfe + 1, 1 + whole.nfe // 12):
            with pytest.raises(type(error)) as caught:
                run(Failing(denoiser, call, error), start, GRID)
            state = caught.value.state  # type: ignore[attr-defined]
            seen.add(state.index)
            rest = run(denoiser, state, GRID)
            assert torch.equal(rest.x, whole.x)
            assert same(rest.state, whole.state)
            del caught.value.state  # type: ignore[attr-defined]
        assert len(seen) >= 4  # as far as it has got


def test_the_error_says_where_the_state_is() -> None:
    solver, x = BDIA(Euler()), noise(2, 3, sigma=80.0)
    with pytest.raises(RuntimeError, match="memory") as caught:
        solver.sample(Failing(mixture(), 4, RuntimeError("memory")), x, GRID)
    assert "level 3 of the grid" in "".join(
        getattr(caught.value, "__notes__", ["level 3 of the grid"])
    )
    early = RuntimeError("memory")
    with pytest.raises(RuntimeError):
        solver.sample(Failing(mixture(), 1, early), x, GRID)
    assert not hasattr(early, "__notes__")  # nothing is lost
    assert torch.equal(early.state.current, x)  # type: ignore[attr-defined]


@each_pair
def test_a_callback_that_fails_loses_no_finished_step(solver: Solver) -> None:
    x = noise(2, 3, sigma=80.0)
    whole = solver.sample(mixture(), x, GRID)

    def callback(info: dict[str, Any]) -> None:
        if info["i"] == 4:
            raise StopIteration

    with pytest.raises(StopIteration) as caught:
        solver.sample(mixture(), x, GRID, callback=callback)
    state: State = caught.value.state  # type: ignore[attr-defined]
    assert state.index == 4
    assert torch.equal(solver.sample(mixture(), state).x, whole.x)


@each_pair
def test_an_interrupt_anywhere_loses_no_finished_step(
    solver: Solver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the arithmetic of a step too, of which some is done by then."""
    x, denoiser, arithmetic = noise(2, 3, sigma=80.0), mixture(), type(solver.arithmetic)
    whole = solver.sample(denoiser, x, GRID)
    original, left = arithmetic.forward, [0]

    def forward(*args: Any) -> Tensor:
        result = original(*args)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return result

    for call in range(1, 7):
        left[0] = call
        with monkeypatch.context() as patch:
            patch.setattr(arithmetic, "forward", forward)
            with pytest.raises(KeyboardInterrupt) as caught:
                solver.sample(denoiser, x, GRID)
        rest = solver.sample(denoiser, caught.value.state)  # type: ignore[attr-defined]
        assert same(rest.state, whole.state)


def test_a_state_that_a_denoiser_wrote_to_is_not_handed_over() -> None:
    def careless(x: Tensor, sigma: Tensor, /, **_: Any) -> Tensor:
        x.mul_(2.0)
        raise RuntimeError("after writing")

    with pytest.raises(RuntimeError) as caught:
        BDIA(Euler()).sample(careless, noise(2, 3), GRID)
    assert not hasattr(caught.value, "state")


def test_an_exception_keeps_what_it_has() -> None:
    class Slotted(Exception):
        @property
        def state(self) -> str:
            return "own"

    with pytest.raises(Slotted) as caught:
        BDIA(Euler()).sample(Failing(mixture(), 4, Slotted()), noise(2, 3), GRID)
    assert caught.value.state == "own"


def test_a_run_inside_a_run_hands_over_the_state_of_the_outer_one() -> None:
    solver, x = BDIA(Euler()), noise(2, 3, sigma=80.0)

    def denoiser(x: Tensor, sigma: Tensor, /, **_: Any) -> Tensor:
        inner = [0.5, 0.2, 0.1]
        return solver.sample(
            Failing(mixture(), 2 if float(sigma[0]) < 1 else 0, OSError()), x, inner
        ).x

    with pytest.raises(OSError) as caught:
        solver.sample(denoiser, x, GRID)
    assert caught.value.state.sigmas == tuple(GRID.tolist())  # type: ignore[attr-defined]


# --- runs that go on -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "solver",
    [
        BDIA(Euler(), 0.3, FixedPoint()),
        BDIA(Euler(), 0.61, FixedPoint()),
        BDIA(HeunEDM(), StepRatio(2), FixedPoint()),
        BDIA(DDIM(), PerStep([0.4, 2.0, 0.3] * 20 + [0.5] * 38), FixedPoint()),
        EDICT(0.7, arithmetic=FixedPoint()),
    ],
    ids=repr,
)
@quiet
def test_fixed_point_in_two_runs_ends_at_the_bits_of_one(solver: Solver, tmp_path: Path) -> None:
    """Past the 63 bits from which words are put aside, at which levels depends on the bound."""
    grid, x = karras_sigmas(99), noise(2, 3, sigma=80.0)
    whole = solver.sample(mixture(), x, grid)
    assert whole.state.side is not None
    assert whole.state.side.bits_per_element > 20
    back = solver.invert(mixture(), whole.state, grid)
    for stop in (1, 2, 40, 71, 98):
        half = solver.sample(mixture(), x, grid, stop=stop).state
        half.save(tmp_path / "state")
        rest = solver.sample(mixture(), State.load(tmp_path / "state"), grid)
        assert same(rest.state, whole.state)
        half = solver.invert(mixture(), whole.state, grid, stop=stop).state
        assert same(solver.invert(mixture(), half, grid).state, back.state)


@quiet
@each_solver
def test_up_to_any_level_and_down_again(solver: Solver) -> None:
    """One level up as well, where the pair that comes back is the one that was given."""
    there = solver.sample(mixture(), noise(2, 3, sigma=80.0), GRID)
    exact = solver.arithmetic.exact
    for stop in range(len(GRID)):
        if solver.states == 1 and not solver.iterative and stop < len(GRID) - 1:
            continue  # nothing undoes its steps
        up = solver.invert(mixture(), there.state, GRID, stop=stop)
        down = solver.sample(mixture(), up.state, GRID)
        if exact:
            assert same(down.state, there.state)
            assert torch.equal(down.x, there.x)
        elif solver.states == 2:
            assert torch.allclose(down.x, there.x, rtol=1e-6, atol=1e-6)
    for pair in ([80.0, 1.0], [80.0, 0.0]):
        if solver.states == 2:
            there = solver.sample(mixture(), noise(2, 3, sigma=80.0), pair)
            again = solver.sample(
                mixture(), solver.invert(mixture(), there.state, pair).state, pair
            )
            assert torch.allclose(again.x, there.x, rtol=1e-6, atol=1e-6)


@each_solver
def test_a_run_to_where_the_state_stands_costs_nothing(solver: Solver) -> None:
    x = noise(2, 3, sigma=80.0)
    for stop in (1, 4, 6):
        there = solver.sample(mixture(), x, GRID, stop=stop)
        for run in (solver.sample, solver.invert):
            if run == solver.sample or solver.states == 2 or solver.iterative:
                again = run(mixture(), there.state, GRID, stop=stop)
                assert again.nfe == 0
                assert torch.equal(again.x, there.x)
                assert same(again.state, there.state)


# --- what a run starts from ------------------------------------------------------------------------


@quiet
@each_solver
def test_a_solution_stands_for_its_state_and_the_state_for_its_grid(solver: Solver) -> None:
    half = solver.sample(mixture(), noise(2, 3, sigma=80.0), GRID, stop=4)
    expected = solver.sample(mixture(), half.state, GRID)
    for start in (half, half.state):
        assert same(solver.sample(mixture(), start).state, expected.state)
        assert same(solver.sample(mixture(), start, GRID).state, expected.state)
    if solver.states == 2 or solver.iterative:
        back = solver.invert(mixture(), expected.state, GRID)
        for start in (expected, expected.state):
            assert torch.equal(solver.invert(mixture(), start).x, back.x)
            assert torch.equal(solver.invert(mixture(), start, GRID.float()).x, back.x)


def test_a_tensor_needs_a_grid() -> None:
    for run in (BDIA(Euler()).sample, BDIA(Euler()).invert):
        with pytest.raises(TypeError, match=r"sigmas, the grid of noise levels, is needed"):
            run(mixture(), noise(2, 3))


@each_pair
def test_a_copy_of_the_grid_in_float32_is_that_grid(solver: Solver) -> None:
    x = noise(2, 3, sigma=80.0)
    for own, other in ((GRID, GRID.float()), (GRID.float(), GRID), (GRID, GRID.float().tolist())):
        state = solver.sample(mixture(), x, own, stop=4).state
        expected = solver.sample(mixture(), state, own)
        assert same(solver.sample(mixture(), state, other).state, expected.state)
    for wrong in (GRID * (1 + 1e-6), GRID.half(), GRID[:-1], karras_sigmas(10)):
        with pytest.raises(ValueError, match="another grid"):
            solver.sample(mixture(), state, wrong)


def test_a_solver_of_one_state_says_what_to_wrap_it_in() -> None:
    for solver in (DDIM(), HeunEDM("behind")):
        for start in (noise(2, 3), solver.sample(mixture(), noise(2, 3), GRID).state):
            with pytest.raises(ValueError, match="cannot be inverted") as caught:
                solver.invert(mixture(), start, GRID)
            assert f"wrap it as BDIA({solver})" in str(caught.value)


# --- parts of a batch, and words -------------------------------------------------------------------


@quiet
@each_pair
def test_states_are_indexed_along_the_batch(solver: Solver, tmp_path: Path) -> None:
    x, grid = noise(6, 3, sigma=80.0), karras_sigmas(70 if solver.arithmetic.exact else 6)
    whole = solver.sample(each_element, x, grid)
    back = solver.invert(each_element, whole.state, grid)
    mask = torch.tensor([True, False, True, True, False, False])
    for rows in (slice(0, 4), slice(2, 3), [5, 0], slice(None, None, 2), mask, torch.tensor([1])):
        part = whole.state[rows]
        assert torch.equal(part.current, whole.state.current[rows])
        part.save(tmp_path / "state")
        found = solver.invert(each_element, State.load(tmp_path / "state"), grid).x
        assert torch.equal(found, back.x[rows])
    if solver.arithmetic.exact:
        with pytest.raises((RuntimeError, OverflowError), match=r"not what it was|not fit|holds"):
            solver.invert(GaussianMixture(2 * torch.eye(3)), whole.state[:2], grid)


@pytest.mark.parametrize("rows", [0, -1, (slice(0, 2), 0), None, ..., "a", slice(4, 4), [], 2.0])
def test_a_part_without_a_batch_is_refused(rows: Any) -> None:
    state = BDIA(Euler()).sample(mixture(), noise(4, 3), GRID).state
    with pytest.raises(IndexError, match="keeps the batch"):
        state[rows]


@quiet
@each_solver
def test_words_for_a_solution_are_short(solver: Solver) -> None:
    x = noise(640, 3, sigma=80.0)
    solution = solver.sample(mixture(), x, GRID)
    for text in (
        repr(solution),
        repr(solution.state),
        repr(solver.sample(mixture(), x, GRID, stop=2)),
    ):
        assert len(text) < 300
        assert "\n" not in text
    assert "torch.float64 (640, 3)" in repr(solution)
    assert f"nfe={solution.nfe}" in repr(solution)
    copy: Solution = pickle.loads(pickle.dumps(solution))
    assert same(copy.state, solution.state)


@pytest.mark.parametrize("solver", EXACT, ids=repr)
def test_states_that_were_read_in_inference_mode_are_undone(solver: Solver, tmp_path: Path) -> None:
    x = noise(2, 3, sigma=80.0)
    state = solver.sample(mixture(), x, GRID).state
    state.save(tmp_path / "state")
    with torch.inference_mode():
        read = State.load(tmp_path / "state")
    back = solver.invert(mixture(), read)
    assert torch.equal(back.x, solver.invert(mixture(), state).x)
