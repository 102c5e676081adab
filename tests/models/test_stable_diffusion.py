"""Stable Diffusion on whole, tiny pipelines with random weights, against diffusers' own sampling."""

import json
import shutil

import pytest
import torch

import odesolvers as ods
from odesolvers.models import (
    ClassifierFreeGuidance,
    load_stable_diffusion,
)

from .conftest import FAMILIES


def noise(n=2, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(n, 4, 8, 8, generator=generator, dtype=torch.float64).to(device, dtype)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(("scale", "negatives"), [(1.0, None), (4.0, ["blurry", ""]), (4.0, None)])
@pytest.mark.parametrize("family", FAMILIES)
def test_ddim_equals_the_pipeline_of_diffusers(
    folders, diffusers, family, scale, negatives, device
):
    prompts = ["a cat", "two dogs, sitting"]
    model = load_stable_diffusion(folders[family], device=device)
    sigmas = model.sigmas(7)
    z = noise(device=device)

    kind = (
        diffusers.StableDiffusionXLPipeline if family == "xl" else diffusers.StableDiffusionPipeline
    )
    pipeline = kind.from_pretrained(folders[family]).to(device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(
        pipeline.scheduler.config, clip_sample=False
    )
    theirs = pipeline(
        prompts,
        negative_prompt=negatives,
        num_inference_steps=7,
        guidance_scale=scale,
        latents=z.clone(),
        output_type="latent",
    ).images

    conditions = model.encode_prompt(prompts, negatives)
    denoiser = model if scale == 1 else ClassifierFreeGuidance(model, scale)
    extra = conditions["positive"] if scale == 1 else conditions
    root = torch.sqrt(1 + sigmas**2).tolist()
    ours = ods.DDIM().sample(denoiser, z * root[0], sigmas, extra_args=extra).x / root[-1]
    assert relative(theirs, z) > 0.1
    assert relative(ours, theirs) < 1e-4
    unconditional = ods.DDIM().sample(model, z * root[0], sigmas, extra_args=conditions["negative"])
    assert relative(unconditional.x / root[-1], theirs) > 1e-3, "the prompt does nothing"


def test_prediction_type_matters(folders):
    """The v network read as an epsilon network gives something else: the parity test can fail."""
    x, sigma = noise(), torch.tensor([1.0, 3.0])
    found = []
    for kind in (None, "epsilon", "sample"):
        model = load_stable_diffusion(folders["2.x-v"], prediction_type=kind)
        extra = model.encode_prompt("a cat")["positive"]
        found.append(model(x, sigma, **extra))
    assert relative(found[0], found[1]) > 0.1
    assert relative(found[0], found[2]) > 0.1


def test_levels_are_those_of_the_scheduler(folders, diffusers):
    for family in FAMILIES:
        model = load_stable_diffusion(folders[family])
        scheduler = diffusers.DDIMScheduler.from_config(model.pipeline.scheduler.config)
        scheduler.set_timesteps(20)
        sigmas = model.sigmas(20)
        times = model.timestep(sigmas[:-1])
        assert times.tolist() == scheduler.timesteps.tolist()
        assert (sigmas[-1].item() == 0.0) == (family == "xl")
    assert model.sigmas(10, spacing="trailing")[0].item() == pytest.approx(model.sigma_max)
    assert model.sigmas(10, final="first")[-1].item() == pytest.approx(model.sigma_min)


def test_timesteps_whole_on_the_levels_and_between_them_as_k_diffusion_has_them(folders, device):
    model = load_stable_diffusion(folders["1.x"], device=device)
    table = model.schedule.log_sigmas.to(device)
    levels = table.exp()
    whole = torch.arange(1000, dtype=torch.float32, device=device)
    for dtype in (torch.float64, torch.float32):
        assert torch.equal(model.timestep(levels.to(dtype)), whole)
    sigma = ods.karras_sigmas(50, 0.03, 14.6)[:-1].to(device)
    distance = (sigma.log() - table[:, None]).abs()
    found = model.timestep(sigma).double()
    assert ((found - distance.argmin(0)).abs() <= 1).all()
    low = found.floor().long()
    w = found - low
    log = (1 - w) * table[low] + w * table[(low + 1).clamp(max=999)]
    torch.testing.assert_close(log, sigma.log(), rtol=0, atol=2e-6)  # times are in float32
    assert (w > 0.01).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_solver_runs_and_bdia_inverts(folders, family, device):
    model = load_stable_diffusion(folders[family], device=device)
    guided = ClassifierFreeGuidance(model, 2.0)
    extra = model.encode_prompt("a cat", "blurry")  # one prompt for all images
    sigmas = model.sigmas(5, final="first")
    x = noise(dtype=torch.float64, device=device) * sigmas[0].item()
    for method in (ods.DDIM(), ods.HeunEDM(), ods.Midpoint(), ods.DPMSolverPP2S(), ods.RK3()):
        solver = ods.BDIA(method, gamma=ods.StepRatio(1))
        solution = solver.sample(guided, x, sigmas, extra_args=extra)
        back = solver.invert(guided, solution.state, sigmas, extra_args=extra)
        assert relative(back.x, x) < 1e-12, method


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"dtype": torch.bfloat16}, 0.05),
        ({"dtype": torch.float16}, 0.01),
        ({"autocast": torch.bfloat16}, 0.05),
        ({"dtype": torch.bfloat16, "channels_last": True}, 0.05),
        ({"channels_last": True}, 1e-5),
    ],
)
def test_precision_of_the_network_and_of_the_state(folders, options, error, device):
    """A network in any precision: near the full one; a float64 state keeps its own round trip.

    In a float32 state it does not: what the inverse recovers is off by a rounding, and a network that
    rounds to fewer digits than that answers some of these with other digits of its own.
    """
    reference = load_stable_diffusion(folders["1.x"], device=device)
    model = load_stable_diffusion(folders["1.x"], device=device, **options)
    assert model.unet.dtype == options.get("dtype", torch.float32)
    assert model.vae.dtype == torch.float32
    prompt, sigmas = "a cat", model.sigmas(6)
    extra, sharp = (m.encode_prompt(prompt)["positive"] for m in (model, reference))
    solver = ods.BDIA(ods.DDIM(), gamma=ods.StepRatio(1))
    for dtype, bound in ((torch.float32, error), (torch.float64, 1e-12)):
        x = noise(dtype=dtype, device=device) * sigmas[0].item()
        solution = solver.sample(model, x, sigmas, extra_args=extra)
        assert solution.x.dtype == dtype
        full = solver.sample(reference, x, sigmas, extra_args=sharp)
        assert 0 < relative(solution.x, full.x) < error
        back = solver.invert(model, solution.state, sigmas, extra_args=extra)
        assert relative(back.x, x) < bound


