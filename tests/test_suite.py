"""The benchmark suite: what it measures is right, and what it drives is driven as published."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.stats import norm
from torch import Tensor

from benchmarks.common import Problem, Reference, Upwards, reference, relative_errors
from benchmarks.suite import measures, run as suite_run, solvers
from benchmarks.suite.data import fine_distance
from benchmarks.suite.peers import Diffusers, KDiffusion, Sampler
from benchmarks.suite.rows import Rows
from benchmarks.suite.solvers import Entry
from odesolvers import BDIA, DDIM, Calibrated, Euler, StepRatio, calibrate
from odesolvers.models import Gaussian

from .problems import gaussian, mixture, noise, relative_error
from .suite_runs import Lost, measure, tiny

if find_spec("k_diffusion") is None:
    pytest.skip("the suite compares with k-diffusion, not installed", allow_module_level=True)

# Measures.


def test_relative_errors_are_relative_to_the_truth() -> None:
    truth = torch.tensor([[3.0, 4.0], [0.0, 5.0], [5.0, 0.0]])
    found = truth + torch.tensor([[0.5, 0.0], [0.0, 1.0], [math.nan, 0.0]])
    assert relative_errors(found, truth).tolist() == pytest.approx([0.1, 0.2, math.inf])


def test_percentile_is_reached_by_that_fraction() -> None:
    errors = torch.arange(100, 0, -1, dtype=torch.float64)
    assert measures.percentile(errors, 0.5) == 50
    assert measures.percentile(errors, 0.95) == 95
    errors[:6] = math.inf
    assert measures.percentile(errors, 0.95) == math.inf
    assert measures.percentile(errors, 0.94) == 94


def test_frechet_distance_of_stretched_and_shifted_points() -> None:
    """The stretch is along the axes of the covariance: ``|m - n|² + Σ (s - t)²``."""
    x = noise(500, 3)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    stretch, shift = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([0.3, 0.0, -1.0]).double()
    expected = float(shift.square().sum() + (stretch - 1).square().sum())
    assert measures.frechet_distance(x, x * stretch + shift) == pytest.approx(expected)
    assert measures.frechet_distance(x, x) == pytest.approx(0.0, abs=1e-12)


def test_frechet_distance_against_scipys_root() -> None:
    x, y = noise(400, 4), noise(300, 4, seed=1) @ noise(4, 4, seed=2) + 0.5
    A, B = np.cov(x.numpy().T), np.cov(y.numpy().T)
    root = scipy.linalg.sqrtm(A @ B).real
    expected = float((x.mean(0) - y.mean(0)).square().sum()) + np.trace(A + B - 2 * root)
    assert measures.frechet_distance(x, y) == pytest.approx(expected)


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_normality_of_quantiles(shift: float) -> None:
    """The largest gap between Φ(z) and Φ(z - m) is at m/2: ``2 Φ(m/2) - 1``."""
    quantiles = torch.from_numpy(norm.ppf((np.arange(2000) + 0.5) / 2000))
    expected = 2 * norm.cdf(shift / 2) - 1
    assert measures.normality(quantiles + shift) == pytest.approx(expected, abs=1e-3)


# Peers: driven over the levels they are given.


def levels(steps: int) -> Tensor:
    return Problem("any", lambda device: Gaussian(), (1,), 1).sigmas(steps)


@pytest.mark.parametrize(
    "peer", [KDiffusion("sample_euler"), Diffusers("DDIMScheduler")], ids=lambda p: type(p).__name__
)
@pytest.mark.parametrize("steps", [2, 7, 20])
def test_first_order_peers_are_ddim(peer: Sampler, steps: int) -> None:
    x, sigmas = noise(16, 3, sigma=80.0), levels(steps)
    ours = DDIM().sample(mixture(), x, sigmas).x
    assert relative_error(peer.sample(mixture(), x, sigmas).x, ours) < 1e-10


@pytest.mark.parametrize("steps", [15, 40])
def test_dpm_solver_of_diffusers_is_that_of_k_diffusion(steps: int) -> None:
    """To float32, in which diffusers keeps its state."""
    x, sigmas = noise(16, 3, sigma=80.0), levels(steps)
    theirs = KDiffusion("sample_dpmpp_2m").sample(mixture(), x, sigmas).x
    ours = Diffusers("DPMSolverMultistepScheduler").sample(mixture(), x, sigmas).x
    assert relative_error(ours, theirs) < 1e-5


def test_dpm_solver_of_diffusers_ends_with_order_one_below_15_steps() -> None:
    x, sigmas = noise(16, 3, sigma=80.0), levels(10)
    theirs = KDiffusion("sample_dpmpp_2m").sample(mixture(), x, sigmas).x
    scheduler = "DPMSolverMultistepScheduler"
    as_it_comes = Diffusers(scheduler).sample(mixture(), x, sigmas).x
    otherwise = Diffusers(scheduler, (("lower_order_final", False),)).sample(mixture(), x, sigmas).x
    assert relative_error(otherwise, theirs) < 1e-5
    assert relative_error(as_it_comes, theirs) > 1e-4


@pytest.mark.parametrize(
    ("peer", "order"),
    [
        (KDiffusion("sample_heun"), 2),
        (KDiffusion("sample_dpm_2"), 2),
        (KDiffusion("sample_dpmpp_2m"), 2),
        (KDiffusion("sample_lms"), 4),
        (Diffusers("UniPCMultistepScheduler"), 3),  # the corrector adds one to the predictor's two
    ],
    ids=lambda value: getattr(value, "sampler", getattr(value, "scheduler", str(value))),
)
def test_orders_of_peers_against_the_exact_flow(peer: Sampler, order: int) -> None:
    """A peer that met other levels than the flow's would not converge."""
    x = noise(4, 5, sigma=80.0)
    exact = gaussian().flow(x, 80.0, 0.02)
    steps = [80, 160, 320]
    errors = [relative_error(peer.sample(gaussian(), x, levels(n)).x, exact) for n in steps]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.2)


