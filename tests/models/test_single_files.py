"""Single files that say how they are trained: markers, metadata and tables of the schedule."""

import sys
import types

import pytest
import torch

from odesolvers.models import StableDiffusion, load_stable_diffusion

from .conftest import load_pipeline
from .pipelines import BETAS, noise, relative

EMPTY = torch.tensor([])
V, SNR = {"v_pred": EMPTY}, {"ztsnr": EMPTY}
PLAYGROUND = {
    "edm_mean": torch.tensor([-1.6574, 1.886, -1.383, 2.5155]).reshape(1, 4, 1, 1),
    "edm_std": torch.tensor([8.4927, 5.9022, 6.5498, 5.2299]).reshape(1, 4, 1, 1),
}


def number(value):
    return torch.tensor(float(value))


def scheduler_of(diffusers, name, **options):
    return getattr(diffusers, name)(**options)


V_SNR = {**BETAS, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
COSXL = {"sigma_schedule": "exponential", "sigma_data": 1.0, "prediction_type": "v_prediction"}


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("family", ["1.x", "xl"])
@pytest.mark.parametrize(
    ("markers", "name", "options"),
    [
        (V, "DDIMScheduler", {**BETAS, "prediction_type": "v_prediction"}),
        ({**V, **SNR}, "DDIMScheduler", V_SNR),
        (
            {"edm_vpred.sigma_max": number(120)},
            "EDMEulerScheduler",
            {**COSXL, "sigma_min": 0.002, "sigma_max": 120.0},
        ),
        (
            {"edm_vpred.sigma_max": number(500), "edm_vpred.sigma_min": number(0.01)},
            "EDMEulerScheduler",
            {**COSXL, "sigma_min": 0.01, "sigma_max": 500.0},
        ),
        (
            {"edm_vpred.sigma_max": number(120), **V},
            "EDMEulerScheduler",
            {**COSXL, "sigma_min": 0.002, "sigma_max": 120.0},
        ),
        (PLAYGROUND, "EDMEulerScheduler", {}),
    ],
)
def test_markers(load, folders, diffusers, family, suffix, markers, name, options):
    """The same as the same weights under the scheduler of diffusers that the markers stand for."""
    model = load(family, markers, suffix=suffix)
    pipeline = load_pipeline(folders[family])
    pipeline.scheduler = scheduler_of(diffusers, name, **options)
    reference = StableDiffusion(pipeline)
    assert model.prediction_type == reference.prediction_type
    assert model.sigma_max == pytest.approx(reference.sigma_max)
    assert model.sigma_min == pytest.approx(reference.sigma_min)
    if name == "EDMEulerScheduler":
        torch.testing.assert_close(model.sigmas(5), reference.sigmas(5))
    x, sigma = noise(), torch.tensor([0.5, 7.0])
    found, expected = (m(x, sigma, **m.encode_prompt("a")["positive"]) for m in (model, reference))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    epsilon = load(family)
    plain = epsilon(x, sigma, **epsilon.encode_prompt("a")["positive"])
    assert relative(plain, expected) > 0.05
    if "ztsnr" in markers:
        assert model.timestep(model.sigmas(8)[:1]).tolist() == [999]


def test_statistics_of_latents_of_playground(load, diffusers):
    """Decoded as diffusers' pipeline decodes with these statistics and its scale of 0.5."""
    model = load("xl", PLAYGROUND)
    plain = load("xl")
    z = noise(1)
    mean, std = PLAYGROUND["edm_mean"], PLAYGROUND["edm_std"]
    pipeline = model.pipeline
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.EDMEulerScheduler()
    seen = []
    handle = model.vae.post_quant_conv.register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    pipeline("a", num_inference_steps=1, guidance_scale=1.0, latents=z, output_type="pt")
    x = z * pipeline.scheduler.init_noise_sigma
    latents = model(x, torch.tensor([80.0]), **model.encode_prompt("a")["positive"])
    model.decode(latents)
    handle.remove()
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-4)
    factor = plain.vae.config.scaling_factor
    torch.testing.assert_close(model.decode(z), plain.decode((z * std / 0.5 + mean) * factor))


@pytest.mark.parametrize(
    ("metadata", "kind"),
    [
        ({"modelspec.prediction_type": "v"}, "v_prediction"),
        ({"modelspec.predict_key": "v"}, "v_prediction"),
        ({"modelspec.predict_key": "epsilon"}, "epsilon"),
        ({"prediction_type": "v_prediction"}, "v_prediction"),
        ({"ss_v_parameterization": "True"}, "v_prediction"),
        ({"ss_v_parameterization": "False", "format": "pt"}, "epsilon"),
    ],
)
def test_metadata(load, metadata, kind):
    model = load(metadata=metadata)
    assert model.prediction_type == kind
    assert model.sigma_max < 15
    snr = {**metadata, "ss_zero_terminal_snr": "True"}
    if kind == "v_prediction":
        assert load(metadata=snr).sigma_max == pytest.approx(2.0**20)
    else:
        with pytest.raises(ValueError, match="zero terminal SNR"):
            load(metadata=snr)


