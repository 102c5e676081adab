"""What networks of Stable Diffusion take: refusals of other tasks, distilled networks, offloading."""

import json
import shutil

import pytest
import torch

import odesolvers as ods
from odesolvers.models import ClassifierFreeGuidance, StableDiffusion, load_stable_diffusion

from .conftest import load_pipeline
from .pipelines import BETAS, noise, relative


@pytest.fixture
def changed(folders, diffusers, tmp_path):
    """The folder of a family whose UNet was made anew with other settings."""

    def make(family, **settings):
        shutil.copytree(folders[family], tmp_path / family)
        config = json.loads((folders[family] / "unet" / "config.json").read_text(encoding="utf-8"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            unet = diffusers.UNet2DConditionModel.from_config({**config, **settings})
        unet.save_pretrained(tmp_path / family / "unet")
        return tmp_path / family

    return make


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"in_channels": 9}, "takes 9 channels .* a mask and a masked image .* as of inpainting"),
        ({"in_channels": 8}, "takes 8 channels .* as of InstructPix2Pix and CosXL Edit"),
        ({"in_channels": 7}, "takes 7 channels .* as of the upscaler"),
        ({"in_channels": 5}, "takes 5 channels .* a depth map"),
        ({"in_channels": 13}, "takes 13 channels .* other inputs beside the 4 channels of latents"),
        ({"out_channels": 8}, "returns 8 channels for 4: a learned variance"),
        ({"num_class_embeds": 10}, "has num_class_embeds=10, a condition beside the prompt"),
        ({"class_embed_type": "timestep"}, "has class_embed_type='timestep'"),
        (
            {"encoder_hid_dim": 32, "encoder_hid_dim_type": "text_proj"},
            "has a projection of kind 'text_proj'",
        ),
    ],
)
@pytest.mark.parametrize("family", ["1.x", "xl"])
def test_networks_of_other_tasks_are_refused(changed, family, settings, message):
    folder = changed(family, **settings)
    with pytest.raises(ValueError, match=rf"could not be read as a Stable Diffusion .*{message}"):
        load_stable_diffusion(folder)


def test_parts_of_different_models_are_refused(folders, changed):
    pipelines = {family: load_pipeline(folders[family]) for family in ("1.x", "xl")}
    unets = {family: p.unet for family, p in pipelines.items()}
    pipelines["1.x"].unet, pipelines["xl"].unet = unets["xl"], unets["1.x"]
    with pytest.raises(
        ValueError, match="addition_embed_type='text_time' in a StableDiffusionPipel"
    ):
        StableDiffusion(pipelines["1.x"])
    with pytest.raises(ValueError, match="addition_embed_type=None in a StableDiffusionXLPipeline"):
        StableDiffusion(pipelines["xl"])
    for part in ("unet", "vae", "scheduler"):
        pipeline = load_pipeline(folders["1.x"])
        setattr(pipeline, part, None)
        with pytest.raises(ValueError, match=f"the pipeline has no {part}: give it one"):
            StableDiffusion(pipeline)
    refiner = changed("xl", projection_class_embeddings_input_dim=5 * 8 + 64)
    with pytest.raises(ValueError, match=r"takes 104 features .* have 112: it is another network"):
        load_stable_diffusion(refiner)


# Schedulers that were not made from the pipeline's


@pytest.mark.parametrize(
    ("name", "stated", "missing"),
    [
        ("DDIMScheduler", (), "beta_start, beta_end, beta_schedule"),
        ("DPMSolverMultistepScheduler", (), "beta_start, beta_end, beta_schedule"),
        ("EulerDiscreteScheduler", ("beta_schedule",), "beta_start, beta_end"),
        ("HeunDiscreteScheduler", (), "beta_start, beta_end, beta_schedule"),
        ("PNDMScheduler", ("beta_start", "beta_end"), "beta_schedule"),
        ("UniPCMultistepScheduler", ("beta_start",), "beta_end, beta_schedule"),
    ],
)
def test_betas_that_nobody_stated_are_refused(folders, diffusers, name, stated, missing):
    """The defaults of the classes are those of DDPM on pixels, or half of these."""
    scheduler = getattr(diffusers, name)(**{key: BETAS[key] for key in stated})
    last = missing.split(", ")[-1]
    with pytest.raises(
        ValueError, match=rf"a {name}, does not say its .*{last}.*{name}.from_config"
    ):
        load_stable_diffusion(folders["1.x"], scheduler=scheduler)
    pipeline = load_pipeline(folders["xl"])
    pipeline.scheduler = scheduler
    with pytest.raises(ValueError, match=rf"was made without {missing}, .*the published networks"):
        StableDiffusion(pipeline)


