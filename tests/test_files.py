"""States survive a file to the bit; anything else is refused."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from odesolvers import BDIA, Euler, FixedPoint, Grid, HeunEDM, State, karras_sigmas
from odesolvers.models import Gaussian

from .problems import gaussian, noise

SIGMAS = karras_sigmas(6)
SOLVER = BDIA(HeunEDM(), 1.0)


def a_state(dtype: torch.dtype = torch.float64) -> State:
    x = torch.randn(3, 1, 4, 5, dtype=torch.float64).mul(80).to(dtype)
    return SOLVER.sample(Gaussian(0.3, 0.5), x, SIGMAS).state


def equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_state_comes_back_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    state = a_state(dtype)
    state.save(tmp_path / "state.safetensors")
    loaded = State.load(tmp_path / "state.safetensors")
    assert equal(loaded.current, state.current)
    assert equal(loaded.partner, state.partner)
    assert (loaded.index, loaded.sigmas, loaded.solver) == (6, state.sigmas, state.solver)
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_loaded_state_inverts_to_the_same_noise(tmp_path: Path) -> None:
    state = a_state()
    state.save(tmp_path / "state.safetensors")
    loaded = State.load(tmp_path / "state.safetensors")
    here, there = (SOLVER.invert(Gaussian(0.3, 0.5), s, SIGMAS) for s in (state, loaded))
    assert torch.equal(here.x, there.x)


def test_a_lone_state_a_strided_one_and_one_that_holds_a_tensor_twice(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    x = torch.randn(5, 4, 1, 3).transpose(0, 3)
    levels = tuple(SIGMAS.tolist())
    for state in (State(x, None, 0, levels, "s"), State(x, x, 2, levels, "s")):
        state.save(path)
        loaded = State.load(path)
        assert equal(loaded.current, state.current)
        assert equal(loaded.partner, state.partner)


def test_a_loaded_state_does_not_change_with_its_file(tmp_path: Path) -> None:
    first, second = a_state(), a_state()
    first.save(tmp_path / "state.safetensors")
    loaded = State.load(tmp_path / "state.safetensors")
    second.save(tmp_path / "state.safetensors")
    assert equal(loaded.current, first.current)


def test_notes_are_kept(tmp_path: Path) -> None:
    notes = {"model": "digits", "labels": [1, 2], "gamma": None}
    a_state().save(tmp_path / "state.safetensors", notes)
    assert State.load_with_notes(tmp_path / "state.safetensors")[1] == notes


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    a_state().save(path)
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="state"):
            State.load(path)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_shortened_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "state.safetensors"
    a_state().save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="not a saved state"):
        State.load(path)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a state, but long enough to have a header in it")
    with pytest.raises(ValueError, match="not a saved state"):
        State.load(text)
    weights = tmp_path / "weights.safetensors"
    save_file({"cleaner": torch.zeros(2)}, weights)
    with pytest.raises(ValueError, match=r"not a state saved by odesolvers"):
        State.load(weights)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        State.load(tmp_path / "absent.safetensors")


def digest(header: str, tensors: dict[str, torch.Tensor]) -> str:
    """The checksum of the format: header, then name, dtype, shape and bytes of each tensor."""
    found = hashlib.sha256(header.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def contents(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """The metadata of a file and its tensors."""
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def rewritten(path: Path, header: object = None, **changes: object) -> None:
    """The same file with other metadata or tensors, and a checksum that is right."""
    metadata, tensors = contents(path)
    for name, change in changes.items():
        if name in ("format", "version"):
            metadata[name] = str(change)
        elif change is None:
            del tensors[name]
        else:
            assert isinstance(change, torch.Tensor)
            tensors[name] = change
    if header is not None:
        metadata["state"] = header if isinstance(header, str) else json.dumps(header)
    metadata["sha256"] = digest(metadata["state"], tensors)
    save_file(tensors, path, metadata=metadata)


def test_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    a_state().save(path)
    rewritten(path, version="4")
    with pytest.raises(ValueError, match="version 4 of the state format"):
        State.load(path)


@cache
def state_of(exact: bool) -> State:
    """A state in floating point, or with side information of which words were put aside."""
    if not exact:
        return a_state()
    solver = BDIA(Euler(), 0.5, FixedPoint())
    return solver.sample(gaussian(), noise(2, 5, sigma=80.0), karras_sigmas(110)).state


def saved(folder: Path, exact: bool) -> tuple[Path, dict[str, Any]]:
    """A file of a state, and its header."""
    path = folder / "state.safetensors"
    state_of(exact).save(path)
    header: dict[str, Any] = json.loads(contents(path)[0]["state"])
    return path, header


def test_an_index_off_the_grid_is_refused(tmp_path: Path) -> None:
    path, header = saved(tmp_path, exact=False)
    rewritten(path, {**header, "index": 7})
    with pytest.raises(ValueError, match="index must be between 1 and 6"):
        State.load(path)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every list and object within a value of JSON, with each of its indices or names."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 1, 2**31, 2**63, 10**400, "float32", "load", "int64", "0x1p99999"])
    | st.floats()
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.mark.parametrize("exact", [False, True])
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_header_that_is_changed_is_a_state_or_a_value_error(
    tmp_path: Path, exact: bool, data: st.DataObject
) -> None:
    """Its checksum is right: types, ranges and lengths are what is checked."""
    path, header = saved(tmp_path, exact)
    for _ in range(data.draw(st.integers(1, 3))):
        inside, key = data.draw(st.sampled_from(list(places(header))))
        change = data.draw(st.sampled_from(["replace", "delete", "add"]))
        if change == "replace":
            inside[key] = data.draw(JSON)
        elif change == "delete":
            del inside[key]
        elif isinstance(inside, dict):
            inside[data.draw(st.text(max_size=5))] = data.draw(JSON)
        else:
            inside.insert(key, data.draw(JSON))
        if not any(True for _ in places(header)):
            break
    rewritten(path, header)
    try:
        state, notes = State.load_with_notes(path)
    except ValueError as error:
        text = str(error).removeprefix(str(path))
        assert len(text) < 400
        assert text.isprintable()
    else:
        assert isinstance(notes, dict)
        assert type(state.index) is int
        assert type(state.coupled) is bool
        assert type(state.solver) is str


@pytest.mark.parametrize(
    "text",
    ["", "[" * 100_000, "{" * 5, "null", "1" * 10_000, "[]", '"state"', "{}"],
)
def test_a_header_that_is_none_is_a_value_error(tmp_path: Path, text: str) -> None:
    path, _ = saved(tmp_path, exact=False)
    rewritten(path, text)
    with pytest.raises(ValueError, match="is not a saved state"):
        State.load(path)


WRONG = {
    "of integers": {"current": torch.ones(3, 1, 4, 5, dtype=torch.int64)},
    "of bools": {"current": torch.ones(3, 1, 4, 5, dtype=torch.bool)},
    "in float8": {"current": torch.ones(3, 1, 4, 5).to(torch.float8_e4m3fn)},
    "not a number": {"current": torch.full((3, 1, 4, 5), math.nan, dtype=torch.float64)},
    "infinite": {"partner": torch.full((3, 1, 4, 5), math.inf, dtype=torch.float64)},
    "empty": {"current": torch.ones(0, 1), "partner": torch.ones(0, 1)},
    "without a batch": {"current": torch.tensor(1.0), "partner": torch.tensor(1.0)},
    "of two shapes": {"current": torch.ones(3, 1, 5, 4, dtype=torch.float64)},
    "of two dtypes": {"current": torch.ones(3, 1, 4, 5)},
    "absent": {"current": None},
    "alone": {"partner": None},
    "one too many": {"other": torch.ones(3)},
    "with words": {"side.packed": torch.zeros(0, 1, dtype=torch.int32)},
}
WRONG_SIDE = {
    "absent": {"side.packed": None},
    "a word absent": {"side.word.0": None},
    "a word too many": {"side.word.99": torch.zeros(10, dtype=torch.int32)},
    "words too long": {"side.word.0": torch.zeros(11, dtype=torch.int32)},
    "words of int64": {"side.word.0": torch.zeros(10, dtype=torch.int64)},
    "packed as float32": {"side.packed": torch.zeros(3, 1)},
    "packed too high": {"side.packed": torch.zeros(32, 1, dtype=torch.int32)},
    "packed without rows": {"side.packed": torch.zeros(1, dtype=torch.int32)},
    "packed without dimensions": {"side.packed": torch.tensor(1, dtype=torch.int32)},
    "a checksum too long": {"side.checksum": torch.zeros(5, dtype=torch.int64)},
    "a checksum of int32": {"side.checksum": torch.zeros(2, dtype=torch.int32)},
    "states of int32": {
        "current": torch.ones(2, 5, dtype=torch.int32),
        "partner": torch.ones(2, 5, dtype=torch.int32),
    },
}


@pytest.mark.parametrize(
    ("exact", "tensors"),
    [
        *(pytest.param(False, tensors, id=name) for name, tensors in WRONG.items()),
        *(pytest.param(True, tensors, id=f"side, {name}") for name, tensors in WRONG_SIDE.items()),
    ],
)
def test_tensors_of_other_kinds_are_refused(
    tmp_path: Path, exact: bool, tensors: dict[str, torch.Tensor | None]
) -> None:
    path, _ = saved(tmp_path, exact)
    rewritten(path, **tensors)
    with pytest.raises(ValueError, match="is not a saved state"):
        State.load(path)


@pytest.mark.parametrize("exact", [False, True])
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_bytes_that_are_changed_are_noticed(
    tmp_path: Path, exact: bool, data: st.DataObject
) -> None:
    path = tmp_path / "whole"
    if not path.exists():
        saved(tmp_path, exact)[0].rename(path)
    whole = path.read_bytes()
    cuts = st.integers(0, len(whole))
    start, end = data.draw(cuts), data.draw(cuts)
    insert = data.draw(st.binary(max_size=9) | st.just(whole[min(start, end) : max(start, end)]))
    changed = whole[:start] + insert + whole[end:]
    (tmp_path / "changed").write_bytes(changed)
    if changed != whole:
        with pytest.raises(ValueError, match="is not a saved state"):
            State.load(tmp_path / "changed")


@pytest.mark.parametrize(
    "layout",
    [
        torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        torch.randn(2, 1, 4, 4).contiguous(memory_format=torch.channels_last),
        torch.randn(2, 3, 2, 4, 4).contiguous(memory_format=torch.channels_last_3d),
        torch.randn(4, 3, 2).permute(2, 0, 1),
        torch.randn(1, 2)[:, ::2],
        torch.randn(2, 6)[:, ::2],
        torch.randn(2, 1).expand(2, 3),
        torch.randn(3),
    ],
    ids=lambda x: f"{tuple(x.shape)} {x.stride()}",
)
def test_the_layout_comes_back(tmp_path: Path, layout: torch.Tensor) -> None:
    """As a run would have it, which starts from a copy: kernels round by layout."""
    path, levels = tmp_path / "state", tuple(SIGMAS.tolist())
    State(layout, layout.contiguous(), 1, levels, "s").save(path)
    loaded = State.load(path)
    assert torch.equal(loaded.current, layout)
    assert loaded.current.stride() == layout.clone().stride()
    assert loaded.partner is not None
    assert loaded.partner.is_contiguous()


@pytest.mark.skipif(sys.platform == "win32", reason="modes and links of POSIX")
def test_a_state_is_written_like_any_file(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"old")
    path.chmod(0o640)
    (tmp_path / "link").symlink_to(path)
    state = a_state()
    state.save(tmp_path / "link")
    assert path.stat().st_mode & 0o777 == 0o640
    assert equal(State.load(path).current, state.current)
    with pytest.raises(FileNotFoundError):
        state.save(tmp_path / "absent" / "state")
    for place in (Path("/dev/null"), tmp_path):
        with pytest.raises(OSError, match="not a regular file"):
            state.save(place)
        with pytest.raises(OSError, match="not a regular file"):
            State.load(place)


def test_the_levels_of_a_state_are_a_grid_to_the_bit() -> None:
    state = a_state()
    assert Grid.of(state.sigmas).levels == state.sigmas
    assert Grid.of(list(state.sigmas)).levels == state.sigmas
    SOLVER.invert(Gaussian(0.3, 0.5), state, state.sigmas)
