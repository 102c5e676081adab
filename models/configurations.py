"""Settings of the parts of a Stable Diffusion pipeline: their forms and their ranges."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

from .edm.checks import brief

CLIP = (
    *("vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers"),
    *("num_attention_heads", "max_position_embeddings", "hidden_act", "layer_norm_eps"),
    *("attention_dropout", "initializer_range", "initializer_factor"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)
"""The settings of a text encoder."""

STATED = {
    "unet": ("attention_head_dim",),
    "text_encoder": ("hidden_act", "num_attention_heads"),
    "text_encoder_2": ("hidden_act", "num_attention_heads"),
}
"""Settings in which published models differ and that no weight shows, so that a default is a guess."""

TIMESTEPS = 100_000
"""The highest whole number among the settings of a scheduler, which make tables of that length."""

SPACINGS = ("leading", "trailing", "linspace")
"""The spacings of timesteps."""

LAYERS = 100
"""The most layers of a kind; published networks have up to 33."""

SIDE = 10_000
"""The most latents along the side of an image; published networks have 128."""

NEUTRAL = {
    "rescale_betas_zero_snr": False,
    "timestep_type": "discrete",
    "use_flow_sigmas": False,
    "use_dynamic_shifting": False,
    "flow_shift": 1.0,
    "shift": 1.0,
    "snr_shift_scale": 1.0,
    "sigma_data": None,
    "trained_betas": None,
}
"""Settings that decide the noise levels of the schedulers that have them, and the values that change
nothing. `from_config` keeps those of another scheduler, and a class that lacks them ignores them."""

TEXT = 2**20
"""The largest size in a text encoder, of 49,408 words; its positions are listed before its weights."""

SCALE_1, SCALE_XL = 0.18215, 0.13025
"""The scales of latents of Stable Diffusion 1 and 2, which is the default of the class, and of XL."""

FORMS = {bool: "true or false", float: "numbers", str: "texts", type(None): "null"}


def clean_settings(part: str, library: str, kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a configuration that a class has, checked in their forms and sizes.

    Args:
        part: the name of the part, for messages.
        library: "diffusers" or "transformers".
        kind: the class.
        config: the content of the file.

    Raises:
        ValueError: if a setting has another form than its default, is not finite or too large.
    """
    if library == "diffusers":
        import diffusers

        named = config.get("_class_name")
        if named is not None and named != kind:
            raise ValueError(
                f"its {part} is a {kind} by the index and {brief(named)} by its own file"
            )
        parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters
        defaults = {name: parameter.default for name, parameter in parameters.items()}
        lists = {name for name, parameter in parameters.items() if _takes_lists(parameter)}
    else:
        import transformers

        config = _of_text(part, config)
        usual = transformers.CLIPTextConfig()
        defaults = {name: getattr(usual, name) for name in CLIP}
        lists = set()
    settings = {name: config[name] for name in defaults if name in config}
    unsaid = [name for name in STATED.get(part, ()) if settings.get(name) is None]
    if unsaid:
        raise ValueError(
            f"its {part} does not say its {' and '.join(unsaid)}, and models differ in it: state it in "
            "its config.json, as it is in that of the model that this one was trained from"
        )
    if part == "scheduler":
        _check_training(kind, settings)
        check_heard(kind, defaults, config)
    if library == "transformers":
        _check_text(part, settings, defaults)
    for name, value in settings.items():
        if value != defaults[name]:
            if isinstance(value, list) and name not in lists:
                raise ValueError(f"its {part} has a setting {name} = a list, and it is one value")
            _check_setting(part, name, value, defaults[name])
    return settings


def check_heard(kind: str, known: Collection[str], config: Mapping[str, Any]) -> None:
    """Check that a scheduler hears the settings that decide the noise levels.

    Args:
        kind: its class.
        known: the settings that the class has.
        config: its configuration, with what it was given and has no use for.

    Raises:
        ValueError: naming a setting that it ignores.
    """
    for name, neutral in NEUTRAL.items():
        value = config.get(name, neutral)
        if name not in known and value is not None and value != neutral:
            raise ValueError(
                f"the scheduler, a {kind}, has {name} = {brief(value)} in its configuration and ignores "
                "it: the network was trained with another scheduler, so pass that one as scheduler="
            )


