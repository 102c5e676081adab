"""The original layout of single-file checkpoints, as the converters of diffusers read it."""

import torch


def original_layout(pipeline):
    """The weights of a pipeline under the names of the original repositories."""
    xl = hasattr(pipeline, "text_encoder_2")
    out = {}
    for key, value in pipeline.unet.state_dict().items():
        out["model.diffusion_model." + _original_unet(key, xl)] = value
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


def _original_unet(key, xl):
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
            with_attention = block == (0 if xl else 1)
            return f"output_blocks.{2 * block + 1}.{2 if with_attention else 1}.{rest}"
        place = f"output_blocks.{2 * block + layer}"
    if kind == "resnets":
        return f"{place}.0.{_replace(rest, *resnet)}"
    return f"{place}.1.{rest}"


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