def test_peers_keep_float32() -> None:
    x = noise(4, 5, sigma=80.0, dtype=torch.float32)
    for entry in solvers.entries():
        if entry.family in ("k-diffusion", "diffusers"):
            solver = entry.make(tiny(), levels(6))
            assert solver.sample(gaussian(), x, levels(6)).x.dtype == torch.float32


def test_steps_are_the_most_within_the_budget() -> None:
    problem = tiny()
    for entry in solvers.entries():
        spent = []
        for steps in (entry.steps(20), entry.steps(20) + 1):
            meter, sigmas = measures.Meter(problem.denoiser), problem.sigmas(steps)
            entry.make(problem, sigmas).sample(meter, problem.noise(), sigmas)
            spent.append(meter.calls)
        assert spent[0] <= 20 < spent[1], entry.name


def test_levels_are_fitted_on_short_grids_only(tmp_path: Path) -> None:
    (entry,) = (entry for entry in solvers.entries() if entry.levels)
    problem = tiny(budgets=(5, 10, 11, 20), seeds=1, learned_steps=20)
    runs = suite_run.missing([problem], [entry], None, None, Rows(tmp_path))
    assert [run.budget for run in runs] == [5, 10]


# Fine solutions.


def test_fine_solution_is_the_exact_flow_and_is_solved_once(tmp_path: Path) -> None:
    problem = tiny()
    solved = reference(problem, 3, tmp_path)
    exact = gaussian().flow(problem.noise(3), 80.0, 0.02)
    assert relative_error(solved.clean, exact) < 1e-7
    assert 0 < solved.convergence < 1e-5

    def refuse(x: Tensor, sigma: Tensor) -> Tensor:
        raise AssertionError

    again = reference(replace(problem, build=lambda device: refuse), 3, tmp_path)
    assert torch.equal(again.clean, solved.clean)
    assert torch.equal(again.noise, problem.noise(3))
    assert again.convergence == solved.convergence


def test_fine_solution_is_compared_with_data() -> None:
    """Both are Gaussian: the flow carries noise to the data, so a finite sample of each is near."""
    clean = gaussian().flow(noise(4000, 5, sigma=80.0, seed=7), 80.0, 0.02)
    problem = tiny(data=lambda n: clean, frechet_states=4000)
    distance = fine_distance(problem, 3)
    assert distance is not None
    assert 0 < distance < 0.02
    shifted = fine_distance(replace(problem, data=lambda n: clean + 1.0), 3)
    assert shifted == pytest.approx(5.0, rel=0.1)
    assert fine_distance(tiny(), 3) is None


# Rows.


def test_row_of_an_invertible_solver_against_the_exact_flow() -> None:
    row = measure(BDIA(Euler(), StepRatio(1)))
    x = tiny().noise(0)
    sigmas = tiny().sigmas(12)
    solver = BDIA(Euler(), StepRatio(1))
    clean = gaussian().flow(x, 80.0, 0.02)
    there = solver.sample(gaussian(), x, sigmas).x
    code = solver.invert(gaussian(), clean, sigmas).x
    size = clean.norm(dim=1).square().mean().sqrt()
    errors = ((there - clean).norm(dim=1) / size).sort().values
    assert row.sampling_median == pytest.approx(float(errors[1]))
    assert row.sampling_95 == pytest.approx(float(errors[-1]))
    errors = ((code - x).norm(dim=1) / x.norm(dim=1).square().mean().sqrt()).sort().values
    assert row.encoding_median == pytest.approx(float(errors[1]))
    assert row.code_std == pytest.approx(float(code.std() / x.std()))
    assert row.code_mean == pytest.approx(float(code.mean() / 80))
    assert row.round_trip is None  # they are measured at some budgets alone
    assert (row.evaluations, row.encoding_evaluations) == (12, 12)
    assert row.diverged == ""


