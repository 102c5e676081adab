"""Pipelines of Stable Diffusion whose parts do not fit each other, or themselves: no wrong number."""

import math
import shutil
import time

import pytest
import torch

from odesolvers.models import load_stable_diffusion

from .conftest import load_pipeline
from .original_layout import original_layout
from .pipelines import refused

ENCODERS = ("text_encoder", "text_encoder_2")
PARTS = ("unet", "vae", *ENCODERS)
NAN, INF = math.nan, math.inf


# Weights


@pytest.mark.parametrize("part", PARTS)
def test_weights_without_a_place(edited, part):
    for name in ("another.weight", "encoder.layers.99.mlp.fc1.bias", "conv_in.position_ids.weight"):
        folder = edited("xl", part, lambda w, n=name: w.update({n: torch.ones(2)}))
        refused(folder, f"its {part} has weights .* no place, such as {name}")


@pytest.mark.parametrize("part", ENCODERS)
def test_layers_that_a_configuration_leaves_out(edited, part):
    """The library would run two of the three layers, and make a plausible prompt."""
    refused(edited("xl", part, num_hidden_layers=2), f"its {part} has .*layers.2.* and 13 more")
    refused(edited("xl", part, num_hidden_layers=4), f"weights of the {part} are missing")


def test_what_text_encoders_ignore_is_ignored(edited, folders):
    """Positions that older versions saved, and the rest of a file of all of CLIP."""
    more = {
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "logit_scale": torch.ones(()),
        "vision_model.post_layernorm.weight": torch.ones(2),
        "visual_projection.weight": torch.ones(2, 2),
    }
    projection = {"text_projection.weight": torch.ones(2, 2)}  # the second needs its own
    expected = load_stable_diffusion(folders["xl"]).encode_prompt("a cat")["positive"]
    for part, added in (("text_encoder", more | projection), ("text_encoder_2", more)):
        found = load_stable_diffusion(edited("xl", part, lambda w, a=added: w.update(a)))
        encoded = found.encode_prompt("a cat")["positive"]
        assert torch.equal(encoded["encoder_hidden_states"], expected["encoder_hidden_states"])


@pytest.mark.parametrize("part", ENCODERS)
def test_names_of_older_and_newer_versions(edited, folders, part):
    """The weights of a text encoder are within `text_model`, or not, by the version that saved them."""

    def rename(weights):
        for name in [n for n in weights if "projection" not in n]:
            short = name.removeprefix("text_model.")
            weights[f"text_model.{name}" if short == name else short] = weights.pop(name)

    expected, found = (
        load_stable_diffusion(folder).encode_prompt("a cat")["positive"]["encoder_hidden_states"]
        for folder in (folders["xl"], edited("xl", part, rename))
    )
    assert torch.equal(found, expected)


