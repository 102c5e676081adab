"""EDM checkpoints from strangers: bounded time, memory and messages, whatever the file holds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from odesolvers.models import load_edm, save_edm
from odesolvers.models.edm import CheckpointError, DhariwalConfig, EDMPrecond, SongConfig, VPPrecond
from odesolvers.models.edm.stored import Storage, StoredTensor

from .edm_files import dump, load, published, tiny
from .edm_floods import alike, hollow
from .edm_hostile import amplified


def test_tensors_may_not_share_their_numbers(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tensors in the file share their numbers"):
        load(amplified(), tmp_path)


@pytest.mark.parametrize("ending", ["pkl", "safetensors"])
def test_folders_devices_and_pipes_are_refused(ending: str, tmp_path: Path) -> None:
    folder, pipe = tmp_path / f"folder.{ending}", tmp_path / f"pipe.{ending}"
    folder.mkdir()
    os.mkfifo(pipe)
    link = tmp_path / f"endless.{ending}"
    link.symlink_to("/dev/zero")
    for path, message in (
        (folder, "is a folder"),
        (pipe, "is not a file"),
        (link, "is not a file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_edm(path)


def test_a_file_that_changes_while_a_network_is_used_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_edm(tiny(), path)
    loaded = load_edm(path)
    x, sigma = torch.ones(1, 3, 8, 8), torch.ones(1)
    before = loaded(x, sigma)
    path.write_bytes(b"")
    assert torch.equal(loaded(x, sigma), before)


def test_messages_are_short_and_printable() -> None:
    for text in ("a" * 10**6, "\x1b[2J\n" * 1000, "\udc80" * 1000, "\u202e" * 1000):
        message = str(CheckpointError(text))
        assert len(message) == 300
        assert message.isprintable()
    assert str(CheckpointError("größer")) == "größer"


def test_stored_tensors_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        numbers = torch.randn(60, generator=generator).to(dtype)
        data = b"\0" + numbers.view(torch.uint8).numpy().tobytes()  # not aligned
        storage = Storage(memoryview(data)[1:], dtype)
        for shape, stride, offset in (
            ((60,), (1,), 0),
            ((5, 12), (12, 1), 0),
            ((12, 5), (1, 12), 0),
            ((3, 4), (20, 2), 7),
            ((), (), 59),
            ((0, 4), (1, 1), 60),
        ):
            got = StoredTensor(storage, offset, shape, stride).load()
            assert torch.equal(got, numbers.as_strided(shape, stride, offset))
            assert got.is_contiguous()
        for shape, stride, offset in (
            ((61,), (0,), 0),
            ((2,), (60,), 0),
            ((1,), (1,), 60),
            ((2,), (-1,), 1),
            ((1,), (1,), -1),
            ((2, 2), (1,), 0),
            ((2**40, 2**40), (0, 0), 0),
        ):
            with pytest.raises(CheckpointError, match="the file holds a tensor"):
                StoredTensor(storage, offset, shape, stride)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma_data": "x"}, "sigma_data must be a number from 1e-30 to 1e.30, got 'x'"),
        ({"sigma_data": -0.5}, "sigma_data must be a number"),
        ({"sigma_data": float("nan")}, "sigma_data must be a number"),
        ({"sigma_data": 10**400}, "sigma_data must be a number .* of very many digits"),
        ({"sigma_min": None}, "sigma_min must be a number from 0 to inf, got None"),
        ({"sigma_min": 2.0, "sigma_max": 1.0}, "sigma_max must be a number from 2 to inf, got 1.0"),
        ({"use_fp16": 1}, "use_fp16 must be True or False, got 1"),
    ],
)
def test_settings_of_preconditioners(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EDMPrecond(tiny().model, **settings)  # type: ignore[arg-type]


def test_settings_of_networks() -> None:
    form = {"img_resolution": 8, "in_channels": 3, "out_channels": 3}
    with pytest.raises(ValueError, match="dropout must be a number from 0 to 1, got 'x'"):
        DhariwalConfig(**form, dropout="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"resample_filter must be .* got a list, 1"):
        SongConfig(**form, resample_filter=([], 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"encoder_type must be one of .* got a list"):
        SongConfig(**form, encoder_type=[])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="beta_d must be a number from 1e-30 to 100, got 1000"):
        VPPrecond(tiny().model, beta_d=1000)


def test_the_size_of_a_network_is_compared_before_it_is_built(tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    for precond, changes, asked in (
        ("EDMPrecond", {"num_blocks": 10**5}, "400006 residual blocks"),
        ("EDMPrecond", {"model_channels": 2**19}, "524288 channels"),
        ("iDDPMPrecond", {"M": 10**9}, "1000000000 noise levels"),
    ):
        path.write_bytes(published(tiny(precond=precond), **changes))
        with pytest.raises(CheckpointError, match=f"ask for {asked}, its .* tensors have at most"):
            load_edm(path)


@pytest.mark.parametrize("kind", ["SongUNet", "DhariwalUNet"])
@pytest.mark.parametrize("named", [True, False])
def test_empty_tensors_are_no_blocks(kind: str, named: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(hollow(kind, 3000, named=named))
    held = 500 if named else 0
    with pytest.raises(CheckpointError, match=f"ask for 2001 residual blocks.* at most {held}"):
        load_edm(path)


@pytest.mark.parametrize("key", [2**61 - 1, 2**31, -(2**31), 0.5, b"a", ()])
def test_keys_that_can_be_chosen_to_hash_alike_are_refused(key: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"refused: the file uses .* as a key"):
        load(dump({key: None}), tmp_path)


def test_many_keys_that_hash_alike(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"refused: the file uses .* as a key"):
        load(alike(50_000), tmp_path)
