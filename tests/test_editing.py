"""Edits, interpolations and watermarks, on denoisers whose answers are known."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from odesolvers import (
    BDIA,
    EDICT,
    DampedStepRatio,
    DDIMInversion,
    Euler,
    FixedPoint,
    HeunEDM,
    InversionWarning,
    ReversibleHeun,
    StepRatio,
    karras_sigmas,
)
from odesolvers.editing import (
    detect,
    edit,
    embed,
    interpolate,
    key_signs,
    mark,
    matches,
    slerp,
)
from odesolvers.models import ClassifierFreeGuidance, Gaussian

SIGMAS = karras_sigmas(12, 0.02, 20.0)
SHAPE = (2, 3, 8, 8)
MASK = torch.zeros(8, 8)
MASK[2:6, 3:] = 1
SOLVERS = [
    BDIA(Euler(), DampedStepRatio()),
    BDIA(Euler(), StepRatio(1), FixedPoint()),
    BDIA(HeunEDM("behind"), StepRatio(1)),
    EDICT(arithmetic=FixedPoint()),
    ReversibleHeun(),
]


class Two:
    """Gaussian data of mean -0.5 or 0.5 by its label; 0 without one. Counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Any, sigma: Any, label: Any = None) -> Any:
        self.calls += 1
        mean = 0.0 if label is None else label.reshape(-1, 1, 1, 1).to(x) - 0.5
        v = (sigma**2).reshape(-1, 1, 1, 1).to(x)
        return (0.09 * x + v * mean) / (0.09 + v)


LEFT, RIGHT = ({"label": torch.tensor([k])} for k in (0.0, 1.0))


def picture(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (0.3 * torch.randn(SHAPE, generator=generator) - 0.5).to(dtype)


# edit


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_outside_of_the_mask_the_picture_is_returned_exactly(solver: Any) -> None:
    x = solver.arithmetic.snap(picture()) if solver.arithmetic.exact else picture()
    denoiser = Two()
    found = edit(solver, denoiser, x, SIGMAS, source=LEFT, target=RIGHT, mask=MASK)
    outside = (MASK == 0).expand(SHAPE)
    assert torch.equal(found.x[outside], x[outside])
    assert ((found.x - x)[~outside] > 0.5).all()
    assert found.x.dtype == x.dtype
    assert found.nfe == denoiser.calls


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_mask_of_ones_changes_nothing(solver: Any) -> None:
    options: Any = {"source": LEFT, "target": RIGHT, "strength": 0.75}
    plain = edit(solver, Two(), picture(torch.float64), SIGMAS, **options)
    masked = edit(solver, Two(), picture(torch.float64), SIGMAS, mask=torch.ones(1), **options)
    # In fixed point the remainders of each step begin anew.
    atol = 1e-6 if solver.arithmetic.exact else 1e-12
    assert torch.allclose(masked.x, plain.x, rtol=0, atol=atol)
    assert torch.allclose(masked.code.x, plain.code.x, rtol=0, atol=1e-12)


def test_a_soft_mask_lies_between() -> None:
    options: Any = {"source": LEFT, "target": RIGHT}
    x, solver = picture(torch.float64), SOLVERS[0]
    whole = edit(solver, Two(), x, SIGMAS, **options).x - x
    half = edit(solver, Two(), x, SIGMAS, mask=torch.full((8, 8), 0.5), **options).x - x
    assert (half.mean() / whole.mean()).item() == pytest.approx(0.3, abs=0.25)
    assert 0 < half.mean() < whole.mean()


def test_an_edit_moves_the_mean_as_the_flow_does_and_leads_back() -> None:
    """The flow of a Gaussian moves x by s(σ) = std(0) / std(σ): an edit shifts by the means alone."""
    x, sigmas = picture(torch.float64), karras_sigmas(400, 0.02, 20.0)
    solver = SOLVERS[0]
    found = edit(solver, Two(), x, sigmas, source=LEFT, target=RIGHT)
    share = 1 - math.sqrt((0.09) / (0.09 + 400))
    assert torch.allclose(found.x - x, torch.full_like(x, share), atol=5e-3)
    back = solver.invert(Two(), found.state, sigmas, extra_args=RIGHT)
    assert torch.allclose(back.x, found.code.x, atol=1e-9)
    same = edit(solver, Two(), x, sigmas, source=LEFT, target=LEFT)
    assert torch.allclose(same.x, x, atol=1e-9)


def test_strength_is_the_share_of_the_grid() -> None:
    solver, denoiser, x = SOLVERS[0], Two(), picture(torch.float64)
    found = edit(solver, denoiser, x, SIGMAS, source=LEFT, target=RIGHT, strength=0.5)
    code = solver.invert(Two(), x, SIGMAS, extra_args=LEFT, stop=6)
    run = solver.sample(Two(), code.state, SIGMAS, extra_args=RIGHT)
    assert torch.equal(found.x, run.x)
    assert found.nfe == denoiser.calls == code.nfe + run.nfe
    shifts = [
        (edit(solver, Two(), x, SIGMAS, source=LEFT, target=RIGHT, strength=s).x - x).mean()
        for s in (0.25, 0.5, 1.0)
    ]
    assert 0 < shifts[0] < shifts[1] < shifts[2]


def test_guidance_leads_from_the_negative_to_the_target() -> None:
    solver, x = SOLVERS[0], picture(torch.float64)
    code = solver.invert(Two(), x, SIGMAS, extra_args=LEFT)
    guided = ClassifierFreeGuidance(Two(), 3.0)
    for negative, given in ((LEFT, None), ({"label": torch.tensor([0.5])},) * 2):
        found = edit(
            solver, Two(), x, SIGMAS, source=LEFT, target=RIGHT, guidance=3.0, negative=given
        )
        branches = {"positive": RIGHT, "negative": negative}
        assert torch.equal(
            found.x, solver.sample(guided, code.state, SIGMAS, extra_args=branches).x
        )


def test_a_masked_edit_warns_once_of_the_whole_run() -> None:
    solver = BDIA(Euler(), 0.05)
    with pytest.warns(InversionWarning, match="12 steps") as caught:
        solver.invert(Two(), picture(), SIGMAS)
    text = str(caught[0].message)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        edit(solver, Two(), picture(), SIGMAS, mask=MASK)
    assert [str(w.message) for w in found if w.category is InversionWarning] == [text]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask": torch.zeros(7, 8)}, r"shape \(7, 8\), which does not fit the picture"),
        ({"mask": torch.zeros(5, 2, 3, 8, 8)}, "does not fit the picture"),
        ({"mask": torch.full((8, 8), 2.0)}, "from 0, keep, to 1, edit"),
        ({"mask": torch.full((8, 8), torch.nan)}, "from 0, keep, to 1, edit"),
        ({"mask": np.zeros((8, 8))}, "mask must be a tensor"),
        ({"strength": 0.0}, "strength must be from 0.167 to 1"),
        ({"strength": 0.1}, "takes 2 at least, got 0.1"),
        ({"strength": 1.1}, "got 1.1"),
        ({"strength": float("nan")}, "got nan"),
        ({"guidance": "3"}, "guidance must be a number"),
    ],
)
def test_what_no_edit_can_use_is_refused_before_a_call(options: dict[str, Any], words: str) -> None:
    denoiser = Two()
    with pytest.raises((TypeError, ValueError), match=words):
        edit(SOLVERS[0], denoiser, picture(), SIGMAS, **options)
    assert denoiser.calls == 0


