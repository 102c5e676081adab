"""The contestants of the edit benchmark that are no solvers of the package."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch

from benchmarks.emoji.released import (
    EditFriendly,
    LegacyRK4,
    ReleasedBDIA,
    adaptive,
    edit_friendly,
    mali,
)
from odesolvers import (
    BDIA,
    BELM,
    DDIM,
    RK4,
    Dopri5,
    McCallumFoster,
    Rex,
    ddim_timesteps,
    karras_sigmas,
    sigmas_from_alphas_cumprod,
)

from .problems import Recorder, mixture, noise, reference, relative_error

SIGMAS = karras_sigmas(10, 0.1, 10.0, append_zero=False)
IMAGE = noise(4, 3, seed=1)


def shifted(x: torch.Tensor, sigma: torch.Tensor, shift: float = 0.0) -> torch.Tensor:
    """A denoiser under conditions, of which the first is that nothing is asked for."""
    denoised: torch.Tensor = mixture()(x, sigma)
    return denoised + shift


@pytest.mark.filterwarnings("ignore::odesolvers.InversionWarning")  # so few steps do not encode
@pytest.mark.parametrize("solver", [BDIA(DDIM(), 0.96), BELM()], ids=repr)
def test_the_released_inversion_begins_without_the_network(solver: BDIA) -> None:
    """In the variance-preserving z of the released line: a noise of 1 in every element."""
    for sigmas in (SIGMAS, torch.tensor([2.0, 1.0, 0.0])):
        code = ReleasedBDIA(solver).invert(mixture(), IMAGE, sigmas)
        image, first = (float(sigmas[k]) for k in (-1, -2))
        a, b = (1 + image**2) ** -0.5, (1 + first**2) ** -0.5  # α of x_0 and x_1
        z = b / a * (a * IMAGE) + (b * first - b / a * (a * image)) * 1.0
        again = solver.sample(mixture(), code, sigmas, stop=len(sigmas) - 1)
        assert again.state.partner is not None
        assert relative_error(again.state.partner, z / b) < 1e-10
        assert relative_error(again.x, IMAGE) < 1e-10
        right = solver.invert(mixture(), IMAGE, sigmas)
        assert code.nfe == len(sigmas) - 1
        assert relative_error(code.x, right.x) > 0.1


def test_legacy_rk4_is_of_order_1_and_rk4_of_order_4() -> None:
    x, exact = noise(8, 3, sigma=5.0), reference(mixture(), noise(8, 3, sigma=5.0), 5.0, 0.3)
    for base, order in ((LegacyRK4(), 1), (RK4(), 4)):
        errors, steps = [], (40, 60, 90)
        for n in steps:
            grid = karras_sigmas(n + 1, 0.3, 5.0, rho=5.0, append_zero=False)
            errors.append(relative_error(Rex(base).sample(mixture(), x, grid).x, exact))
        assert -np.polyfit(np.log(steps), np.log(errors), 1)[0] == pytest.approx(order, abs=0.2)


def test_legacy_rk4_is_the_released_sequence_of_stages() -> None:
    """`exp_rk4`, in x / σ over ς = 1/σ: f3 at the second point, f4 at the third."""
    s, end = 1 / 3.0, 1 / 2.0
    h, x = end - s, noise(4, 3, sigma=3.0)

    def data(point: torch.Tensor, at: float) -> torch.Tensor:
        denoised: torch.Tensor = mixture()(
            point / at, torch.full((4,), 1 / at, dtype=torch.float64)
        )
        return denoised

    y = x * s
    f1 = data(y, s)
    k2 = y + h * 0.5 * f1
    f2 = data(k2, s + 0.5 * h)
    k3 = y + h * 0.5 * f2
    f3 = data(k2, s + 0.5 * h)
    f4 = data(k3, s + h)
    expected = (y + h * (f1 / 6 + f2 / 3 + f3 / 3 + f4 / 6)) / end
    solver = Rex(LegacyRK4(), 1.0)  # a first step from two equal states is the method's own
    found = solver.sample(mixture(), x, [3.0, 2.0]).x
    assert relative_error(found, expected) < 1e-13


def test_solvers_on_grids_of_their_own_lead_down_to_the_image() -> None:
    for solver, evaluations in (
        (mali(), 10),
        (mali(0.9), 10),
        (adaptive(Rex(Dopri5()), 1e-4), None),
        (adaptive(McCallumFoster(Dopri5()), 1e-4), None),
    ):
        code = solver.invert(mixture(), IMAGE, SIGMAS)
        assert code.nfe == (evaluations or 12 * (len(code.state.sigmas) - 1))
        assert relative_error(solver.sample(mixture(), code, SIGMAS).x, IMAGE) < 1e-9
        exact = reference(mixture(), IMAGE, 0.1, 10.0)
        assert relative_error(code.x, exact) < (0.1 if evaluations else 5e-3)


# --- edit-friendly noise maps ----------------------------------------------------------------------


@pytest.mark.parametrize("skip", [0.0, 0.36, 1.0])
def test_under_the_conditions_of_the_source_the_image_is_reached_again(skip: float) -> None:
    source, target = {"shift": 0.0}, {"shift": 0.3}
    same = edit_friendly(shifted, IMAGE, SIGMAS, source, source, skip)
    other = edit_friendly(shifted, IMAGE, SIGMAS, source, target, skip)
    assert relative_error(same, IMAGE) < 1e-12
    assert relative_error(other, IMAGE) > 0.01


def test_one_evaluation_for_each_step_that_is_not_skipped() -> None:
    recorder = Recorder(mixture())
    method = EditFriendly(skip=1 / 3)
    code = method.invert(recorder, IMAGE, SIGMAS)
    edited = method.sample(recorder, code, SIGMAS)
    assert recorder.sigmas == SIGMAS[3:9].tolist() * 2
    assert (code.nfe, edited.nfe) == (6, 6)


def test_states_are_the_image_with_noise_of_their_own() -> None:
    """Of the level's size, and independent, which the noise of a forward process is not."""
    image = torch.zeros(20_000, 1, dtype=torch.float64)
    grid = [10.0, 5.0, 2.0]
    starts = [EditFriendly(skip).invert(mixture_1d, image, grid).start for skip in (0.0, 0.5)]  # type: ignore[arg-type]
    for start, sigma in zip(starts, grid, strict=False):
        assert float(start.std()) == pytest.approx((sigma**2 - 4.0) ** 0.5, rel=0.03)
    both = torch.corrcoef(torch.cat(starts, 1).T)[0, 1]
    assert abs(float(both)) < 0.03


