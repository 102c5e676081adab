"""What is expected of an inversion, against inversions: closed forms, and measured round trips."""

from __future__ import annotations

import math
import warnings
from functools import cache

import pytest
import torch

from odesolvers import (
    BDIA,
    DDIM,
    EDICT,
    RK4,
    ConstantGamma,
    Euler,
    FixedPoint,
    FixedPointInversion,
    GammaRule,
    Grid,
    HeunEDM,
    IntegrationApproximator,
    InversionWarning,
    McCallumFoster,
    PerStep,
    ReversibleHeun,
    Rex,
    SmoothedOutput,
    StepRatio,
    karras_sigmas,
    side_information_bound,
    stability_report,
)
from odesolvers.extend import Solver
from odesolvers.models import Gaussian, GaussianMixture
from odesolvers.stability import StabilityReport

from .problems import noise, relative_error

APPROXIMATORS: list[IntegrationApproximator] = [Euler(), DDIM(), HeunEDM()]
RULES: list[GammaRule | float] = [0.5, 0.96, 1.0, StepRatio(1), StepRatio(2)]
STD = 0.5


def mixture() -> GaussianMixture:
    """Five Gaussians in eight dimensions that part from each other at half the noise's height."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    return GaussianMixture(means, 0.2 + 0.3 * torch.rand(5, generator=generator))


def measured_round_trip(
    solver: BDIA, denoiser: torch.nn.Module, sigmas: torch.Tensor, dtype: torch.dtype
) -> float:
    """The median over the batch: a few states near a border between components fare far worse."""
    x = noise(128, 8, sigma=80.0, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InversionWarning)  # it is what is measured
        state = solver.sample(denoiser, x, sigmas).state
        back = solver.invert(denoiser, state, sigmas).x
    error = (back.double() - x.double()).norm(dim=1) / x.double().norm(dim=1)
    return float(error.median())


@pytest.mark.parametrize("n", [18, 50, 80])
@pytest.mark.parametrize("gamma", RULES, ids=repr)
@pytest.mark.parametrize("approximator", APPROXIMATORS, ids=repr)
def test_round_trips_are_as_expected(
    approximator: IntegrationApproximator, gamma: GammaRule | float, n: int
) -> None:
    """From 1e-16 to 1e15: within a factor of 3 on a Gaussian, of 10 on a mixture.

    Where g = 1 and states shrink, most roundings are undone by the roundings back: nothing is too low.
    Near to it many are.
    """
    solver, sigmas = BDIA(approximator, gamma), karras_sigmas(n)
    report = stability_report(solver, sigmas)
    least = {1.0: -1.0, 0.96: 0.2}.get(gamma, 0.3) if isinstance(gamma, float) else 0.3
    for dtype in (torch.float32, torch.float64):
        expected = report.round_trip_error(dtype)
        on_gaussian = measured_round_trip(solver, Gaussian(std=STD), sigmas, dtype)
        assert least < on_gaussian / expected < 3
        assert least / 3 < measured_round_trip(solver, mixture(), sigmas, dtype) / expected < 10


def test_half_precision_has_a_bound() -> None:
    """Its sums are formed in float32 and rounded once, which the figure does not count on."""
    solver, sigmas = BDIA(Euler(), 0.9), karras_sigmas(10)
    expected = stability_report(solver, sigmas).round_trip_error(torch.bfloat16)
    measured = measured_round_trip(solver, Gaussian(std=STD), sigmas, torch.bfloat16)
    assert 0.02 < measured / expected < 2


def test_data_of_another_width() -> None:
    """At 18 steps of γ = 0.5 the width matters: the figure follows it."""
    solver, sigmas = BDIA(DDIM(), 0.5), karras_sigmas(18)
    for std in (0.1, 2.0):
        report = stability_report(solver, sigmas, data_std=std)
        measured = measured_round_trip(solver, Gaussian(std=std), sigmas, torch.float64)
        assert 0.3 < measured / report.round_trip_error(torch.float64) < 3


@cache
def images_and_codes() -> tuple[torch.Tensor, torch.Tensor]:
    """Draws from the mixture, and their codes on a fine grid."""
    image = mixture().sample(64, torch.Generator().manual_seed(1))
    solver = BDIA(RK4(), StepRatio(1))
    return image, solver.invert(mixture(), image, karras_sigmas(300)).x


@pytest.mark.parametrize("n", [18, 50])
@pytest.mark.parametrize("gamma", [*RULES, 0.8], ids=repr)
@pytest.mark.parametrize("approximator", APPROXIMATORS, ids=repr)
@pytest.mark.filterwarnings("ignore::odesolvers.InversionWarning")
def test_codes_of_lone_images_are_as_expected(
    approximator: IntegrationApproximator, gamma: GammaRule | float, n: int
) -> None:
    """The standard deviation exactly, on the Gaussian; the error within 10, on a mixture."""
    solver, sigmas = BDIA(approximator, gamma), karras_sigmas(n)
    report = stability_report(solver, sigmas)
    image = STD * noise(4, 8, seed=1)
    code = solver.invert(Gaussian(std=STD), image, sigmas).x
    true = Gaussian(std=STD).flow(image, 0.0, 80.0)
    assert float(code.norm() / true.norm()) == pytest.approx(report.code_std, rel=1e-6)
    image, fine = images_and_codes()
    code = solver.invert(mixture(), image, sigmas).x
    error = (code - fine).norm(dim=1) / fine.square().sum(1).mean().sqrt()
    assert 0.1 < float(error.median()) / report.encoding_error < 10


@pytest.mark.parametrize("gamma", [0.5, 1.0, StepRatio(1), StepRatio(2)], ids=repr)
def test_truncation_errors_are_each_steps_own_carried_to_the_end(gamma: GammaRule | float) -> None:
    """Against runs of the solver itself: exact states but for one step, linear in the error."""
    solver, sigmas = BDIA(Euler(), gamma), karras_sigmas(8)
    flow, s = Gaussian(std=STD).flow, sigmas.tolist()
    exact = [flow(torch.full((1, 1), 80.0, dtype=torch.float64), s[0], level) for level in s]
    steps, v = [stage for (stage,) in solver.steps(Grid.of(sigmas))], STD**2

    def step(k: int, older: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
        denoised = v / (v + s[k] ** 2) * here
        return steps[k].gain * older + steps[k].rest[0] * here + steps[k].rest[1] * denoised

    total = 0.0
    for k in range(8):
        here = step(k, exact[max(k - 1, 0)], exact[k])
        off = here - exact[k + 1]
        before, error = torch.zeros_like(off), off
        for later in range(k + 1, 8):
            before, error = error, step(later, before, error)
        total += float(error) ** 2
    report = stability_report(solver, sigmas)
    assert report.sampling_error == pytest.approx(math.sqrt(total) / float(exact[-1]), rel=1e-9)


# Amplification and side information, in closed form.


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_a_constant_amplifies_by_its_powers(gamma: float) -> None:
    grid = Grid.of(karras_sigmas(20))
    report = stability_report(BDIA(Euler(), gamma), grid)
    assert report.amplification_inverting == pytest.approx(gamma**-19, rel=1e-12)
    assert report.amplification_sampling == 1.0
    assert report.side_information == pytest.approx(-19 * math.log2(gamma), rel=1e-12)
    scaled = stability_report(BDIA(DDIM(), gamma), grid)
    # In z the alternating error goes from level k + 1 to k, a weight acts from k + 1 to k - 1.
    ends = [DDIM().scale(grid.levels[k]) for k in (0, 1, -2, -1)]
    in_x = gamma**-19 * ends[2] * ends[3] / (ends[0] * ends[1])
    assert scaled.amplification_inverting == pytest.approx(in_x, rel=1e-9)
    in_z = in_x * ends[0] / ends[2]
    assert scaled.amplification_inverting_vp == pytest.approx(in_z, rel=1e-9)


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_step_ratios_multiply_to_the_last_step_over_the_first(power: float) -> None:
    sigmas = karras_sigmas(20, append_zero=False)
    h = -sigmas.diff()
    report = stability_report(BDIA(Euler(), StepRatio(power)), sigmas)
    ratio = float(h[0] / h[-1]) ** power
    assert report.amplification_inverting == pytest.approx(ratio, rel=1e-12)
    assert report.amplification_sampling == 1.0
    assert report.side_information == pytest.approx(math.log2(ratio), rel=1e-12)
    more = stability_report(BDIA(Euler(), StepRatio(power)), sigmas.flip(0) * -1 + 81.0)
    assert more.amplification_sampling == pytest.approx(ratio, rel=1e-9)  # steps that lengthen


def test_given_weights_and_smoothing() -> None:
    sigmas = karras_sigmas(4)
    report = stability_report(BDIA(Euler(), PerStep([0.5, 2.0, 0.25])), sigmas)
    assert report.amplification_sampling == 2.0
    assert report.amplification_inverting == 4.0
    assert report.side_information == 2.0
    for rule in (ConstantGamma(1.0), StepRatio(1)):
        plain = stability_report(BDIA(Euler(), rule), sigmas)
        smooth = stability_report(BDIA(Euler(), SmoothedOutput(rule)), sigmas)
        last = rule.weights(Grid.of(sigmas), Euler().scale)[-1]
        ratio = smooth.side_information - plain.side_information
        assert ratio == pytest.approx(math.log2(1 + last))
    assert smooth.amplification_inverting >= plain.amplification_inverting


def test_the_amplification_of_a_part_of_the_grid_counts_if_it_is_the_largest() -> None:
    """Weights above 1 undo what others amplify; the worst stretch is what the report tells."""
    solver = BDIA(Euler(), PerStep([2.0, 1 / 4, 2.0, 1 / 3, 10.0]))
    report = stability_report(solver, torch.linspace(6, 0.5, 7))
    assert report.amplification_inverting == pytest.approx(4 / 2 * 3)
    assert report.amplification_sampling == pytest.approx(10.0)
    assert stability_report(BDIA(Euler()), [2.0, 1.0]).amplification_inverting == 1.0


COUPLED = [
    EDICT(),
    McCallumFoster(Euler(), 0.9),
    McCallumFoster(HeunEDM()),
    Rex(HeunEDM(), 0.99),
    ReversibleHeun(),
]


@pytest.mark.parametrize("solver", COUPLED, ids=repr)
@pytest.mark.parametrize("append_zero", [False, True])
def test_coupled_solvers_do_what_the_report_says_on_gaussian_data(
    solver: Solver, append_zero: bool
) -> None:
    sigmas = karras_sigmas(12, 0.1, 10.0, append_zero=append_zero)
    report = stability_report(solver, sigmas, data_std=STD)
    denoiser, last = Gaussian(std=STD), float(sigmas[-1])
    start = noise(256, 8, sigma=10.0)
    end = denoiser.flow(start, 10.0, last)
    sample = solver.sample(denoiser, start, sigmas).x
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", InversionWarning
        )  # where it is off by more than 0.3, rightly
        code = solver.invert(denoiser, end, sigmas).x
    assert report.sampling_error == pytest.approx(relative_error(sample, end), rel=1e-6)
    assert report.encoding_error == pytest.approx(relative_error(code, start), rel=1e-6)
    assert report.code_std == pytest.approx(float(code.norm() / start.norm()), rel=1e-9)

    single = start.float()
    state = solver.sample(denoiser, single, sigmas).state
    measured = relative_error(solver.invert(denoiser, state, sigmas).x, single)
    # With weights of 1, or nearly, the roundings back undo those on the way.
    near_one = solver in (McCallumFoster(HeunEDM()), ReversibleHeun())
    assert (-1.0 if near_one else 0.1) < measured / report.round_trip_error(torch.float32) < 10


def test_amplification_of_a_coupled_step_is_that_of_its_stages() -> None:
    sigmas = karras_sigmas(12, 0.1, 10.0, append_zero=False)
    report = stability_report(McCallumFoster(Euler(), 0.9), sigmas)
    assert report.amplification_inverting == pytest.approx(0.9**-11, rel=1e-12)
    assert report.side_information == pytest.approx(-11 * math.log2(0.9), rel=1e-12)
    edict = stability_report(EDICT(0.9), sigmas)
    assert edict.amplification_inverting == pytest.approx(0.9**-22, rel=1e-12)


def test_iteration_has_no_stability_of_its_own() -> None:
    with pytest.raises(ValueError, match=r"does not undo.*solution\.convergence"):
        stability_report(FixedPointInversion(Euler()), karras_sigmas(5))


# Output smoothing.


def kicked(approximator: IntegrationApproximator, rule: GammaRule, sigmas: torch.Tensor) -> float:
    """What a kick at level 1 moves the last state by, of a flow that stands still: ``D(x) = x``."""

    def identity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return x.clone()

    solver, x = BDIA(approximator, rule), torch.zeros(1, 1, dtype=torch.float64)
    state = solver.sample(identity, x, sigmas, stop=1).state
    assert state.partner is not None
    state.current.add_(1.0)
    return float(solver.sample(identity, state, sigmas).x)


@pytest.mark.parametrize("approximator", [Euler(), HeunEDM()], ids=repr)
@pytest.mark.parametrize("gamma", [1.0, 0.6])
def test_smoothing_takes_a_kick_out(approximator: IntegrationApproximator, gamma: float) -> None:
    """Of a kick 1/(1 + γ) stays for good, and the rest alternates: that is gone at any length."""
    stays = 1 / (1 + gamma)
    for n in (4, 5):
        sigmas = karras_sigmas(n, append_zero=False)
        rule = ConstantGamma(gamma)
        assert kicked(approximator, SmoothedOutput(rule), sigmas) == pytest.approx(stays, rel=1e-9)
        assert abs(kicked(approximator, rule, sigmas) - stays) > 0.05


@pytest.mark.parametrize("approximator", [Euler(), HeunEDM()], ids=repr)
def test_smoothing_of_step_ratios_leaves_what_the_rule_says(
    approximator: IntegrationApproximator,
) -> None:
    """``(g' - g) / (g' (1 + g))`` of the alternating part before, as the last two weights differ."""
    values = (0.7, 0.9, 0.8)
    g_before, g = values[-2:]
    sigmas = karras_sigmas(5, append_zero=False)
    run = [0.0, 1.0]
    for weight in values[:-1]:
        run.append(run[-1] + weight * (run[-2] - run[-1]))
    alternating = (run[-1] - run[-2]) * g_before / (1 + g_before)
    stays = run[-1] - alternating
    ends = kicked(approximator, SmoothedOutput(PerStep(values)), sigmas)
    left = (g_before - g) / (g_before * (1 + g))
    assert ends - stays == pytest.approx(left * alternating, rel=1e-9)
    plain = kicked(approximator, PerStep(values), sigmas)
    assert abs(plain - stays) > 2 * abs(ends - stays)


# Words.


def words(report: StabilityReport) -> str:
    """The report on one line."""
    return " ".join(str(report).split())


def test_the_verdicts() -> None:
    grid = karras_sigmas(50)
    good = stability_report(BDIA(Euler(), StepRatio(1)), grid)
    assert good.round_trip == "inverts in float32"
    assert good.encoding == "encodes lone images to noise"
    assert "Instead" not in str(good)
    poor = stability_report(BDIA(DDIM(), 0.5), grid)
    assert poor.round_trip == "inverts in float64 or FixedPoint only"
    assert poor.encoding == "does not encode lone images to noise"
    assert "use a float64 state or arithmetic=FixedPoint(); to encode images use" in words(poor)
    hopeless = stability_report(BDIA(DDIM(), 0.5), karras_sigmas(80))
    assert hopeless.round_trip == "inverts in FixedPoint only"
    exact = stability_report(BDIA(DDIM(), 0.5, FixedPoint()), grid)
    assert exact.round_trip == "inverts to the bit"
    assert exact.round_trip_error(torch.float32) == 0.0
    assert exact.encoding_error == pytest.approx(poor.encoding_error, rel=0.01)
    assert exact.side_information == side_information_bound(BDIA(DDIM(), 0.5, FixedPoint()), grid)
    assert f"{exact.side_information:.3g} bits" in words(exact)


def test_figures_beyond_all_numbers_are_infinite() -> None:
    report = stability_report(BDIA(Euler(), 1e-9), karras_sigmas(100))
    assert report.amplification_inverting == math.inf
    assert report.encoding_error == report.code_std == math.inf
    assert report.round_trip_error(torch.float64) == math.inf
    assert "inf" in str(report)


@pytest.mark.parametrize(
    "solver",
    [
        Euler(),
        HeunEDM(),
        FixedPointInversion(DDIM()),
        BDIA(Euler(), 0.0),
        BDIA(DDIM(), PerStep([1, 0, 1])),
    ],
    ids=repr,
)
def test_a_step_that_forgets_everything_destroys_infinitely_many_bits(solver: Solver) -> None:
    assert side_information_bound(solver, karras_sigmas(4)) == math.inf


def test_the_first_step_of_a_pair_forgets_nothing() -> None:
    assert side_information_bound(BDIA(Euler(), 0.5), [2.0, 1.0]) == 0
    assert side_information_bound(BDIA(Euler(), 0.5), karras_sigmas(4)) == pytest.approx(3)
    bits = -4 * 2 * math.log2(0.93)  # each step mixes twice
    assert side_information_bound(EDICT(), karras_sigmas(4)) == pytest.approx(bits)


def test_what_is_no_use_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data_std must be a positive number, got 0"):
        stability_report(BDIA(Euler()), karras_sigmas(5), data_std=0)
    with pytest.raises(ValueError, match=r"step from sigmas\[1\] = .* has the weight g = 0"):
        stability_report(BDIA(Euler(), 0.0), karras_sigmas(5))
    report = stability_report(BDIA(Euler()), karras_sigmas(5))
    with pytest.raises(TypeError, match=r"floating point dtype .*got torch.int64"):
        report.round_trip_error(torch.int64)
