"""Learnt weights: what they are worth on noise they have not seen, and where they may be used."""

from __future__ import annotations

import json
import math
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from odesolvers import (
    BDIA,
    DDIM,
    RK4,
    Calibrated,
    ConstantGamma,
    DampedStepRatio,
    Euler,
    GammaRule,
    Grid,
    HeunEDM,
    InversionWarning,
    Objective,
    PerStep,
    SmoothedOutput,
    StepRatio,
    calibrate,
    karras_sigmas,
    parse,
    stability_report,
)
from odesolvers.calibration import CalibrationReport
from odesolvers.extend import Solver
from odesolvers.models import Gaussian, IdealDenoiser, load_digits

from .problems import Recorder, mixture, noise, relative_error
from .test_order import BOTTOM, TOP, fitted_order

GRID = karras_sigmas(9, 0.05, 20.0, append_zero=False)  # 8 steps
SMALL = {"reference_steps": 32, "max_runs": 40}


def errors(
    solver: Solver, denoiser: torch.nn.Module, x: torch.Tensor, sigmas: torch.Tensor
) -> tuple[float, float]:
    """Geometric mean over states of the sampling and the encoding error, from scratch."""
    fine = karras_sigmas(401, float(sigmas[-1]), float(sigmas[0]), append_zero=False)
    end = RK4().sample(denoiser, x, fine).x

    def mean(found: torch.Tensor, right: torch.Tensor) -> float:
        distances = (found - right).flatten(1).norm(dim=1)
        return float((distances / right.flatten(1).norm(dim=1).square().mean().sqrt()).log().mean())

    sampled = solver.sample(denoiser, x, sigmas).x
    code = solver.invert(denoiser, end, sigmas).x
    return math.exp(mean(sampled, end)), math.exp(mean(code, x))


@pytest.fixture(scope="module")
def learnt() -> Calibrated:
    return calibrate(mixture(), noise(16, 3, sigma=20.0), GRID, **SMALL)


def test_beats_the_fixed_rules_on_noise_it_has_not_seen(learnt: Calibrated) -> None:
    x = noise(64, 3, sigma=20.0, seed=1)
    sampling, encoding = errors(BDIA(Euler(), learnt), mixture(), x, GRID)
    for rule in (1.0, StepRatio(1), StepRatio(2), DampedStepRatio()):
        other = errors(BDIA(Euler(), rule), mixture(), x, GRID)
        assert sampling * encoding < 0.8 * other[0] * other[1]


def test_finds_the_damping_that_digits_need() -> None:
    """Without it samples are as far off as pictures are apart, see the docs on choosing."""
    denoiser = IdealDenoiser(load_digits()[0][:300])
    sigmas = karras_sigmas(9, 0.02, 80.0, append_zero=False)
    x = noise(16, 1, 8, 8, sigma=80.0)
    solver = BDIA(Euler(), calibrate(denoiser, x, sigmas, reference_steps=64, max_runs=50))
    unseen = noise(32, 1, 8, 8, sigma=80.0, seed=1)
    sampling, encoding = errors(solver, denoiser, unseen, sigmas)
    neutral = errors(BDIA(Euler(), StepRatio(1)), denoiser, unseen, sigmas)
    assert sampling < 0.1 * neutral[0]
    assert encoding < neutral[1]


def test_the_report_holds_what_was_measured(learnt: Calibrated) -> None:
    report = learnt.report
    assert report is not None
    x = noise(16, 3, sigma=20.0)
    after = errors(BDIA(Euler(), learnt), mixture(), x, GRID)
    before = errors(BDIA(Euler(), StepRatio(1)), mixture(), x, GRID)
    assert (report.sampling[1], report.encoding[1]) == pytest.approx(after, rel=0.02)
    assert (report.sampling[0], report.encoding[0]) == pytest.approx(before, rel=0.02)
    fine = karras_sigmas(401, 0.05, 20.0, append_zero=False)
    alone = Euler().sample(mixture(), x, GRID).x - RK4().sample(mixture(), x, fine).x
    assert report.base == pytest.approx(
        float((alone.norm(dim=1)).log().mean().exp())
        / float(RK4().sample(mixture(), x, fine).x.norm(dim=1).square().mean().sqrt()),
        rel=0.02,
    )
    assert "StepRatio(1)" in str(report)
    assert f"{report.evaluations} denoiser calls" in str(report)