def test_a_solver_without_an_inverse_is_refused() -> None:
    with pytest.raises(ValueError, match=r"use BDIA\(Euler\(\)\)"):
        edit(Euler(), Two(), picture(), SIGMAS)
    found = edit(DDIMInversion(), Two(), picture(), SIGMAS, source=LEFT, target=RIGHT)
    assert found.x.shape == SHAPE  # the comparison of the field runs


# interpolate


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_an_interpolation_ends_at_its_pictures(solver: Any) -> None:
    a, b = picture(torch.float64).split(1)
    if solver.arithmetic.exact:
        a, b = solver.arithmetic.snap(a), solver.arithmetic.snap(b)
    frames = interpolate(solver, Two(), a, b, SIGMAS, frames=5, source=LEFT)
    assert len(frames) == 5
    tolerance = 0 if solver.arithmetic.exact else 1e-10
    assert (frames[0].x - a).abs().max() <= tolerance
    assert (frames[-1].x - b).abs().max() <= tolerance
    distances = [((f.x - a).norm() / (b - a).norm()).item() for f in frames]
    assert distances == sorted(distances)
    assert (frames[2].x - frames[1].x).abs().max() > 1e-3


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_an_interpolation_between_two_conditions_ends_at_its_pictures(solver: Any) -> None:
    a, b = picture(torch.float64).split(1)
    if solver.arithmetic.exact:
        a, b = solver.arithmetic.snap(a), solver.arithmetic.snap(b)
    frames = interpolate(solver, Two(), a, b, SIGMAS, frames=3, source=LEFT, target=RIGHT)
    tolerance = 0 if solver.arithmetic.exact else 1e-10
    assert (frames[0].x - a).abs().max() <= tolerance
    assert (frames[2].x - b).abs().max() <= tolerance
    # The frame between is a sample of the mixture of both, which is guidance of scale 1/2.
    codes = [
        solver.invert(Two(), x, SIGMAS, extra_args=extra).state
        for x, extra in ((a, LEFT), (b, RIGHT))
    ]
    between = ClassifierFreeGuidance(Two(), 0.5)
    both = {"positive": RIGHT, "negative": LEFT}
    right = solver.sample(between, slerp(*codes, 0.5), SIGMAS, extra_args=both).x
    assert (frames[1].x - right).abs().max() < 1e-6


