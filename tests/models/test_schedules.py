"""Schedulers of discrete timesteps against diffusers' own pipelines."""

import pytest
import torch

import odesolvers as ods
from odesolvers.models import StableDiffusion
from odesolvers.models.schedules import DISCRETE

from .pipelines import BETAS, build, noise, relative, theirs

pytestmark = pytest.mark.filterwarnings("ignore:.*begin at timestep:UserWarning")  # of few steps
# The last takes arguments in its step that no pipeline of images has.
OTHERS = ("DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler", "CogVideoXDPMScheduler")
FORWARD = [name for name in DISCRETE if name not in OTHERS]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", FORWARD)
def test_one_step_of_every_discrete_scheduler_is_the_denoiser(pipeline, diffusers, name, kind):
    """A single step to the level 0 returns the denoised image, whatever the scheduler."""
    if (name, kind) == ("PNDMScheduler", "sample"):
        pytest.skip("PNDM has no prediction of samples")
    options = {
        **BETAS,
        "prediction_type": kind,
        "timestep_spacing": "trailing",
        "clip_sample": False,
    }
    if name == "PNDMScheduler":
        options |= {"skip_prk_steps": True, "set_alpha_to_one": True}
    try:
        found, z, t = theirs(pipeline, build(diffusers, name, **options), 1)
    except NotImplementedError:
        pytest.skip(f"{name} has no {kind}")
    model = StableDiffusion(pipeline)
    sigma = model.schedule.log_sigmas[t.long().reshape(-1)[0]].exp().float().expand(2)
    assert model.timestep(sigma).tolist() == [t.item()] * 2
    x = z * (1 + sigma**2).sqrt().reshape(-1, 1, 1, 1)
    extra = model.encode_prompt("a cat")["positive"]
    if name in (
        "DEISMultistepScheduler",
        "SASolverScheduler",
        "TCDScheduler",
    ):  # to level 1 of 1000
        low = model.sigma_min
        ours = ods.DDIM().sample(model, x, [sigma[0].item(), low], extra_args=extra).x
        ours = ours / (1 + low**2) ** 0.5
    else:
        ours = model(x, sigma, **extra)
    assert relative(ours, found) < 1e-4
    other = {"epsilon": "sample", "v_prediction": "epsilon", "sample": "v_prediction"}[kind]
    wrong = StableDiffusion(pipeline, prediction_type=other)
    assert relative(wrong(x, sigma, **extra), found) > 0.01


@pytest.mark.parametrize(
    "options",
    [
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "sigmoid", "beta_start": 1e-4, "beta_end": 0.02},
        {"beta_schedule": "laplace"},
        {"beta_schedule": "exp"},
        {"trained_betas": torch.linspace(1e-3, 0.02, 300).tolist(), "num_train_timesteps": 300},
        {**BETAS, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ],
)
@pytest.mark.parametrize("name", DISCRETE)
def test_levels_are_those_of_the_scheduler_itself(xl, diffusers, name, options):
    """Also of noise schedules that `DDIMScheduler` does not know."""
    try:
        scheduler = build(diffusers, name, **options)
    except (NotImplementedError, TypeError):
        pytest.skip(f"{name} has no {options}")
    xl.scheduler = scheduler
    model = StableDiffusion(xl)
    levels = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt().double()
    found = model.schedule.log_sigmas.exp()
    assert len(found) == scheduler.config.num_train_timesteps
    torch.testing.assert_close(found[:-1], levels[:-1], rtol=1e-6, atol=0)
    if getattr(scheduler.config, "rescale_betas_zero_snr", False):
        assert levels[-1] >= 4000  # infinite, or what stands for it
        assert model.sigma_max == pytest.approx(2.0**20, rel=1e-6)
    else:
        assert model.sigma_max == pytest.approx(levels[-1].item(), rel=1e-6)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("n", [1, 7, 10, 28, 999])