@pytest.mark.parametrize("max_runs", [1, 5, 14, 25])
def test_spends_no_more_runs_than_allowed_and_counts_the_calls(max_runs: int) -> None:
    recorder = Recorder(mixture())
    rule = calibrate(recorder, noise(4, 3, sigma=20.0), GRID, reference_steps=16, max_runs=max_runs)
    assert rule.report is not None
    assert rule.report.runs <= max_runs + 1  # the rule to compare with is run in any case
    assert rule.report.evaluations == len(recorder.points)


def test_more_runs_are_no_worse() -> None:
    x = noise(8, 3, sigma=20.0)
    values = []
    for max_runs in (1, 13, 30, 60):
        report = calibrate(mixture(), x, GRID, reference_steps=32, max_runs=max_runs).report
        assert report is not None
        values.append(report.sampling[1] * report.encoding[1])
    assert all(later <= earlier for earlier, later in pairwise(values))
    assert values[-1] < 0.7 * values[0]


@pytest.mark.parametrize("only", ["sampling", "encoding"])
def test_an_objective_of_one_part_asks_for_that_part_alone(only: str) -> None:
    x = noise(8, 3, sigma=20.0)
    other = {"sampling": "encoding", "encoding": "sampling"}[only]
    objective = Objective(**{other: 0.0})
    alone = calibrate(
        mixture(), x, GRID, objective=objective, reference_steps=32, max_runs=120
    ).report
    assert alone is not None
    before, after = getattr(alone, only)
    assert after < 0.5 * before
    assert all(math.isnan(value) for value in getattr(alone, other))
    assert f"{other} error" not in str(alone)


def test_extra_args_reach_every_call() -> None:
    recorder = Recorder(lambda x, sigma, shift: mixture()(x, sigma) + shift)
    calibrate(
        recorder,
        noise(2, 3, sigma=20.0),
        GRID,
        extra_args={"shift": 0.0},
        reference_steps=8,
        max_runs=14,
    )
    assert all(args == {"shift": 0.0} for args in recorder.extra_args)


@pytest.mark.parametrize("bound", [1.0, 3.0, 1e3])
def test_amplification_stays_below_the_bound_or_that_of_the_neutral_rule(bound: float) -> None:
    """Also where samples alone are asked for, which small weights would serve best."""
    x, samples = noise(4, 3, sigma=20.0), Objective(encoding=0.0)
    rule = calibrate(mixture(), x, GRID, objective=samples, max_amplification=bound, **SMALL)
    free = calibrate(mixture(), x, GRID, objective=samples, **SMALL)

    def amplification(rule: GammaRule) -> float:
        return stability_report(BDIA(Euler(), rule), GRID).amplification_inverting_vp

    allowed = max(bound, amplification(StepRatio(1)))
    assert amplification(rule) <= allowed * (1 + 1e-6)
    assert bound > 100 or amplification(free) > 1.2 * allowed


