"""EDM and flow-matching schedulers against diffusers' own pipelines, and schedulers that are refused."""

import pytest
import torch

import odesolvers as ods
from odesolvers.models import StableDiffusion
from odesolvers.models.schedules import DISCRETE, EDM, FLOW

from .pipelines import BETAS, build, noise, relative, theirs

MULTISTEP_FLOW = (
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)


# EDM


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize(
    ("low", "high", "data", "last"), [(0.002, 80.0, 0.5, "zero"), (0.01, 120.0, 1.0, "sigma_min")]
)
def test_edm_equals_the_pipeline(pipeline, diffusers, kind, spacing, low, high, data, last):
    """Euler's method on the scheduler's levels, for settings as of Playground v2.5 and CosXL."""
    options = {"sigma_min": low, "sigma_max": high, "sigma_data": data, "prediction_type": kind}
    options |= {"sigma_schedule": spacing, "final_sigmas_type": last}
    scheduler = diffusers.EDMEulerScheduler(**options)
    found, _, t = theirs(pipeline, scheduler, 6)
    model = StableDiffusion(pipeline)
    assert (model.sigma_min, model.sigma_max, model.prediction_type) == (low, high, kind)
    sigmas = model.sigmas(6)
    torch.testing.assert_close(sigmas, torch.unique(scheduler.sigmas.double()).flip(0))
    assert model.timestep(sigmas[:1])[0].item() == pytest.approx(t.item(), rel=1e-6)
    x = noise() * scheduler.init_noise_sigma
    extra = model.encode_prompt("a cat")["positive"]
    ours = ods.Euler().sample(model, x, sigmas, extra_args=extra)
    assert relative(ours.x, found) < 1e-4
    multistep = diffusers.EDMDPMSolverMultistepScheduler(**options, solver_order=1)
    found = theirs(pipeline, multistep, 6)[0]  # at order 1 it is Euler's method, in other words
    again = ods.DDIM().sample(StableDiffusion(pipeline), x, sigmas, extra_args=extra)
    assert relative(again.x, found) < 1e-4
    pipeline.scheduler = diffusers.EDMEulerScheduler(**{**options, "sigma_data": 0.7})
    other = ods.Euler().sample(StableDiffusion(pipeline), x, sigmas, extra_args=extra)
    assert relative(other.x, found) > 1e-3, "sigma_data does nothing"


@pytest.mark.parametrize(
    ("karras", "last"), [(True, "zero"), (False, "zero"), (False, "sigma_min")]
)
def test_continuous_euler_is_edm(xl, diffusers, karras, last):
    """The same preconditioning under the name of Euler's scheduler: continuous v prediction."""
    scheduler = diffusers.EulerDiscreteScheduler(
        **BETAS,
        prediction_type="v_prediction",
        timestep_type="continuous",
        use_karras_sigmas=karras,
        sigma_min=0.002 if karras else None,
        sigma_max=120.0 if karras else None,
        final_sigmas_type=last,
    )
    found, _, t = theirs(xl, scheduler, 6)
    model = StableDiffusion(xl)
    sigmas = model.sigmas(6)
    assert model.timestep(sigmas[:1])[0].item() == pytest.approx(t.item(), rel=1e-6)
    extra = model.encode_prompt("a cat")["positive"]
    x = noise() * scheduler.init_noise_sigma
    ours = ods.Euler().sample(model, x, sigmas, extra_args=extra).x
    assert relative(ours, found) < 1e-4


def test_grids_that_turn_back_are_refused(xl, diffusers):
    """Under Karras spacing this scheduler ends at the first level of another schedule, a higher one."""
    options = {"timestep_type": "continuous", "prediction_type": "v_prediction", "sigma_min": 0.002}
    options |= {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}
    xl.scheduler = diffusers.EulerDiscreteScheduler(**BETAS, **options)
    with pytest.raises(ValueError, match="sigmas must decrease strictly"):
        StableDiffusion(xl).sigmas(6)


# Flow matching


@pytest.mark.parametrize("name", MULTISTEP_FLOW)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_every_flow_scheduler_has_this_denoiser(pipeline, diffusers, name, shift):
    """What the scheduler makes of an output of the network, at each of its levels."""
    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    scheduler = build(diffusers, name, **options)
    pipeline.scheduler = scheduler
    model = StableDiffusion(pipeline)
    assert model.prediction_type == "flow_prediction"
    extra = model.encode_prompt("a cat")["positive"]
    embeddings = {
        "encoder_hidden_states": extra["encoder_hidden_states"].expand(2, -1, -1),
        "added_cond_kwargs": {
            k: v.expand(2, -1) for k, v in extra.get("added_cond_kwargs", {}).items()
        },
    }
    z, sigmas = noise(), model.sigmas(4, final="zero")
    scheduler.set_timesteps(4)
    for k in range(4):
        time = scheduler.sigmas[k]
        scheduler._step_index = k
        output = pipeline.unet(z, 1000 * time, **embeddings).sample
        found = scheduler.convert_model_output(output, sample=z)
        if name == "DEISMultistepScheduler":  # it converts to noise
            found = (z - time * found) / (1 - time)
        level = sigmas[k].float().expand(2)
        assert model.timestep(level)[0].item() == pytest.approx(1000 * time.item(), rel=1e-6)
        ours = model(z * (1 + level[0]), level, **extra)
        assert relative(ours, found) < 1e-4