def test_names_of_older_autoencoders(edited, folders):
    """As in the published folders of Stable Diffusion 1."""
    names = ("to_q.", "query."), ("to_k.", "key."), ("to_v.", "value."), ("to_out.0.", "proj_attn.")

    def rename(weights):
        for name in [n for n in weights if ".attentions." in n]:
            value = weights.pop(name)
            for new, old in names:
                name = name.replace(new, old)
            weights[name] = value

    latents = torch.ones(1, 4, 8, 8)
    found, expected = (
        load_stable_diffusion(folder).decode(latents)
        for folder in (edited("1.x", "vae", rename), folders["1.x"])
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("part", PARTS)
def test_weights_of_other_shapes(edited, part):
    for place in (0, 3, -1):

        def cut(weights, place=place):
            name = sorted(weights)[place]
            weights[name] = weights[name][..., :-1].clone()

        refused(edited("xl", part, cut), rf"its {part} has (\S+ of shape|weights .* no place)")


KINDS = (torch.int8, torch.uint8, torch.bool, torch.int64, torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("part", PARTS)
def test_weights_that_are_no_floating_point(edited, part):
    for kind in KINDS:

        def convert(weights, kind=kind):
            name = sorted(weights)[3]
            weights[name] = weights[name].to(kind)

        refused(edited("xl", part, convert), rf"its {part} has '\S+' in \w+, and weights are read")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_weights_that_are_no_numbers(edited, part, value):
    for kind in (torch.float32, torch.float16, torch.bfloat16):

        def spoil(weights, kind=kind):
            name = sorted(weights)[3]
            weights[name] = weights[name].to(kind)
            weights[name].flatten()[-1] = value

        refused(edited("xl", part, spoil), f"its {part} has NaN or infinity in ")


def test_weights_that_overflow_where_they_are_asked_for_in_half_precision(edited):
    folder = edited("1.x", "unet", lambda w: w["conv_in.weight"].flatten()[0].fill_(1e6))
    assert load_stable_diffusion(folder).unet.conv_in.weight.max() == 1e6
    match = r"its unet has NaN or infinity in conv_in.weight, in torch.float16: load it in"
    refused(folder, match, dtype=torch.float16)


@pytest.mark.parametrize("family", ["1.x", "2.x", "xl"])
def test_shards(folders, tmp_path, family):
    """Of every part; and one whose second file has a weight of the first, or one without a place."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "m"
    shutil.copytree(folders[family], folder)
    for part in PARTS[: 4 if family == "xl" else 3]:
        (path,) = (folder / part).glob("*.safetensors")
        weights = load_file(path)
        names = sorted(weights)
        halves = [{n: weights[n] for n in names[k::2]} for k in range(2)]
        files = [path.with_name(f"{path.stem}-{k:05}-of-00002.safetensors") for k in (1, 2)]
        for half, file in zip(halves, files, strict=True):
            save_file(half, file, metadata={"format": "pt"})
        path.unlink()
    model, whole = load_stable_diffusion(folder), load_stable_diffusion(folders[family])
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    twice = {**halves[1], names[0]: 2 * weights[names[0]]}
    save_file(twice, files[1], metadata={"format": "pt"})
    refused(folder, f"its {part} has '{names[0]}' in two files")
    save_file({**halves[1], "odd": torch.ones(2)}, files[1], metadata={"format": "pt"})
    refused(folder, f"its {part} has weights .* such as odd")


# Single files

EXTRA = {
    "unet": (
        "model.diffusion_model.input_blocks.77.0.in_layers.0.weight",
        "model.diffusion_model.what.bias",
    ),
    "vae": ("first_stage_model.encoder.down.7.block.0.norm1.weight", "first_stage_model.what"),
}
LAYER = {
    "1.x": ("cond_stage_model.transformer.text_model.encoder.layers.3.mlp.fc1.bias",),
    "xl": (
        "conditioner.embedders.0.transformer.text_model.encoder.layers.3.mlp.fc1.bias",
        "conditioner.embedders.1.model.transformer.resblocks.3.mlp.c_fc.bias",
        "conditioner.embedders.2.what.bias",
    ),
}


@pytest.mark.parametrize("family", ["1.x", "xl"])
def test_weights_of_single_files_without_a_place(folders, tmp_path, family):
    """The converters of diffusers leave them out."""
    from safetensors.torch import save_file

    weights = original_layout(load_pipeline(folders[family]))
    path = tmp_path / "a.safetensors"
    names = {name: part for part, extra in EXTRA.items() for name in extra}
    names |= dict.fromkeys(LAYER[family][:1], "text_encoder")
    names |= dict.fromkeys(LAYER[family][1:], "text_encoder_2")
    for name, part in names.items():
        save_file({**weights, name: torch.ones(3, 5)}, path)
        match = rf"its {part} has weights .* no place, 1 of them, as one of shape \(3, 5\)"
        refused(path, match, config=folders[family])
    for kind in KINDS:
        name = next(key for key in sorted(weights) if key.startswith("first_stage_model"))
        save_file({**weights, name: weights[name].to(kind)}, path)
        refused(path, rf"its vae has '{name}' in ", config=folders[family])
    spoilt = {**weights, name: weights[name] * NAN}
    save_file(spoilt, path)
    refused(path, "its vae has NaN or infinity in", config=folders[family])
    ignored = {
        "first_stage_model.loss.logvar": torch.zeros(()),
        "model_ema.num_updates": torch.ones((), dtype=torch.int32),
        **{f"model_ema.diffusion_modelblock{k}": torch.zeros(1) for k in range(300)},
    }
    if family == "1.x":
        ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
        ignored[ids] = torch.arange(77)[None]
    save_file(weights | ignored, path)
    assert load_stable_diffusion(path, config=folders[family]) is not None


def test_the_last_layer_of_stable_diffusion_2(folders, tmp_path):
    """Its files have one layer more than its text encoder, which takes the last but one."""
    from odesolvers.models.single_files import read_single_file

    weights = original_layout(load_pipeline(folders["xl"]))
    xl, two = "conditioner.embedders.1.model.", "cond_stage_model.model."
    others = {k: v for k, v in weights.items() if not k.startswith("conditioner.")}
    encoder = {k.replace(xl, two): v for k, v in weights.items() if k.startswith(xl)}
    first = {k: v for k, v in encoder.items() if ".resblocks.0." in k}
    last = {k.replace(".0.", ".3."): v.clone() for k, v in first.items()}
    after = {k.replace(".0.", ".4."): v.clone() for k, v in first.items()}
    scale = {f"{two}logit_scale": torch.zeros(())}
    from safetensors.torch import save_file

    from odesolvers.models.single_files import check_used

    pipeline = load_pipeline(folders["xl"])
    pipeline.text_encoder, pipeline.text_encoder_2 = pipeline.text_encoder_2.text_model, None
    pipeline.text_encoder.config.num_hidden_layers = 3
    for more, fits in (({}, True), (last | scale, True), (last | after, False)):
        save_file(others | encoder | more, tmp_path / "a.safetensors")
        file = read_single_file(tmp_path / "a.safetensors")
        if fits:
            check_used(file, pipeline)
        else:
            with pytest.raises(ValueError, match=r"its text_encoder has weights .* 12 of them"):
                check_used(file, pipeline)


def test_single_files_of_many_blocks(folders, tmp_path):
    """The converters of diffusers compare each name with each block: 20 seconds for 3000."""
    from safetensors.torch import save_file

    weights = original_layout(load_pipeline(folders["1.x"]))
    empty = torch.zeros(0)
    parents = (
        *("model.diffusion_model.input_blocks", "model.diffusion_model.output_blocks.1.1"),
        *("first_stage_model.encoder.down", "cond_stage_model.transformer.text_model"),
        *("model.diffusion_model", "x.diffusion_model"),
    )
    for parent in parents:
        many = {f"{parent}.{k}.0.weight": empty for k in range(3000)}
        save_file(weights | many, tmp_path / "a.safetensors")
        begin = time.perf_counter()
        refused(tmp_path / "a.safetensors", "more than any network", config=folders["1.x"])
        assert time.perf_counter() - begin < 5
    wide = {f"a.{j}.{k}{'.0' * 14}": empty for j in range(90) for k in range(90)}
    for more in (wide, {"a" + ".a" * 10**6: empty}, {"a" * 10**6: empty}):
        save_file(weights | more, tmp_path / "a.safetensors")
        refused(tmp_path / "a.safetensors", "more or longer names", config=folders["1.x"])
