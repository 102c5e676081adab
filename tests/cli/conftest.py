"""A shell in a folder of its own, where each model is loaded once."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest

from odesolvers.cli import choices

from .shell import Shell


@pytest.fixture(scope="session")
def models() -> dict[str, choices.Model]:
    """The models, each loaded once."""
    cached = {name: functools.cache(model.load) for name, model in choices.MODELS.items()}
    return {n: dataclasses.replace(m, load=cached[n]) for n, m in choices.MODELS.items()}


@pytest.fixture(autouse=True)
def _elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: dict[str, choices.Model]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for name, model in models.items():
        monkeypatch.setitem(choices.MODELS, name, model)


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)
