"""The core stands alone: what it imports, proved in a clean interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest

import odesolvers

HEAVY = (
    "k_diffusion",
    "diffusers",
    "transformers",
    "sklearn",
    "matplotlib",
    "typer",
    "tqdm",
    "PIL",
)


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("module", ["odesolvers", "odesolvers.models"])
def test_imports_nothing_beyond_torch_numpy_and_scipy(module: str) -> None:
    block = f"""
import sys
import torch, numpy
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {HEAVY}:
            raise ImportError(f'{{name}} must not be imported')
before = {{name.split('.')[0] for name in sys.modules}}
sys.meta_path.insert(0, Refuse())
import {module}
after = {{name.split('.')[0] for name in sys.modules}}
print(sorted(after - before - set(sys.stdlib_module_names)))
"""
    loaded = set(eval(run(block)))
    assert loaded <= {"odesolvers", "scipy"}


def test_the_core_works_without_any_model_library() -> None:
    names = ", ".join(repr(name) for name in HEAVY)
    code = f"""
import sys
for name in ({names}):
    sys.modules[name] = None
import torch
from odesolvers import BDIA, HeunEDM, karras_sigmas
x = torch.randn(2, 3) * 80
there = BDIA(HeunEDM()).sample(lambda x, s: x / (1 + s[:, None] ** 2), x, karras_sigmas(5))
back = BDIA(HeunEDM()).invert(lambda x, s: x / (1 + s[:, None] ** 2), there.state, karras_sigmas(5))
print(bool((back.x - x).abs().max() < 1e-3))
"""
    assert run(code) == "True"


def test_adds_little_to_torchs_own_import_time() -> None:
    code = """
import time, torch
start = time.perf_counter()
import odesolvers
print(time.perf_counter() - start)
"""
    assert min(float(run(code)) for _ in range(3)) < 0.5


def test_progress_without_tqdm_says_what_to_install() -> None:
    code = """
import sys
sys.modules['tqdm'] = sys.modules['tqdm.auto'] = None
import torch
from odesolvers import Euler
try:
    Euler().sample(lambda x, s: x, torch.ones(1, 2), [2.0, 1.0], progress=True)
except ImportError as error:
    print(error)
"""
    assert "pip install tqdm" in run(code)


def test_everything_public_is_there() -> None:
    assert all(hasattr(odesolvers, name) for name in odesolvers.__all__)
