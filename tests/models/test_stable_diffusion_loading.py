"""Loading of Stable Diffusion: single files, the hub and damaged checkpoints."""

import json
import shutil
import sys

import pytest
import torch

from odesolvers.models import (
    StableDiffusion,
    load_stable_diffusion,
    save_tiny_stable_diffusion,
)

from .original_layout import original_layout
from .pipelines import BETAS


@pytest.mark.parametrize(
    ("family", "suffix"), [("1.x", ".safetensors"), ("1.x", ".ckpt"), ("xl", ".safetensors")]
)
def test_single_file(folders, tmp_path, family, suffix):
    from safetensors.torch import save_file

    reference = load_stable_diffusion(folders[family])
    weights = original_layout(reference.pipeline)
    path = tmp_path / f"model{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": weights}, path)
    else:
        save_file(weights, path)
    model = load_stable_diffusion(path, config=folders[family])
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    sigma = torch.tensor([1.0, 3.0])
    found, expected = (
        m(x, sigma, **m.encode_prompt("a cat")["positive"]) for m in (model, reference)
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(model.encode(image), reference.encode(image))
    torch.testing.assert_close(model.decode(x), reference.decode(x))


def test_no_checkpoint(tmp_path, diffusers, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"holds no model_index\.json"):
        load_stable_diffusion(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_stable_diffusion(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="no local path, and the Hugging Face hub"):
        load_stable_diffusion("nobody/nothing")


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument")  # of diffusers
def test_hub_id(folders, tmp_path, monkeypatch):
    """From the cache of the hub, in its layout, as after a download."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "models--someone--tiny-xl", "0" * 40
    shutil.copytree(folders["xl"], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    model, reference = (load_stable_diffusion(f) for f in ("someone/tiny-xl", folders["xl"]))
    weights = reference.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    # What is there and unsuitable is not reported as missing.
    path = repository / "snapshots" / commit / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "rescale_betas_zero_snr": True}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"someone/tiny-xl could not be read .* zero terminal SNR"):
        load_stable_diffusion("someone/tiny-xl")


def test_other_pipelines(folders, tmp_path, model):
    shutil.copytree(folders["1.x"], tmp_path / "m")
    path = tmp_path / "m" / "model_index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**index, "_class_name": "FluxPipeline"}), encoding="utf-8")
    with pytest.raises(
        ValueError, match="it is a FluxPipeline; supported are StableDiffusionPipeline"
    ):
        load_stable_diffusion(tmp_path / "m")
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="could not be read as a Stable Diffusion checkpoint"):
        load_stable_diffusion(tmp_path / "m")
    with pytest.raises(TypeError, match="pipeline must be a StableDiffusionPipeline or"):
        StableDiffusion(object())
    with pytest.raises(ValueError, match="prediction_type must be"):
        StableDiffusion(model.pipeline, prediction_type="flow")
    with pytest.raises(ValueError, match="family must be"):
        save_tiny_stable_diffusion(tmp_path, "3.x")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("damage", ["missing weight", "truncated", "no file"])
def test_damaged_directory(folders, tmp_path, part, damage):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folders["xl"], tmp_path / "m")
    (path,) = (tmp_path / "m" / part).glob("*.safetensors")
    if damage == "missing weight":  # which diffusers and transformers would make up at random
        weights = load_file(path)
        weights.pop(next(k for k in weights if "attn" in k or "attentions" in k))
        save_file(weights, path, metadata={"format": "pt"})
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        path.unlink()
    message = f"weights of the {part} are missing" if damage == "missing weight" else "could not be"
    with pytest.raises(ValueError, match=message):
        load_stable_diffusion(tmp_path / "m")


@pytest.mark.parametrize("family", ["1.x", "xl"])
@pytest.mark.parametrize("how", ["null", "absent"])
def test_pipelines_saved_without_a_part(folders, tmp_path, family, how):
    """As by `from_pretrained(..., text_encoder=None)` before saving."""
    shutil.copytree(folders[family], tmp_path / "m")
    path = tmp_path / "m" / "model_index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    parts = [k for k, v in index.items() if isinstance(v, list) and v[0] in LIBRARIES]
    assert len(parts) == (7 if family == "xl" else 5)
    for part in parts:
        changed = {k: v for k, v in index.items() if k != part}
        if how == "null":
            changed[part] = [None, None]
        path.write_text(json.dumps(changed), encoding="utf-8")
        with pytest.raises(
            ValueError, match=rf"names no {part}, so the pipeline was saved without"
        ):
            load_stable_diffusion(tmp_path / "m")
    changed = {**index, "text_encoder": ["transformers", "CLIPTextModelOfMine"]}
    path.write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(
        ValueError, match="'text_encoder' is 'CLIPTextModelOfMine' of 'transformers', which is not"
    ):
        load_stable_diffusion(tmp_path / "m")
    del index["_class_name"]
    path.write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ValueError, match="it is a None; supported are"):
        load_stable_diffusion(tmp_path / "m")


LIBRARIES = ("diffusers", "transformers")


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_every_missing_weight_is_named(folders, tmp_path, part):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folders["1.x"], tmp_path / "m")
    (path,) = (tmp_path / "m" / part).glob("*.safetensors")
    weights = load_file(path)
    for key in sorted(weights)[:: len(weights) // 12]:
        rest = {k: v for k, v in weights.items() if k != key}
        save_file(rest, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"weights of the {part} are missing: {key}$"):
            load_stable_diffusion(tmp_path / "m")


def test_weights_without_a_place_are_named(folders, tmp_path):
    """The guidance embedding of a distilled network, under the configuration of the base model."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folders["1.x"], tmp_path / "m")
    (path,) = (tmp_path / "m" / "unet").glob("*.safetensors")
    weights = load_file(path)
    weights["time_embedding.cond_proj.weight"] = torch.zeros(32, 16)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no place, such as time_embedding\.cond_proj\.weight"):
        load_stable_diffusion(tmp_path / "m")


@pytest.mark.parametrize("family", ["1.x", "xl"])
@pytest.mark.parametrize("part", ["model.diffusion_model", "first_stage_model", "encoder"])
def test_missing_weights_of_single_files(folders, tmp_path, family, part):
    """Named by their part; a file without any weights of a part is refused as well."""
    from safetensors.torch import save_file

    weights = original_layout(load_stable_diffusion(folders[family]).pipeline)
    prefix = {"1.x": "cond_stage_model", "xl": "conditioner"}[family] if part == "encoder" else part
    named = {"model.diffusion_model": "unet", "first_stage_model": "vae"}.get(part, "text_encoder")
    keys = sorted(k for k in weights if k.startswith(prefix + "."))
    for gone in (keys[3:4], keys[-1:], keys):
        save_file({k: v for k, v in weights.items() if k not in gone}, tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match="could not be read as a Stable Diffusion") as caught:
            load_stable_diffusion(tmp_path / "a.safetensors", config=folders[family])
        assert named in str(caught.value) or gone is keys


def test_damaged_single_file(folders, tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "a.safetensors").write_bytes(b"not a checkpoint")
    (tmp_path / "b.ckpt").write_bytes(b"not a checkpoint")
    save_file({"weight": torch.zeros(2)}, tmp_path / "c.safetensors")
    for name in ("a.safetensors", "b.ckpt", "c.safetensors"):
        with pytest.raises(ValueError, match="could not be read as a Stable Diffusion checkpoint"):
            load_stable_diffusion(tmp_path / name, config=folders["1.x"])


@pytest.mark.parametrize("package", ["diffusers", "transformers"])
def test_missing_package(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install diffusers transformers"):
        load_stable_diffusion("anything/at-all")


def test_a_scheduler_that_does_not_say_what_the_network_predicts(folders, tmp_path, diffusers):
    """Nobody stated the epsilon prediction of its class, and the folder's own says otherwise."""
    folder = tmp_path / "v"
    shutil.copytree(folders["1.x"], folder)
    path = folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(path.read_text()) | {"prediction_type": "v_prediction"}
    path.write_text(json.dumps(settings))
    silent = diffusers.EulerDiscreteScheduler(**BETAS)
    with pytest.raises(ValueError, match=r"does not say .* = 'v_prediction': .*from_config"):
        load_stable_diffusion(folder, scheduler=silent)
    made = diffusers.EulerDiscreteScheduler.from_config(settings)
    stated = diffusers.EulerDiscreteScheduler(**BETAS, prediction_type="epsilon")
    for options, kind in (
        ({"scheduler": made}, "v_prediction"),
        ({"scheduler": stated}, "epsilon"),
        ({"scheduler": silent, "prediction_type": "sample"}, "sample"),
    ):
        assert load_stable_diffusion(folder, **options).schedule.prediction_type == kind
    assert load_stable_diffusion(folders["1.x"], scheduler=silent) is not None
