"""Settings of Stable Diffusion pipelines that are no numbers, out of range, or of other models."""

import json
import math
import shutil

import pytest
import torch

from odesolvers.models import StableDiffusion, load_stable_diffusion

from .conftest import load_pipeline
from .pipelines import BETAS, refused

NAN, INF = math.nan, math.inf


@pytest.fixture
def tiny(folders):
    """A pipeline whose parts a test may change."""
    return load_pipeline(folders["1.x"])


@pytest.fixture
def tiny_xl(folders):
    return load_pipeline(folders["xl"])


@pytest.fixture
def settings(folders, tmp_path):
    """The folder of a family with other settings in a file."""

    def make(family, file, **changed):
        folder = tmp_path / "m"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(folders[family], folder)
        content = json.loads((folder / file).read_text(encoding="utf-8"))
        (folder / file).write_text(json.dumps(content | changed), encoding="utf-8")
        return folder

    return make


# The VAE

WRONG = ("x", NAN, INF, -INF, 0, 0.0, -1.0, True, None, [1.0], torch.tensor(1.0))
TABLES = {
    "mean alone": ([0.0] * 4, None),
    "deviation alone": (None, [1.0] * 4),
    "three": ([0.0] * 3, [1.0] * 4),
    "five": ([0.0] * 4, [1.0] * 5),
    "no number": ([0.0, NAN, 0.0, 0.0], [1.0] * 4),
    "infinite": ([0.0] * 4, [1.0, 1.0, 1.0, INF]),
    "zero": ([0.0] * 4, [1.0, 1.0, 1.0, 0.0]),
    "negative": ([0.0] * 4, [-1.0] * 4),
    "texts": (["0"] * 4, [1.0] * 4),
    "scalars": (0.0, 1.0),
}


@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_scales_of_latents(tiny, value):
    tiny.vae.register_to_config(scaling_factor=value)
    with pytest.raises(
        ValueError, match=r"the VAE has scaling_factor = .*, and it is a number above"
    ):
        StableDiffusion(tiny)


@pytest.mark.parametrize("value", ["x", NAN, True, 0.1159, -1])
def test_shifts_of_latents(tiny, value):
    """Pipelines of Stable Diffusion add none, so that the pictures would be of other colours."""
    tiny.vae.register_to_config(shift_factor=value)
    with pytest.raises(ValueError, match=r"the VAE has shift_factor = .* as those of SD3 and FLUX"):
        StableDiffusion(tiny)


@pytest.mark.parametrize("case", TABLES)
def test_statistics_of_latents(tiny, case):
    mean, std = TABLES[case]
    tiny.vae.register_to_config(latents_mean=mean, latents_std=std)
    with pytest.raises(ValueError, match=r"the VAE has latents_mean and latents_std, and latents_"):
        StableDiffusion(tiny)


def test_statistics_that_are_right(tiny):
    tiny.vae.register_to_config(latents_mean=(0.0, -1, 2.5, 0), latents_std=[1, 2.0, 3.0, 0.5])
    tiny.vae.register_to_config(scaling_factor=1, shift_factor=0.0)
    assert StableDiffusion(tiny).decode(torch.zeros(1, 4, 8, 8)).shape == (1, 3, 16, 16)


# Schedulers


@pytest.mark.parametrize(
    "changed",
    [
        *({"beta_start": v} for v in ("x", NAN, INF, True, None, -0.1, 2)),
        *({"beta_end": v} for v in ("x", NAN, INF, False, None, -0.1, 1.0, 10**9)),
        *({"num_train_timesteps": v} for v in ("x", NAN, 0, 1, -5, 1.5, 1000.0, None, 10**9)),
        *({"trained_betas": v} for v in ([NAN] * 9, [2.0] * 9, [-0.1] * 9, ["x"] * 9, "x", [[]])),
        *({"steps_offset": v} for v in ("x", -1, 0.5, True, 10**9)),
        *({"timestep_spacing": v} for v in ("x", 7, None)),
        *({name: "no"} for name in ("set_alpha_to_one", "skip_prk_steps")),
    ],
    ids=str,
)
def test_schedules_that_are_none(settings, changed):
    """As text, for JSON has NaN and Infinity in Python."""
    (name,) = changed
    refused(settings("1.x", "scheduler/scheduler_config.json", **changed), f"{name} = ")


