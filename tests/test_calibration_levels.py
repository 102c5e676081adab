"""Noise levels learned with the weights: what they are worth, where they stay, where they serve."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.interpolate import PchipInterpolator

from odesolvers import (
    BDIA,
    DDIM,
    RK4,
    Calibrated,
    Euler,
    Grid,
    HeunEDM,
    IntegrationApproximator,
    InversionWarning,
    Objective,
    PerStep,
    StepRatio,
    calibrate,
    karras_sigmas,
    parse,
    stability_report,
)
from odesolvers.calibration.spacing import Spacing
from odesolvers.extend import Solver
from odesolvers.models import Gaussian, GaussianMixture, IdealDenoiser, load_digits

from .problems import Recorder, mixture, noise
from .test_calibration import errors

GRID = karras_sigmas(7, 0.05, 20.0, append_zero=False)  # 6 steps
FEW: dict[str, Any] = {"reference_steps": 32, "max_runs": 120}


def digits() -> IdealDenoiser:
    return IdealDenoiser(load_digits()[0][:300])


@pytest.fixture(scope="module")
def learnt() -> Calibrated:
    return calibrate(mixture(), noise(16, 3, sigma=20.0), GRID, levels=True)


def test_both_ways_far_ahead_of_weights_alone_on_noise_that_it_has_not_seen(
    learnt: Calibrated,
) -> None:
    x = noise(64, 3, sigma=20.0, seed=1)
    weights = calibrate(mixture(), noise(16, 3, sigma=20.0), GRID, **FEW)
    alone = errors(BDIA(Euler(), weights), mixture(), x, GRID)
    joint = errors(BDIA(Euler(), learnt), mixture(), x, learnt.sigmas)
    assert joint[0] < 0.6 * alone[0]
    assert joint[1] < 0.6 * alone[1]


def test_digits_too() -> None:
    """Where the best weights on Karras's levels encode with an error of 5 %."""
    sigmas = karras_sigmas(7, 0.02, 80.0, append_zero=False)
    x, unseen = noise(16, 1, 8, 8, sigma=80.0), noise(32, 1, 8, 8, sigma=80.0, seed=1)
    weights = calibrate(digits(), x, sigmas, reference_steps=64)
    rule = calibrate(digits(), x, sigmas, levels=True, reference_steps=64)
    alone = errors(BDIA(Euler(), weights), digits(), unseen, sigmas)
    joint = errors(BDIA(Euler(), rule), digits(), unseen, rule.sigmas)
    assert joint[0] < 0.75 * alone[0]
    assert joint[1] < 0.5 * alone[1]


def test_the_one_weight_and_level_of_two_steps_are_the_best_of_all() -> None:
    """No others, on a scan of both, have samples nearer to the fine solution."""
    x = noise(16, 3, sigma=5.0)
    end = RK4().sample(mixture(), x, karras_sigmas(200, 0.5, 5.0, append_zero=False)).x

    def miss(gamma: float, level: float) -> float:
        """The geometric mean of the errors of the states, as `Objective` says."""
        found = BDIA(Euler(), PerStep([gamma])).sample(mixture(), x, [5.0, level, 0.5]).x
        return float((found - end).norm(dim=1).log().mean().exp())

    objective = Objective(encoding=0.0)
    rule = calibrate(mixture(), x, [5.0, 3.0, 0.5], levels=True, objective=objective)
    scan = [miss(0.02 * k, level) for k in range(1, 100, 2) for level in np.geomspace(0.6, 4, 40)]
    assert miss(rule.values[0], rule.levels[1]) < 1.02 * min(scan)


