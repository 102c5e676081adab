"""A shell in a folder of its own, where each model of the package is loaded once."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from odesolvers import opening

from .shell import Shell


@pytest.fixture(scope="session")
def bundled() -> Mapping[str, Any]:
    """The models, each loaded once."""
    return {name: (functools.cache(load), what) for name, (load, what) in opening.BUNDLED.items()}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundled: Mapping[str, Any]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for name, entry in bundled.items():
        monkeypatch.setitem(opening.BUNDLED, name, entry)  # type: ignore[arg-type]


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)