@pytest.mark.parametrize(
    "betas",
    [
        *({"beta_start": 0.0}, {"beta_end": 0.0}, {"trained_betas": [0.0] * 9}),
        *({"trained_betas": []}, {"trained_betas": [0.1]}, {"trained_betas": [0.1, 0.0, 0.1]}),
    ],
    ids=str,
)
def test_betas_without_noise(settings, betas):
    """Two levels are equal, and their distance in log σ is divided by."""
    folder = settings("1.x", "scheduler/scheduler_config.json", **betas)
    refused(folder, r"(betas that make no noise levels|out of bounds|trained_betas = )")


@pytest.mark.parametrize(
    "kind", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]
)
def test_schedulers_that_were_given(tiny, diffusers, kind):
    for betas in ([NAN] * 9, [0.0] * 9, [-0.5] * 9):
        tiny.scheduler = getattr(diffusers, kind)(trained_betas=betas)
        with pytest.raises(ValueError, match=r"trained_betas = a list|betas that make no noise"):
            StableDiffusion(tiny)
    tiny.scheduler = getattr(diffusers, kind)(**BETAS)
    assert StableDiffusion(tiny).sigma_max == pytest.approx(14.6146, rel=1e-5)


@pytest.mark.parametrize(
    "levels",
    [
        {"sigma_data": NAN},
        {"sigma_data": 0.0},
        {"sigma_min": -1.0},
        {"sigma_max": INF},
        {"sigma_min": 80.0, "sigma_max": 0.002},
        {"sigma_max": "x"},
    ],
    ids=str,
)
def test_levels_that_are_none(tiny, diffusers, levels):
    scheduler = diffusers.EDMEulerScheduler()
    scheduler.register_to_config(**levels)
    tiny.scheduler = scheduler
    with pytest.raises(
        ValueError, match=r"the scheduler, a EDMEulerScheduler, has (levels|sigma_)"
    ):
        StableDiffusion(tiny)


# Networks


@pytest.mark.parametrize("value", ["x", 0, -1, 1.5, True, None, [8], [8, 8, 8], [8, 0], 10**6])
def test_sizes_of_latents(tiny, value):
    tiny.unet.register_to_config(sample_size=value)
    with pytest.raises(ValueError, match=r"the UNet has sample_size = .*, and it is the side"):
        StableDiffusion(tiny)


def test_latents_of_two_sides(tiny_xl):
    """The first is the height, as in the pipelines of diffusers."""
    tiny_xl.unet.register_to_config(sample_size=[8, 12])
    model = StableDiffusion(tiny_xl)
    assert model.latent_shape() == (4, 8, 12)
    assert model.latent_shape(width=32) == (4, 8, 16)
    ids = model.encode_prompt("a cat")["positive"]["added_cond_kwargs"]["time_ids"]
    assert ids.tolist() == [[16, 24, 0, 0, 16, 24]]


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        *(("unet", "norm_eps", v) for v in (NAN, -1e-5, "x", True, [])),
        *(("unet", name, -1) for name in ("attention_head_dim", "layers_per_block", "freq_shift")),
        *(("unet", name, "x") for name in ("flip_sin_to_cos", "block_out_channels", "dropout")),
        *(("unet", name, 7) for name in ("act_fn", "down_block_types", "resnet_time_scale_shift")),
        *(("vae", name, 2) for name in ("force_upcast", "use_quant_conv", "act_fn")),
        *(("text_encoder", "layer_norm_eps", v) for v in (NAN, -1.0, "x")),
        *(("text_encoder", "num_attention_heads", v) for v in (-4, "x", False)),
        ("text_encoder", "hidden_act", 7),
        ("text_encoder", "attention_dropout", INF),
    ],
    ids=str,
)
def test_settings_of_other_forms(settings, part, name, value):
    match = (
        rf"(its {part} has a setting {name} |its {part} has .* no place|attention_head_dim|list)"
    )
    refused(settings("1.x", f"{part}/config.json", **{name: value}), match)


