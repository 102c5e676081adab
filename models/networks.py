"""Inputs, conditions and device of the networks of Stable Diffusion."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from .configurations import NEUTRAL, check_sample_size, check_vae, flat
from .edm.checks import brief
from .schedules import DISCRETE, EDM, FLOW

OTHER_INPUTS = {
    5: "a depth map beside the latents, as of Stable Diffusion 2 depth",
    7: "a low resolution image beside the latents, as of the upscaler",
    8: "the latents of an image to edit beside its own, as of InstructPix2Pix and CosXL Edit",
    9: "a mask and a masked image beside the latents, as of inpainting",
}
"""The networks of other tasks, by their number of input channels."""

LEVELS = (
    "rescale_betas_zero_snr",
    "timestep_type",
    "sigma_data",
    "snr_shift_scale",
    "trained_betas",
)
"""Settings that decide the noise levels of a network, beside its betas and timesteps."""

WIDTH_2 = 1024
"""The features of a token in the prompts of Stable Diffusion 2."""

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""The schedule of the published networks."""


def check_network(pipeline: Any, *, is_xl: bool) -> None:
    """Check that the network of a pipeline takes latents, a noise level and a prompt, and no more.

    Raises:
        ValueError: naming the part that is missing, or the input that the network takes besides.
    """
    for name in ("unet", "vae", "scheduler"):
        if getattr(pipeline, name, None) is None:
            raise ValueError(f"the pipeline has no {name}: give it one")
    check_vae(pipeline.vae.config, is_xl=is_xl)
    check_sample_size(pipeline.unet.config.sample_size)
    config, latents = pipeline.unet.config, pipeline.vae.config.latent_channels
    channels = config.in_channels
    if channels != latents:
        other = OTHER_INPUTS.get(channels, f"other inputs beside the {latents} channels of latents")
        raise ValueError(
            f"the UNet takes {channels} channels and the VAE makes {latents}: it expects {other}. "
            "Supported are networks of text to image, which take the latents alone"
        )
    if config.out_channels != channels:
        raise ValueError(
            f"the UNet returns {config.out_channels} channels for {channels}: a learned variance is not "
            "supported"
        )
    added = getattr(config, "addition_embed_type", None)
    if added != ("text_time" if is_xl else None):
        raise ValueError(
            f"the UNet has addition_embed_type={added!r} in a {type(pipeline).__name__}, which gives "
            f"{'text_time' if is_xl else 'no'} conditions: the parts are of different models"
        )
    if is_xl and pipeline.text_encoder_2 is not None:
        width = config.projection_class_embeddings_input_dim
        given = 6 * config.addition_time_embed_dim + pipeline.text_encoder_2.config.projection_dim
        if width != given:
            raise ValueError(
                f"the UNet takes {width} features of added conditions, and the six sizes and the pooled "
                f"prompt of text_encoder_2 have {given}: it is another network than XL's own for text "
                "to image, such as its refiner"
            )
    for name in ("class_embed_type", "num_class_embeds"):
        if getattr(config, name, None) is not None:
            raise ValueError(
                f"the UNet has {name}={getattr(config, name)!r}, a condition beside the prompt, which "
                "is not supported"
            )
    _check_projection(config)
    _check_encoders(pipeline, is_xl=is_xl)
    check_tokenizers(pipeline)


def _check_encoders(pipeline: Any, *, is_xl: bool) -> None:
    """Check that the text encoders of a pipeline make the prompts that its network takes."""
    names = ("text_encoder", "text_encoder_2")[: 1 + is_xl]
    encoders = {n: e for n in names if (e := getattr(pipeline, n)) is not None}
    for name, encoder in encoders.items():
        if hasattr(encoder, "text_projection") != (name == "text_encoder_2"):
            kind = "CLIPTextModel" + "WithProjection" * (name == "text_encoder_2")
            raise ValueError(
                f"the {name} is a {type(encoder).__name__}, and that of a {type(pipeline).__name__} is "
                f"a {kind}: its prompts would be read as something else"
            )
    width = sum(encoder.config.hidden_size for encoder in encoders.values())
    taken = sorted(set(flat(pipeline.unet.config.cross_attention_dim)))
    if encoders and (is_xl is False or len(encoders) == 2) and taken != [width]:
        raise ValueError(
            f"the UNet takes prompts of {' and '.join(map(str, taken))} features for each token, and "
            f"{' and '.join(encoders)} {'make' if is_xl else 'makes'} {width}: the parts are of "
            "different models"
        )


