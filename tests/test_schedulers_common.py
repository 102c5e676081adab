"""The common tests that diffusers has for its own schedulers, on the scheduler here.

They stand in its repository and not in its package, so they run where a clone of it is named::

    DIFFUSERS=~/diffusers python -m pytest -n 0 tests/test_schedulers_common.py
"""

import importlib
import os
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

import pytest

from odesolvers.schedulers import InvertibleScheduler

from .test_schedulers_settings import SD

pytestmark = pytest.mark.filterwarnings("ignore")

CLONE = os.environ.get("DIFFUSERS")
if not CLONE:
    pytest.skip("DIFFUSERS names no clone of diffusers", allow_module_level=True)

BDIA = "BDIA(DDIM(), gamma=DampedStepRatio()"
CONFIGS = {
    "DDIM": SD,
    "DDIM, inverted": {**SD, "inverted": True},
    "DDIM, state in float32": {**SD, "state_dtype": "float32"},
    "DDIM, fixed point": {**SD, "solver": f"{BDIA}, arithmetic=FixedPoint())"},
    "DDIM, two evaluations a step": {**SD, "solver": "BDIA(HeunEDM(), gamma=HeunStepRatio())"},
    "DDIM, coupled": {**SD, "solver": "EDICT()"},
    "Euler": {**SD, "base": "EulerDiscreteScheduler"},
    "DPM-Solver": {**SD, "base": "DPMSolverMultistepScheduler"},
    "EDM": {"base": "EDMEulerScheduler"},
    "flow matching": {"base": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
}
EXCEPTIONS = {
    # The schedulers of diffusers for the same networks have no such setting either.
    ("EDM", "test_trained_betas"): "unexpected keyword argument 'trained_betas'",
    ("flow matching", "test_trained_betas"): "unexpected keyword argument 'trained_betas'",
    # The suite takes a timestep that exists for its own EDMEulerScheduler, and 0 for all others.
    ("EDM", "test_add_noise_device"): "0 is not one of scheduler.timesteps",
    # It asks for a timestep 0 before set_timesteps, which here is refused rather than guessed.
    ("EDM", "test_scheduler_public_api"): "call set_timesteps first",
}


def suite(module):
    """A file of the suite, under a package name that this folder of tests does not have."""
    package = ModuleSpec("tests_of_diffusers", None, is_package=True)
    package.submodule_search_locations = [str(Path(CLONE).expanduser() / "tests")]
    sys.modules.setdefault("tests_of_diffusers", module_from_spec(package))
    return importlib.import_module(f"tests_of_diffusers.schedulers.{module}")


CASES = {  # not as names of this file, of which pytest would run them
    "common": suite("test_schedulers").SchedulerCommonTest,
    "ddim": suite("test_scheduler_ddim").DDIMSchedulerTest,
}


def names(case, start):
    return [name for name in dir(case) if name.startswith(start)]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", names(CASES["common"], "test_"))
def test_common_tests_of_diffusers(name, config):
    class Case(CASES["common"]):
        scheduler_classes = (InvertibleScheduler,)
        forward_default_kwargs = (("num_inference_steps", 50),)

        def get_scheduler_config(self, **settings):
            return {**CONFIGS[config], **settings}

    test = getattr(Case(name), name)
    if (config, name) in EXCEPTIONS:
        with pytest.raises((TypeError, ValueError), match=EXCEPTIONS[config, name]):
            test()
    else:
        test()


@pytest.mark.parametrize("name", names(CASES["ddim"], "test_full_loop"))
def test_whole_runs_have_the_numbers_of_ddim(name):
    class Scheduler(InvertibleScheduler):
        def step(self, model_output, timestep, sample, eta=0.0, **options):
            assert eta == 0.0
            return super().step(model_output, timestep, sample, **options)

    class Case(CASES["ddim"]):
        scheduler_classes = (Scheduler,)

        def get_scheduler_config(self, **settings):
            return {**super().get_scheduler_config(**settings), "solver": "DDIM()"}

    getattr(Case(name), name)()