def test_the_report_holds_what_was_measured_on_the_learned_grid(learnt: Calibrated) -> None:
    report, x = learnt.report, noise(16, 3, sigma=20.0)
    assert report is not None
    after = errors(BDIA(Euler(), learnt), mixture(), x, learnt.sigmas)
    before = errors(BDIA(Euler(), StepRatio(1)), mixture(), x, GRID)
    alone = RK4().sample(mixture(), x, karras_sigmas(401, 0.05, 20.0, append_zero=False)).x
    euler = (Euler().sample(mixture(), x, learnt.sigmas).x - alone).norm(dim=1).log().mean().exp()
    assert (report.sampling[1], report.encoding[1]) == pytest.approx(after, rel=0.03)
    assert (report.sampling[0], report.encoding[0]) == pytest.approx(before, rel=0.03)
    assert report.base == pytest.approx(
        float(euler / alone.norm(dim=1).square().mean().sqrt()), rel=0.03
    )


@pytest.mark.parametrize("max_runs", [1, 20, 40, 70])
def test_spends_no_more_runs_than_allowed_and_counts_the_calls(max_runs: int) -> None:
    recorder = Recorder(mixture())
    x, options = noise(4, 3, sigma=20.0), {"reference_steps": 16, "max_runs": max_runs}
    report = calibrate(recorder, x, GRID, levels=True, **options).report  # type: ignore[arg-type]
    assert report is not None
    assert report.runs <= max_runs + 2  # the rule to compare with is run in any case, and one more
    assert report.evaluations == len(recorder.points)


@pytest.mark.parametrize("runs", range(12, 22))
def test_any_limit_of_runs_ends_in_a_rule(runs: int) -> None:
    """Also one that is reached between the fit of the weights and the first other grid."""
    x = noise(2, 3, sigma=20.0)
    rule = calibrate(mixture(), x, GRID, levels=True, reference_steps=8, max_runs=runs)
    assert rule.report is not None
    assert rule.report.runs <= runs + 2


def test_twenty_steps_take_at_most_six_hundred_runs() -> None:
    grid = karras_sigmas(21, 0.05, 20.0, append_zero=False)
    x = noise(2, 3, sigma=20.0)
    report = calibrate(mixture(), x, grid, levels=True, reference_steps=20).report
    assert report is not None
    assert report.runs <= 601
    assert report.moves > 0


@pytest.mark.parametrize(
    "base", [Euler(), DDIM(), HeunEDM(), HeunEDM("behind"), HeunEDM("both")], ids=repr
)
@pytest.mark.parametrize("steps", [4, 10])
def test_every_base_gains(base: IntegrationApproximator, steps: int) -> None:
    sigmas = karras_sigmas(steps + 1, 0.05, 20.0, append_zero=False)
    x, unseen = noise(32, 3, sigma=20.0), noise(64, 3, sigma=20.0, seed=1)
    options: dict[str, Any] = {"base": base, "reference_steps": 32}
    weights = calibrate(mixture(), x, sigmas, max_runs=60, **options)
    rule = calibrate(mixture(), x, sigmas, levels=True, **options)
    alone = errors(BDIA(base, weights), mixture(), unseen, sigmas)
    joint = errors(BDIA(base, rule), mixture(), unseen, rule.sigmas)
    assert joint[0] * joint[1] < 0.8 * alone[0] * alone[1]


@pytest.mark.parametrize("steps", [4, 5, 6])
@pytest.mark.parametrize("sampling", [1.0, 10.0])
def test_neither_error_is_bought_with_the_other(steps: int, sampling: float) -> None:
    """The least mean of both is, on five steps, one with codes 1.75 times as far off."""
    sigmas = karras_sigmas(steps + 1, 0.05, 20.0, append_zero=False)
    x, options = noise(8, 3, sigma=20.0), {"objective": Objective(sampling, 1.0)}
    alone = calibrate(mixture(), x, sigmas, reference_steps=32, **options).report
    joint = calibrate(mixture(), x, sigmas, levels=True, reference_steps=32, **options).report
    assert alone is not None
    assert joint is not None
    assert joint.sampling[1] < 1.02 * alone.sampling[1]
    assert joint.encoding[1] < 1.02 * alone.encoding[1]