@pytest.mark.parametrize("family", ["1.x", "xl"])
def test_images_are_encoded_by_the_mode(folders, family, device):
    model = load_stable_diffusion(folders[family], device=device)
    image = torch.rand(2, 3, 16, 24, device=device) * 2 - 1
    latents = model.encode(image)
    assert latents.shape == (2, 4, 8, 12)
    assert torch.equal(latents, model.encode(image)), "a draw, not the mode"
    with torch.no_grad():
        mode = model.vae.encode(image).latent_dist.mode() * model.vae.config.scaling_factor
        torch.testing.assert_close(latents, mode)
        decoded = model.vae.decode(latents / model.vae.config.scaling_factor).sample
    torch.testing.assert_close(model.decode(latents), decoded)
    assert model.decode(latents.double()).dtype == torch.float64


def test_gradients_are_those_of_the_inputs_alone(model):
    x, sigma = noise().requires_grad_(), torch.ones(2)
    prompt = model.encode_prompt("a cat")["positive"]
    assert not prompt["encoder_hidden_states"].requires_grad
    assert not model.decode(model(x.detach(), sigma, **prompt)).requires_grad
    model.decode(model(x, sigma, **prompt)).square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())


def test_latent_statistics_of_the_vae_are_used(folders, tmp_path):
    shutil.copytree(folders["xl"], tmp_path / "xl")
    path = tmp_path / "xl" / "vae" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [2.0, 3.0, 4.0, 5.0]}
    path.write_text(json.dumps(config), encoding="utf-8")
    model, plain = (load_stable_diffusion(f) for f in (tmp_path / "xl", folders["xl"]))
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    mean, std = (
        torch.tensor(config[k]).reshape(1, 4, 1, 1) for k in ("latents_mean", "latents_std")
    )
    factor = plain.vae.config.scaling_factor
    expected = (plain.encode(image) / factor - mean) / std * factor
    torch.testing.assert_close(model.encode(image), expected)
    z = noise(1)
    torch.testing.assert_close(model.decode(z), plain.decode((z * std / factor + mean) * factor))


def test_added_conditions_of_xl(folders):
    model = load_stable_diffusion(folders["xl"])
    conditions = model.encode_prompt(["a cat", "a dog"], size=(32, 48))
    added = conditions["positive"]["added_cond_kwargs"]
    assert added["time_ids"].tolist() == [[32, 48, 0, 0, 32, 48]] * 2
    assert added["text_embeds"].shape == (2, 64)
    assert not torch.equal(added["text_embeds"][0], added["text_embeds"][1])
    default = model.encode_prompt("a cat")["positive"]["added_cond_kwargs"]
    assert default["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]]
    assert model.latent_shape() == (4, 8, 8)
    assert model.latent_shape(32, 48) == (4, 16, 24)


def test_zero_terminal_snr(folders, diffusers, tmp_path):
    """The last level is infinite: it becomes 2^20, and a run from it is the scheduler's own."""
    shutil.copytree(folders["2.x-v"], tmp_path / "m")
    path = tmp_path / "m" / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    path.write_text(json.dumps(config), encoding="utf-8")
    model = load_stable_diffusion(tmp_path / "m")
    sigmas = model.sigmas(8)  # divides 1000: elsewhere diffusers' DDIM misses its own timesteps
    assert sigmas[0].item() == pytest.approx(2.0**20, rel=1e-6)
    extra, z = model.encode_prompt("a cat")["positive"], noise()
    root = torch.sqrt(1 + sigmas**2).tolist()
    ours = ods.DDIM().sample(model, z * root[0], sigmas, extra_args=extra).x / root[-1]
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        tmp_path / "m", safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 8, "guidance_scale": 1.0, "output_type": "latent"}
    theirs = pipeline(["a cat"] * 2, latents=z.clone(), **options).images
    assert relative(ours, theirs) < 1e-4


