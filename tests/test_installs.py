"""One copy of the package is imported whole: that of the clone one stands in, or the installed one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest

import odesolvers

PACKAGE = Path(odesolvers.__file__).parent
MODELS = PACKAGE.parent / "models"


def clone(root: Path) -> None:
    copytree(PACKAGE, root / "odesolvers")
    copytree(MODELS, root / "models")


def installed(root: Path) -> None:
    copytree(PACKAGE, root / "odesolvers")
    copytree(MODELS, root / "odesolvers" / "models")
    copytree(MODELS / "edm", root / "models")  # another distribution's, beside it


@pytest.mark.parametrize("layout", [clone, installed])
def test_the_package_and_its_models_come_from_one_place(
    layout: Callable[[Path], None], tmp_path: Path
) -> None:
    layout(tmp_path / "here")
    # Anything else on the path comes second, as site-packages does for who stands in a clone.
    installed(tmp_path / "other")
    code = """
import sys, odesolvers.cli, odesolvers.models.emoji
print(*{module.__file__ for name, module in sys.modules.items() if name.startswith("odesolvers")})
"""
    path = os.pathsep.join([str(tmp_path / "here"), str(tmp_path / "other")])
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert result.returncode == 0, result.stderr
    files = result.stdout.split()
    assert len(files) > 40
    assert [file for file in files if not file.startswith(str(tmp_path / "here"))] == []


def test_an_installed_package_holds_no_packages_of_others(tmp_path: Path) -> None:
    installed(tmp_path)
    (tmp_path / "stranger.py").touch()
    result = subprocess.run(
        [sys.executable, "-c", "import odesolvers.stranger"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert "No module named 'odesolvers.stranger'" in result.stderr


def test_pyproject_names_every_package_for_the_wheel() -> None:
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    found = set()
    for top, name in ((PACKAGE, "odesolvers"), (MODELS, "odesolvers.models")):
        for file in top.rglob("__init__.py"):
            found.add(".".join((name, *file.parent.relative_to(top).parts)))
    named = set(settings["tool"]["setuptools"]["packages"])
    assert named == found, "give tool.setuptools.packages in pyproject.toml the same packages"


def test_no_hint_names_an_index_that_has_no_such_package() -> None:
    files = [*PACKAGE.rglob("*.py"), *MODELS.rglob("*.py")]
    hints = [f"{file}: {line}" for file in files for line in file.read_text().splitlines()]
    wrong = [hint for hint in hints if re.search(r"pip install\W+odesolvers", hint)]
    assert not wrong, "the package is on no index: name the packages that are missing"