def mixture_1d(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return x / (1 + sigma[:, None] ** 2)


def test_a_step_is_that_of_diffusers_ddim_with_eta_1(diffusers: ModuleType) -> None:
    """Their scheduler, which is DDPM at η = 1, goes down by our noise maps to our sample."""
    scheduler = diffusers.DDIMScheduler(
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading"
    )
    scheduler.alphas_cumprod = alphas = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = alphas[0]
    scheduler.set_timesteps(20)
    timesteps = ddim_timesteps(20, spacing="leading", offset=1)
    sigmas = sigmas_from_alphas_cumprod(alphas, timesteps, final="first")
    method = EditFriendly(0.0)
    code = method.invert(shifted, IMAGE, sigmas, extra_args={"shift": 0.0})
    z = code.start * alphas[timesteps[0]].sqrt()
    for t, noise_map in zip(scheduler.timesteps, code.maps, strict=True):
        a, s = alphas[t].sqrt(), (1 - alphas[t]).sqrt()
        epsilon = (z - a * shifted(z / a, (s / a).expand(4), 0.3)) / s
        z = scheduler.step(epsilon, t, z, eta=1.0, variance_noise=noise_map).prev_sample
    ours = method.sample(shifted, code, sigmas, extra_args={"shift": 0.3}).x
    assert relative_error(ours, z / alphas[0].sqrt()) < 1e-6
