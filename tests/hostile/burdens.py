"""Small folders and files of Stable Diffusion that ask for much: layers, widths, blocks, words, junk."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import load_file

from .bend import joined, split
from .corpus import file, saved
from .stable_diffusion import JSONS, both, content, folder, home, written
from .watch import Case

LONG: tuple[Any, ...] = (50, 100, 500, 10_000, 2**31, -500)
MANY: tuple[Any, ...] = (*LONG, [500, 500], [[50] * 50, [50] * 50], [100] * 100, [[100] * 99] * 99)
SETTINGS = {
    "unet": {
        **dict.fromkeys(("layers_per_block", "transformer_layers_per_block"), MANY),
        "reverse_transformer_layers_per_block": MANY,
        **dict.fromkeys(("block_out_channels", "attention_head_dim", "num_attention_heads"), MANY),
        **dict.fromkeys(("cross_attention_dim", "norm_num_groups", "conv_in_kernel"), MANY),
        **dict.fromkeys(("num_class_embeds", "encoder_hid_dim", "time_embedding_dim"), LONG),
        **dict.fromkeys(("time_cond_proj_dim", "addition_time_embed_dim", "sample_size"), LONG),
        **dict.fromkeys(("in_channels", "out_channels", "conv_out_kernel", "freq_shift"), LONG),
    },
    "vae": {
        **dict.fromkeys(("layers_per_block", "block_out_channels", "norm_num_groups"), MANY),
        **dict.fromkeys(("in_channels", "out_channels", "latent_channels", "sample_size"), LONG),
    },
    "text_encoder": dict.fromkeys(
        (
            *("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"),
            *("max_position_embeddings", "num_attention_heads", "projection_dim"),
        ),
        MANY,
    ),
}
TINY = ("num_encoder_blocks", "num_decoder_blocks")
CHANNELS = ("encoder_block_out_channels", "decoder_block_out_channels")
PARENTS = (
    *("model.diffusion_model.input_blocks", "model.diffusion_model.output_blocks"),
    *("model.diffusion_model.middle_block", "model.diffusion_model", "first_stage_model"),
    *("first_stage_model.encoder.down", "first_stage_model.decoder.up", "cond_stage_model"),
    *("cond_stage_model.transformer.text_model.encoder.layers", "conditioner.embedders"),
    *("cond_stage_model.model.transformer.resblocks", "model_ema", "denoiser"),
)


def burdens() -> Iterator[Case]:
    """Settings, lists, tables and names that are long, in folders and beside single files."""
    for loader in ("sd", "config"):
        for part, names in SETTINGS.items():
            for name, values in names.items():
                for value in values:
                    bad = {**content(f"{part}/config.json"), name: value}
                    label = f"{part} {name} = {str(value)[:30]}"
                    yield folder(label, written(f"{part}/config.json", bad), loader)
        for blocks, width, layers in itertools.product((2, 10, 40, 99), (1, 32), (1, 5, 90)):
            yield folder(f"unet {blocks} x {layers} x {width}", unet(blocks, width, layers), loader)
            yield folder(f"vae {blocks} x {layers} x {width}", vae(blocks, width, layers), loader)
        for name in (*TINY, *CHANNELS):
            for value in MANY:
                yield folder(f"tiny VAE {name} = {str(value)[:30]}", tiny({name: value}), loader)
        deep = {name: [90] * 90 for name in TINY} | {name: [1] * 90 for name in CHANNELS}
        yield folder("tiny VAE deep", tiny(deep), loader)
        for size in (10**4, 10**5, 10**6):
            yield from junk(size, loader)
    for count in (99, 2000, 30_000):
        yield from blocks_of(count)
    for part in ("unet", "vae", "text_encoder"):
        yield from swollen(part)
    for number in (1e3, 1e5, 1e9, 10**30, 1.5):
        for name in ("num_train_timesteps", "steps_offset"):
            bad = {**content("scheduler/scheduler_config.json"), name: number}
            yield folder(f"{name} = {number}", written("scheduler/scheduler_config.json", bad))


def unet(blocks: int, width: int, layers: int) -> Any:
    settings = {
        "block_out_channels": [width] * blocks,
        "down_block_types": ["CrossAttnDownBlock2D"] * blocks,
        "up_block_types": ["CrossAttnUpBlock2D"] * blocks,
        "norm_num_groups": 1,
        "attention_head_dim": 1,
        "layers_per_block": layers,
        "transformer_layers_per_block": layers,
    }
    return written("unet/config.json", {**content("unet/config.json"), **settings})


def vae(blocks: int, width: int, layers: int) -> Any:
    settings = {
        "block_out_channels": [width] * blocks,
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "norm_num_groups": 1,
        "layers_per_block": layers,
    }
    return written("vae/config.json", {**content("vae/config.json"), **settings})


def tiny(settings: dict[str, Any]) -> Any:
    index = {**content("model_index.json"), "vae": ["diffusers", "AutoencoderTiny"]}
    return both(written("model_index.json", index), written("vae/config.json", settings))


def junk(size: int, loader: str) -> Iterator[Case]:
    """JSON of so many bytes in one file, and in all of them."""
    fill = {
        "numbers": {"junk": list(range(size // 8))},
        "names": {f"k{n}": n for n in range(size // 14)},
        "lists": {"junk": [[]] * (size // 4)},
        "a text": {"junk": "x" * size},
        "a setting": {
            "trained_betas": [0.1] * (size // 5),
            "block_out_channels": [1] * (size // 3),
        },
    }
    for label, more in fill.items():
        for name in JSONS:
            bad = {**content(name), **more}
            yield folder(f"{name} with {size} bytes of {label}", written(name, bad), loader)
        changes = [
            written(name, {**content(name), **more}) for name in JSONS if "vocab" not in name
        ]
        yield folder(f"all with {size} bytes of {label}", both(*changes), loader)
    words = {f"w{n}": n for n in range(size // 14)}
    merges = "#version: 0.2\n" + "".join(f"a{n} b{n}\n" for n in range(size // 14))
    change = both(written("tokenizer/vocab.json", words), written("tokenizer/merges.txt", merges))
    yield folder(f"{len(words)} words and merges", change, loader)
    same = "#version: 0.2\n" + "a t</w>\n" * (size // 8)
    yield folder(f"{size} bytes of merges", written("tokenizer/merges.txt", same), loader)
    added = {"added_tokens_decoder": {str(n): {"content": f"<{n}>"} for n in range(size // 30)}}
    bad = {**content("tokenizer/tokenizer_config.json"), **added}
    yield folder(
        f"{size} bytes of added tokens", written("tokenizer/tokenizer_config.json", bad), loader
    )


def blocks_of(count: int) -> Iterator[Case]:
    """Single files with so many empty tensors under one name, in some forms."""
    header, numbers = split((home() / "a.safetensors").read_bytes())
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    forms = (
        "{}",
        "{}.0.in_layers.0.weight",
        "{}.1.transformer_blocks.0.attn1.to_q.weight",
        "x{}.y",
    )
    for parent, form in itertools.product(PARENTS, forms):
        more = {f"{parent}.{form.format(k)}": empty for k in range(count)}
        data = joined({**header, **more}, numbers)
        yield file("sd", f"{count} of {parent}.{form}", "a.safetensors", data)
    rng = random.Random(count)
    words = (
        "input_blocks",
        "output_blocks",
        "down",
        "up",
        "resblocks",
        "layers",
        "0",
        "1",
        "attn_1",
    )
    names = {f"{rng.choice(PARENTS)}.{'.'.join(rng.choices(words, k=9))}" for _ in range(count)}
    data = joined({**header, **dict.fromkeys(sorted(names), empty)}, numbers)
    yield file("sd", f"{count} names at random", "a.safetensors", data)


def swollen(part: str) -> Iterator[Case]:
    """Folders with many tensors beside those of a part, empty or of one number."""
    stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    name = f"{part}/{stem}.safetensors"
    weights = load_file(home() / "folder" / name)
    layers = {"layers_per_block": 99, "num_hidden_layers": 99}
    config = {**content(f"{part}/config.json"), **layers}
    for count, size in itertools.product((2000, 9000, 20_000), (0, 1, 32)):
        data = saved(weights | {f"w{k}": torch.zeros(size) for k in range(count)})
        yield folder(f"{part} and {count} tensors of {size}", written(name, data))
        change = both(written(name, data), written(f"{part}/config.json", config))
        yield folder(f"{part}, 99 layers and {count} tensors of {size}", change)