def test_a_trial_that_diverges_is_no_end() -> None:
    """Some of the rules that are tried overflow here; they lose, and that is all."""

    def brittle(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        denoised = mixture()(x, sigma)
        return torch.where(x.abs().amax(dim=1, keepdim=True) > 90, denoised / 0.0, denoised)

    rule = calibrate(brittle, noise(4, 3, sigma=20.0), GRID, **SMALL)
    assert rule.report is not None
    assert math.isfinite(rule.report.encoding[1])


def test_the_one_weight_of_two_steps_is_the_best_of_all() -> None:
    """No other, on a scan, has samples nearer to the fine solution."""
    grid = torch.tensor([5.0, 1.5, 0.5], dtype=torch.float64)
    x = noise(16, 3, sigma=5.0)
    fine = karras_sigmas(200, 0.5, 5.0, append_zero=False)
    end = RK4().sample(mixture(), x, fine).x

    def miss(gamma: GammaRule) -> float:
        """The geometric mean of the errors of the states, as `Objective` says."""
        found = BDIA(Euler(), gamma).sample(mixture(), x, grid).x
        return float((found - end).norm(dim=1).log().mean().exp())

    rule = calibrate(mixture(), x, grid, objective=Objective(encoding=0.0))
    scan = [miss(PerStep([0.02 * k])) for k in range(1, 100)]
    assert miss(rule) < 1.02 * min(scan)
    assert miss(rule) < 0.5 * miss(PerStep([1.0]))


def test_another_base() -> None:
    x = noise(8, 3, sigma=20.0)
    rule = calibrate(mixture(), x, GRID, base=HeunEDM(), **SMALL)
    unseen = noise(32, 3, sigma=20.0, seed=1)
    found = errors(BDIA(HeunEDM(), rule), mixture(), unseen, GRID)
    fixed = errors(BDIA(HeunEDM(), StepRatio(1)), mixture(), unseen, GRID)
    assert found[0] * found[1] < fixed[0] * fixed[1]
    with pytest.raises(ValueError, match=r"calibrated for HeunEDM\(\), this is Euler\(\)"):
        BDIA(Euler(), rule)
    with pytest.raises(ValueError, match=r"calibrated for HeunEDM\(\), this is Euler\(\)"):
        BDIA(Euler(), SmoothedOutput(rule))


def as_calibrated(rule: GammaRule, sigmas: torch.Tensor) -> Calibrated:
    grid = Grid.of(sigmas)
    return Calibrated("Euler()", grid.levels, tuple(rule.weights(grid, Euler().scale)))


@pytest.mark.parametrize("append_zero", [False, True])
@pytest.mark.parametrize("n", [5, 13, 40])
def test_on_other_grids_it_says_what_it_has_to_say_beyond_the_step_ratio(
    n: int, append_zero: bool
) -> None:
    """In closed form: nothing for the step ratio itself, and the damping of a damped one."""
    other = Grid.of(karras_sigmas(n, 0.05, 20.0, append_zero=append_zero))
    scale = Euler().scale
    neutral = as_calibrated(StepRatio(1), GRID).weights(other, scale)
    assert neutral == pytest.approx(StepRatio(1).weights(other, scale), rel=1e-12)
    damped = DampedStepRatio(cutoff=0.5, power=2)
    fine = karras_sigmas(33, 0.05, 20.0, append_zero=False)
    transferred = as_calibrated(damped, fine).weights(other, scale)
    inside = len(transferred) - append_zero
    assert transferred[:inside] == pytest.approx(damped.weights(other, scale)[:inside], rel=0.15)


def test_what_alternates_does_not_reach_other_grids() -> None:
    grid = Grid.of(karras_sigmas(21, 0.05, 20.0, append_zero=False))
    ratios = StepRatio(1).weights(grid, Euler().scale)
    values = tuple(g * (2.0 if k % 2 else 0.5) for k, g in enumerate(ratios))
    rule = Calibrated("Euler()", grid.levels, values)
    other = Grid.of(karras_sigmas(31, 0.05, 20.0, append_zero=False))
    ratio = np.array(rule.weights(other, Euler().scale)) / StepRatio(1).weights(
        other, Euler().scale
    )
    assert ratio[3:-3] == pytest.approx(1.0, rel=1e-9)


def test_it_gains_the_order_of_its_base_on_finer_grids() -> None:
    grid = karras_sigmas(9, BOTTOM, TOP, rho=5.0, append_zero=False)
    rule = calibrate(mixture(), noise(8, 3, sigma=TOP, seed=3), grid, **SMALL)
    assert fitted_order(BDIA(Euler(), rule), (100, 200, 400)) == pytest.approx(2, abs=0.2)


def test_grids_of_another_range_are_refused(learnt: Calibrated) -> None:
    for top in (80.0, 5.0):
        with pytest.raises(ValueError, match="calibrate on a grid of this range"):
            BDIA(Euler(), learnt).sample(mixture(), noise(1, 3), karras_sigmas(8, 0.05, top))


def test_files_hold_the_rule_to_the_bit(learnt: Calibrated, tmp_path: Path) -> None:
    path = tmp_path / "rule.json"
    learnt.save(path)
    again = Calibrated.load(path)
    assert again == learnt
    assert again.report == learnt.report
    assert repr(BDIA(Euler(), again)) == repr(BDIA(Euler(), learnt))
    assert list(tmp_path.iterdir()) == [path]
    other = Calibrated(learnt.base, learnt.levels, (*learnt.values[:-1], learnt.values[-1] * 1.001))
    assert repr(other) != repr(learnt)
    assert parse(repr(learnt)) == learnt
    assert parse(repr(BDIA(Euler(), learnt))) == BDIA(Euler(), learnt)


def test_a_state_made_with_a_learnt_rule_goes_back_with_the_rule_from_its_file(
    learnt: Calibrated, tmp_path: Path
) -> None:
    x = noise(4, 3, sigma=20.0, seed=5)
    state = BDIA(Euler(), learnt).sample(mixture(), x, GRID).state
    learnt.save(tmp_path / "rule.json")
    solver = BDIA(Euler(), Calibrated.load(tmp_path / "rule.json"))
    assert relative_error(solver.invert(mixture(), state, GRID).x, x) < 1e-12


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"a": 1}', "\x00"])
def test_files_that_are_no_calibration_are_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="is not a calibration"):
        Calibrated.load(path)


