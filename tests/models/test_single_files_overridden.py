"""Single files whose caller knows better: this replaces what the file says, and no other check."""

import pytest
import torch

from odesolvers.models import load_stable_diffusion
from odesolvers.models.markers import check_buffers, read_training

from .pipelines import BETAS

EMPTY = torch.tensor([])
V, SNR = {"v_pred": EMPTY}, {"ztsnr": EMPTY}
COSXL = {"edm_vpred.sigma_max": torch.tensor(120.0)}
STATISTICS = {"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}
NAN = float("nan")


@pytest.fixture(params=["prediction", "scheduler"])
def said(request, diffusers):
    """What the caller says."""
    if request.param == "prediction":
        return {"prediction_type": "epsilon"}
    stated = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    return {"scheduler": diffusers.DDIMScheduler(**BETAS, **stated)}


def refused(load, match, markers=None, metadata=None, **options):
    with pytest.raises(ValueError, match=f"could not be read as .*{match}"):
        load("1.x", markers, metadata=metadata, **options)


@pytest.mark.parametrize(
    ("markers", "match"),
    [
        ({"scale_factor": torch.tensor(0.13025)}, r"scale_factor of latents is 0\.13025"),
        ({"scale_factor": torch.tensor(NAN)}, "scale_factor of latents is nan"),
        (
            {"scale_factor": torch.tensor([0.18215] * 2)},
            "scale_factor has 2 numbers in place of one",
        ),
        ({"scale_factor": EMPTY}, "scale_factor has 0 numbers in place of one"),
        ({**STATISTICS, "scale_factor": torch.tensor(0.18215)}, r"latents is 0\.18215, .* 0\.5"),
        (
            {"edm_mean": torch.zeros(4)},
            "edm_mean, .* the statistics of its latents are not complete",
        ),
        ({**COSXL, "edm_std": torch.ones(4)}, "edm_std, .* are not complete"),
        ({**STATISTICS, "edm_std": torch.zeros(4)}, "latents_std is not 4 numbers above 0"),
        ({**STATISTICS, "edm_mean": torch.zeros(3)}, "latents_mean is not 4 numbers"),
        (
            {"lora_unet_x.lora_down.weight": torch.ones(2, 2)},
            "lora_unet_x.* no part of Stable Diff",
        ),
        ({"control_model.input_hint_block.0.weight": torch.ones(8)}, "control_model.* no part of"),
        ({"denoiser.latents_std": torch.ones(4)}, "denoiser.latents_std, .* no part of"),
        ({"motion_modules.0.pe": torch.ones(1, 2)}, "motion_modules.* no part of"),
        ({"model.diffusion_model.v_pred": EMPTY}, "its unet has weights .* no place"),
        ({"cond_stage_model.ztsnr": torch.ones(1)}, "its text_encoder has weights .* no place"),
        ({"first_stage_model.edm_mean": torch.zeros(4)}, "its vae has weights .* no place"),
    ],
)
def test_checks_that_nothing_replaces(load, said, markers, match):
    if "model.diffusion_model.v_pred" in markers or "." in next(iter(markers)):
        match = f"({match}|which may say how its network is trained)"
    refused(load, match, markers, **said)


@pytest.mark.parametrize(
    ("markers", "metadata"),
    [
        ({"flow": EMPTY}, None),
        ({"shift": torch.tensor(3.0)}, None),
        ({"denoiser.v_pred": EMPTY}, None),
        ({"model_ema.ztsnr": EMPTY}, None),
        ({"first_stage_model.loss.edm_mean": EMPTY}, None),
        ({"embedding_manager.edm_vpred": torch.ones(4)}, None),
        ({"posterior_variance": torch.ones(1000)}, None),
        ({}, {"v_pred": "True"}),
        ({}, {"ss_flow_matching": "1"}),
        ({}, {"modelspec.prediction_type": "rf"}),
        ({}, {"ss_zero_terminal_snr": "maybe"}),
        ({}, {"modelspec.sigma_data": "0.5"}),
        ({}, {"ZTSNR": ""} | {"Rectified": "yes"}),
        (V | SNR, {"ss_zero_terminal_snr": "False"}),
    ],
)
def test_what_a_scheduler_alone_replaces(load, said, markers, metadata):
    """What the network predicts does not say at which levels."""
    if "scheduler" in said:
        assert load("1.x", markers, metadata=metadata, **said).prediction_type == "epsilon"
    else:
        match = "which (may say how its .* but )?is not understood|ss_zero_terminal_snr = False"
        refused(load, match, markers, metadata, **said)


@pytest.mark.parametrize(
    "metadata",
    [
        {"workflow": "{}", "prompt": "v_pred", "modelspec.implementation": "sgm"},
        {"ss_scale_v_pred_loss_like_noise_pred": "True", "ss_noise_offset": "0.1"},
        {"v_pred": "False", "is_flow": "none"},
    ],
)
def test_metadata_that_say_nothing(load, said, metadata):
    assert load("1.x", metadata=metadata, **said).prediction_type == "epsilon"


@pytest.mark.parametrize("value", [EMPTY, torch.tensor(0.0), torch.tensor(False), torch.ones(3)])
def test_markers_count_by_being_there(load, value):
    """ComfyUI writes them without a number and, like A1111's relatives, reads their names alone."""
    model = load("1.x", {"v_pred": value, "ztsnr": value.clone()})
    assert (model.prediction_type, round(model.sigma_max)) == ("v_prediction", 2**20)


def test_a_scheduler_leaves_nothing_unsaid_that_the_file_says(load, diffusers):
    def make(kind="DDIMScheduler", **options):
        return getattr(diffusers, kind)(**options)

    v = {"prediction_type": "v_prediction"}
    for markers, scheduler, match in (
        (V, make(**BETAS), "prediction_type, and .* prediction_type = 'v_prediction'"),
        (COSXL, make(**BETAS), "prediction_type, and .* prediction_type = 'v_prediction'"),
        (V | SNR, make(**BETAS, **v), "rescale_betas_zero_snr, and .* = True"),
        (V | SNR, make("PNDMScheduler", **BETAS, **v), "rescale_betas_zero_snr"),
        (COSXL, make("EDMEulerScheduler", **v), r"sigma_data, and .* = 1\.0"),
        (V | COSXL | SNR, make(**BETAS), "prediction_type, and the checkpoint contradicts itself"),
    ):
        refused(load, f"does not say its {match}", markers, scheduler=scheduler)
    stated = make(**BETAS, **v, rescale_betas_zero_snr=False)
    assert load("1.x", V | SNR, scheduler=stated).sigma_max < 15
    stated = make(**BETAS, prediction_type="epsilon")
    for markers in (V, COSXL, V | COSXL | SNR):
        assert load("1.x", markers, scheduler=stated).prediction_type == "epsilon"
    kept = load("1.x", V, scheduler=make(**BETAS), prediction_type="v_prediction")
    assert kept.prediction_type == "v_prediction"
    flow = make("FlowMatchEulerDiscreteScheduler")
    assert load("1.x", COSXL, scheduler=flow).prediction_type == "flow_prediction"


def test_a_scheduler_leaves_nothing_unsaid_that_a_folder_says(edited, diffusers):
    def folder(**options):
        return edited("2.x-v", "scheduler", file="scheduler_config.json", **options)

    v = {"prediction_type": "v_prediction"}
    for options, scheduler, name in (
        (
            {"num_train_timesteps": 500},
            diffusers.DDIMScheduler(**BETAS, **v),
            "num_train_timesteps",
        ),
        ({"rescale_betas_zero_snr": True}, diffusers.DDIMScheduler(**BETAS, **v), "rescale_betas"),
        ({"beta_end": 0.02}, diffusers.LCMScheduler(**v), "beta_end"),
        ({"trained_betas": [0.1] * 9}, diffusers.DDIMScheduler(**BETAS, **v), "trained_betas"),
    ):
        with pytest.raises(ValueError, match=f"does not say its .*{name}"):
            load_stable_diffusion(folder(**options), scheduler=scheduler)
    stated = diffusers.DDIMScheduler(**BETAS, **v, num_train_timesteps=1000)
    model = load_stable_diffusion(folder(num_train_timesteps=500), scheduler=stated)
    assert len(model.schedule.alphas_cumprod) == 1000


def tables(alphas):
    alphas = alphas.double()
    return {
        "alphas_cumprod": alphas,
        "betas": 1 - alphas / torch.cat([torch.ones(1), alphas[:-1]]),
        "denoiser.sigmas": ((1 - alphas) / alphas).sqrt().flip(0),
        "log_one_minus_alphas_cumprod": (1 - alphas).log(),
        "sqrt_alphas_cumprod": alphas.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alphas).sqrt(),
        "sqrt_recip_alphas_cumprod": (1 / alphas).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alphas - 1).sqrt(),
    }


