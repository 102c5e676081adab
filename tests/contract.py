"""What every approximator, and every solver that can be inverted, must do.

A new one is tested by a class of three lines, see `tests/test_approximators.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from odesolvers import (
    BDIA,
    Grid,
    IntegrationApproximator,
    PerStep,
    State,
    karras_sigmas,
    parse,
)
from odesolvers.extend import Combination, Denoise, IterativeSolver, Shear, Solver
from odesolvers.models import InDtype

from .problems import Recorder, both_increments, gaussian, increment, mixture, noise, relative_error

GRID = karras_sigmas(7, sigma_min=0.1, sigma_max=10.0, rho=4.0)  # 8 levels, the last is 0


class SolverContract:
    """For any solver: the run itself."""

    solver: ClassVar[Solver]
    # Evaluations that a run makes again where it was stopped.
    resuming_costs: ClassVar[int] = 0

    def start(self, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return noise(*shape, sigma=float(GRID[0]), dtype=dtype)

    def test_solution_has_the_form_of_the_input(self, device: torch.device) -> None:
        for shape in ((1, 5), (3, 5), (2, 1, 7, 5), (4, 3, 5)):
            for dtype in (torch.float32, torch.float64):
                x = self.start(*shape, dtype=dtype).to(device)
                solution = self.solver.sample(gaussian().to(device), x, GRID)
                assert solution.x.shape == x.shape
                assert solution.x.dtype == x.dtype
                assert solution.x.device == x.device
                assert bool(solution.x.isfinite().all())

    def test_solves_the_ode(self, device: torch.device) -> None:
        grid = karras_sigmas(200, sigma_min=0.1, sigma_max=10.0, append_zero=False)
        x, denoiser = self.start(4, 5).to(device), gaussian().to(device)
        exact = denoiser.flow(x, 10.0, 0.1)
        assert relative_error(self.solver.sample(denoiser, x, grid).x, exact) < 0.02

    def test_input_is_not_modified_and_second_run_equals_first(self) -> None:
        x = self.start(2, 5)
        before = x.clone()
        first = self.solver.sample(gaussian(), x, GRID)
        self.solver.sample(mixture(), self.start(3, 3), GRID[2:])
        again = self.solver.sample(gaussian(), x, GRID)
        assert torch.equal(x, before)
        assert torch.equal(first.x, again.x)

    def test_its_expression_makes_it_again(self) -> None:
        known = {
            type(part).__name__: type(part) for part in (self.solver, *vars(self.solver).values())
        }
        again = parse(repr(self.solver), known)
        assert again == self.solver
        assert repr(again) == repr(self.solver)
        assert hash(again) == hash(self.solver)

    def test_nfe_counts_the_calls(self) -> None:
        recorder = Recorder(gaussian())
        solution = self.solver.sample(recorder, self.start(2, 5), GRID)
        assert solution.nfe == len(recorder.points)

    def test_extra_args_reach_every_call(self) -> None:
        recorder = Recorder(lambda x, sigma, shift: gaussian()(x, sigma) + shift)
        self.solver.sample(recorder, self.start(2, 5), GRID, extra_args={"shift": 0.5})
        assert all(args == {"shift": 0.5} for args in recorder.extra_args)

    def test_callback_gets_k_diffusions_dictionary(self) -> None:
        seen: list[dict[str, object]] = []
        x = self.start(2, 5)
        self.solver.sample(gaussian(), x, GRID, callback=seen.append)
        assert [info["i"] for info in seen] == list(range(7))
        for info in seen:
            assert isinstance(info["x"], torch.Tensor)
            assert isinstance(info["sigma"], torch.Tensor)
            assert float(info["sigma"]) == float(info["sigma_hat"]) == float(GRID[info["i"]])
            expected = gaussian()(info["x"], info["sigma"].expand(2))
            torch.testing.assert_close(info["denoised"], expected)
        assert torch.equal(seen[0]["x"], x)

    def test_stopping_and_going_on_changes_nothing(self) -> None:
        x = self.start(2, 5)
        whole = self.solver.sample(gaussian(), x, GRID)
        half = self.solver.sample(gaussian(), x, GRID, stop=3)
        rest = self.solver.sample(gaussian(), half.state, GRID)
        assert torch.equal(rest.x, whole.x)
        assert half.nfe + rest.nfe == whole.nfe + self.resuming_costs


class ApproximatorContract(SolverContract):
    """For any `IntegrationApproximator`."""

    approximator: ClassVar[IntegrationApproximator]
    solver: ClassVar[Solver]
    # Whether its step ahead under `BDIA` is the step that it takes alone.
    keeps_its_step: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        cls.solver = cls.approximator

    def test_declared_evaluations_are_those_made(self) -> None:
        a = self.approximator
        assert len(a.start(2.0, 1.0).calls) == a.evaluations
        assert len(self.both(2.0, 1.0, 3.0).calls) <= 2 * a.evaluations - 1
        assert len(a.start(2.0, 0.0).calls) == 1
        recorder = Recorder(gaussian())
        assert a.sample(recorder, self.start(1, 5), GRID).nfe == 6 * a.evaluations + 1

    def test_first_evaluation_is_at_the_state_itself(self) -> None:
        first, *others = self.both(2.0, 1.0, 3.0).calls
        assert first == (Combination({0: 1.0}), 2.0)
        assert all(1.0 <= call.sigma <= 3.0 for call in others)

    def both(self, sigma: float, ahead: float, behind: float) -> Shear:
        """A shear of the increments to both sides."""

        def rest(x: Combination, D: Denoise) -> Combination:
            to_ahead, to_behind = self.approximator.both_increments(x, sigma, ahead, behind, D)
            return to_ahead + 2.0 * to_behind

        return Shear.of(rest)

    def test_the_increment_ahead_is_the_methods_own(self) -> None:
        """Under `BDIA` the step ahead is the method's, whatever serves behind."""
        x = noise(3, 3, sigma=2.0)
        for ahead in (1.0, 0.3, 0.0) if self.keeps_its_step else (0.0,):
            alone = increment(self.approximator, mixture(), x, 2.0, ahead)
            both, _ = both_increments(self.approximator, mixture(), x, 2.0, ahead, 3.0)
            torch.testing.assert_close(both, alone, rtol=1e-14, atol=1e-14)

    def test_the_increment_behind_is_accurate_to_the_order(self) -> None:
        """It errs by a power of the step like that ahead, whether it has calls of its own or not."""
        x, sigma, errors = noise(4, 5, sigma=2.0), 2.0, []
        steps = (0.2, 0.1, 0.05)
        for h in steps:
            _, found = both_increments(
                self.approximator, gaussian(), x, sigma, sigma - h, sigma + h
            )
            exact = gaussian().flow(x, sigma, sigma + h) - x
            errors.append(float((found - exact).norm()))
        slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
        assert slope > self.approximator.order + 0.8

    def test_the_step_to_zero_lands_on_the_denoisers_output(self) -> None:
        step = self.approximator.start(2.0, 0.0)
        assert step.calls == ((Combination({0: 1.0}), 2.0),)
        assert step.rest[0] == pytest.approx(0.0, abs=1e-15)
        assert step.rest[1] == pytest.approx(1.0, rel=1e-15)

    def test_the_flow_stands_still_at_level_zero(self) -> None:
        for call in self.approximator.start(0.0, 1.0).calls:
            assert call.sigma > 0.0

    def test_has_no_inverse_alone(self) -> None:
        state = self.solver.sample(gaussian(), self.start(2, 5), GRID).state
        for start in (state, state.current):
            with pytest.raises(ValueError, match=r"cannot be inverted: .*wrap it as BDIA\("):
                self.solver.invert(gaussian(), start, GRID)

    def test_scale_is_positive_on_the_grid(self) -> None:
        assert all(self.approximator.scale(sigma) > 0 for sigma in (0.0, 0.002, 1.0, 80.0))

    def test_gamma_zero_in_bdia_equals_the_base(self) -> None:
        x = self.start(2, 5)
        base = self.approximator.sample(gaussian(), x, GRID)
        refined = BDIA(self.approximator, 0.0).sample(gaussian(), x, GRID)
        assert torch.equal(base.x, refined.x)
        assert base.nfe == refined.nfe

    def test_a_tiny_gamma_is_close_to_the_base(self) -> None:
        """The limit, so that gamma = 0 is no special case of the algebra."""
        if not self.keeps_its_step:
            pytest.skip("its step under BDIA is another one of the same order")
        x = self.start(2, 5)
        base = self.approximator.sample(gaussian(), x, GRID)
        tiny = BDIA(self.approximator, PerStep([1e-9] * 6)).sample(gaussian(), x, GRID)
        assert 0 < relative_error(tiny.x, base.x) < 1e-7


