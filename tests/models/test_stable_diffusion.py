"""Stable Diffusion on whole, tiny pipelines with random weights, against diffusers' own sampling."""

import json
import shutil
import sys

import pytest
import torch

import odesolvers as ods
from odesolvers.models import (
    ClassifierFreeGuidance,
    StableDiffusion,
    load_stable_diffusion,
    save_tiny_stable_diffusion,
)

FAMILIES = ["1.x", "2.x", "2.x-v", "xl"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, diffusers):
    """Where the pipeline of each family is saved."""
    root = tmp_path_factory.mktemp("stable-diffusion")
    for family in FAMILIES:
        save_tiny_stable_diffusion(root / family, family)
    return {family: root / family for family in FAMILIES}


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
    levels = model.log_sigmas.exp()
    whole = torch.arange(1000, dtype=torch.float32, device=device)
    for dtype in (torch.float64, torch.float32):
        assert torch.equal(model.timestep(levels.to(dtype)), whole)
    sigma = ods.karras_sigmas(50, 0.03, 14.6)[:-1].to(device)
    distance = (sigma.log() - model.log_sigmas[:, None]).abs()
    found = model.timestep(sigma).double()
    assert ((found - distance.argmin(0)).abs() <= 1).all()
    low = found.floor().long()
    w = found - low
    log = (1 - w) * model.log_sigmas[low] + w * model.log_sigmas[(low + 1).clamp(max=999)]
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


# The original layout of single-file checkpoints, as the converters of diffusers read it.


def original_layout(pipeline):
    """The weights of a pipeline under the names of the original repositories."""
    xl = hasattr(pipeline, "text_encoder_2")
    out = {}
    for key, value in pipeline.unet.state_dict().items():
        out["model.diffusion_model." + _original_unet(key)] = value
    for key, value in pipeline.vae.state_dict().items():
        name = _original_vae(key)
        conv = "attentions" in key and "weight" in key and "norm" not in key
        out["first_stage_model." + name] = value[:, :, None, None] if conv else value
    prefix = "conditioner.embedders.0." if xl else "cond_stage_model."
    for key, value in pipeline.text_encoder.state_dict().items():
        out[prefix + "transformer.text_model." + key.removeprefix("text_model.")] = value
    if xl:
        out |= _original_open_clip(pipeline.text_encoder_2.state_dict())
    # Tensors of their own: safetensors refuses shared storage.
    return {key: value.clone().contiguous() for key, value in out.items()}


def _replace(key, *pairs):
    for old, new in pairs:
        key = key.replace(old, new)
    return key


def _original_unet(key):
    parts = key.split(".")
    ends = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    stem = key.rpartition(".")[0]
    if stem in ends:
        return f"{ends[stem]}.{parts[-1]}"
    resnet = (
        ("norm1", "in_layers.0"),
        ("conv1", "in_layers.2"),
        ("norm2", "out_layers.0"),
        ("conv2", "out_layers.3"),
        ("time_emb_proj", "emb_layers.1"),
        ("conv_shortcut", "skip_connection"),
    )
    if parts[0] == "mid_block":
        index = {"resnets": 2 * int(parts[2]), "attentions": 1}[parts[1]]
        rest = ".".join(parts[3:])
        return f"middle_block.{index}." + (_replace(rest, *resnet) if index != 1 else rest)
    side, block, kind, layer, *rest = parts
    rest = ".".join(rest)
    block, layer = int(block), int(layer)
    if side == "down_blocks":  # one residual block and one downsampling to a block
        if kind == "downsamplers":
            return f"input_blocks.{2 * block + 2}.0.op.{rest.removeprefix('conv.')}"
        place = f"input_blocks.{2 * block + 1 + layer}"
    else:  # two residual blocks, the upsampling beside the last
        if kind == "upsamplers":
            with_attention = any(k == block for k in _UP_ATTENTION)
            return f"output_blocks.{2 * block + 1}.{2 if with_attention else 1}.{rest}"
        place = f"output_blocks.{2 * block + layer}"
    if kind == "resnets":
        return f"{place}.0.{_replace(rest, *resnet)}"
    return f"{place}.1.{rest}"


_UP_ATTENTION = set()


def _original_vae(key):
    parts = key.split(".")
    names = (("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"))
    attention = (
        ("group_norm", "norm"),
        ("to_q", "q"),
        ("to_k", "k"),
        ("to_v", "v"),
        ("to_out.0", "proj_out"),
    )
    if "mid_block" in parts:
        kind, k, rest = parts[2], int(parts[3]), ".".join(parts[4:])
        if kind == "attentions":
            return f"{parts[0]}.mid.attn_1.{_replace(rest, *attention)}"
        return f"{parts[0]}.mid.block_{k + 1}.{_replace(rest, *names)}"
    if "down_blocks" in parts or "up_blocks" in parts:
        side, kind, rest = parts[1], parts[3], ".".join(parts[5:])
        down = side == "down_blocks"
        block = int(parts[2]) if down else 1 - int(parts[2])
        way = "down" if down else "up"
        if kind == "resnets":
            return f"{parts[0]}.{way}.{block}.block.{parts[4]}.{_replace(rest, *names)}"
        return f"{parts[0]}.{way}.{block}.{way}sample.{rest}"
    return _replace(key, *names)