@pytest.mark.parametrize("name", tables(torch.ones(2)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tables_of_the_schedule(diffusers, name, dtype):
    v = {"prediction_type": "v_prediction"}
    discrete = {
        "own": diffusers.DDIMScheduler(**BETAS),
        "linear": diffusers.DDIMScheduler(**{**BETAS, "beta_schedule": "linear"}),
        "snr": diffusers.DDIMScheduler(**BETAS, **v, rescale_betas_zero_snr=True),
    }
    others = {
        "edm": diffusers.EDMEulerScheduler(),
        "flow": diffusers.FlowMatchEulerDiscreteScheduler(),
        "flow too": diffusers.DPMSolverMultistepScheduler(**BETAS, use_flow_sigmas=True),
    }
    for kind, scheduler in discrete.items():
        table = tables(scheduler.alphas_cumprod.clamp(min=1e-9))[name].to(dtype)
        training = read_training({}, [name], [], {name: table})
        for other, given in {**discrete, **others}.items():
            if other == kind:
                check_buffers(training, given, None)
            else:
                with pytest.raises(ValueError, match=f"its {name} is another noise schedule than"):
                    check_buffers(training, given, None)
        damaged = read_training({}, [name], [], {name: table * NAN})
        with pytest.raises(ValueError, match="another noise schedule"):
            check_buffers(damaged, scheduler, None)


@pytest.mark.parametrize(
    "scheduler", ["EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler", None]
)
def test_tables_beside_another_kind_of_training(load, diffusers, scheduler):
    """They are of discrete timesteps, so that one of both is left over."""
    markers = {"betas": diffusers.DDIMScheduler(**BETAS).betas}
    options = {} if scheduler is None else {"scheduler": getattr(diffusers, scheduler)()}
    if scheduler == "EDMEulerScheduler":
        options["prediction_type"] = "epsilon"
    match = "its betas is another noise schedule .* take it out of the file if it is left over"
    refused(load, match, markers if scheduler else markers | COSXL, **options)


@pytest.mark.parametrize("zipped", [True, False])
def test_what_stands_beside_the_weights_of_an_archive(weights, folders, tmp_path, zipped):
    path = tmp_path / "model.ckpt"

    def load(**beside):
        content = {"state_dict": weights["1.x"], "epoch": 3, **beside}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        return load_stable_diffusion(path, config=folders["1.x"])

    assert load(v_pred=torch.tensor([])).prediction_type == "v_prediction"
    for kind, meaning in {"v": "v_prediction", "eps": "epsilon"}.items():
        found = load(hyper_parameters={"parameterization": kind, "base_lr": 1e-4})
        assert found.prediction_type == meaning
    for beside in ({"parameterization": "x0"}, {"flow_matching": True}, {"shift": torch.ones(())}):
        with pytest.raises(ValueError, match="is not understood"):
            load(**beside)
    with pytest.raises(ValueError, match=r"lora.* no part of Stable Diffusion"):
        load(lora=torch.ones(2))
