"""Fixtures shared by the tests of Stable Diffusion."""

import json
import shutil

import pytest
import torch

from odesolvers.models import load_stable_diffusion, save_tiny_stable_diffusion

from .original_layout import original_layout

FAMILIES = ["1.x", "2.x", "2.x-v", "xl"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory, diffusers):
    """The folder of the saved pipeline of each family."""
    root = tmp_path_factory.mktemp("stable-diffusion")
    for family in FAMILIES:
        save_tiny_stable_diffusion(root / family, family)
    return {family: root / family for family in FAMILIES}


@pytest.fixture(scope="session")
def model(folders):
    """The miniature Stable Diffusion 1.x."""
    return load_stable_diffusion(folders["1.x"])


@pytest.fixture(scope="module", params=["1.x", "xl"])
def pipeline(request, folders):
    """A pipeline without and one with added conditions, whose scheduler tests replace."""
    return load_pipeline(folders[request.param])


@pytest.fixture(scope="module")
def xl(folders):
    """The miniature XL pipeline, whose scheduler tests replace."""
    return load_pipeline(folders["xl"])


@pytest.fixture
def edited(folders, tmp_path):
    """The folder of a family with other weights or settings in one part, `...` for none."""
    from safetensors.torch import load_file, save_file

    def make(family, part, change=None, file="config.json", **settings):
        folder = tmp_path / "m"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(folders[family], folder)
        if change is not None:
            (path,) = (folder / part).glob("*.safetensors")
            weights = load_file(path)
            change(weights)
            save_file(weights, path, metadata={"format": "pt"})
        if settings:
            path = folder / part / file
            content = json.loads(path.read_text(encoding="utf-8"))
            content = {k: v for k, v in {**content, **settings}.items() if v is not ...}
            path.write_text(json.dumps(content), encoding="utf-8")
        return folder

    return make


@pytest.fixture(scope="session")
def weights(folders):
    return {family: original_layout(load_pipeline(folders[family])) for family in ("1.x", "xl")}


@pytest.fixture
def load(folders, weights, tmp_path):
    """Write a single file with more tensors and metadata, and load it."""

    def loaded(family="xl", markers=None, *, metadata=None, suffix=".safetensors", **options):
        path = tmp_path / f"model{suffix}"
        content = {**weights[family], **(markers or {})}
        if suffix == ".ckpt":
            torch.save({"state_dict": content}, path)
        else:
            from safetensors.torch import save_file

            save_file(content, path, metadata=metadata)
        return load_stable_diffusion(path, **{"config": folders[family], **options})

    return loaded


def load_pipeline(folder):
    pipeline = load_stable_diffusion(folder).pipeline
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
