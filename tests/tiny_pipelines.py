"""Miniature pipelines of diffusers with random weights, which take prompts as embeddings."""

import inspect

import torch

from odesolvers.models import save_tiny_stable_diffusion

FAMILIES = ("1.x", "2.x-v", "xl", "sd3", "flux", "wan", "cogvideox")
"""Text to image by UNets and by transformers of flow matching, and text to video."""

WIDTH = {"1.x": 32, "2.x-v": 32, "xl": 96, "sd3": 32, "flux": 32, "wan": 32, "cogvideox": 32}
SHAPE = {
    "sd3": (1, 4, 8, 8),
    "flux": (1, 16, 16),
    "wan": (1, 4, 2, 4, 4),
    "cogvideox": (1, 3, 4, 2, 2),
}


def save_pipeline(folder, family):
    """Writes the pipeline of a family to a folder."""
    import diffusers

    if family in ("1.x", "2.x-v", "xl"):
        return save_tiny_stable_diffusion(folder, family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make = {"sd3": _sd3, "flux": _flux, "wan": _wan, "cogvideox": _cogvideox}
        pipeline = make[family](diffusers)
    pipeline.save_pretrained(folder)
    return None


def load_pipeline(folder, dtype=torch.float32):
    import diffusers

    index = diffusers.DiffusionPipeline.load_config(folder)
    parts = inspect.signature(getattr(diffusers, index["_class_name"]).__init__).parameters
    encoders = [name for name in parts if name.startswith(("text_", "token"))]
    absent = [name for name in encoders if index.get(name, [None])[0] is None]
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(absent))
    pipeline.to(dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(family, seed=3, n=1):
    shape = SHAPE.get(family, (1, 4, 8, 8))
    return torch.randn(n, *shape[1:], generator=torch.Generator().manual_seed(seed))


def conditions(family, dtype=torch.float32):
    """The prompt and its negative as keyword arguments of the pipeline, with guidance."""
    generator = torch.Generator().manual_seed(5)

    def embedding(*shape):
        return torch.randn(1, *shape, generator=generator).to(dtype)

    length, width = (7, WIDTH[family])
    both = {"prompt_embeds": embedding(length, width)}
    both["negative_prompt_embeds"] = embedding(length, width)
    if family in ("xl", "sd3", "flux"):
        both["pooled_prompt_embeds"] = embedding(64 if family == "xl" else 32)
        both["negative_pooled_prompt_embeds"] = embedding(64 if family == "xl" else 32)
    sizes = {
        "flux": {"height": 16, "width": 16},
        "wan": {"height": 32, "width": 32, "num_frames": 5},
        "cogvideox": {"height": 16, "width": 16, "num_frames": 9},
    }
    guidance = "true_cfg_scale" if family == "flux" else "guidance_scale"
    return {**both, **sizes.get(family, {}), guidance: 3.0}


def run(pipeline, family, latents, n=6, dtype=torch.float32, **options):
    """The latents that the pipeline makes of others, under guidance; `dtype` is that of the network."""
    options = {"num_inference_steps": n, "output_type": "latent", **options}
    return pipeline(latents=latents, **conditions(family, dtype), **options)[0]


def _vae(diffusers, channels):
    return diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        sample_size=16,
        shift_factor=0.06,
        scaling_factor=1.5,
    )


def _sd3(diffusers):
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=8,
    )
    absent = ("text_encoder", "text_encoder_2", "text_encoder_3")
    absent += ("tokenizer", "tokenizer_2", "tokenizer_3")
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(diffusers, 4),
        **dict.fromkeys(absent),
    )


def _flux(diffusers):
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    absent = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    return diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(diffusers, 4),
        **dict.fromkeys(absent),
    )


def _wan(diffusers):
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=64,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    return diffusers.WanPipeline(
        transformer=transformer,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
    )


def _cogvideox(diffusers):
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        max_text_seq_length=7,
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    return diffusers.CogVideoXPipeline(
        transformer=transformer,
        scheduler=diffusers.CogVideoXDPMScheduler(
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            rescale_betas_zero_snr=True,
        ),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
    )
