"""The configs of schedulers: which class one is of, and which settings are used."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Final

import diffusers

from odesolvers.models.schedules import DISCRETE, EDM, FLOW

from ..checks import check_choice

OWN: Final = ("solver", "base", "inverted", "state_dtype")
"""The settings that are not those of the base class."""


def read_config(
    config: object, kwargs: Mapping[str, Any], name: str
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Sorts a config and keyword arguments for an `InvertibleScheduler`.

    Args:
        config: of a scheduler of diffusers, or of the class `name`.
        kwargs: settings in place of those in `config`.
        name: the class of the scheduler to make.

    Returns:
        The arguments of the constructor; entries of the config that it has no use for, which are kept;
        keyword arguments that are no settings.

    Raises:
        TypeError: for anything but a config.
        ValueError: if the base class cannot be told from the config, or is not known.
    """
    if not isinstance(config, Mapping):
        raise TypeError(
            f"config must be that of a scheduler, got {type(config).__name__}: pass scheduler.config"
        )
    own = {key: config[key] for key in OWN if key in config}
    if config.get("_class_name", name) != name or "base" not in own:
        own["base"] = class_name(config)  # and not one that an earlier switch has left
    own |= {key: kwargs[key] for key in OWN if key in kwargs}
    if own["base"] is None:
        raise ValueError(
            "the config does not name its class, and has the settings of none that is known: pass "
            "base=, such as base='DDIMScheduler'"
        )
    check_choice("base", own["base"], *DISCRETE, *EDM, *FLOW)
    theirs = {key: value for key, value in config.items() if key not in OWN}
    others = {key: value for key, value in kwargs.items() if key not in OWN}
    settings, unused, hidden = getattr(diffusers, own["base"]).extract_init_dict(
        {**theirs, "_class_name": own["base"]}, **others
    )
    return {**own, **settings}, {**hidden, "_class_name": name}, unused


def class_name(config: Mapping[str, Any]) -> str | None:
    """The class of a scheduler by its config; one made by its constructor does not name it."""
    if "_class_name" in config:
        return str(config["_class_name"])
    settings = {"self", *(name for name in config if not name.startswith("_"))}
    unset = {name: config[name] for name in config.get("_use_default_values", ()) if name in config}

    def differing(name: str) -> int:
        """The number of settings that were left out, and are another's defaults."""
        own = _defaults(name)
        return sum(own[key] != value for key, value in unset.items())

    known = sorted((*DISCRETE, *EDM, *FLOW), key=len)  # the inverse and parallel ones last
    return min((n for n in known if _defaults(n).keys() == settings), key=differing, default=None)


def _defaults(name: str) -> dict[str, Any]:
    """The parameters of the constructor of a class, with their defaults."""
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    return {key: parameter.default for key, parameter in parameters.items()}