class InvertibleContract(SolverContract):
    """For any exact solver of a pair: `invert` undoes `sample`, from wherever it starts."""

    solver: ClassVar[Solver]
    # The numbers of the steps that a callback sees on the way up, and the state's index at the top.
    undone: ClassVar[list[int]]
    top: ClassVar[int]
    # Long enough to be near the flow, short enough for a solver that amplifies on the way up.
    encoding_grid: ClassVar[torch.Tensor] = karras_sigmas(200, sigma_min=0.01, sigma_max=10.0)

    # Relative error of a round trip of seven steps.
    tolerance: ClassVar[dict[torch.dtype, float]] = {torch.float32: 2e-5, torch.float64: 2e-14}

    def test_invert_gives_back_the_noise(self, device: torch.device) -> None:
        for dtype, tolerance in self.tolerance.items():
            for shape in ((1, 5), (4, 2, 5)):
                denoiser = gaussian().to(device)
                x = self.start(*shape, dtype=dtype).to(device)
                there = self.solver.sample(denoiser, x, GRID)
                back = self.solver.invert(denoiser, there.state, GRID)
                assert relative_error(back.x, x) < tolerance
                assert relative_error(there.x, x) > 0.5  # it went somewhere

    def test_going_back_costs_no_more_than_going(self) -> None:
        there = self.solver.sample(gaussian(), self.start(2, 5), GRID)
        assert self.solver.invert(gaussian(), there.state, GRID).nfe <= there.nfe

    def test_going_back_evaluates_where_going_did(self) -> None:
        there, back = Recorder(mixture()), Recorder(mixture())
        solution = self.solver.sample(there, self.start(2, 3), GRID)
        self.solver.invert(back, solution.state, GRID)
        for point, sigma in zip(back.points, back.sigmas, strict=True):
            levels = zip(there.points, there.sigmas, strict=True)
            distances = [relative_error(point, p) for p, s in levels if s == sigma]
            assert min(distances) < 1e-12

    def test_a_lone_image_is_reached_again(self, device: torch.device) -> None:
        denoiser = gaussian().to(device)
        for grid in (GRID, GRID[:-1]):
            image = noise(3, 5, seed=1).to(device)
            code = self.solver.invert(denoiser, image, grid)
            again = self.solver.sample(denoiser, code.state, grid)
            assert relative_error(again.x, image) < 1e-12
            assert relative_error(code.x, image) > 0.5

    def test_a_lone_image_is_encoded_as_the_flow_does(self) -> None:
        grid = self.encoding_grid
        image = 0.5 * noise(3, 5, seed=1)
        exact = gaussian().flow(image, float(grid[-1]), 10.0)
        code = self.solver.invert(gaussian(), image, grid)
        assert relative_error(code.x, exact) < 0.1

    def test_any_part_of_the_grid_can_be_undone_and_done_again(self, device: torch.device) -> None:
        x, denoiser = self.start(2, 3).to(device), mixture().to(device)
        middle = self.solver.sample(denoiser, x, GRID, stop=4)
        end = self.solver.sample(denoiser, middle.state, GRID)
        up = self.solver.invert(denoiser, end.state, GRID, stop=3)
        down = self.solver.sample(denoiser, up.state, GRID)
        assert relative_error(down.x, end.x) < 1e-12
        top = self.solver.invert(denoiser, up.state, GRID)
        assert relative_error(top.x, x) < 1e-12
        assert top.state.index == self.top

    def test_the_pair_is_needed(self) -> None:
        """Without its partner the sample does not lead back: what a round trip must notice."""
        x = self.start(2, 3)
        there = self.solver.sample(mixture(), x, GRID)
        lone = self.solver.invert(mixture(), there.x, GRID)
        assert relative_error(lone.x, x) > 1e-6

    def test_extra_args_reach_every_call_on_the_way_up(self) -> None:
        recorder = Recorder(lambda x, sigma, shift: gaussian()(x, sigma) + shift)
        options = {"extra_args": {"shift": 0.5}}
        there = self.solver.sample(recorder, self.start(2, 5), GRID, **options)
        back = self.solver.invert(recorder, there.state, GRID, **options)
        assert len(recorder.extra_args) == there.nfe + back.nfe
        assert all(args == {"shift": 0.5} for args in recorder.extra_args)

    def test_states_are_not_modified(self) -> None:
        there = self.solver.sample(gaussian(), self.start(2, 5), GRID)
        state = there.state
        assert state.partner is not None
        copy = replace(state, current=state.current.clone(), partner=state.partner.clone())
        first = self.solver.invert(gaussian(), state, GRID)
        assert copy.partner is not None
        assert torch.equal(state.current, copy.current)
        assert torch.equal(state.partner, copy.partner)
        assert torch.equal(first.x, self.solver.invert(gaussian(), copy, GRID).x)

    @pytest.mark.parametrize("network", [torch.float32, torch.float64, torch.bfloat16])
    def test_the_network_may_have_another_dtype_than_the_state(self, network: torch.dtype) -> None:
        denoiser = InDtype(gaussian(), network)
        x = self.start(50, 5)
        there = self.solver.sample(denoiser, x, GRID)
        back = self.solver.invert(denoiser, there.state, GRID)
        assert relative_error(back.x, x) < 1e-12

    def test_what_the_caller_writes_to_x_does_not_reach_the_state(self) -> None:
        x = self.start(2, 5)
        start = x.clone()
        there = self.solver.sample(gaussian(), x, GRID)
        first = self.solver.sample(gaussian(), x, GRID, stop=1)
        for tensor in (x, there.x, first.x):
            tensor.clamp_(-1, 1)
        for state in (there.state, first.state):
            assert relative_error(self.solver.invert(gaussian(), state, GRID).x, start) < 1e-12

    def test_callbacks_do_not_change_the_run(self) -> None:
        there = self.solver.sample(gaussian(), self.start(2, 5), GRID)
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []

        def keep(info: dict[str, torch.Tensor]) -> None:
            kept.append((info["x"], info["x"].clone()))

        plain = self.solver.invert(gaussian(), there.state, GRID)
        watched = self.solver.invert(gaussian(), there.state, GRID, callback=keep)
        assert torch.equal(plain.x, watched.x)
        assert len(kept) == len(self.undone)
        assert all(torch.equal(x, copy) for x, copy in kept)

    def seen_on_the_way_up(self) -> tuple[State, list[dict[str, Any]]]:
        """The state that is undone, and what the callback was given: all steps, with their outputs."""
        there = self.solver.sample(gaussian(), self.start(2, 5), GRID)
        seen: list[dict[str, Any]] = []
        self.solver.invert(gaussian(), there.state, GRID, callback=seen.append)
        assert [info["i"] for info in seen] == self.undone
        for info in seen:
            assert float(info["sigma"]) == float(info["sigma_hat"])
            expected = gaussian()(info["x"], info["sigma"].expand(2))
            torch.testing.assert_close(info["denoised"], expected)
        return there.state, seen


