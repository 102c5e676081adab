"""Mistakes that are easily made with the scheduler, and what it says of them."""

import warnings

import pytest
import torch

from odesolvers import BDIA, DDIM, InversionWarning, StabilityWarning
from odesolvers.models.schedules import DISCRETE
from odesolvers.schedulers import InvertibleScheduler

from .test_schedulers_settings import SD, SOLVERS, Z, drive, relative

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:the code of a lone image")

LEADING = {**SD, "timestep_spacing": "leading", "steps_offset": 1}


@pytest.fixture
def euler(diffusers):
    return diffusers.EulerDiscreteScheduler(**LEADING).config


@pytest.mark.parametrize("text", ["BDIA(DDIM())", "EDICT()"])
@pytest.mark.parametrize("inverted", [False, True])
def test_the_inverse_of_an_inverse_runs_all_steps(text, inverted):
    scheduler = InvertibleScheduler(text, **SD, inverted=inverted)
    first = drive(scheduler, Z, 6)
    twice = scheduler.inverse().inverse()
    assert twice.start is None
    assert torch.equal(drive(twice, Z, 6), first)
    once = scheduler.inverse()
    back = drive(once, first, 6)  # and after a run there is a pair to go on from
    assert relative(back, Z) < 1e-6
    assert relative(drive(once.inverse(), back, 6), first) < 1e-6


@pytest.mark.parametrize("text", SOLVERS)
def test_a_run_of_one_step_comes_back(text):
    scheduler = InvertibleScheduler(text, **SD, timestep_spacing="trailing")
    picture = drive(scheduler, Z.double(), 1)
    up = scheduler.inverse()
    again = drive(up, picture, 1)
    assert relative(again, Z.double()) < 1e-9
    assert relative(drive(up.inverse(), again, 1), picture) < 1e-9


@pytest.mark.parametrize(
    ("levels", "kind", "words"),
    [
        ({"n": 1500}, ValueError, "different levels for num_inference_steps = 1500"),
        ({"n": 0}, ValueError, "at least 1, got 0"),
        ({"n": 10.5}, TypeError, "num_inference_steps must be an integer, got 10.5"),
        ({}, TypeError, "num_inference_steps must be an integer, got None"),
        ({"timesteps": [2000, 500]}, ValueError, "between 0 and 999"),
        ({"timesteps": [999, 500, 500]}, ValueError, "timesteps must decrease"),
        ({"sigmas": [9.0, 2.0, 2.0, 0.0]}, ValueError, "sigmas must decrease"),
    ],
)
def test_levels_that_diffusers_would_merge_or_clamp_are_refused(euler, levels, kind, words):
    scheduler = InvertibleScheduler.from_config(euler)
    with pytest.raises(kind, match=words):
        drive(scheduler, Z, **levels)


@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete", "DPMSolverMultistep"])
def test_runs_that_begin_far_from_noise_are_warned_of(diffusers, name):
    config = getattr(diffusers, f"{name}Scheduler")(**LEADING).config
    scheduler = InvertibleScheduler.from_config(config)
    for n in (2, 600):
        with pytest.warns(UserWarning, match="timestep_spacing='trailing'"):
            scheduler.set_timesteps(n)
    scheduler.set_timesteps(10)  # and no warning


