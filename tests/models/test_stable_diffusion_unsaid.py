"""Folders that leave open what their network is: a setting unsaid, or said twice, or a weight twice."""

import json
import shutil

import pytest
import torch

from odesolvers.models import StableDiffusion, load_stable_diffusion

from .conftest import load_pipeline
from .pipelines import refused

ENCODERS = ("text_encoder", "text_encoder_2")


def prompt_of(model, text="a cat"):
    return model.encode_prompt(text)["positive"]["encoder_hidden_states"]


# Weights under two names, of which the library that reads them takes one


@pytest.mark.parametrize(
    ("new", "old"), [("to_q.", "query."), ("to_v.", "value."), ("to_out.0.", "proj_attn.")]
)
@pytest.mark.parametrize("factor", [1, 2])
def test_weights_of_the_vae_under_two_names(edited, new, old, factor):
    def change(weights):
        for name in [n for n in weights if new in n]:
            weights[name.replace(new, old)] = factor * weights[name]

    match = rf"its vae has 4 of its 124 weights under two names, .*attentions\.0\.{old}bias"
    refused(edited("1.x", "vae", change), match)


@pytest.mark.parametrize("part", ENCODERS)
@pytest.mark.parametrize("count", [1, 100])
def test_weights_of_text_encoders_under_two_names(edited, part, count):
    def change(weights):
        for name in [n for n in weights if "projection" not in n][:count]:
            short = name.removeprefix("text_model.")
            weights[f"text_model.{name}" if short == name else short] = 2 * weights[name]

    refused(edited("xl", part, change), rf"its {part} has \d+ of its \d+ weights under two names")


@pytest.mark.parametrize(("new", "old"), [("to_q.", "query."), ("conv_in.", "conv_in.conv.")])
def test_weights_of_the_unet_under_two_names(edited, new, old):
    def change(weights):
        for name in [n for n in weights if new in n]:
            weights[name.replace(new, old)] = 2 * weights[name]

    refused(edited("1.x", "unet", change), "its unet has (weights .* no place|.* two names)")


# Settings of text encoders within those of all of CLIP


@pytest.mark.parametrize("part", ENCODERS)
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_settings_of_all_of_clip(edited, folders, part, activation):
    """As transformers reads them."""
    import transformers

    path = folders["xl"] / part / "config.json"
    inner = json.loads(path.read_text(encoding="utf-8")) | {"hidden_act": activation}
    unsaid = dict.fromkeys(inner, ...)
    whole = {"model_type": "clip", "projection_dim": 8, "text_config": inner, "vision_config": {}}
    folder = edited("xl", part, **unsaid | whole)
    kind = "CLIPTextModelWithProjection" if part == "text_encoder_2" else "CLIPTextModel"
    theirs = getattr(transformers, kind).from_pretrained(folder / part)
    assert theirs.config.hidden_act == activation
    ours = load_stable_diffusion(folder)
    ids = torch.arange(77)[None]
    for found, expected in zip(
        getattr(ours, part)(ids).to_tuple(), theirs(ids).to_tuple(), strict=True
    ):
        torch.testing.assert_close(found, expected)
    plain = prompt_of(load_stable_diffusion(folders["xl"]))
    usual = json.loads(path.read_text(encoding="utf-8"))["hidden_act"] == activation
    assert torch.equal(prompt_of(ours), plain) == usual


@pytest.mark.parametrize(
    "inner", [{"hidden_act": "gelu"}, {"num_attention_heads": 2}, {"layer_norm_eps": 0.1}]
)
def test_settings_at_two_places(edited, folders, inner):
    path = folders["1.x"] / "text_encoder" / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    folder = edited("1.x", "text_encoder", text_config=content | inner)
    refused(folder, f"its text_encoder has {next(iter(inner))} = .* and, in its text_config, ")
    same = load_stable_diffusion(edited("1.x", "text_encoder", text_config=content))
    assert torch.equal(prompt_of(same), prompt_of(load_stable_diffusion(folders["1.x"])))
    refused(edited("1.x", "text_encoder", text_config=[1]), "a text_config of another form")


@pytest.mark.parametrize("kind", ["siglip_text_model", "chinese_clip", 7, None, ["clip"]])
@pytest.mark.parametrize("inner", [True, False])
def test_text_encoders_of_another_kind(edited, kind, inner):
    """SigLIP's has the weights of CLIP's, and reads the words after a word as well."""
    changed = {"text_config": {"model_type": kind}} if inner else {"model_type": kind}
    match = "its text_encoder is of model_type .* are of CLIP"
    refused(edited("1.x", "text_encoder", **changed), match)


