"""Miniature Stable Diffusion pipelines with random weights, for tests and experiments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch

from .stable_diffusion import import_diffusers
from .tokenizers import letters

Family = Literal["1.x", "2.x", "2.x-v", "xl"]


def save_tiny_stable_diffusion(
    folder: str | Path, family: Family = "1.x", *, seed: int = 0
) -> None:
    """Write a small but complete pipeline that `load_stable_diffusion` can read.

    It has all parts of a published pipeline (network, VAE, text encoders, a byte-level CLIP tokenizer,
    scheduler settings) with a few hundred thousand random weights. Latents are ``(4, 8, 8)``, images
    ``(3, 16, 16)``. Its samples are not meaningful images.

    Args:
        folder: the output directory.
        family: "1.x", "2.x" (epsilon), "2.x-v" (v prediction) or "xl".
        seed: seed of the weights; the global random state is not changed.

    Raises:
        ImportError: if diffusers or transformers is not installed.
        ValueError: if `family` is unknown.
    """
    if family not in ("1.x", "2.x", "2.x-v", "xl"):
        raise ValueError(f"family must be '1.x', '2.x', '2.x-v' or 'xl', got {family!r}")
    diffusers = import_diffusers()
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: dict[str, Any] = {
            "vae": diffusers.AutoencoderKL(
                block_out_channels=(32, 64),
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                latent_channels=4,
                sample_size=16,
                scaling_factor=0.13025 if family == "xl" else 0.18215,
            ),
            "unet": diffusers.UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(32, 64),
                layers_per_block=1,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D")
                if family != "xl"
                else ("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")
                if family != "xl"
                else ("CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=96 if family == "xl" else 32,
                attention_head_dim=8 if family == "1.x" else (2, 4),
                use_linear_projection=family != "1.x",
                **_added_conditions() if family == "xl" else {},
            ),
            "text_encoder": _text_encoder("gelu" if family.startswith("2") else "quick_gelu"),
            "tokenizer": _tokenizer(folder / "tokenizer"),
        }
        if family == "xl":
            parts["text_encoder_2"] = _text_encoder("gelu", projection=True)
            parts["tokenizer_2"] = _tokenizer(folder / "tokenizer_2")
    schedule = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "prediction_type": "v_prediction" if family == "2.x-v" else "epsilon",
    }
    if family == "xl":
        scheduler = diffusers.EulerDiscreteScheduler(**schedule, timestep_spacing="leading")
        pipeline = diffusers.StableDiffusionXLPipeline(
            **parts, scheduler=scheduler, add_watermarker=False
        )
    else:
        ended = {**schedule, "set_alpha_to_one": False}
        scheduler = (
            diffusers.PNDMScheduler(**ended, skip_prk_steps=True)
            if family == "1.x"
            else diffusers.DDIMScheduler(**ended, clip_sample=False)
        )
        pipeline = diffusers.StableDiffusionPipeline(
            **parts,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)


def _added_conditions() -> dict[str, Any]:
    """Settings of XL's added conditions: six size and crop numbers in 8 features each, 64 pooled."""
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 64,
    }


def _text_encoder(activation: str, *, projection: bool = False) -> Any:
    import transformers

    width = 64 if projection else 32
    config = transformers.CLIPTextConfig(
        vocab_size=len(_vocabulary()),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=width,
        hidden_act=activation,
        bos_token_id=len(_vocabulary()) - 2,
        eos_token_id=len(_vocabulary()) - 1,
    )
    if projection:
        return transformers.CLIPTextModelWithProjection(config)
    return transformers.CLIPTextModel(config)


def _tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer with a single merge, so that text is encoded almost byte by byte."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: k for k, token in enumerate(_vocabulary())}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\na t</w>\n", encoding="utf-8")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return transformers.CLIPTokenizer.from_pretrained(folder)


def _vocabulary() -> list[str]:
    """The bytes inside and at the end of words, a word of two letters, and the special tokens."""
    singles = letters()
    ends = [letter + "</w>" for letter in singles]
    return [*singles, *ends, "at</w>", "<|startoftext|>", "<|endoftext|>"]
