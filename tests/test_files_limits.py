"""Files of states that overlap, are too long, or would write to a terminal are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from odesolvers import State

from .test_files import SIGMAS, a_state, contents, rewritten, saved


@pytest.mark.parametrize(
    "strides",
    [[2, 2], [1, 1], [4, 0], [0, 4], [3, 2], [1, 5], [8, 1], [3], [3, 1, 9], []],
    ids=str,
)
def test_strides_that_overlap_or_leave_gaps_are_refused(tmp_path: Path, strides: list[int]) -> None:
    path = tmp_path / "state"
    State(torch.randn(3, 3), None, 0, tuple(SIGMAS.tolist()), "s").save(path)
    header = json.loads(contents(path)[0]["state"])
    rewritten(path, {**header, "strides": {"current": strides}})
    with pytest.raises(ValueError, match="has no strides"):
        State.load(path)


@pytest.mark.parametrize(
    "solver", ["\x1b[2J", "a\nb", "a\0", "\u202ereversed", "\ud800"], ids=ascii
)
def test_a_solver_with_control_characters_is_neither_written_nor_read(
    tmp_path: Path, solver: str
) -> None:
    path, header = saved(tmp_path, exact=False)
    rewritten(path, {**header, "solver": solver})
    with pytest.raises(ValueError, match="must be a string of printable characters"):
        State.load(path)
    state = State(torch.ones(1, 1), None, 0, (2.0, 1.0, 0.0), solver)
    with pytest.raises(ValueError, match="must be a string of printable characters"):
        state.save(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_header_that_is_far_too_long_is_neither_written_nor_read(tmp_path: Path) -> None:
    """It is not read as JSON, which takes a hundred times its size in memory."""
    state = a_state()
    for long in ({"text": "a" * 2**23}, {"list": [{}] * 2**22}):
        with pytest.raises(ValueError, match="at most 8388608 bytes"):
            state.save(tmp_path / "state", long)
        assert not (tmp_path / "state").exists()
    body = b'{"a":[' + b'{"b":[]},' * 10**6 + b"0]}"
    (tmp_path / "state").write_bytes(len(body).to_bytes(8, "little") + body)
    with pytest.raises(ValueError, match="its header has more than 8388608 bytes"):
        State.load(tmp_path / "state")


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_a_path_that_no_file_can_have_is_an_os_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(OSError, match="is no name of a file"):
        a_state().save(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        State.load(tmp_path / name)