def test_round_trips_are_measured_where_asked_for() -> None:
    row = measure(BDIA(Euler(), StepRatio(1)), budget=tiny().dear[0])
    assert row.round_trip is not None
    assert row.round_trip < 1e-12
    assert row.image_round_trip is not None
    assert row.image_round_trip < 1e-12
    assert row.inversion_evaluations == tiny().dear[0] - 1


def test_row_of_a_sampler_has_no_code() -> None:
    row = measure(KDiffusion("sample_lms"))
    assert row.encoding_median is None
    assert row.round_trip is None
    assert row.sampling_median is not None
    assert row.sampling_median < measure(DDIM()).sampling_median  # type: ignore[operator]


@pytest.mark.parametrize("error", [FloatingPointError, OverflowError, None])
def test_divergence_is_a_result(error: type[Exception] | None) -> None:
    row = measure(Lost(error))
    assert row.sampling_median == row.sampling_95 == math.inf
    assert row.diverged == "sampling"


def fitted(problem: Problem, sigmas: Tensor) -> Sampler:
    """Weights fitted on a batch that no measured seed has; refused above 5 steps."""
    if len(sigmas) > 6:
        raise OverflowError
    x = problem.calibration_noise()
    rule = calibrate(problem.denoiser, x, sigmas, max_runs=1, reference_steps=2)
    return BDIA(Euler(), rule)


def test_calibration_is_counted_apart() -> None:
    entry = Entry("fitted", "test", fitted, "fitted")
    x = tiny().noise(0)
    truth = Reference(x, gaussian().flow(x, 80.0, 0.02), 0.0)
    row = suite_run.measure(suite_run.Run(tiny(), entry, 5, 0), truth, None)
    learned = fitted(tiny(), tiny().sigmas(5)).gamma.report  # type: ignore[attr-defined]
    assert (row.evaluations, row.calibration_evaluations) == (5, learned.evaluations)
    row = suite_run.measure(suite_run.Run(tiny(), entry, 6, 0), truth, None)
    assert (row.diverged, row.sampling_median) == ("calibration", math.inf)


def test_learned_weights_are_kept_and_serve_longer_grids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solvers, "CACHE", tmp_path)
    make = solvers.CalibratedBDIA(Euler(), states=2)
    problem = tiny(version=1, calibration_runs=12, learned_steps=3)
    first = make.rule(problem, 3)
    longer = make.rule(problem, 7)
    assert len(list(tmp_path.iterdir())) == 2
    assert (len(first.values), len(longer.values)) == (2, 6)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert make(problem, problem.sigmas(7)) == BDIA(Euler(), longer)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written


def test_a_solver_with_levels_of_its_own_runs_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solvers, "CACHE", tmp_path)
    make = solvers.CalibratedLevels(Euler(), states=2)
    problem = tiny(version=1, calibration_runs=20)
    first = make(problem, problem.sigmas(4))
    (path,) = tmp_path.iterdir()
    rule = Calibrated.load(path)
    assert rule.sigmas.tolist() != problem.sigmas(4).tolist()
    x = problem.noise(0)
    found = make(problem, problem.sigmas(4)).sample(problem.denoiser, x, problem.sigmas(4)).x
    assert torch.equal(found, BDIA(Euler(), rule).sample(problem.denoiser, x, rule.sigmas).x)
    assert first.gamma == rule  # type: ignore[attr-defined]


def test_ddim_upwards_asks_for_the_noise_where_it_stands() -> None:
    x, sigmas = noise(3, 5), torch.tensor([4.0, 2.0, 0.5], dtype=torch.float64)
    code = Upwards(DDIM()).invert(gaussian(), x, sigmas).x
    y = x
    for sigma, target in ((0.5, 2.0), (2.0, 4.0)):
        d = (y - gaussian()(y, torch.full((3,), sigma, dtype=torch.float64))) / sigma
        y = y + (target - sigma) * d
    assert relative_error(code, y) < 1e-14


def test_other_errors_are_not_swallowed() -> None:
    with pytest.raises(TypeError):
        measure(Lost(TypeError))