@pytest.mark.parametrize(
    ("part", "changed"),
    [
        ("unet", {"layers_per_block": 100}),
        ("unet", {"layers_per_block": 2**31}),
        ("unet", {"transformer_layers_per_block": 100}),
        ("unet", {"block_out_channels": [32] * 10_000}),
        ("unet", {"cross_attention_dim": 2**30}),
        ("vae", {"layers_per_block": 100}),
        ("vae", {"block_out_channels": [32] * 90, "down_block_types": ["DownEncoderBlock2D"] * 90}),
        ("text_encoder", {"num_hidden_layers": 100}),
        ("text_encoder", {"num_hidden_layers": 2**31}),
        *(("text_encoder", {name: 2**30}) for name in ("hidden_size", "vocab_size")),
        ("text_encoder", {"max_position_embeddings": 2**31}),
    ],
    ids=str,
)
def test_networks_that_no_file_fills(settings, part, changed, monkeypatch):
    """They are refused after as many weights as the files have, and 64."""
    built = []
    handle = torch.nn.modules.module.register_module_parameter_registration_hook(
        lambda module, name, weight: built.append(name) if weight is not None else None
    )
    try:
        refused(settings("1.x", f"{part}/config.json", **changed), part)
    finally:
        handle.remove()
    assert len(built) < 800  # the parts before are read whole: 150 and 140 weights


def test_settings_that_are_long(settings, folders):
    junk = {f"k{n}": [n] for n in range(20_000)}
    names = ("unet/config.json", "scheduler/scheduler_config.json", "model_index.json")
    for name in names:
        refused(settings("1.x", name, junk=junk), "has more than 262144 bytes")
    name = "tokenizer/tokenizer_config.json"
    refused(settings("1.x", name, junk=[junk] * 4), "has more than 1048576 bytes")
    short = dict(list(junk.items())[:2000])
    assert load_stable_diffusion(settings("1.x", names[0], junk=short)) is not None


# Prompts


@pytest.mark.parametrize("family", ["1.x", "xl"])
def test_tokens_that_text_encoders_do_not_know(folders, family):
    """An index error on the CPU, and a failed assertion of the device on a GPU."""
    names = ["tokenizer", "tokenizer_2"][: 1 + (family == "xl")]
    for name in names:
        pipeline = load_pipeline(folders[family])
        model = StableDiffusion(pipeline)
        getattr(pipeline, name).add_tokens(["<cat>", "<dog>"])
        for make in (
            lambda p=pipeline: StableDiffusion(p),
            lambda m=model: m.encode_prompt("<cat>"),
        ):
            with pytest.raises(
                ValueError, match=f"the {name} has token 516, '<dog>', and the text_enc"
            ):
                make()
        encoder = getattr(pipeline, name.replace("tokenizer", "text_encoder"))
        encoder.resize_token_embeddings(517)
        if name == "tokenizer":
            assert model.encode_prompt("a <cat>") is not None


def test_tokens_of_folders(settings):
    folder = settings("1.x", "tokenizer/tokenizer_config.json")
    path = folder / "tokenizer" / "added_tokens.json"
    path.write_text(json.dumps({"<cat>": 515}), encoding="utf-8")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    refused(folder, "the tokenizer has token 515, '<cat>', and the text_encoder knows 515")


def test_where_a_prompt_ends(tiny_xl):
    """XL reads its second prompt at one token, and at the first where that is not found."""
    config = tiny_xl.text_encoder_2.config
    for end in (5, -1, 513):
        config.eos_token_id = end
        with pytest.raises(
            ValueError, match=f"by its eos_token_id {end}, and the tokenizer_2 ends it"
        ):
            StableDiffusion(tiny_xl)
    config.eos_token_id = 2  # of published configurations: the highest of all tokens
    assert StableDiffusion(tiny_xl) is not None
    tiny_xl.tokenizer_2.add_tokens(["<cat>"])
    tiny_xl.text_encoder_2.resize_token_embeddings(516)
    with pytest.raises(ValueError, match="reads a prompt at its token 515, by its eos_token_id 2"):
        StableDiffusion(tiny_xl)