@pytest.mark.parametrize("factor", [0.1, 80.0])
def test_latents_that_are_no_noise_are_warned_of(factor):
    scheduler = InvertibleScheduler(**SD)
    with pytest.warns(StabilityWarning, match="root mean square"):
        drive(scheduler, factor * Z, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = drive(scheduler, Z, 6)
        drive(scheduler.inverse(), picture, 6)


@pytest.mark.parametrize(
    ("act", "kind", "words"),
    [
        (lambda c: InvertibleScheduler.from_config(c, BDIA(DDIM())), TypeError, "solver="),
        (
            lambda c: InvertibleScheduler.from_config(c, solvr="DDIM()"),
            TypeError,
            "solvr: no setting",
        ),
        (lambda c: InvertibleScheduler.from_config(c, solver=DDIM), TypeError, r"write DDIM\(\)"),
        (
            lambda c: InvertibleScheduler.from_config(InvertibleScheduler(**SD)),
            TypeError,
            "pass scheduler.config",
        ),
        (lambda c: InvertibleScheduler.from_config({}), ValueError, "pass base="),
    ],
)
def test_configs_and_arguments_that_are_mixed_up(euler, act, kind, words):
    with pytest.raises(kind, match=words):
        act(euler)


def test_a_start_is_a_state_of_as_many_steps():
    scheduler = InvertibleScheduler(**SD)
    drive(scheduler, Z, 5)
    up = scheduler.inverse()
    with pytest.raises(ValueError, match="use the same num_inference_steps"):
        up.set_timesteps(6)
    up.start = Z
    with pytest.raises(TypeError, match="start must be a State or None"):
        up.set_timesteps(5)


def test_calls_before_set_timesteps_say_so(diffusers):
    for name in ("DDIM", "EDMEuler"):
        config = getattr(diffusers, f"{name}Scheduler")().config
        scheduler = InvertibleScheduler.from_config(config)
        with pytest.raises(ValueError, match="set_timesteps first"):
            scheduler.add_noise(Z, Z, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="set_timesteps first"):
        scheduler.scale_model_input(Z, 1)


def test_a_generator_is_accepted_and_not_used():
    scheduler = InvertibleScheduler(**SD)
    scheduler.set_timesteps(5)
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    scheduler.step(Z, scheduler.timesteps[0], Z, generator=generator)
    assert torch.equal(generator.get_state(), before)


def test_solvers_with_uneven_steps_do_not_begin_in_the_middle():
    scheduler = InvertibleScheduler("BDIA(RK4())", **SD)
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(2 * scheduler.order)
    with pytest.raises(ValueError, match="equally many evaluations in every step"):
        scheduler.step(Z, scheduler.timesteps[2 * scheduler.order], Z)


@pytest.mark.parametrize("name", sorted({*DISCRETE} - {"DDIMInverseScheduler"}))
def test_settings_that_a_config_left_to_its_class_are_those_of_that_class(diffusers, name):
    scheduler = getattr(diffusers, name)()  # whose config does not name it
    read = InvertibleScheduler.from_config(scheduler.config)
    assert torch.equal(read.alphas_cumprod, scheduler.alphas_cumprod)


def test_a_last_level_that_is_repeated_to_rounding_is_one_level(diffusers):
    base = diffusers.EDMDPMSolverMultistepScheduler(final_sigmas_type="sigma_min")
    base.set_timesteps(6)
    assert base.sigmas[-1] != base.sigmas[-2]
    scheduler = InvertibleScheduler.from_config(base.config)
    drive(scheduler, Z, 6)
    assert torch.equal(scheduler.sigmas, base.sigmas[:-1].double())


def test_an_inverse_scheduler_is_read_as_the_scheduler_that_it_inverts(diffusers):
    settings = {**SD, "steps_offset": 1, "prediction_type": "v_prediction"}
    pictures = [
        drive(InvertibleScheduler.from_config(kind(**settings).config), Z, 6)
        for kind in (
            diffusers.DPMSolverMultistepScheduler,
            diffusers.DPMSolverMultistepInverseScheduler,
        )
    ]
    assert torch.equal(*pictures)


def test_a_learned_variance_is_left_out(diffusers):
    base = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False)
    scheduler = InvertibleScheduler.from_config(base.config)
    output = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(2))
    scheduler.set_timesteps(5)
    t = scheduler.timesteps[0]
    mine = scheduler.step(output, t, Z).pred_original_sample
    assert relative(mine, base.step(output, t, Z).pred_original_sample) < 1e-5


def test_noise_in_a_picture_that_is_inverted_is_warned_of():
    scheduler = InvertibleScheduler(**SD, inverted=True)
    scheduler.set_timesteps(5)
    with pytest.warns(InversionWarning, match="noise is added to a picture under an inverted"):
        scheduler.add_noise(Z, Z, scheduler.timesteps[:1])
