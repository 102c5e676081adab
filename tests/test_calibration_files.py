"""Calibrations in files from anywhere: a rule, or a ValueError."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from odesolvers import Calibrated
from odesolvers.calibration import CalibrationReport

from .test_files import JSON, places

RULE = Calibrated(
    "Euler()",
    (80.0, 10.0, 1.0, 0.1, 0.0),
    (0.9, 0.5, 0.25),
    CalibrationReport((0.1, 0.05), (0.2, math.nan), 0.3, runs=7, evaluations=21, moves=2),
    levels_learned=True,
)


def refused(path: Path) -> None:
    with pytest.raises(ValueError, match="is not a calibration") as caught:
        Calibrated.load(path)
    text = str(caught.value).removeprefix(str(path))
    assert len(text) < 400
    assert text.isprintable()


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_file_that_is_changed_is_a_rule_or_a_value_error(
    tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / "rule.json"
    RULE.save(path)
    content: dict[str, Any] = json.loads(path.read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        inside, key = data.draw(st.sampled_from(list(places(content))))
        change = data.draw(st.sampled_from(["replace", "delete", "add"]))
        if change == "replace":
            inside[key] = data.draw(JSON)
        elif change == "delete":
            del inside[key]
        elif isinstance(inside, dict):
            inside[data.draw(st.text(max_size=5))] = data.draw(JSON)
        else:
            inside.insert(key, data.draw(JSON))
        if not content:
            break
    path.write_text(json.dumps(content))
    try:
        rule = Calibrated.load(path)
    except ValueError:
        refused(path)
    else:
        assert type(rule.base) is str
        assert all(1e-6 <= g <= 1e6 for g in rule.values)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[" * 100_000,
        b"\xff\xfe",
        b"\0" * 99,
        b'{"format": ' + b"9" * 9999 + b"}",
        b"null",
        b"{}",
        b" " * 2**23 + b"{}",
    ],
)
def test_what_is_no_calibration_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    refused(tmp_path / "file")


@pytest.mark.parametrize(
    "change",
    [
        {"version": True},
        {"version": 1.0},
        {"version": 1},
        {"version": 3},
        {"levels_learned": 1},
        {"base": 5},
        {"base": []},
        {"values": "abc"},
        {"values": {"0": 1}},
        {"values": [1.0, 0.5, 0.25]},
        {"values": ["0x1p+1023"] * 3},
        {"values": ["0x1p-1000"] * 3},
        {"values": ["0x1p99999"] * 3},
        {"values": ["-0x1p0"] * 3},
        {"levels": ["0x1p0"] * 5},
        {"more": 1},
        {"report": []},
        {"report": {"runs": 10**400}},
        {"format": "odesolvers\x1b[2Jstate"},
    ],
    ids=str,
)
def test_types_and_ranges_are_checked(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "rule.json"
    RULE.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(path)


def test_files_of_the_first_version_are_read(tmp_path: Path) -> None:
    """They knew no learned levels."""
    path = tmp_path / "rule.json"
    RULE.save(path)
    content = json.loads(path.read_text()) | {"version": 1}
    del content["levels_learned"], content["report"]["consistency"]
    path.write_text(json.dumps(content))
    rule = Calibrated.load(path)
    assert rule == Calibrated(RULE.base, RULE.levels, RULE.values)
    assert rule.report is not None
    assert rule.report.runs == 7
    assert all(map(math.isnan, rule.report.consistency))


def test_a_file_of_the_rule_that_is_far_too_long_is_refused(tmp_path: Path) -> None:
    """Before it is read as JSON, which takes a hundred times its size in memory."""
    path = tmp_path / "rule.json"
    RULE.save(path)
    path.write_bytes(path.read_bytes() + b" " * 2**23)
    with pytest.raises(ValueError, match="more than 8388608 bytes"):
        Calibrated.load(path)


def test_a_rule_is_written_like_any_file(tmp_path: Path) -> None:
    path = tmp_path / "rule.json"
    RULE.save(path)
    (tmp_path / "link").symlink_to(path)
    RULE.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    again = Calibrated.load(path)
    assert again == RULE
    assert again.report is not None
    assert math.isnan(again.report.encoding[1])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "rule.json"]


@pytest.mark.skipif(sys.platform == "win32", reason="devices of POSIX")
def test_devices_are_neither_read_nor_replaced() -> None:
    for path in ("/dev/zero", "/dev/null"):
        with pytest.raises(OSError, match="not a regular file"):
            Calibrated.load(path)
        with pytest.raises(OSError, match="not a regular file"):
            RULE.save(path)