def test_multistep_flow_equals_the_pipeline(pipeline, diffusers):
    """DPM-Solver++ of order 1 is Euler's method; its whole thousandths are these times themselves."""
    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": 1}
    found, _, t = theirs(pipeline, diffusers.DPMSolverMultistepScheduler(**options), 1)
    model = StableDiffusion(pipeline)
    sigmas = model.sigmas(1)
    assert model.timestep(sigmas[:1])[0].item() == pytest.approx(t.item(), rel=1e-6)
    x, extra = noise() * (1 + sigmas[0].item()), model.encode_prompt("a cat")["positive"]
    ours = ods.FlowEuler().sample(model, x, sigmas, extra_args=extra).x
    assert relative(ours, found) < 1e-4


def flow_scheduler(diffusers, name, **options):
    """One of flow matching, with what pipelines of Stable Diffusion expect besides."""
    parent = getattr(diffusers, name)
    extended = type(
        name, (parent,), {"init_noise_sigma": 1.0, "scale_model_input": lambda _, x, t: x}
    )
    return extended(**options)


@pytest.mark.parametrize("options", [{}, {"shift": 3.0}, {"shift": 2.0, "use_karras_sigmas": True}])
def test_flow_euler_equals_the_pipeline(pipeline, diffusers, options):
    name = "FlowMatchEulerDiscreteScheduler"
    found, _, t = theirs(pipeline, flow_scheduler(diffusers, name, **options), 6)
    model = StableDiffusion(pipeline)
    sigmas = model.sigmas(6)
    assert model.timestep(sigmas[:1])[0].item() == pytest.approx(t.item(), rel=1e-6)
    x = noise() * (1 + sigmas[0].item())
    extra = model.encode_prompt("a cat")["positive"]
    ours = ods.FlowEuler().sample(model, x, sigmas, extra_args=extra).x
    assert relative(ours, found) < 1e-4
    solver = ods.BDIA(ods.FlowEuler(), ods.StepRatio(1))
    solution = solver.sample(model, x.double(), sigmas, extra_args=extra)
    back = solver.invert(model, solution.state, sigmas, extra_args=extra)
    assert relative(back.x, x.double()) < 1e-8


def test_flow_heun_has_the_same_network(xl, diffusers):
    levels = []
    for name in FLOW:
        xl.scheduler = getattr(diffusers, name)(shift=2.0)
        model = StableDiffusion(xl)
        levels.append(model.sigmas(5))
        last = model.sigmas(5, final="first")
        assert last[-1] > 0
        assert len(last) == 5
    torch.testing.assert_close(levels[0][0], levels[1][0])
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(5)
    times = torch.unique(scheduler.sigmas.double()).flip(0)
    torch.testing.assert_close(levels[1][1:], (times / (1 - times))[1:])


# Refused


def every_scheduler(diffusers):
    for name in dir(diffusers):
        if name.endswith("Scheduler"):
            yield name


def test_every_other_scheduler_is_refused_by_name(xl, diffusers):
    refused = 0
    for name in every_scheduler(diffusers):
        if name in (*DISCRETE, *EDM, *FLOW):
            continue
        try:
            scheduler = build(diffusers, name)
            _ = scheduler.config
        except Exception:  # abstract ones, and those that need a library or an argument
            continue
        xl.scheduler = scheduler
        with pytest.raises(
            ValueError, match=f"scheduler of the pipeline is a {name}, which is not"
        ):
            StableDiffusion(xl)
        refused += 1
    assert refused >= 10


def test_contradictory_settings_are_refused(xl, diffusers):
    def attempt(scheduler, kind=None):
        xl.scheduler = scheduler
        return StableDiffusion(xl, prediction_type=kind)

    for name in EDM:
        with pytest.raises(
            ValueError, match=f"'epsilon' or 'v_prediction' under {name}, got 'sample'"
        ):
            attempt(build(diffusers, name), "sample")
    for name in MULTISTEP_FLOW:
        with pytest.raises(ValueError, match=r"got 'flow_prediction' without use_flow_sigmas=True"):
            attempt(build(diffusers, name, prediction_type="flow_prediction"))
        for kind in ("epsilon", "v_prediction", "sample"):
            scheduler = build(diffusers, name, prediction_type=kind, use_flow_sigmas=True)
            with pytest.raises(ValueError, match=f"must be 'flow_prediction', got '{kind}'"):
                attempt(scheduler)
    for name in FLOW:
        with pytest.raises(ValueError, match="must be 'flow_prediction', got 'epsilon'"):
            attempt(build(diffusers, name), "epsilon")
    with pytest.raises(ValueError, match="invert_sigmas=True"):
        attempt(diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
    model = attempt(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    with pytest.raises(ValueError, match=r"use_dynamic_shifting.*flow_sigmas\(scheduler.sigmas\)"):
        model.sigmas(5)
    with pytest.raises(ValueError, match="have no spacing of timesteps, got spacing='leading'"):
        attempt(diffusers.EDMEulerScheduler()).sigmas(5, spacing="leading")
    with pytest.raises(ValueError, match="needs n >= 1"):
        attempt(diffusers.EDMEulerScheduler()).sigmas(0)


def test_levels_out_of_range(xl, diffusers):
    for scheduler, bad in (
        (diffusers.EDMEulerScheduler(), (0.0, 1e-3, 81.0, float("nan"))),
        (diffusers.FlowMatchEulerDiscreteScheduler(), (-1.0, 2.0**21)),
    ):
        xl.scheduler = scheduler
        model = StableDiffusion(xl)
        extra = model.encode_prompt("a cat")["positive"]
        for sigma in bad:
            with pytest.raises(ValueError, match="sigma must lie"):
                model(noise(1), torch.tensor([sigma]), **extra)


def test_the_scheduler_of_the_pipeline_is_not_changed(xl, diffusers):
    xl.scheduler = diffusers.EDMEulerScheduler()
    before = xl.scheduler.sigmas.clone()
    StableDiffusion(xl).sigmas(5)
    assert torch.equal(xl.scheduler.sigmas, before)