def test_slerp_walks_on_the_sphere() -> None:
    """On a circle: equal angles, and the closed form at a third."""
    solver = BDIA(Euler(), 1.0)
    a, b = (
        solver.invert(Gaussian(), torch.tensor([v]), SIGMAS).state for v in ([1.0, 0.0], [0.0, 1.0])
    )
    third = slerp(a, b, 1 / 3)
    assert third.partner is not None
    radius = torch.stack([s.partner for s in (a, b)]).abs().max()  # type: ignore[misc]
    angle = math.pi / 6
    expected = radius * torch.tensor([[math.cos(angle), math.sin(angle)]])
    assert torch.allclose(third.partner, expected, rtol=1e-5)
    assert torch.allclose(slerp(a, a, 0.3).current, a.current, rtol=1e-6)
    assert slerp(a, b, 0) is a


def test_states_and_places_that_do_not_fit_are_refused() -> None:
    solver = BDIA(Euler(), 1.0)
    a = solver.invert(Gaussian(), torch.ones(1, 2), SIGMAS).state
    b = solver.invert(Gaussian(), torch.ones(1, 2), karras_sigmas(5, 0.02, 20.0)).state
    with pytest.raises(ValueError, match="one solver, grid, level and shape"):
        slerp(a, b, 0.5)
    with pytest.raises(ValueError, match=r"from 0 to 1, got 1\.5"):
        slerp(a, a, 1.5)
    with pytest.raises(ValueError, match="frames must be 2 or more"):
        interpolate(solver, Gaussian(), torch.ones(1, 2), torch.ones(1, 2), SIGMAS, frames=1)
    with pytest.raises(ValueError, match="of one shape"):
        interpolate(solver, Gaussian(), torch.ones(1, 2), torch.ones(1, 3), SIGMAS)


# watermarks


def test_the_signs_are_the_bits_of_shake_256() -> None:
    """FIPS 202: SHAKE-256 of "abc" begins with the bytes 48 33 66 60."""
    bits = "".join(f"{byte:08b}" for byte in bytes.fromhex("48336660"))
    expected = torch.tensor([2.0 * int(bit) - 1 for bit in bits], dtype=torch.float64)
    assert torch.equal(key_signs("abc", (4, 8)).flatten(), expected)
    assert torch.equal(key_signs(b"abc", (31,)), expected[:31])
    with pytest.raises(TypeError, match="not empty"):
        key_signs("", (3,))


def test_marked_noise_is_normal_and_carries_the_key() -> None:
    noise = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(1))
    marked = mark(noise, "mine")
    assert torch.equal(marked.abs(), noise.abs())
    assert stats.kstest(marked.flatten().numpy(), "norm").pvalue > 1e-3
    found = matches(marked, "mine")
    assert found.agreeing.item() == found.elements == 4 * 64 * 64
    assert found.log10_p_value.item() == pytest.approx(-found.elements * math.log10(2))
    assert matches(marked, "another").p_value.item() > 1e-3


def exact_log_tail(least: int, n: int) -> float:
    """``log P(K >= least)`` of n coins, by whole numbers."""
    term = total = 1  # n over n
    for k in range(n, least, -1):
        term = term * k // (n - k + 1)
        total += term
    return math.log(total) - n * math.log(2)


@pytest.mark.parametrize("n", [1, 10, 192, 16384])
def test_p_values_are_those_of_whole_numbers_and_of_scipy(n: int) -> None:
    signs = key_signs("k", (n,))
    for share in (0.0, 0.3, 0.5, 0.53, 0.7, 1.0):
        agreeing = round(share * n)
        code = torch.cat([signs[:agreeing], -signs[agreeing:]]).unsqueeze(0)
        found = matches(code, "k")
        assert found.agreeing.item() == agreeing
        log = found.log10_p_value.item() * math.log(10)
        assert log == pytest.approx(exact_log_tail(agreeing, n), rel=1e-7, abs=1e-9)
        assert found.p_value.item() == pytest.approx(stats.binom.sf(agreeing - 1, n, 0.5), rel=1e-7)


def test_a_false_alarm_is_as_rare_as_its_p_value_says() -> None:
    """Whatever the picture: here one value everywhere, which is like no noise."""
    code = torch.ones(1, 3, 16, 16)
    p = np.array([matches(code, f"key {k}").p_value.item() for k in range(2000)])
    for level in (0.01, 0.1, 0.5):
        assert (p <= level).mean() < level + 4 * math.sqrt(level / 2000)
    assert (p <= 0.1).mean() > 0.05


def test_a_watermark_is_found_in_the_picture_alone() -> None:
    solver = BDIA(Euler(), StepRatio(1))
    noise = 20 * torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    made = embed(solver, Two(), noise, SIGMAS, "mine", source=RIGHT)
    noisy = made.x + 0.01 * torch.randn(SHAPE[1:], generator=torch.Generator().manual_seed(3))
    found = detect(solver, Two(), noisy, SIGMAS, "mine", source=RIGHT)
    assert (found.p_value < 1e-6).all()
    assert found.code is not None
    assert found.code.x.shape == noise.shape
    assert (detect(solver, Two(), noisy, SIGMAS, "other", source=RIGHT).p_value > 1e-3).all()
    plain = solver.sample(Two(), noise, SIGMAS, extra_args=RIGHT).x
    assert (detect(solver, Two(), plain, SIGMAS, "mine", source=RIGHT).p_value > 1e-3).all()