# Bad input


@pytest.fixture(scope="module")
def xl(folders):
    return load_stable_diffusion(folders["xl"])


def test_missing_prompt(model, xl):
    x, sigma = noise(), torch.ones(2)
    with pytest.raises(ValueError, match="the prompt is missing"):
        model(x, sigma)
    embeddings = xl.encode_prompt("a cat")["positive"]["encoder_hidden_states"]
    with pytest.raises(ValueError, match="the prompt is missing"):
        xl(x, sigma, encoder_hidden_states=embeddings)
    for prompt in (None, [], ["a cat", None], 3):
        with pytest.raises(TypeError, match="prompt must be text"):
            model.encode_prompt(prompt)
    with pytest.raises(ValueError, match="2 prompts and 3 negative prompts"):
        model.encode_prompt(["a", "b"], ["c", "d", "e"])
    with pytest.raises(ValueError, match="takes none"):
        model.encode_prompt("a", size=(16, 16))
    three = model.encode_prompt(["a", "b", "c"])["positive"]
    with pytest.raises(ValueError, match="the prompt is given for 3 images and the state holds 2"):
        model(x, sigma, **three)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 4, 8), (2, 9, 8, 8)])
def test_wrong_latents(model, shape):
    extra = model.encode_prompt("a cat")["positive"]
    with pytest.raises(ValueError, match=r"latents of shape \(B, 4, H, W\)"):
        model(torch.zeros(shape), torch.ones(2), **extra)
    with pytest.raises(ValueError, match=r"latents must have shape \(B, 4, H, W\)"):
        model.decode(torch.zeros(2, 3, 8, 8))


def test_network_on_another_device(folders):
    model = load_stable_diffusion(folders["1.x"])
    extra = model.encode_prompt("a cat")["positive"]
    with pytest.raises(ValueError, match="the prompt is on meta and the state on cpu"):
        model(noise(), torch.ones(2), encoder_hidden_states=torch.zeros(1, 77, 32, device="meta"))
    model.unet.to("meta")
    with pytest.raises(ValueError, match="the state is on cpu and the network on meta"):
        model(noise(), torch.ones(2), **extra)


@pytest.mark.parametrize("sigma", [0.01, 15.0, 80.0, 0.0, float("nan")])
def test_sigma_outside_the_range(model, sigma):
    extra = model.encode_prompt("a cat")["positive"]
    with pytest.raises(ValueError, match=r"training levels, 0.0291675 to 14.6146, got"):
        model(noise(), torch.tensor([1.0, sigma]), **extra)
    if sigma == 80.0:
        with pytest.raises(ValueError, match="training levels"):
            ods.DDIM().sample(model, noise(), ods.karras_sigmas(5), extra_args=extra)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_sigma_outside_the_range_on_a_gpu(folders):
    model = load_stable_diffusion(folders["1.x"], device="cuda")
    extra = model.encode_prompt("a cat")["positive"]
    with pytest.raises(FloatingPointError, match="sigma outside its range"):
        ods.DDIM().sample(model, noise(device="cuda"), ods.karras_sigmas(5), extra_args=extra)


def test_images_out_of_form(model):
    with pytest.raises(ValueError, match="sides divisible by 2"):
        model.encode(torch.zeros(1, 3, 15, 16))
    with pytest.raises(ValueError, match=r"\[-1, 1\], got torch.float32 from 0 to 255"):
        model.encode(torch.linspace(0, 255, 3 * 256).reshape(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"got torch.uint8"):
        model.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_model_keeps_its_levels(folders, family):
    """Nothing but weights is converted or moved: devices without float64 can hold the model."""
    model = load_stable_diffusion(folders[family])
    expected = model(noise(), torch.ones(2), **model.encode_prompt("a cat")["positive"])
    assert all(v.dtype != torch.float64 for v in model.state_dict().values())
    model.half()
    found = model(noise(), torch.ones(2), **model.encode_prompt("a cat")["positive"])
    assert relative(found, expected) < 0.01
    assert model.timestep(torch.tensor([model.sigma_min, model.sigma_max])).tolist() == [0, 999]