def _original_open_clip(state):
    out, prefix = {}, "conditioner.embedders.1.model."
    for key, value in state.items():
        key = key.removeprefix("text_model.")
        if key.startswith("encoder.layers."):
            name = _replace(
                key,
                ("encoder.layers", "transformer.resblocks"),
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
                ("self_attn.out_proj", "attn.out_proj"),
            )
            if "q_proj" in key:  # queries, keys and values are one matrix there
                whole = [state[_full(state, key.replace("q_proj", p))] for p in _QKV]
                stem = prefix + name.partition("self_attn")[0]
                out[f"{stem}attn.in_proj_{key.rpartition('.')[2]}"] = torch.cat(whole)
            elif "k_proj" not in key and "v_proj" not in key:
                out[prefix + name] = value
        elif key == "text_projection.weight":
            out[prefix + "text_projection"] = value.T
        else:
            out[prefix + _replace(key, *_OPEN_CLIP)] = value
    return out


_QKV = ("q_proj", "k_proj", "v_proj")
_OPEN_CLIP = (
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("embeddings.token_embedding", "token_embedding"),
    ("final_layer_norm", "ln_final"),
)


def _full(state, key):
    return key if key in state else "text_model." + key


@pytest.mark.parametrize(
    ("family", "suffix"), [("1.x", ".safetensors"), ("1.x", ".ckpt"), ("xl", ".safetensors")]
)
def test_single_file(folders, tmp_path, family, suffix):
    from safetensors.torch import save_file

    reference = load_stable_diffusion(folders[family])
    _UP_ATTENTION.clear()
    _UP_ATTENTION.update({0} if family == "xl" else {1})
    weights = original_layout(reference.pipeline)
    path = tmp_path / f"model{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": weights}, path)
    else:
        save_file(weights, path)
    model = load_stable_diffusion(path, config=folders[family])
    x, sigma = noise(), torch.tensor([1.0, 3.0])
    found, expected = (
        m(x, sigma, **m.encode_prompt("a cat")["positive"]) for m in (model, reference)
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(model.encode(image), reference.encode(image))
    torch.testing.assert_close(model.decode(x), reference.decode(x))


# Bad input


@pytest.fixture(scope="module")
def model(folders):
    return load_stable_diffusion(folders["1.x"])


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


def test_converted_levels_are_refused(folders):
    model = load_stable_diffusion(folders["1.x"])
    extra = model.encode_prompt("a cat")["positive"]
    with pytest.raises(TypeError, match="noise levels were converted"):
        model.half()(noise(), torch.ones(2), **extra)


def test_no_checkpoint(tmp_path, diffusers, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"holds no model_index\.json"):
        load_stable_diffusion(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_stable_diffusion(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="no local path, and the Hugging Face hub"):
        load_stable_diffusion("nobody/nothing")


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument")  # of diffusers
def test_hub_id(folders, tmp_path, monkeypatch):
    """From the cache of the hub, in its layout, as after a download."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "models--someone--tiny-xl", "0" * 40
    shutil.copytree(folders["xl"], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    model, reference = (load_stable_diffusion(f) for f in ("someone/tiny-xl", folders["xl"]))
    weights = reference.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_other_pipelines(folders, tmp_path, model):
    shutil.copytree(folders["1.x"], tmp_path / "m")
    path = tmp_path / "m" / "model_index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**index, "_class_name": "FluxPipeline"}), encoding="utf-8")
    with pytest.raises(
        ValueError, match="it is a FluxPipeline; supported are StableDiffusionPipeline"
    ):
        load_stable_diffusion(tmp_path / "m")
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="could not be read as a Stable Diffusion checkpoint"):
        load_stable_diffusion(tmp_path / "m")
    with pytest.raises(TypeError, match="pipeline must be a StableDiffusionPipeline or"):
        StableDiffusion(object())
    with pytest.raises(ValueError, match="prediction_type must be"):
        StableDiffusion(model.pipeline, prediction_type="flow")
    with pytest.raises(ValueError, match="family must be"):
        save_tiny_stable_diffusion(tmp_path, "3.x")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("damage", ["missing weight", "truncated", "no file"])
def test_damaged_directory(folders, tmp_path, part, damage):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folders["xl"], tmp_path / "m")
    (path,) = (tmp_path / "m" / part).glob("*.safetensors")
    if damage == "missing weight":  # which diffusers and transformers would make up at random
        weights = load_file(path)
        weights.pop(next(k for k in weights if "attn" in k or "attentions" in k))
        save_file(weights, path, metadata={"format": "pt"})
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        path.unlink()
    message = f"weights of the {part} are missing" if damage == "missing weight" else "could not be"
    with pytest.raises(ValueError, match=message):
        load_stable_diffusion(tmp_path / "m")


def test_damaged_single_file(folders, tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "a.safetensors").write_bytes(b"not a checkpoint")
    (tmp_path / "b.ckpt").write_bytes(b"not a checkpoint")
    save_file({"weight": torch.zeros(2)}, tmp_path / "c.safetensors")
    for name in ("a.safetensors", "b.ckpt", "c.safetensors"):
        with pytest.raises(ValueError, match="could not be read as a Stable Diffusion checkpoint"):
            load_stable_diffusion(tmp_path / name, config=folders["1.x"])


@pytest.mark.parametrize("package", ["diffusers", "transformers"])
def test_missing_package(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'odesolvers\[stable-diffusion\]'"):
        load_stable_diffusion("anything/at-all")