def test_under_guidance() -> None:
    """The learned grid belongs to what is given in `extra_args`, which reaches every call."""
    x, y = load_digits()
    model, extra = IdealDenoiser(x[:300], y[:300]), {"class_labels": torch.arange(8) % 10}

    def guided(x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        return 3 * model(x, sigma, class_labels=class_labels) - 2 * model(x, sigma)

    sigmas = karras_sigmas(6, 0.02, 80.0, append_zero=False)
    recorder, start = Recorder(guided), noise(8, 1, 8, 8, sigma=80.0)
    options: dict[str, Any] = {"extra_args": extra, "reference_steps": 40}
    rule = calibrate(recorder, start, sigmas, levels=True, max_runs=80, **options)
    weights = calibrate(guided, start, sigmas, max_runs=40, **options)
    assert all(args == extra for args in recorder.extra_args)
    assert rule.report is not None
    assert weights.report is not None
    joint, alone = rule.report, weights.report
    assert joint.sampling[1] * joint.encoding[1] < 0.5 * alone.sampling[1] * alone.encoding[1]


class Bounded(torch.nn.Module):
    """A denoiser with a lowest level."""

    sigma_min = 0.05

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        assert float(sigma.min()) >= self.sigma_min * (1 - 1e-12)
        return mixture()(x, sigma)


@pytest.mark.parametrize("append_zero", [False, True])
def test_levels_decrease_between_ends_that_stay_and_within_the_range_of_the_denoiser(
    append_zero: bool,
) -> None:
    sigmas = karras_sigmas(6, 0.05, 20.0, append_zero=append_zero)
    rule = calibrate(Bounded(), noise(8, 3, sigma=20.0), sigmas, levels=True, **FEW)
    assert (rule.levels[0], rule.levels[-1]) == (sigmas[0].item(), sigmas[-1].item())
    assert len(rule.levels) == len(sigmas)
    assert all(a > b for a, b in pairwise(rule.sigmas.float().tolist()))
    assert rule.report is not None
    neutral = rule.report.sampling[0] * rule.report.encoding[0]
    assert rule.report.sampling[1] * rule.report.encoding[1] < 0.5 * neutral


def test_grids_that_end_in_zero_without_a_lowest_level() -> None:
    sigmas = karras_sigmas(5, 0.3, 20.0)
    rule = calibrate(Gaussian(std=0.5), noise(8, 3, sigma=20.0), sigmas, levels=True, **FEW)
    assert rule.report is not None
    assert rule.levels[-1] == 0.0
    assert rule.report.sampling[1] < 0.1 * rule.report.sampling[0]


@pytest.mark.parametrize("count", [7, 12, 1000])
@pytest.mark.parametrize("order", [1, -1])
def test_levels_are_chosen_among_those_of_a_model(count: int, order: int) -> None:
    x = noise(16, 3, sigma=20.0)
    known = karras_sigmas(count, 0.05, 20.0, rho=3.0, append_zero=False)
    rule = calibrate(mixture(), x, GRID, levels=known.tolist()[::order], **FEW)
    assert set(rule.levels[1:-1]) <= set(known.tolist())
    assert (rule.levels[0], rule.levels[-1]) == (GRID[0].item(), GRID[-1].item())
    weights = calibrate(mixture(), x, GRID, **FEW)
    assert rule.report is not None
    assert weights.report is not None
    assert rule.report.runs <= FEW["max_runs"] + 1
    joint, alone = rule.report, weights.report
    share = {1000: 0.5, 12: 0.8, 7: math.inf}[count]  # of five within the ends, all are taken
    assert joint.sampling[1] * joint.encoding[1] < share * alone.sampling[1] * alone.encoding[1]


def test_no_level_is_chosen_twice() -> None:
    grid = Grid((20.0, 9.9, 9.8, 9.7, 0.1))
    chosen = Spacing(grid).among(grid, [9.5, 5.0, 9.6, 20.0, 0.1, 3.0])
    assert chosen.levels == (20.0, 9.6, 9.5, 5.0, 0.1)


def test_too_few_levels_to_choose_from_are_refused_before_any_call() -> None:
    recorder = Recorder(mixture())
    known = torch.tensor([20.0, 9.0, 5.0, 3.0, 1.0, 0.05, 0.01, 30.0, 5.0])
    with pytest.raises(ValueError, match="5 inner levels, and only 4 of the levels to choose from"):
        calibrate(recorder, noise(2, 3, sigma=20.0), GRID, levels=known)
    assert not recorder.points


def test_a_copy_of_the_grid_in_float32_is_the_grid(learnt: Calibrated) -> None:
    copy = Grid.of(learnt.sigmas.float())
    assert copy.levels != learnt.levels
    assert tuple(learnt.weights(copy, Euler().scale)) == learnt.values
    assert learnt.encoding_error(copy) == learnt.encoding_error(Grid(learnt.levels)) is not None


def test_other_levels_in_the_same_number_are_refused(learnt: Calibrated) -> None:
    """The weights do not suit them, and whoever passes them has forgotten the learned ones."""
    with pytest.raises(ValueError, match=r"pass rule\.sigmas as the grid"):
        BDIA(Euler(), learnt).sample(mixture(), noise(1, 3, sigma=20.0), GRID)
    with pytest.raises(ValueError, match=r"pass rule\.sigmas as the grid"):
        stability_report(BDIA(Euler(), learnt), GRID)


@pytest.mark.parametrize("steps", [1, 2, 5, 17, 60])
def test_other_numbers_of_steps_get_the_same_curve(learnt: Calibrated, steps: int) -> None:
    u = PchipInterpolator(np.arange(7), np.array(learnt.levels) ** (1 / 7))
    wanted = u(np.linspace(0, 6, steps + 1)) ** 7
    assert learnt.sigmas_in(steps).numpy() == pytest.approx(wanted, rel=1e-12)
    karras = Calibrated("Euler()", tuple(GRID.tolist()), (0.5,) * 5)
    same = karras_sigmas(steps + 1, 0.05, 20.0, append_zero=False) if steps > 1 else GRID[[0, -1]]
    assert karras.sigmas_in(steps).numpy() == pytest.approx(same.numpy(), rel=1e-12)
    assert torch.equal(learnt.sigmas_in(6), learnt.sigmas)


def test_the_curve_carries_the_gain_to_more_steps(learnt: Calibrated) -> None:
    x = noise(64, 3, sigma=20.0, seed=1)
    weights = calibrate(mixture(), noise(16, 3, sigma=20.0), GRID, **FEW)
    solver, longer = BDIA(Euler(), learnt), learnt.sigmas_in(15)
    karras = karras_sigmas(16, 0.05, 20.0, append_zero=False)
    joint = errors(solver, mixture(), x, longer)
    alone = errors(BDIA(Euler(), weights), mixture(), x, karras)
    assert joint[0] < 0.75 * alone[0]
    assert joint[1] < 0.75 * alone[1]


@pytest.mark.parametrize("steps", [0, -3, 2.5, "six"])
def test_no_number_of_steps(learnt: Calibrated, steps: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="steps"):
        learnt.sigmas_in(steps)


def test_files_and_expressions_hold_the_rule_with_its_grid(
    learnt: Calibrated, tmp_path: Path
) -> None:
    learnt.save(tmp_path / "rule.json")
    again = Calibrated.load(tmp_path / "rule.json")
    assert again == learnt
    assert again.levels_learned
    assert torch.equal(again.sigmas, learnt.sigmas)
    assert again.report == learnt.report or math.isnan(again.report.consistency[0])  # type: ignore[union-attr]
    assert parse(repr(BDIA(Euler(), learnt))) == BDIA(Euler(), learnt)
    x = noise(4, 3, sigma=20.0, seed=5)
    state = BDIA(Euler(), learnt).sample(mixture(), x, learnt.sigmas).state
    back = BDIA(Euler(), again).invert(mixture(), state, again.sigmas.float())
    assert (back.x - x).abs().max() < 1e-9


def test_the_stability_report_and_the_warnings_know_the_grid(learnt: Calibrated) -> None:
    solver = BDIA(Euler(), learnt)
    assert learnt.report is not None
    assert stability_report(solver, learnt.sigmas).encoding_error == learnt.report.encoding[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error", InversionWarning)
        solver.invert(mixture(), noise(2, 3), learnt.sigmas)


@pytest.mark.parametrize("bound", [1.0, 30.0])
def test_the_bound_on_amplification_holds_on_the_learned_grid(bound: float) -> None:
    """Of the digits samples alone would be served by amplifications of hundreds."""
    sigmas = karras_sigmas(6, 0.02, 80.0, append_zero=False)
    options: dict[str, Any] = {"levels": True, "objective": Objective(encoding=0.0), **FEW}
    x = noise(4, 1, 8, 8, sigma=80.0)
    rule = calibrate(digits(), x, sigmas, max_amplification=bound, **options)

    def amplification(gamma: Any) -> float:
        return stability_report(BDIA(Euler(), gamma), rule.sigmas).amplification_inverting_vp

    allowed = max(bound, amplification(StepRatio(1)))
    assert 0.9 * allowed < amplification(rule) <= allowed * (1 + 1e-6)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Pictures in [-1, 1] as files of 8 bits have them."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def pictures() -> GaussianMixture:
    """Clusters of vectors in [-1, 1]."""
    means = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return GaussianMixture((0.5 * means).clamp(-0.6, 0.6), stds=torch.full((5,), 0.15))


def consistency(solver: Solver, x: torch.Tensor, sigmas: torch.Tensor) -> float:
    """Geometric mean of the distances of codes of 8-bit samples to their noise, from scratch."""
    picture = rounded(solver.sample(pictures(), x, sigmas).x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InversionWarning)
        code = solver.invert(pictures(), picture, sigmas).x
    size = x.flatten(1).norm(dim=1).square().mean().sqrt()
    return float(((code - x).flatten(1).norm(dim=1) / size).log().mean().exp())


def test_codes_of_the_solvers_own_8_bit_samples_are_an_objective() -> None:
    """Rounding alone costs such a code an error of a per cent."""
    sigmas = karras_sigmas(7, 0.05, 80.0, append_zero=False)
    x, unseen = noise(48, 12, sigma=80.0), noise(64, 12, sigma=80.0, seed=1)
    samples, codes = (
        calibrate(pictures(), x, sigmas, levels=True, objective=Objective(s, 0, c))
        for s, c in ((1, 0), (0, 1))
    )
    assert codes.report is not None
    assert all(map(math.isnan, (*codes.report.sampling, *codes.report.encoding)))
    assert "consistency error" in str(codes.report)
    before, after = codes.report.consistency
    assert before == pytest.approx(consistency(BDIA(Euler(), StepRatio(1)), x, sigmas), rel=0.1)
    assert after == pytest.approx(consistency(BDIA(Euler(), codes), x, codes.sigmas), rel=0.4)
    assert stability_report(BDIA(Euler(), codes), codes.sigmas).encoding_error == after
    other = consistency(BDIA(Euler(), samples), unseen, samples.sigmas)
    assert consistency(BDIA(Euler(), codes), unseen, codes.sigmas) < 0.75 * other


def test_progress_ends_where_the_fit_ends(capfd: pytest.CaptureFixture[str]) -> None:
    x = noise(2, 3, sigma=20.0)
    rule = calibrate(mixture(), x, GRID, levels=True, progress=True, reference_steps=8, max_runs=40)
    assert rule.report is not None
    assert f"{rule.report.runs}/40" in capfd.readouterr().err


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_as_on_the_cpu() -> None:
    x = noise(8, 3, sigma=20.0)
    here = calibrate(mixture(), x, GRID, levels=True, **FEW)
    there = calibrate(mixture().cuda(), x.cuda(), GRID, levels=True, **FEW)
    assert here.report is not None
    assert there.report is not None
    assert there.report.sampling[1] == pytest.approx(here.report.sampling[1], rel=0.2)
