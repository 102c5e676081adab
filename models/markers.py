"""What a checkpoint in a single file says about its training beside its weights.

Checkpoints in the original layout name no scheduler. Those that are not trained like the published base
models say so by small tensors under names of their own, which ComfyUI and its relatives write and read,
by the metadata of the file, or by buffers of the training schedule.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .edm.checks import brief
from .schedules import DISCRETE
from .weights import few

MARKERS = (
    "edm_mean",
    "edm_std",
    "edm_vpred.sigma_max",
    "edm_vpred.sigma_min",
    "v_pred",
    "ztsnr",
)
"""Names of the markers that are understood. ``v_pred`` and ``ztsnr`` count by being there, whatever they
hold: ComfyUI writes them without a number, and reads no more than their names."""

TABLES: Mapping[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "alphas_cumprod": (lambda x: x, 1e-5),
    "betas": (lambda x: (1 - x).cumprod(0), 1e-5),
    "denoiser.sigmas": (lambda x: 1 / (1 + x**2), 1e-5),
    "log_one_minus_alphas_cumprod": (lambda x: 1 - x.exp(), 1e-2),
    "sqrt_alphas_cumprod": (lambda x: x**2, 1e-5),
    "sqrt_one_minus_alphas_cumprod": (lambda x: 1 - x**2, 1e-2),
    "sqrt_recip_alphas_cumprod": (lambda x: 1 / x**2, 1e-5),
    "sqrt_recipm1_alphas_cumprod": (lambda x: 1 / (1 + x**2), 1e-5),
}
"""Tables of the training schedule, how ᾱ follows from each, and how exactly if in half precision."""

DERIVED = (
    "alphas_cumprod_prev",
    "logvar",
    "lvlb_weights",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "posterior_variance",
)
"""Other buffers of training, which follow from these tables."""

KNOWN = {*TABLES, *DERIVED, *MARKERS, "scale_factor"}

PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
"""Prediction types by their names in metadata."""

METADATA: Mapping[str, Mapping[str, str | None]] = {
    "modelspec.predict_key": PREDICTIONS,
    "modelspec.prediction_type": PREDICTIONS,
    "parameterization": {"eps": "epsilon", "v": "v_prediction"},  # of Lightning
    "prediction_type": PREDICTIONS,
    "ss_v_parameterization": {"True": "v_prediction", "False": "epsilon"},
    "ss_zero_terminal_snr": {"True": "ztsnr", "False": None},
}
"""Entries of metadata, and what their values mean."""

SPEAKS = re.compile(
    r"v_?pred|v_?param|parameteri[sz]ation|predict|zt?_?snr|terminal_snr|edm|(?<!work)flow|rectif"
    r"|sigma_?(data|min|max)|beta_?(start|end|schedule)|noise_?schedule",
    re.IGNORECASE,
)
"""Names of metadata that may say how a network is trained."""

SILENT = ("ss_scale_v_pred_loss_like_noise_pred",)
"""Those that say nothing about what it predicts."""

NO = ("", "0", "false", "no", "none", "null")
"""Values that say that something is not so."""


@dataclass(frozen=True)
class Training:
    """What a single file says about how its network was trained.

    Attributes:
        values: the markers and buffers that it holds.
        prediction_type: "epsilon" or "v_prediction", if the file says so.
        zero_snr: whether it says that the schedule has zero terminal SNR.
        unclear: why it may say something that is not understood; empty if it does not.
        contradicts: whether it says two predictions.
    """

    values: Mapping[str, Tensor]
    prediction_type: str | None
    zero_snr: bool
    unclear: str
    contradicts: bool

    @property
    def edm(self) -> list[str]:
        """The markers of preconditioning that it holds."""
        return [name for name in MARKERS if name.startswith("edm_") and name in self.values]

    def check_understood(self, *, prediction: bool, scheduler: bool) -> None:
        """Check that the file can be read by what it says and by what the caller knows.

        Args:
            prediction: whether the caller says what the network predicts.
            scheduler: whether the caller says all of how it is trained.

        Raises:
            ValueError: if there is no telling.
        """
        if self.unclear and not scheduler:
            raise ValueError(
                f"{self.unclear}: pass scheduler= if you know how its network is trained"
            )
        if self.contradicts and not (prediction or scheduler):
            raise ValueError(
                "its markers and its metadata contradict each other: it says both epsilon and v "
                "prediction; pass prediction_type="
            )


def read_training(
    metadata: Mapping[str, str],
    names: Iterable[str],
    others: list[str],
    values: Mapping[str, Tensor],
) -> Training:
    """What a file says, by its metadata and its small tensors.

    Args:
        metadata: of the file.
        names: of all its tensors.
        others: of those that belong to no part of the pipeline, and are not known.
        values: the tensors that are known.

    Raises:
        ValueError: if its statistics of latents are not complete.
    """
    if ("edm_mean" in values) != ("edm_std" in values):
        one = "edm_mean" if "edm_mean" in values else "edm_std"
        raise ValueError(
            f"it holds {one}, which is neither edm_mean with edm_std (Playground v2.5) nor "
            "edm_vpred.sigma_max (CosXL): the statistics of its latents are not complete"
        )
    said, unclear = _metadata(metadata)
    inside = {marker.partition(".")[0] for marker in MARKERS}
    others = others + [
        name for name in names if name not in MARKERS and not inside.isdisjoint(name.split("."))
    ]
    if not any(name in values for name in TABLES):
        others += [name for name in DERIVED if name in values]
    if "ztsnr" in values and metadata.get("ss_zero_terminal_snr") == "False":
        unclear = "it holds ztsnr, and its metadata says ss_zero_terminal_snr = False"
    if others:
        unclear = (
            f"it holds {few(sorted(others))}, which may say how its network is trained but is not "
            "understood"
        )
    said |= {meaning for name, meaning in _SAID.items() if name in values}
    predictions = said - {"ztsnr"}
    kind = predictions.pop() if len(predictions) == 1 else None
    return Training(values, kind, "ztsnr" in said, unclear, len(predictions) > 1)


_SAID = {"v_pred": "v_prediction", "ztsnr": "ztsnr"}


def _metadata(metadata: Mapping[str, str]) -> tuple[set[str], str]:
    """What metadata say, and why they may say something that is not understood."""
    said, unclear = set(), ""
    for key, value in metadata.items():
        known = METADATA.get(key)
        if known is not None and value in known:
            said.add(known[value])
        elif known is not None or (
            SPEAKS.search(key) and key not in SILENT and value.strip().lower() not in NO
        ):
            unclear = (
                f"its metadata says {brief(key)[1:-1]} = {brief(value)}, which is not understood"
            )
    return {meaning for meaning in said if meaning is not None}, unclear


def scheduler_of(training: Training, usual: Any, diffusers: Any) -> Any:
    """The scheduler that a file describes.

    Args:
        training: what the file says.
        usual: the scheduler of its configuration, which counts where the file says nothing.
        diffusers: the library.

    Raises:
        ValueError: if the file contradicts itself or its configuration.
    """
    edm = training.edm
    if edm:
        kind = "v_prediction" if "edm_vpred.sigma_max" in edm else "epsilon"
        if training.prediction_type not in (None, kind) or training.zero_snr:
            what = "ztsnr" if training.zero_snr else training.prediction_type
            raise ValueError(f"it holds {edm[0]} and says {what}: only one can be right")
        return _edm_scheduler(training.values, edm, diffusers)
    if training.prediction_type is not None or training.zero_snr:
        return _discrete_scheduler(training, usual, diffusers)
    return usual


def _edm_scheduler(values: Mapping[str, Tensor], edm: list[str], diffusers: Any) -> Any:
    """The scheduler of Playground v2.5 or of CosXL, as ComfyUI reads their markers."""
    if edm == ["edm_mean", "edm_std"]:
        return diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    if "edm_vpred.sigma_max" not in edm or "edm_mean" in edm or "edm_std" in edm:
        raise ValueError(
            f"it holds {' and '.join(edm)}, which is neither edm_mean with edm_std (Playground v2.5) "
            "nor edm_vpred.sigma_max (CosXL): pass scheduler= if you know how its network is trained"
        )
    low = _number(values, "edm_vpred.sigma_min") if "edm_vpred.sigma_min" in edm else 0.002
    return diffusers.EDMEulerScheduler(
        sigma_min=low,
        sigma_max=_number(values, "edm_vpred.sigma_max"),
        sigma_data=1.0,
        sigma_schedule="exponential",
        prediction_type="v_prediction",
    )


def _discrete_scheduler(training: Training, scheduler: Any, diffusers: Any) -> Any:
    """The pipeline's schedule under the prediction type of its training."""
    name, config = type(scheduler).__name__, scheduler.config
    if name not in DISCRETE or getattr(config, "use_flow_sigmas", False):
        what = training.prediction_type or "ztsnr"
        raise ValueError(f"it says {what}, and its configuration has a {name}: pass scheduler=")
    shared = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "timestep_spacing",
        "steps_offset",
        "set_alpha_to_one",
    )
    options = {key: config[key] for key in shared if key in config}
    if training.zero_snr:
        options |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    kind = training.prediction_type or config.prediction_type
    return diffusers.DDIMScheduler(**options, prediction_type=kind, clip_sample=False)


