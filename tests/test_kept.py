"""Figures that several processes of a benchmark measure together."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common import Kept, kept as module

ELSEWHERE = """
import sys
from pathlib import Path
from benchmarks.common import Kept, kept as module
module.CACHE = Path(sys.argv[1])
print([Kept(Path(sys.argv[2]))(key, lambda: "theirs") for key in sys.argv[3:]])
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "CACHE", tmp_path / "cache")
    return tmp_path / "figures.jsonl"


def elsewhere(path: Path, *keys: str) -> str:
    """What another process gets for each key."""
    command = [sys.executable, "-c", ELSEWHERE, str(path.parent / "cache"), str(path), *keys]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_a_figure_is_measured_once_and_read_again(path: Path) -> None:
    assert Kept(path)("a", lambda: {"error": 1.5}) == {"error": 1.5}
    assert Kept(path)("a", lambda: pytest.fail("measured again")) == {"error": 1.5}


def test_another_process_gets_nothing_until_the_figure_is_there(path: Path) -> None:
    """Also after a figure that the first one needed is done."""
    kept = Kept(path)

    def measure() -> str:
        kept("inner", lambda: 1)
        return elsewhere(path, "outer", "inner", "other")

    assert kept("outer", measure) == "[None, 1, 'theirs']"
    assert kept("other", lambda: pytest.fail("measured again")) == "theirs"


def test_a_measurement_that_fails_is_made_again(path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        Kept(path)("a", lambda: 1 / 0)
    assert Kept(path)("a", lambda: 2) == 2


def test_a_line_that_was_cut_off_is_measured_again(path: Path) -> None:
    Kept(path)("a", lambda: 1)
    Kept(path)("b", lambda: 2)
    path.write_bytes(path.read_bytes()[:-3])
    assert Kept(path).read() == {"a": 1}
    assert Kept(path)("b", lambda: 3) == 3
    assert Kept(path).read() == {"a": 1, "b": 3}