def test_prompts_that_are_too_long(tiny, settings):
    refused(
        settings("1.x", "tokenizer/tokenizer_config.json", model_max_length=78),
        "the tokenizer makes prompts of 78 tokens, and the text_encoder takes 77",
    )
    tiny.tokenizer.model_max_length = 100
    with pytest.raises(ValueError, match="makes prompts of 100 tokens"):
        StableDiffusion(tiny)


def test_text_encoders_of_other_models(tiny, tiny_xl, diffusers):
    import transformers

    first, second = tiny_xl.text_encoder, tiny_xl.text_encoder_2
    tiny_xl.text_encoder, tiny_xl.text_encoder_2 = second, first
    with pytest.raises(ValueError, match=r"takes 112 features|text_encoder is a CLIPTextModelWith"):
        StableDiffusion(tiny_xl)
    tiny_xl.text_encoder, tiny_xl.text_encoder_2 = second, second  # 64 + 64 features
    with pytest.raises(
        ValueError, match=r"the text_encoder is a CLIPTextModelWithProjection, and that"
    ):
        StableDiffusion(tiny_xl)
    tiny.text_encoder = second
    with pytest.raises(
        ValueError, match=r"StableDiffusionPipeline is a CLIPTextModel: its prompts"
    ):
        StableDiffusion(tiny)
    config = {**first.config.to_dict(), "hidden_size": 64}
    wide = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
    tiny.text_encoder, tiny_xl.text_encoder, tiny_xl.text_encoder_2 = wide, wide, second
    with pytest.raises(ValueError, match=r"prompts of 32 features .* text_encoder makes 64"):
        StableDiffusion(tiny)
    with pytest.raises(ValueError, match=r"prompts of 96 features .* and text_encoder_2 make 128"):
        StableDiffusion(tiny_xl)
    tiny.text_encoder = None  # prompts from elsewhere
    assert StableDiffusion(tiny) is not None


# Settings that a class does not hear


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("PNDMScheduler", {"rescale_betas_zero_snr": True}),
        ("HeunDiscreteScheduler", {"rescale_betas_zero_snr": True}),
        ("DPMSolverMultistepScheduler", {"timestep_type": "continuous"}),
        ("DDIMScheduler", {"use_flow_sigmas": True}),
        ("PNDMScheduler", {"flow_shift": 3.0}),
        ("EulerDiscreteScheduler", {"shift": 3.0}),
        ("DDIMScheduler", {"snr_shift_scale": 3.0}),
        ("DDIMScheduler", {"sigma_data": 1.0}),
    ],
)
def test_settings_of_another_scheduler_are_not_ignored(folders, tmp_path, kind, changed):
    """`from_config` keeps what the other was trained with in the file, and its class ignores it."""
    folder = tmp_path / "m"
    shutil.copytree(folders["2.x-v"], folder)
    file, index = folder / "scheduler" / "scheduler_config.json", folder / "model_index.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | {"_class_name": kind} | changed), encoding="utf-8")
    parts = json.loads(index.read_text(encoding="utf-8"))
    index.write_text(json.dumps(parts | {"scheduler": ["diffusers", kind]}), encoding="utf-8")
    refused(folder, f"a {kind}, has {next(iter(changed))} = .* and ignores it")
    neutral = {"rescale_betas_zero_snr": False, "timestep_type": "discrete", "shift": 1.0}
    file.write_text(json.dumps(content | {"_class_name": kind} | neutral), encoding="utf-8")
    load_stable_diffusion(folder)


def test_a_pipeline_does_not_ignore_them_either(tiny, diffusers):
    trained = diffusers.DDIMScheduler.from_config(
        tiny.scheduler.config, rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )
    tiny.scheduler = diffusers.PNDMScheduler.from_config(trained.config)
    with pytest.raises(ValueError, match="a PNDMScheduler, has rescale_betas_zero_snr = True"):
        StableDiffusion(tiny)


@pytest.mark.parametrize(
    "changed",
    [
        {"hidden_size": 0, "num_hidden_layers": 0, "max_position_embeddings": 2**28},
        {"max_position_embeddings": 2**24},
        {"vocab_size": 2**22},
        {"layer_norm_eps": None},
    ],
)
def test_text_encoders_of_no_size(settings, changed):
    refused(settings("1.x", "text_encoder/config.json", **changed), "its text_encoder has ")