def set_statistics(training: Training, vae: Any) -> None:
    """Give a VAE the statistics of latents that its file holds."""
    if "edm_mean" in training.values:
        vae.register_to_config(
            latents_mean=training.values["edm_mean"].float().flatten().tolist(),
            latents_std=training.values["edm_std"].float().flatten().tolist(),
            scaling_factor=0.5,  # of Playground v2.5
        )


def check_buffers(training: Training, scheduler: Any, vae: Any) -> None:
    """Check that a pipeline has the schedule and the scale of latents that its file holds.

    Raises:
        ValueError: naming the buffer.
    """
    values = training.values
    flow = getattr(scheduler.config, "use_flow_sigmas", False)
    alphas = None if flow else getattr(scheduler, "alphas_cumprod", None)
    for name, (alphas_of, tolerance) in TABLES.items():
        if name not in values:
            continue
        table = alphas_of(values[name].double().flatten())
        if alphas is None or len(table) != len(alphas):
            same = False
        else:  # those of XL begin at the top
            table = torch.sort(table, descending=True).values
            same = bool(torch.isclose(table, alphas.double(), rtol=0.03, atol=tolerance).all())
        if not same:
            raise ValueError(
                f"its {name} is another noise schedule than that of the {type(scheduler).__name__}: "
                "pass config= or scheduler= with its own, or take it out of the file if it is left over "
                "from the model that this one was trained from"
            )
    if "scale_factor" not in values:
        return
    scale, own = _number(values, "scale_factor"), vae.config.scaling_factor
    if not abs(scale - own) <= 0.01 * own:  # NaN neither
        raise ValueError(
            f"its scale_factor of latents is {scale:.6g}, that of its configuration {own:.6g}: pass "
            "config= with its own"
        )


def _number(values: Mapping[str, Tensor], name: str) -> float:
    if values[name].numel() != 1:
        raise ValueError(f"its {name} has {values[name].numel()} numbers in place of one")
    return float(values[name].item())