def test_files_of_another_version_are_refused(learnt: Calibrated, tmp_path: Path) -> None:
    path = tmp_path / "rule.json"
    learnt.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 3}))
    with pytest.raises(ValueError, match="in version 3 of the format, this odesolvers reads"):
        Calibrated.load(path)


def test_large_states_are_fitted_like_small_ones() -> None:
    """Errors of more than some thousand elements are compared by a sketch of them."""
    sigmas = karras_sigmas(6, 0.05, 20.0, append_zero=False)

    def values(n: int) -> tuple[float, ...]:
        denoiser = Gaussian(std=torch.linspace(0.05, 5.0, n))
        x = noise(2, n, sigma=20.0)
        rule = calibrate(denoiser, x, sigmas, reference_steps=32, max_runs=40)
        assert rule.report is not None
        assert rule.report.moves > 0
        return rule.values

    assert values(40_000) == pytest.approx(values(4000), rel=0.05)


def test_gradients_are_not_recorded() -> None:
    """Of a denoiser with parameters that could be trained."""
    network = torch.nn.Linear(3, 3).double()
    recorded = []

    def denoiser(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        denoised = mixture()(x, sigma) + 0.0 * network(x)
        recorded.append(denoised.requires_grad)
        return denoised

    calibrate(denoiser, noise(2, 3, sigma=20.0), GRID, reference_steps=8, max_runs=14)
    assert not any(recorded)


def test_half_precision_states_are_refused() -> None:
    with pytest.raises(TypeError, match=r"fitted to their rounding.*InDtype"):
        calibrate(mixture(), noise(2, 3, sigma=20.0, dtype=torch.bfloat16), GRID)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(8, 3), (8, 1, 3)])