def test_betas_that_are_stated_are_believed(folders, diffusers, tmp_path):
    pipeline = load_pipeline(folders["xl"])
    kinds = diffusers.DDIMScheduler, diffusers.UniPCMultistepScheduler
    pixels = diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    pixels.save_pretrained(tmp_path)
    table = diffusers.DDIMScheduler(trained_betas=[0.1, 0.2, 0.3])
    flow = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    own = [kind.from_config(pipeline.scheduler.config) for kind in kinds]
    read = diffusers.DDIMScheduler.from_pretrained(tmp_path)
    sigmas = []
    for scheduler in (*own, diffusers.LCMScheduler(), pixels, read, table, flow):
        pipeline.scheduler = scheduler
        sigmas.append(StableDiffusion(pipeline).sigma_max)
    published, ddpm, three = 14.6146, 157.407, (1 / (0.9 * 0.8 * 0.7) - 1) ** 0.5
    assert sigmas == pytest.approx([published] * 3 + [ddpm] * 2 + [three, 2.0**20], rel=1e-5)


@pytest.mark.parametrize("family", ["1.x", "xl"])
def test_pipelines_without_text_encoders_take_embeddings(folders, family):
    pipeline = load_pipeline(folders[family])
    whole = StableDiffusion(pipeline)
    extra = whole.encode_prompt("a cat")["positive"]
    x, sigma = noise(), torch.ones(2)
    expected = whole(x, sigma, **extra)
    for name in ("text_encoder", "text_encoder_2")[: 1 + (family == "xl")]:
        setattr(pipeline, name, None)
        model = StableDiffusion(pipeline)
        torch.testing.assert_close(model(x, sigma, **extra), expected)
        with pytest.raises(ValueError, match="the pipeline has no text_encoder, so prompts cannot"):
            model.encode_prompt("a cat")


# Distilled under guidance


@pytest.mark.parametrize("name", ["DDIMScheduler", "LCMScheduler"])
@pytest.mark.parametrize("family", ["1.x", "xl"])
@pytest.mark.parametrize("scale", [1.0, 4.0, 8.5])
def test_guidance_as_a_condition_equals_the_pipeline(changed, diffusers, family, scale, name):
    """The pipeline of diffusers passes the scale to such a network instead of guiding it."""
    model = load_stable_diffusion(changed(family, time_cond_proj_dim=16))
    pipeline = model.pipeline
    pipeline.set_progress_bar_config(disable=True)
    options = {"timestep_spacing": "trailing", "clip_sample": False}
    scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **options)
    pipeline.scheduler = scheduler
    n = {"DDIMScheduler": 8, "LCMScheduler": 1}[name]
    theirs = pipeline(
        ["a cat"] * 2,
        num_inference_steps=n,
        guidance_scale=scale,
        latents=noise(),
        output_type="latent",
    ).images
    model = StableDiffusion(pipeline)
    sigmas = model.sigmas(n) if n > 1 else torch.tensor([model.sigma_max, 0.0])
    root = torch.sqrt(1 + sigmas**2).tolist()
    extra = model.encode_prompt("a cat", guidance_scale=scale)
    ours = ods.DDIM().sample(model, noise() * root[0], sigmas, extra_args=extra["positive"])
    assert relative(ours.x / root[-1], theirs) < 1e-4
    other = model.encode_prompt("a cat", guidance_scale=scale + 3)["positive"]
    wrong = ods.DDIM().sample(model, noise() * root[0], sigmas, extra_args=other)
    assert relative(wrong.x / root[-1], theirs) > 1e-3, "the scale does nothing"
    guided = ClassifierFreeGuidance(model, 1.0)  # both branches carry the embedding
    both = ods.DDIM().sample(guided, noise() * root[0], sigmas, extra_args=extra)
    torch.testing.assert_close(both.x, ours.x)


def test_a_guidance_scale_where_there_is_none_and_none_where_it_is_needed(folders, changed):
    plain = load_stable_diffusion(folders["1.x"])
    distilled = load_stable_diffusion(changed("1.x", time_cond_proj_dim=16))
    x, sigma = noise(), torch.ones(2)
    with pytest.raises(ValueError, match=r"distilled under guidance .* guidance_scale=8.0"):
        distilled(x, sigma, **distilled.encode_prompt("a")["positive"])
    with pytest.raises(
        ValueError, match=r"no guidance scale .* use ClassifierFreeGuidance\(model, s"
    ):
        plain.encode_prompt("a", guidance_scale=8.0)
    extra = distilled.encode_prompt("a", guidance_scale=8.0)["positive"]
    with pytest.raises(ValueError, match=r"timestep_cond .* and this network takes none"):
        plain(x, sigma, **extra)
    with pytest.raises(ValueError, match=r"has shape \(1, 8\), and this network takes \(16,\) for"):
        distilled(x, sigma, **{**extra, "timestep_cond": torch.zeros(1, 8)})


# Conditions


