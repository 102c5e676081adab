"""What imports what: the floors of the package, and a core that runs without any model library."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import odesolvers
import odesolvers.extend
import odesolvers.models

ROOT = Path(odesolvers.__file__).parent
MODELS = ROOT.parent / "models"  # installs as `odesolvers.models`

# From the top. A file imports files of its own floor or of lower ones, and never in a circle.
FLOORS = (
    (
        "__main__",
        "cli",
        "jobs",
        "page",
        "pictures",
        "opening",
        "bundled",
        "results",
        "editing",
        "pipelines",
        "interop",
        "schedulers",
    ),
    ("__init__", "extend"),
    ("parsing", "named"),
    ("adaptive", "calibration", "likelihood", "pair_likelihood", "stability", "stepwise"),
    ("bdia", "coupled", "iterative"),
    ("gamma", "approximators"),
    ("solver",),
    ("gradients",),
    ("run",),
    ("trust", "propagation"),
    ("state", "files"),
    ("arithmetic",),
    ("formula", "checks", "grids", "settings", "values", "progress", "writing", "typed"),
)
MODELS_MAY_IMPORT = ("models", "grids", "values", "writing")  # a denoiser needs no solver

HEAVY = ("k_diffusion", "diffusers", "transformers", "sklearn", "matplotlib", "tqdm", "PIL", "rich")

Files = Mapping[str, str]  # the text of each file, by the dotted name of its module


@cache
def files() -> Files:
    found = {}
    for top, prefix in ((ROOT, "odesolvers"), (MODELS, "odesolvers.models")):
        for path in top.rglob("*.py"):
            parts = path.relative_to(top).with_suffix("").parts
            found[".".join((prefix, *parts))] = path.read_text()
    return found


@cache
def nodes(text: str) -> list[ast.Import | ast.ImportFrom]:
    return [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import | ast.ImportFrom)]


def imports(module: str, sources: Files) -> set[str]:
    """The modules of the package that a file imports anywhere: for a type, or inside a function, too."""
    known = {name.removesuffix(".__init__"): name for name in sources}
    package = module.split(".")[:-1]
    found: set[str] = set()
    for node in nodes(sources[module]):
        if isinstance(node, ast.Import):
            found |= {known[alias.name] for alias in node.names if alias.name in known}
        else:
            base = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                name = f"{origin}.{alias.name}" if f"{origin}.{alias.name}" in known else origin
                found |= {known[name]} if name in known else set()
    return found - {module}


def floor(module: str) -> int:
    """The number of a module's floor, 0 for the top one."""
    room = module.split(".")[1]
    return next(k for k, rooms in enumerate(FLOORS) if room in rooms)


def circle(sources: Files) -> list[str]:
    """The modules of a circle, in order, or none."""
    try:
        TopologicalSorter({name: imports(name, sources) for name in sources}).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def upward(sources: Files) -> list[str]:
    """Imports of a higher floor."""
    return [
        f"{name} imports {other}"
        for name in sources
        if not name.startswith("odesolvers.models.")
        for other in sorted(imports(name, sources))
        if not other.startswith("odesolvers.models.") and floor(other) < floor(name)
    ]


def test_no_file_imports_in_a_circle() -> None:
    assert circle(files()) == []


def test_no_file_imports_a_higher_floor() -> None:
    assert upward(files()) == []


def test_every_file_has_a_floor() -> None:
    rooms = {name.split(".")[1] for name in files()} - {"models"}
    assert rooms <= {room for rooms in FLOORS for room in rooms}


def test_solvers_know_no_model_and_models_no_solver() -> None:
    for name in files():
        for other in imports(name, files()):
            if name.startswith("odesolvers.models."):
                assert other.split(".")[1] in MODELS_MAY_IMPORT, f"{name} imports {other}"
            elif other.startswith("odesolvers.models."):
                assert floor(name) == 0, f"{name} imports {other}"


@pytest.mark.parametrize(
    "line",
    [
        "from .bdia import BDIA",
        "from . import bdia",
        "import odesolvers.bdia",
        "from odesolvers.bdia import BDIA",
        "if TYPE_CHECKING:\n    from .bdia import BDIA",
        "def late():\n    from .bdia import BDIA",
    ],
)
def test_an_import_upward_is_found_in_every_form(line: str) -> None:
    name = "odesolvers.run"
    sources = {**files(), name: f"{files()[name]}\n{line}\n"}
    assert "odesolvers.run imports odesolvers.bdia" in upward(sources)
    assert {"odesolvers.run", "odesolvers.bdia"} <= set(circle(sources))


def test_a_circle_within_a_floor_is_found() -> None:
    sources = {**files(), "odesolvers.grids": "from .checks import place"}
    assert set(circle(sources)) == {"odesolvers.grids", "odesolvers.checks"}


@pytest.fixture(scope="module")
def alone() -> dict[str, object]:
    """What a fresh interpreter tells where no library of models or of pictures can be imported."""
    code = f"""
import json, sys, time
import torch, numpy
for name in {HEAVY}:
    sys.modules[name] = None  # importing it is an error
known = {{name.split('.')[0] for name in sys.modules}} | set(sys.stdlib_module_names)
start = time.process_time()
import odesolvers
seconds = time.process_time() - start
from odesolvers import BDIA, Euler, HeunEDM, karras_sigmas
x, sigmas, solver = 80 * torch.ones(2, 3).double(), karras_sigmas(5), BDIA(HeunEDM())
denoiser = lambda x, sigma: x / (1 + sigma[:, None] ** 2)
there = solver.sample(denoiser, x, sigmas)
back = solver.invert(denoiser, there.state, sigmas)
try:
    Euler().sample(denoiser, x, sigmas, progress=True)
except ImportError as error:
    refusal = str(error)
import odesolvers.models
loaded = sorted({{name.split('.')[0] for name in sys.modules}} - known)
miss = float((back.x - x).abs().max())
print(json.dumps(dict(loaded=loaded, seconds=seconds, miss=miss, refusal=refusal)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found: dict[str, object] = json.loads(result.stdout)
    return found


def test_the_core_and_models_import_and_run_with_torch_and_numpy_only(
    alone: dict[str, object],
) -> None:
    assert alone["loaded"] == ["odesolvers"]
    assert alone["miss"] < 1e-9  # type: ignore[operator]


def test_the_core_adds_little_to_torchs_own_import_time(alone: dict[str, object]) -> None:
    assert alone["seconds"] < 0.5  # type: ignore[operator]


def test_progress_without_tqdm_says_what_to_install(alone: dict[str, object]) -> None:
    assert "pip install tqdm" in str(alone["refusal"])


def test_everything_public_is_there() -> None:
    for module in (odesolvers, odesolvers.extend, odesolvers.models):
        assert all(hasattr(module, name) for name in module.__all__)