def test_which_levels_ddim_visits(xl, diffusers, spacing, n):
    """Steps start where those of `DDIMScheduler` do; it ends them `1000 // n` timesteps lower.

    That is the start of the next one under "leading", and elsewhere only if n divides 1000: its steps
    from one level to the next then are between levels of different steps. Ours are not.
    """
    scheduler = diffusers.DDIMScheduler(**BETAS, timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(n)
    xl.scheduler = scheduler
    model = StableDiffusion(xl)
    sigmas = model.sigmas(n)
    assert len(sigmas) == n + 1
    assert model.timestep(sigmas[:-1]).tolist() == scheduler.timesteps.tolist()
    ends = []
    for t in scheduler.timesteps.tolist():  # x0 = 0 and noise 1: the next state is sqrt(1 - ᾱ)
        noisy = (1 - scheduler.alphas_cumprod[t]).sqrt().reshape(1)
        square = scheduler.step(torch.ones(1), t, noisy).prev_sample.double().item() ** 2
        ends.append((square / (1 - square)) ** 0.5)
    agree = torch.isclose(torch.tensor(ends).double(), sigmas[1:], rtol=1e-3, atol=1e-3)
    if spacing == "leading" or (1000 % n == 0 and spacing == "trailing"):
        assert bool(agree.all())
    elif n > 1:
        assert not bool(agree.all())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDIMScheduler", {"set_alpha_to_one": False}),
        ("PNDMScheduler", {"set_alpha_to_one": False}),
        ("PNDMScheduler", {}),  # the default of this class alone
        ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}),
        ("UniPCMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
    ],
)
@pytest.mark.parametrize(
    ("spacing", "n", "steps"),
    [("linspace", 10, 9), ("leading", 10, 9), ("trailing", 10, 10), ("trailing", 1000, 999)],
)
def test_no_step_from_timestep_0_to_itself(xl, diffusers, name, options, spacing, n, steps):
    options = {**BETAS, **options, "timestep_spacing": spacing, "steps_offset": 0}
    xl.scheduler = build(diffusers, name, **options)
    model = StableDiffusion(xl)
    sigmas = model.sigmas(n)
    assert len(sigmas) == steps + 1
    assert sigmas[-1].item() == pytest.approx(model.sigma_min)
    options = {"timestep_spacing": spacing, "set_alpha_to_one": False, "clip_sample": False}
    ddim = diffusers.DDIMScheduler(**BETAS, **options)
    ddim.set_timesteps(n)
    visited = [*ddim.timesteps.tolist(), 0]
    if visited[-2] == 0:  # there its own step changes nothing
        z, output = noise(), noise() + 1
        torch.testing.assert_close(ddim.step(output, 0, z).prev_sample, z)
        visited.pop()
    assert model.timestep(sigmas).tolist() == visited
    assert len(model.sigmas(n, final="zero")) == n + 1
    if spacing != "trailing":
        with pytest.raises(ValueError, match="leads nowhere: ask for more steps"):
            model.sigmas(1)


@pytest.mark.parametrize("name", FORWARD)
def test_epsilon_prediction_of_pure_noise_is_refused(xl, diffusers, name):
    snr = build(diffusers, name, **BETAS, rescale_betas_zero_snr=True)
    ends = build(diffusers, name, trained_betas=[0.1] * 9 + [1.0], num_train_timesteps=10)
    for scheduler in (snr, ends):
        if scheduler is snr and "rescale_betas_zero_snr" not in scheduler.config:
            continue
        xl.scheduler = scheduler
        with pytest.raises(ValueError, match=r"zero terminal SNR .* and epsilon prediction"):
            StableDiffusion(xl)
        for kind in ("v_prediction", "sample"):
            model = StableDiffusion(xl, prediction_type=kind)
            assert model.sigma_max == pytest.approx(2.0**20)
    xl.scheduler = build(
        diffusers,
        name,
        trained_betas=[0.1, 1.0],
        num_train_timesteps=2,
        prediction_type="v_prediction",
    )
    with pytest.raises(ValueError, match="zero terminal SNR"):
        StableDiffusion(xl, prediction_type="epsilon")


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_distilled_networks_are_sampled_at_the_timesteps_of_their_scheduler(xl, diffusers, name, n):
    scheduler = getattr(diffusers, name)(**BETAS)
    scheduler.set_timesteps(n)
    xl.scheduler = scheduler
    model = StableDiffusion(xl)
    levels = model.sigmas(n)
    alphas = scheduler.alphas_cumprod[scheduler.timesteps].double()
    assert relative(levels[:n], torch.sqrt((1 - alphas) / alphas)) < 1e-6
    evenly = model.sigmas(n, spacing="leading")
    assert n == 1 or not torch.equal(evenly, levels)


@pytest.mark.parametrize(("n", "first"), [(1, 0), (2, 500), (3, 666), (501, 500)])
def test_a_grid_that_begins_far_from_noise_is_warned_of(xl, diffusers, n, first):
    xl.scheduler = diffusers.DDIMScheduler(**BETAS)
    model = StableDiffusion(xl)
    with pytest.warns(UserWarning, match=f"begin at timestep {first} of 1000.*trailing"):
        model.sigmas(n)


def test_published_levels_that_are_rounded_are_in_range(xl, diffusers):
    """Align Your Steps (Sabour et al. 2024), whose first level is 14.615 and last 0.029."""
    xl.scheduler = diffusers.DDIMScheduler(**BETAS)
    model = StableDiffusion(xl)
    ends = torch.tensor([14.615, 0.029], dtype=torch.float64)
    assert model.timestep(ends).tolist() == pytest.approx([999, 0], abs=1e-6)
    with pytest.raises(ValueError, match=r"got 15; .*karras_sigmas\(n, 0.029"):
        model.timestep(torch.tensor([15.0]))