@pytest.mark.parametrize(
    ("markers", "metadata", "message"),
    [
        (SNR, None, "zero terminal SNR .* and epsilon prediction"),
        (V, {"modelspec.predict_key": "epsilon"}, "contradict each other"),
        ({}, {"modelspec.prediction_type": "rf"}, "modelspec.prediction_type = 'rf', which is not"),
        ({"edm_mean": number(0)}, None, "edm_mean, which is neither edm_mean with edm_std"),
        ({"edm_std": number(0)}, None, "edm_std, which is neither edm_mean with edm_std"),
        ({"edm_vpred.sigma_min": number(0)}, None, "neither edm_mean .* nor edm_vpred.sigma_max"),
        ({**PLAYGROUND, "edm_vpred.sigma_max": number(120)}, None, "which is neither"),
        ({**PLAYGROUND, **V}, None, "edm_mean and says v_prediction: only one can be right"),
        (
            {"edm_vpred.sigma_max": number(120)},
            {"prediction_type": "epsilon"},
            "edm_vpred.sigma_max and says epsilon: only one can be right",
        ),
        ({"edm_vpred.sigma_max": number(120), **SNR}, None, "only one can be right"),
        ({"edm_vpred.sigma_data": number(1)}, None, "edm_vpred.sigma_data, which may say"),
        ({"flow": EMPTY}, None, "it holds flow, which may say how its network is trained"),
        ({f"x{k}": EMPTY for k in range(5)}, None, "holds x0, x1, x2 and 2 more, which may"),
        ({"scale_factor": number(0.18215)}, None, "scale_factor of latents is 0.18215"),
        ({"model.diffusion_model.time_embed.cond_proj.weight": torch.zeros(128, 16)}, None, "LCM"),
    ],
)
def test_what_is_not_understood_is_refused(load, markers, metadata, message):
    with pytest.raises(ValueError, match=message):
        load("xl", markers, metadata=metadata)


def test_who_knows_better(load, diffusers):
    """An explicit prediction type or scheduler comes before the file."""
    assert load(markers=V, prediction_type="epsilon").prediction_type == "epsilon"
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    model = load(markers={**V, "flow": EMPTY}, scheduler=flow)
    assert model.prediction_type == "flow_prediction"
    assert model.sigma_max == 2.0**20
    with pytest.raises(
        ValueError, match=r"could not be read .* a VQDiffusionScheduler, which is not"
    ):
        load(scheduler=diffusers.VQDiffusionScheduler(num_vec_classes=8))


def test_tables_of_the_schedule_are_compared(load, diffusers):
    own = diffusers.DDIMScheduler(**BETAS)
    other = diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    snr = diffusers.DDIMScheduler(**BETAS, rescale_betas_zero_snr=True)
    for scheduler in (own, other, snr):
        alphas = scheduler.alphas_cumprod.clamp(min=1e-9)
        tables = {
            "alphas_cumprod": alphas.half(),
            "betas": scheduler.betas,
            "denoiser.sigmas": ((1 - alphas) / alphas).sqrt().flip(0),
        }
        for name, table in tables.items():
            if scheduler is own:
                assert load(markers={name: table}).prediction_type == "epsilon"
            else:
                with pytest.raises(ValueError, match=f"its {name} is another noise schedule"):
                    load(markers={name: table})
    with pytest.raises(ValueError, match="another noise schedule"):
        load(markers={"betas": own.betas[:500]})


def test_a_file_and_a_configuration_that_disagree(load, folders, diffusers, tmp_path):
    pipeline = load_pipeline(folders["xl"])
    pipeline.scheduler = diffusers.EDMEulerScheduler()
    pipeline.save_pretrained(tmp_path / "edm")
    assert load(config=tmp_path / "edm").sigma_max == 80.0
    with pytest.raises(
        ValueError, match="it says v_prediction, and its configuration has a EDMEuler"
    ):
        load(markers=V, config=tmp_path / "edm")
    betas = diffusers.DDIMScheduler(**BETAS).betas
    with pytest.raises(ValueError, match="another noise schedule"):
        load(markers={"betas": betas}, config=tmp_path / "edm")


def test_stable_diffusion_2_must_say_what_it_predicts(load, folders, weights, monkeypatch):
    """Both kinds were published, with nothing in the file to tell them apart."""
    key = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
    markers = {key: torch.zeros(8, 1024)}
    with pytest.raises(
        ValueError, match=r"is a Stable Diffusion 2, .* does not say which: pass pred"
    ):
        load("1.x", markers, config=None)


@pytest.mark.parametrize("zipped", [True, False])
def test_lightning_checkpoints(weights, folders, tmp_path, monkeypatch, zipped):
    """Objects of pytorch-lightning beside the weights, as in the files of the first releases."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)

    class ModelCheckpoint:
        pass

    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = name, "ModelCheckpoint"
    module.ModelCheckpoint = ModelCheckpoint
    for parent in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, module)
    path = tmp_path / "model.ckpt"
    for callbacks in ({ModelCheckpoint: {"best": 1}}, [ModelCheckpoint()]):
        content = {"state_dict": weights["1.x"], "callbacks": callbacks, "epoch": 3}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=rf"a pickle that holds .* \({name}.ModelCheckpoint\)"):
            load_stable_diffusion(path, config=folders["1.x"])
    plain = {"state_dict": weights["1.x"], "epoch": 3, "pytorch-lightning_version": "1.4"}
    torch.save(plain, path, _use_new_zipfile_serialization=zipped)
    assert load_stable_diffusion(path, config=folders["1.x"]).prediction_type == "epsilon"
    torch.save({"epoch": 3}, path)
    with pytest.raises(ValueError, match="no dictionary of tensors"):
        load_stable_diffusion(path)