def check_tokenizers(pipeline: Any) -> None:
    """Check that the text encoders of a pipeline know all tokens of its tokenizers.

    Raises:
        ValueError: naming the tokenizer.
    """
    for name in ("tokenizer", "tokenizer_2"):
        of = name.replace("tokenizer", "text_encoder")
        tokenizer, encoder = getattr(pipeline, name, None), getattr(pipeline, of, None)
        if tokenizer is None or encoder is None:
            continue
        words = tokenizer.get_vocab()
        word, last = max(words.items(), key=itemgetter(1))
        known = encoder.get_input_embeddings().num_embeddings
        if last >= known:
            raise ValueError(
                f"the {name} has token {last}, {brief(word)}, and the {of} knows {known}, which are "
                f"numbered from 0: it is that of another model, or tokens were added without their "
                f"embeddings, for which there are pipeline.load_textual_inversion and "
                f"{of}.resize_token_embeddings"
            )
        longest, most = tokenizer.model_max_length, encoder.config.max_position_embeddings
        if longest > most:
            raise ValueError(
                f"the {name} makes prompts of {longest} tokens, and the {of} takes {most}: set its "
                f"model_max_length to that"
            )
        end, marked = encoder.config.eos_token_id, tokenizer.eos_token_id
        # Configurations of OpenAI and of Stable Diffusion XL say 2, which stands for the highest number.
        if hasattr(encoder, "text_projection") and (last if end == 2 else end) != marked:
            raise ValueError(
                f"the {of} reads a prompt at its token {last if end == 2 else end}, by its eos_token_id "
                f"{end}, and the {name} ends it by token {marked}: set {of}.config.eos_token_id, and "
                f"that of {of}.text_model, to {marked} if these belong together"
            )


def check_betas(scheduler: Any) -> None:
    """Check that the betas of a scheduler are stated, and are not the defaults of its class.

    A scheduler that is read from a file, or made by `from_config` from one that is, states its own.

    Raises:
        ValueError: if they are not, and the defaults are those of other networks.
    """
    config = scheduler.config
    used = {name: getattr(config, name, None) for name in BETAS}
    unstated = _unstated_betas(config)
    if unstated and used != BETAS:
        kind = type(scheduler).__name__
        raise ValueError(
            f"the scheduler, a {kind}, was made without {', '.join(unstated)}, and the defaults of its "
            f"class lead to {used}, where the published networks have {BETAS}: make it from that of "
            f"the pipeline, {kind}.from_config(pipeline.scheduler.config), or state all three if this "
            "network was trained so"
        )


def _unstated_betas(config: Any) -> list[str]:
    """The settings of betas that a scheduler uses and that are the defaults of its class."""
    if getattr(config, "trained_betas", None) is not None or getattr(
        config, "use_flow_sigmas", False
    ):
        return []
    schedule = getattr(config, "beta_schedule", None)
    between = schedule in ("linear", "scaled_linear", "sigmoid")  # of two betas
    return [
        name
        for name in BETAS
        if name in getattr(config, "_use_default_values", ())
        and (between or name == "beta_schedule")
    ]


def check_replacement(scheduler: Any, own: Any, prediction_type: str | None) -> None:
    """Check that a scheduler leaves nothing unsaid in which that of the checkpoint differs.

    Args:
        scheduler: the one given, which replaces it.
        own: that of the checkpoint, None if it contradicts itself.
        prediction_type: what the network predicts, if the caller says it.

    Raises:
        ValueError: naming the settings that the class of `scheduler` has by default, or has not.
    """
    config, name = scheduler.config, type(scheduler).__name__
    unsaid = getattr(config, "_use_default_values", ())
    wanted = {} if own is None else own.config
    compared: list[str] = []
    if own is not None and _kind_of(scheduler) == _kind_of(own):
        compared = [*_unstated_betas(config), "num_train_timesteps", *LEVELS]
    found = {}
    for key in [*(["prediction_type"] if prediction_type is None else []), *compared]:
        given = config.get(key, NEUTRAL.get(key))
        other = wanted.get(key, NEUTRAL.get(key))
        # A class of another kind that lacks the setting has no choice.
        states = key not in unsaid and (key in config or key not in compared)
        if not states and (own is None or (key in wanted and given != other)):
            found[key] = other
    if found:
        said = ", ".join(f"{key} = {brief(value)}" for key, value in found.items())
        raise ValueError(
            f"the scheduler given, a {name}, does not say its {' and '.join(found)}, and the checkpoint "
            + ("contradicts itself" if own is None else f"says {said}")
            + f": make it by {name}.from_config(pipeline.scheduler.config), or state it"
        )