def _of_text(part: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the text encoder in a configuration, which may be that of all of CLIP."""
    inner = config.get("text_config")
    for one in (config, inner):
        kind = one.get("model_type", "clip") if isinstance(one, dict) else "clip"
        if kind not in ("clip", "clip_text_model"):
            raise ValueError(
                f"its {part} is of model_type {brief(kind)} by its config.json, and those of Stable "
                "Diffusion are of CLIP"
            )
    if inner is None:
        return config
    if not isinstance(inner, dict):
        raise ValueError(f"its {part} has a text_config of another form, {brief(inner)}")
    for name in CLIP:
        # The dimension of all of CLIP is checked by the weights, and beginnings of training are over.
        used = name != "projection_dim" and not name.startswith("initializer_")
        if used and config.get(name) not in (None, inner.get(name)):
            raise ValueError(
                f"its {part} has {name} = {brief(config[name])} and, in its text_config, "
                f"{brief(inner.get(name))}: one of them belongs to another model; remove it"
            )
    return inner


def _check_text(part: str, settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        if name.endswith("_id"):
            continue
        if value is None and defaults[name] is not None:
            raise ValueError(f"its {part} has no {name}")
        if type(value) is int and type(defaults[name]) is int and (value == 0 or value > TEXT):
            raise ValueError(f"its {part} has {name} = {brief(value)}, not from 1 to {TEXT}")


def _takes_lists(parameter: inspect.Parameter) -> bool:
    """Whether a setting of diffusers may be a list, by its annotation or its default."""
    hint, default = str(parameter.annotation).lower(), parameter.default
    return (
        any(word in hint for word in ("tuple", "list", "array"))
        or default is None
        or isinstance(default, (list, tuple))
    )


def _check_setting(part: str, name: str, value: Any, default: Any) -> None:
    values = list(flat(value))
    what = f"its {part} has a setting {name}"
    most = TIMESTEPS if part == "scheduler" else 2**31
    if "layers" in name or name.endswith("_blocks"):
        most = LAYERS  # networks make lists of that length before they make layers
    least = -1 if name.endswith("_id") else 0  # -1 stands for no token
    known = {_form(item) for item in flat(default)} - {type(None), object}
    for item in values:
        if isinstance(item, (dict, list)) or (isinstance(item, str) and len(item) > 100):
            raise ValueError(f"{what} of another form, {brief(item)}")
        if known and _form(item) not in (*known, type(None)):
            forms = " or ".join(sorted(FORMS[form] for form in known))
            raise ValueError(f"{what} = {brief(item)}, where {forms} belong")
        if type(item) is float and not math.isfinite(item):
            raise ValueError(f"{what} = {item}, which is no number")
        if type(item) is int and abs(item) > most:
            raise ValueError(f"{what} = {brief(item)}, above {most}")
        if float in known and type(item) in (int, float) and item < min(least, *flat(default)):
            raise ValueError(f"{what} = {brief(item)}, below {least}")
    if len(values) > (TIMESTEPS if name == "trained_betas" else 100):
        raise ValueError(f"{what} of {len(values)} numbers")


def _form(value: Any) -> type:
    form = float if type(value) is int else type(value)
    return form if form in FORMS else object


def flat(value: Any) -> Iterable[Any]:
    """The values in a list, or in lists in it; a value itself that is no list."""
    for item in value if isinstance(value, (list, tuple)) else [value]:
        yield from item if isinstance(item, (list, tuple)) else [item]


def check_vae(config: Any, *, is_xl: bool) -> None:
    """Check the statistics by which latents are normalised.

    Raises:
        ValueError: naming the setting.
    """
    scale = config.scaling_factor
    unsaid = "scaling_factor" in getattr(config, "_use_default_values", ())
    if is_xl and unsaid and scale == SCALE_1:
        raise ValueError(
            f"the VAE does not say its scaling_factor, and the default of its class, {SCALE_1}, is that "
            f"of Stable Diffusion 1 and 2; XL's own has {SCALE_XL}: state it in its config.json, or by "
            "vae.register_to_config(scaling_factor=...)"
        )
    if not (_is_number(scale) and scale > 0):
        raise ValueError(f"the VAE has scaling_factor = {brief(scale)}, and it is a number above 0")
    shift = getattr(config, "shift_factor", None)
    if not (shift is None or (_is_number(shift) and shift == 0)):
        raise ValueError(
            f"the VAE has shift_factor = {brief(shift)}, as those of SD3 and FLUX, and pipelines of "
            "Stable Diffusion shift nothing: it belongs to another model"
        )
    tables = {name: getattr(config, name, None) for name in ("latents_mean", "latents_std")}
    if all(table is None for table in tables.values()):
        return
    for name, table in tables.items():
        numbers = list(table) if isinstance(table, (list, tuple)) else []
        above = -math.inf if name == "latents_mean" else 0.0
        if len(numbers) != config.latent_channels or not all(
            _is_number(number) and number > above for number in numbers
        ):
            raise ValueError(
                f"the VAE has latents_mean and latents_std, and {name} is not {config.latent_channels} "
                f"numbers{' above 0' if above == 0 else ''}, one for each channel of latents"
            )


def check_sample_size(size: Any) -> None:
    """Check the size of the latents for which a network was made.

    Raises:
        ValueError: if it is neither a side nor two.
    """
    sides = list(size) if isinstance(size, (list, tuple)) else [size, size]
    if len(sides) != 2 or not all(_is_whole(side) and 1 <= side <= SIDE for side in sides):
        raise ValueError(
            f"the UNet has sample_size = {brief(size)}, and it is the side of latents, or two sides, "
            f"from 1 to {SIDE}"
        )


def _check_training(kind: str, config: Mapping[str, Any]) -> None:
    """Check the settings of a scheduler that describe its timesteps and betas."""

    def refuse(name: str, form: str) -> None:
        value = brief(config[name])
        raise ValueError(f"the scheduler, a {kind}, has {name} = {value}, and it is {form}")

    for name, least in (("num_train_timesteps", 2), ("steps_offset", 0)):
        if name in config and not (_is_whole(config[name]) and least <= config[name] <= TIMESTEPS):
            refuse(name, f"a whole number from {least} to {TIMESTEPS}")
    if config.get("timestep_spacing", SPACINGS[0]) not in SPACINGS:
        refuse("timestep_spacing", f"{', '.join(SPACINGS[:2])} or {SPACINGS[2]}")
    for name in ("beta_start", "beta_end", "trained_betas"):
        betas = config.get(name, 0.5)
        if name == "trained_betas" and betas is None:
            continue
        if isinstance(betas, (np.ndarray, torch.Tensor)):
            betas = betas.tolist()
        if not all(_is_number(beta) and 0 <= beta <= 1 for beta in flat(betas)):
            refuse(
                name,
                "a number from 0 to 1, or a list of these"
                if name == "trained_betas"
                else "a number from 0 to 1",
            )


def check_scheduler(scheduler: Any) -> None:
    """Check that a scheduler states noise levels.

    Raises:
        ValueError: naming the setting.
    """
    config, kind = scheduler.config, type(scheduler).__name__
    _check_training(kind, config)
    known = inspect.signature(type(scheduler).__init__).parameters
    check_heard(kind, {*known, "timestep_type"}, config)  # which is read here, whatever the class
    for name in ("sigma_min", "sigma_max", "sigma_data", "shift", "rho"):
        value = getattr(config, name, None)
        if value is not None and not (_is_number(value) and value > 0):
            raise ValueError(
                f"the scheduler, a {kind}, has {name} = {brief(value)}, and it is a number above 0"
            )
    low, high = (getattr(config, name, None) for name in ("sigma_min", "sigma_max"))
    if low is not None and high is not None and low >= high:
        raise ValueError(f"the scheduler, a {kind}, has levels from {low} down to {high}")
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if isinstance(alphas, torch.Tensor) and not getattr(config, "use_flow_sigmas", False):
        falling = bool((alphas.diff() < 0).all()) and bool(((alphas >= 0) & (alphas < 1)).all())
        if len(alphas) < 2 or not falling:  # NaN compares as false
            raise ValueError(
                f"the scheduler, a {kind}, has betas that make no noise levels, as each must be above "
                "the one before: "
                + ", ".join(
                    f"{name} = {brief(getattr(config, name, None))}"
                    for name in ("beta_start", "beta_end", "beta_schedule", "trained_betas")
                )
            )


def _is_number(value: Any) -> bool:
    return type(value) is not bool and isinstance(value, Real) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return type(value) is not bool and isinstance(value, Integral)