class TwoStepContract(InvertibleContract):
    """For those whose pair stands at two levels of the grid."""

    undone: ClassVar[list[int]] = [6, 5, 4, 3, 2, 1]
    top: ClassVar[int] = 1

    def test_callback_on_the_way_up(self) -> None:
        """The dictionary of sampling; the level falls from the state one level up to 1."""
        state, seen = self.seen_on_the_way_up()
        assert torch.equal(seen[0]["x"], state.partner)
        for info in seen:
            assert float(info["sigma"]) == float(GRID[info["i"]])

    def test_a_lone_state_is_started_with_a_step_of_its_own(self) -> None:
        image = noise(2, 3, seed=1)
        code = self.solver.invert(mixture(), image, GRID, stop=6)
        assert (code.state.index, code.state.coupled) == (7, False)
        assert torch.equal(code.state.current, image)
        assert code.nfe > 0


class CoupledContract(InvertibleContract):
    """For those whose two states stand at one level."""

    undone: ClassVar[list[int]] = [6, 5, 4, 3, 2, 1, 0]
    top: ClassVar[int] = 0

    def test_callback_on_the_way_up(self) -> None:
        """The steps in reverse; the first evaluation of each may be at either of its levels."""
        _, seen = self.seen_on_the_way_up()
        for info in seen:
            levels = [float(sigma) for sigma in GRID[info["i"] : info["i"] + 2]]
            assert float(info["sigma"]) in levels
            assert float(info["sigma"]) > 0

    def test_a_lone_state_is_its_own_companion(self) -> None:
        x = self.start(2, 3)
        lone = self.solver.sample(mixture(), x, GRID, stop=3)
        pair = self.solver.invert(mixture(), lone.state, GRID).state
        assert relative_error(pair.current, x) < 1e-12
        assert pair.partner is not None
        assert relative_error(pair.partner, x) < 1e-12
        last = self.solver.steps(Grid.of(GRID))[6]
        image = noise(2, 3, seed=1)
        code = self.solver.invert(mixture(), image, GRID, stop=6)
        assert (code.state.index, code.state.coupled) == (6, True)
        assert 0 < code.nfe <= sum(len(shear.calls) for shear in last)

    def test_both_states_follow_the_flow(self) -> None:
        grid = karras_sigmas(200, sigma_min=0.1, sigma_max=10.0, append_zero=False)
        x = self.start(4, 5)
        exact = gaussian().flow(x, 10.0, 0.1)
        partner = self.solver.sample(gaussian(), x, grid).state.partner
        assert partner is not None
        assert relative_error(partner, exact) < 0.02