def _kind_of(scheduler: Any) -> str:
    """The group of schedulers that describe a network by the same settings."""
    name = type(scheduler).__name__
    if name in FLOW or getattr(scheduler.config, "use_flow_sigmas", False):
        return "flow"
    return "edm" if name in EDM else "discrete" if name in DISCRETE else name


def check_stated(pipeline: Any) -> None:
    """Check that the scheduler of Stable Diffusion 2, published with both predictions, says which.

    Raises:
        ValueError: if it does not, and the default of its class is used.
    """
    config = pipeline.scheduler.config
    unsaid = "prediction_type" in getattr(config, "_use_default_values", ())
    if unsaid and WIDTH_2 in flat(pipeline.unet.config.cross_attention_dim):
        raise ValueError(
            f"it is a Stable Diffusion 2 (prompts of {WIDTH_2} features), which was published with "
            f"epsilon and with v prediction, and its scheduler, a {type(pipeline.scheduler).__name__}, "
            "does not say which: pass prediction_type='v_prediction' (of 768 pixels) or 'epsilon' (512)"
        )


def check_conditions(
    config: Any,
    prompt: Any,
    added: Mapping[str, Any],
    timestep_cond: Tensor | None,
) -> None:
    """Check that the conditions of a call are those of the network, and complete.

    Raises:
        TypeError: if a condition is not a tensor.
        ValueError: if a condition is missing or is not one of the network.
    """
    _check_projection(config)  # an IP-Adapter may have been loaded since
    known = () if config.addition_embed_type is None else ("text_embeds", "time_ids")
    for name in sorted(set(added) - set(known)):
        raise ValueError(
            f"added_cond_kwargs has {name!r}, and this network takes {' and '.join(known) or 'none'}"
            + (": IP-Adapters are not supported" if name == "image_embeds" else "")
        )
    missing = set(known) - set(added)
    if prompt is None or missing:
        what = "" if len(missing) in (0, 2) else f": added_cond_kwargs has no {missing.pop()}"
        raise ValueError(
            f"the prompt is missing{what}: pass extra_args=model.encode_prompt('...')['positive'] ('' "
            "for none), or all of encode_prompt's result under ClassifierFreeGuidance"
        )
    for name, value in {"encoder_hidden_states": prompt, **added}.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    width = config.time_cond_proj_dim
    if width is not None and timestep_cond is None:
        raise ValueError(
            "this network was distilled under guidance (LCM) and takes the guidance scale as a "
            "condition: pass extra_args=model.encode_prompt('...', guidance_scale=8.0)['positive']"
        )
    if timestep_cond is not None and (width is None or timestep_cond.shape[1:] != (width,)):
        raise ValueError(
            f"timestep_cond has shape {tuple(timestep_cond.shape)}, and this network takes "
            + ("none" if width is None else f"({width},) for each image")
        )


def expand(value: Tensor | None, x: Tensor, name: str, dtype: torch.dtype) -> Tensor | None:
    """Expand a condition to the batch of `x`, in the dtype of the network; None remains None.

    Raises:
        ValueError: if it is for another number of images, or on another device.
    """
    if value is None:
        return None
    n = x.shape[0]
    if value.shape[0] not in (1, n):
        raise ValueError(
            f"{name} is given for {value.shape[0]} images and the state holds {n}: encode one "
            "prompt, or one for each image"
        )
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device} and the state on {x.device}")
    return value.expand(n, *value.shape[1:]).to(dtype)


def execution_device(network: Any) -> torch.device:
    """The device on which a model of diffusers runs, which offloading moves its weights to and from."""
    if hasattr(network, "_hf_hook"):  # of accelerate
        for module in network.modules():
            device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            if device is not None:
                return torch.device(device)
    for module in (network, *network.children()):  # of diffusers; groups of leaves have it below
        registry = getattr(module, "_diffusers_hook", None)
        hook = None if registry is None else registry.get_hook("group_offloading")
        if hook is not None:
            return torch.device(hook.config.onload_device)
    own: torch.device = network.device
    return own


def _check_projection(config: Any) -> None:
    kind = getattr(config, "encoder_hid_dim_type", None)
    if kind is not None:
        what = "an IP-Adapter" if kind == "ip_image_proj" else f"a projection of kind {kind!r}"
        raise ValueError(
            f"the UNet has {what} (encoder_hid_dim_type={kind!r}), which takes images as conditions: "
            "not supported; pipeline.unload_ip_adapter() removes an IP-Adapter"
        )