def test_grids_that_end_in_zero(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    sigmas = karras_sigmas(6, 0.05, 20.0)
    denoiser = Gaussian(std=0.5)
    x = noise(*shape, sigma=20.0, dtype=dtype)
    report = calibrate(denoiser, x, sigmas, **SMALL).report
    assert report is not None
    assert report.sampling[1] * report.encoding[1] < report.sampling[0] * report.encoding[0]
    neutral = BDIA(Euler(), StepRatio(1)).sample(denoiser, x, sigmas).x
    end = denoiser.flow(x, 20.0, 0.0)
    size = float(end.norm() / math.sqrt(len(end)))
    before = float((neutral - end).reshape(8, -1).norm(dim=1).log().mean().exp()) / size
    assert report.sampling[0] == pytest.approx(before, rel=0.05)


def test_long_grids_are_fitted_too() -> None:
    """By default there are runs enough to move every weight, where 80 would not do."""
    sigmas = karras_sigmas(71, 0.05, 20.0, append_zero=False)
    x, objective = noise(1, 3, sigma=20.0), Objective(sampling=0.0)
    report = calibrate(mixture(), x, sigmas, objective=objective, reference_steps=1).report
    assert report is not None
    assert report.runs > 80
    assert report.moves > 0
    few = calibrate(mixture(), noise(2, 3, sigma=20.0), GRID, reference_steps=8, max_runs=20)
    assert few.report is not None
    assert few.report.moves == 0
    assert " 0 moves" in str(few.report)


def test_starts_are_rules_or_numbers_in_the_scale_of_the_base() -> None:
    x = noise(4, 3, sigma=20.0)
    options = {"base": DDIM(), "reference_steps": 16, "max_runs": 1}
    rule = calibrate(mixture(), x, GRID, starts=[0.9], **options)  # type: ignore[arg-type]
    assert rule.values == pytest.approx(ConstantGamma(0.9).weights(Grid.of(GRID), DDIM().scale))
    with pytest.raises(TypeError, match="gamma must be a number"):
        calibrate(mixture(), x, GRID, starts=["a"], **options)  # type: ignore[arg-type, list-item]
    with pytest.raises(ValueError, match="gives 1 weights"):
        calibrate(mixture(), x, GRID, starts=[PerStep([1.0])], **options)  # type: ignore[arg-type]


def test_no_warning_where_the_calibration_knows_better() -> None:
    """The model of the stability report is a Gaussian; weights that suit another flow look bad to it."""
    sigmas = karras_sigmas(7, 0.02, 80.0, append_zero=False)
    values = (0.9, 0.02, 0.02, 0.3, 0.01)
    grid = Grid.of(sigmas)
    known = CalibrationReport((0.1, 0.1), (0.1, 0.04), 0.1, 1, 1)
    image = noise(2, 3)
    for report, expected in ((None, True), (known, False)):
        solver = BDIA(Euler(), Calibrated("Euler()", grid.levels, values, report))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always", InversionWarning)
            solver.invert(mixture(), image, sigmas)
        assert bool(seen) == expected
    assert stability_report(solver, sigmas).encoding_error == 0.04


@pytest.mark.parametrize(
    "change",
    [
        {"values": None},
        {"values": ["0x1p-1"]},
        {"values": ["nan"] * 7},
        {"levels": [1.0, 0.5]},
        {"report": {"runs": 1}},
    ],
)
def test_damaged_files_are_refused(
    change: dict[str, object], learnt: Calibrated, tmp_path: Path
) -> None:
    path = tmp_path / "rule.json"
    learnt.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match="is not a calibration"):
        Calibrated.load(path)


def test_what_was_not_asked_for_is_null_in_the_file(tmp_path: Path) -> None:
    rule = calibrate(
        mixture(),
        noise(2, 3, sigma=20.0),
        GRID,
        objective=Objective(encoding=0.0),
        reference_steps=8,
        max_runs=1,
    )
    rule.save(tmp_path / "rule.json")
    assert "NaN" not in (tmp_path / "rule.json").read_text()
    again = Calibrated.load(tmp_path / "rule.json").report
    assert again is not None
    assert all(math.isnan(value) for value in again.encoding)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_runs": 0}, "max_runs >= 1"),
        ({"reference_steps": 0}, "reference_steps >= 1"),
        ({"max_amplification": 0.5}, "max_amplification >= 1"),
        ({"max_amplification": math.nan}, "max_amplification >= 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(mixture(), noise(2, 3, sigma=20.0), GRID, **settings)  # type: ignore[arg-type]


def test_a_grid_of_one_step_has_no_weight_to_learn() -> None:
    with pytest.raises(ValueError, match="two steps or more"):
        calibrate(mixture(), noise(2, 3, sigma=20.0), [20.0, 0.0])


@pytest.mark.parametrize("weights", [(0, 0), (-1, 1), (1, math.nan), (math.inf, 1), (1, 1, -1)])
def test_objectives_out_of_range_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="not all 0"):
        Objective(*weights)