# Settings whose default is right for one family and wrong for another


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("unet", "attention_head_dim"),
        *((part, name) for part in ENCODERS for name in ("hidden_act", "num_attention_heads")),
    ],
)
def test_what_no_weight_shows_must_be_said(edited, part, name):
    refused(edited("xl", part, **{name: ...}), f"its {part} does not say its {name}, and models")


def test_the_scale_of_latents_of_xl_must_be_said(edited, folders, diffusers):
    """The default of the class is that of Stable Diffusion 1, whose published folders do not say it."""
    refused(
        edited("xl", "vae", scaling_factor=...), r"the default .* 0\.18215, .* XL's own has 0\.13"
    )
    pipeline = load_pipeline(folders["xl"])
    config = {k: v for k, v in pipeline.vae.config.items() if k != "scaling_factor"}
    pipeline.vae = diffusers.AutoencoderKL.from_config(config)
    with pytest.raises(ValueError, match="the VAE does not say its scaling_factor"):
        StableDiffusion(pipeline)
    pipeline.vae.register_to_config(scaling_factor=0.13025)
    assert StableDiffusion(pipeline) is not None
    tiny = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    pipeline.vae = tiny  # of both families, with a scale of 1
    assert StableDiffusion(pipeline) is not None
    first = load_stable_diffusion(edited("1.x", "vae", scaling_factor=...))
    latents = torch.ones(1, 4, 8, 8)
    expected = load_stable_diffusion(folders["1.x"]).decode(latents)
    assert torch.equal(first.decode(latents), expected)


def test_the_prediction_of_stable_diffusion_2_must_be_said(folders, diffusers):
    pipeline = load_pipeline(folders["2.x"])
    config = {k: v for k, v in pipeline.scheduler.config.items() if k != "prediction_type"}
    pipeline.unet.register_to_config(cross_attention_dim=1024)  # of the published networks
    pipeline.text_encoder = None
    for name in ("DDIMScheduler", "EulerDiscreteScheduler", "PNDMScheduler"):
        pipeline.scheduler = getattr(diffusers, name).from_config(config)
        with pytest.raises(ValueError, match=f"Stable Diffusion 2 .* a {name}, does not say which"):
            StableDiffusion(pipeline)
        for kind in ("epsilon", "v_prediction"):
            assert StableDiffusion(pipeline, prediction_type=kind).prediction_type == kind
    stated = {**config, "prediction_type": "v_prediction"}
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(stated)
    assert StableDiffusion(pipeline).prediction_type == "v_prediction"


@pytest.mark.parametrize("value", [1, 0, "false", None])
def test_whether_empty_prompts_are_zeros_is_true_or_false(edited, value):
    folder = edited("xl", "", file="model_index.json", force_zeros_for_empty_prompt=value)
    refused(folder, "force_zeros_for_empty_prompt = .*, where true or false belong")


@pytest.mark.parametrize("value", [True, False])
def test_zeros_for_empty_prompts(edited, value):
    folder = edited("xl", "", file="model_index.json", force_zeros_for_empty_prompt=value)
    negative = load_stable_diffusion(folder).encode_prompt("a")["negative"]
    assert bool((negative["encoder_hidden_states"] == 0).all()) is value


# Weights of a variant


@pytest.mark.parametrize("having", ["unet", "vae", "text_encoder"])
def test_a_variant_of_one_part_alone(folders, tmp_path, having):
    folder = tmp_path / "m"
    shutil.copytree(folders["1.x"], folder)
    (path,) = (folder / having).glob("*.safetensors")
    stem = path.name.removesuffix(".safetensors")
    path.rename(path.with_name(f"{stem}.fp16.safetensors"))
    refused(folder, rf"its {having} has no weights, but some of variant 'fp16': pass variant=")
    first = "vae" if having == "unet" else "unet"
    (other,) = (folder / first).glob("*.safetensors")
    match = (
        rf"its {first} has no weights of variant fp16, but '{other.name}': .* copy this file to "
    )
    refused(folder, match, variant="fp16")
    for path in folder.glob("*/*.safetensors"):
        if "fp16" not in path.name:
            shutil.copy(path, path.with_name(path.name.replace(".saf", ".fp16.saf")))
    assert load_stable_diffusion(folder, variant="fp16") is not None
