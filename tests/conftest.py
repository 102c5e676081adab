"""Fixtures and settings of the whole suite."""

from __future__ import annotations

import importlib
import os
import warnings
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from hypothesis import settings

# Tests run side by side, one for each core: more threads in each only get into each other's way.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start

settings.register_profile("quick", max_examples=60, deadline=None)
settings.register_profile("full", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
            ],
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device there is."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def k_diffusion() -> ModuleType:
    """The installed package; tests that ask for it are skipped where it cannot be installed."""
    if find_spec("k_diffusion") is None:
        pytest.skip("k-diffusion is not installed: it cannot be, on Python 3.13 and later")
    with warnings.catch_warnings():  # its own imports warn, ours do not
        warnings.simplefilter("ignore")
        module = importlib.import_module("k_diffusion")
        importlib.import_module("k_diffusion.sampling")
    return module


@pytest.fixture(scope="session")
def diffusers() -> ModuleType:
    """The installed package; tests that ask for it are skipped where it is not."""
    if find_spec("diffusers") is None:
        pytest.skip("diffusers is not installed")
    with warnings.catch_warnings():  # its own imports warn, ours do not
        warnings.simplefilter("ignore")
        module = importlib.import_module("diffusers")
        _ = module.DDIMScheduler
    return module
