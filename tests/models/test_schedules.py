"""Schedulers of every kind against diffusers' own pipelines, and those that are refused."""

import warnings

import pytest
import torch

import odesolvers as ods
from odesolvers.models import StableDiffusion, load_stable_diffusion
from odesolvers.models.schedules import DISCRETE, EDM, FLOW

FORWARD = [name for name in DISCRETE if "Inverse" not in name]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
MULTISTEP_FLOW = (
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)


def noise(n=2):
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(7))


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module", params=["1.x", "xl"])
def pipeline(request, folders):
    found = load_stable_diffusion(folders[request.param]).pipeline
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def xl(folders):
    found = load_stable_diffusion(folders["xl"]).pipeline
    found.set_progress_bar_config(disable=True)
    return found


def build(diffusers, name, **options):
    """A scheduler, with those of the options that its class has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of diffusers
        kind = getattr(diffusers, name)
        known = kind.__init__.__wrapped__.__code__.co_varnames
        return kind(**{k: v for k, v in options.items() if k in known})


def theirs(pipeline, scheduler, n):
    """The pipeline's own latents, from standard normal ones, and the first input of its network."""
    pipeline.scheduler = scheduler
    seen = []
    handle = pipeline.unet.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    try:
        found = pipeline(
            ["a cat"] * 2,
            num_inference_steps=n,
            guidance_scale=1.0,
            latents=noise(),
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images
    finally:
        handle.remove()
    return found, *seen[0]


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
        {"beta_schedule": "sigmoid"},
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
