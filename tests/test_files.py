"""States survive a file to the bit; anything else is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from odesolvers import BDIA, Grid, HeunEDM, State, karras_sigmas
from odesolvers.models import Gaussian

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


def rewritten(path: Path, **changes: str) -> None:
    """The same file with other metadata, as another program might write it."""
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), **changes}
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    metadata.setdefault("sha256", "")
    if "state" in changes:
        metadata["sha256"] = digest(changes["state"], tensors)
    save_file(tensors, path, metadata=metadata)


def test_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    a_state().save(path)
    rewritten(path, version="3")
    with pytest.raises(ValueError, match="version 3 of the state format"):
        State.load(path)


def test_an_index_off_the_grid_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    a_state().save(path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["state"])
    rewritten(path, state=json.dumps({**header, "index": 7}))
    with pytest.raises(ValueError, match="index must be between 1 and 6"):
        State.load(path)


def test_the_levels_of_a_state_are_a_grid_to_the_bit() -> None:
    state = a_state()
    assert Grid.of(state.sigmas).levels == state.sigmas
    assert Grid.of(list(state.sigmas)).levels == state.sigmas
    SOLVER.invert(Gaussian(0.3, 0.5), state, state.sigmas)