class IterativeContract(SolverContract):
    """For an `IterativeSolver`: one state, one step undone at a time, nearly."""

    solver: ClassVar[IterativeSolver]
    # Relative error of a round trip of seven steps.
    bound: ClassVar[float]
    # Whether a step is first evaluated on the way up where it begins on the way down, or where it ends.
    undoes_at: ClassVar[int] = 0

    def test_samples_as_its_approximator(self) -> None:
        x = self.start(2, 5)
        ours = self.solver.sample(gaussian(), x, GRID)
        theirs = self.solver.approximator.sample(gaussian(), x, GRID)
        assert torch.equal(ours.x, theirs.x)
        assert ours.nfe == theirs.nfe
        assert ours.state.partner is None

    def test_round_trips_are_near_in_both_directions(self, device: torch.device) -> None:
        denoiser = mixture().to(device)
        for batch in (1, 4):
            x = self.start(batch, 3).to(device)
            there = self.solver.sample(denoiser, x, GRID)
            back = self.solver.invert(denoiser, there.state, GRID)
            assert 1e-14 < relative_error(back.x, x) < self.bound
            lone = self.solver.invert(denoiser, there.x, GRID)
            assert torch.equal(lone.x, back.x)  # the sample alone is all there is
            again = self.solver.sample(denoiser, back.state, GRID)
            assert relative_error(again.x, there.x) < self.bound

    def test_any_part_of_the_grid(self) -> None:
        there = self.solver.sample(mixture(), self.start(2, 3), GRID)
        whole = self.solver.invert(mixture(), there.state, GRID)
        half = self.solver.invert(mixture(), there.state, GRID, stop=3)
        rest = self.solver.invert(mixture(), half.state, GRID)
        assert torch.equal(rest.x, whole.x)
        assert (half.state.index, rest.state.index) == (3, 0)
        assert half.nfe + rest.nfe == whole.nfe

    def test_every_evaluation_counts_and_the_callback_sees_each_step_once(self) -> None:
        there = self.solver.sample(mixture(), self.start(2, 3), GRID)
        recorder, seen = Recorder(mixture()), []
        options = {"extra_args": {}, "callback": seen.append}
        back = self.solver.invert(recorder, there.state, GRID, **options)
        assert back.nfe == len(recorder.points)
        assert [info["i"] for info in seen] == [6, 5, 4, 3, 2, 1, 0]
        for info in seen:
            level = float(GRID[info["i"] + self.undoes_at])
            assert float(info["sigma"]) == (level or float(GRID[info["i"]]))
            expected = mixture()(info["x"], info["sigma"].expand(2))
            torch.testing.assert_close(info["denoised"], expected)