def test_conditions_of_other_networks_are_refused(folders):
    x, sigma = noise(), torch.ones(2)
    for family in ("1.x", "xl"):
        model = load_stable_diffusion(folders[family])
        extra = model.encode_prompt("a")["positive"]
        added = extra.get("added_cond_kwargs", {})
        for name in ("image_embeds", "hint"):
            given = {**extra, "added_cond_kwargs": {**added, name: [torch.zeros(1, 1, 32)]}}
            takes = "text_embeds and time_ids" if family == "xl" else "none"
            with pytest.raises(
                ValueError, match=f"has '{name}', and this network takes {takes}"
            ) as e:
                model(x, sigma, **given)
            assert ("IP-Adapters are not supported" in str(e.value)) == (name == "image_embeds")
        with pytest.raises(TypeError, match="encoder_hidden_states must be a tensor, got list"):
            model(x, sigma, **{**extra, "encoder_hidden_states": [0.0]})
    given = {**extra, "added_cond_kwargs": {"text_embeds": added["text_embeds"]}}
    with pytest.raises(ValueError, match="prompt is missing: added_cond_kwargs has no time_ids"):
        model(x, sigma, **given)


def test_an_ip_adapter_loaded_later_is_refused(folders):
    """As `pipeline.load_ip_adapter` marks it in the configuration of the UNet."""
    model = load_stable_diffusion(folders["1.x"])
    extra = model.encode_prompt("a")["positive"]
    model.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    with pytest.raises(ValueError, match=r"has an IP-Adapter .*unload_ip_adapter\(\) removes"):
        model(noise(), torch.ones(2), **extra)
    with pytest.raises(ValueError, match="has an IP-Adapter"):
        StableDiffusion(model.pipeline)


# Offloading


@pytest.mark.parametrize("family", ["1.x", "xl"])
@pytest.mark.parametrize("how", ["sequential", "whole", "unet", "groups", "leaves"])
@pytest.mark.filterwarnings("ignore")  # of accelerate and diffusers, about hooks
def test_offloaded_models_run_where_they_are_sent(folders, diffusers, family, how):
    """Weights wait elsewhere, some as meta tensors in their place, and come for each call."""
    import accelerate

    reference = load_stable_diffusion(folders[family])
    model = load_stable_diffusion(folders[family])
    cpu = torch.device("cpu")
    parts = [p for p in model.pipeline.components.values() if isinstance(p, torch.nn.Module)]
    if how == "sequential":
        for part in parts:
            accelerate.cpu_offload(part, cpu, offload_buffers=True)
        assert model.unet.device.type == "meta"
    elif how == "unet":
        accelerate.cpu_offload(model.unet, cpu)
    elif how == "whole":
        hook = None
        for part in parts:
            _, hook = accelerate.cpu_offload_with_hook(part, cpu, prev_module_hook=hook)
    else:
        kind = {"groups": "block_level", "leaves": "leaf_level"}[how]
        options = {"num_blocks_per_group": 1} if how == "groups" else {}
        model.unet.enable_group_offload(cpu, cpu, offload_type=kind, **options)
    assert model.device == cpu
    x, sigmas = noise(), reference.sigmas(4)
    x = x * sigmas[0].item()
    found, expected = (
        ods.BDIA(ods.DDIM()).sample(
            ClassifierFreeGuidance(m, 3.0), x, sigmas, extra_args=m.encode_prompt("a", "b")
        )
        for m in (model, reference)
    )
    torch.testing.assert_close(found.x, expected.x)
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(model.encode(image), reference.encode(image))
    torch.testing.assert_close(model.decode(found.x), reference.decode(found.x))


@pytest.mark.filterwarnings("ignore")  # of diffusers, about hooks
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_groups_run_on_another_device(folders, kind):
    """The device is that of the hook, whatever the weights are on (here one that no machine lacks)."""
    model = load_stable_diffusion(folders["1.x"])
    meta, cpu = torch.device("meta"), torch.device("cpu")
    model.unet.enable_group_offload(cpu, cpu, offload_type=kind, num_blocks_per_group=1)
    for module in model.unet.modules():
        if hasattr(module, "_diffusers_hook"):
            hook = module._diffusers_hook.get_hook("group_offloading")
            hook.config.onload_device = meta
    assert model.device == meta
    with pytest.raises(ValueError, match="the state is on cpu and the network on meta"):
        model(noise(), torch.ones(2))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_pipelines_offloaded_from_a_gpu(folders, how):
    model = load_stable_diffusion(folders["xl"])
    expected = load_stable_diffusion(folders["xl"], device="cuda")
    getattr(model.pipeline, how)()
    assert model.device.type == "cuda"
    x, sigma = noise().cuda(), torch.ones(2, device="cuda")
    found, right = (m(x, sigma, **m.encode_prompt("a")["positive"]) for m in (model, expected))
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.decode(x), expected.decode(x), rtol=1e-4, atol=1e-4)
