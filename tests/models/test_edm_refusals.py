"""EDM checkpoints that are refused; nothing in a file is executed."""

from __future__ import annotations

import builtins
import functools
import importlib
import io
import operator
import os
import pickle
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from odesolvers.models import load_edm
from odesolvers.models.edm import CheckpointError

from .edm_files import (
    Persistent,
    arguments,
    dump,
    load,
    name,
    published,
    record,
    same,
    short,
    tiny,
)


class Call:
    """Pickles as a call of `function`, which `pickle.load` would make."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def nested(marker: str, *, archive: bool) -> bytes:
    """Bytes of `torch.save` that run a command when read by `torch.load` without weights_only."""
    file = io.BytesIO()
    torch.save(Call(os.system, f"touch {marker}"), file, _use_new_zipfile_serialization=archive)
    return file.getvalue()


ATTACKS: dict[str, tuple[Callable[[str], Any], str]] = {
    "os.system": (lambda m: Call(os.system, f"touch {m}"), r"system"),
    "eval": (lambda m: Call(eval, f"open({m!r}, 'w').close()"), r"builtins\.eval"),
    "exec": (lambda m: Call(exec, f"open({m!r}, 'w').close()"), r"builtins\.exec"),
    "open": (lambda m: Call(open, m, "w"), r"open"),
    "getattr": (
        lambda m: Call(getattr, Call(importlib.import_module, "os"), "system"),
        r"builtins\.getattr",
    ),
    "import": (lambda m: Call(builtins.__import__, "antigravity"), r"builtins\.__import__"),
    "attrgetter": (lambda m: Call(operator.attrgetter, "a.b"), r"operator\.attrgetter"),
    "partial": (lambda m: functools.partial(os.system, f"touch {m}"), r"functools\.partial"),
    "Popen": (lambda m: Call(subprocess.Popen, ["touch", m]), r"subprocess\.Popen"),
    "torch.load": (lambda m: Call(torch.load, m), r"torch\.serialization\.load"),
    "hub": (lambda m: Call(torch.hub.load, "a/b", "c"), r"torch\.hub\.load"),
    "storage": (
        lambda m: Call(torch.storage._load_from_bytes, nested(m, archive=False)),
        r"posix\.system",
    ),
    "storage archive": (
        lambda m: Call(torch.storage._load_from_bytes, nested(m, archive=True)),
        r"storage in an archive",
    ),
    "object array": (
        lambda m: np.array([Call(os.system, f"touch {m}")], dtype=object),
        r"multiarray\._reconstruct",
    ),
    "object scalar": (
        lambda m: Call(np.float64(0).__reduce__()[0], np.dtype("O"), b"12345678"),
        r"numpy dtype 'O8'",
    ),
    "record": (
        lambda m: Persistent(
            "Evil",
            {"_init_args": (), "_init_kwargs": {}},
            source=f"open({m!r}, 'w').close()\nclass Evil: pass\n",
        ),
        r"the file holds a network 'Evil'; known are VPPrecond",
    ),
    "known record": (
        lambda m: Persistent(
            "EDMPrecond",
            {"_init_args": (), "_init_kwargs": {}, "evil": Call(os.system, f"touch {m}")},
        ),
        r"system",
    ),
    "other module": (lambda m: nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_malicious_files_are_refused_by_name_and_not_executed(attack: str, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    payload, message = ATTACKS[attack]
    data = dump({"ema": payload(str(marker))})
    with pytest.raises(CheckpointError, match=message):
        load(data, tmp_path)
    assert not marker.exists()


def test_the_attacks_would_have_worked(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    for attack in ("os.system", "eval", "exec"):
        pickle.loads(dump({"ema": ATTACKS[attack][0](str(marker))}))
        assert marker.exists(), attack
        marker.unlink()
    for archive in (False, True):
        torch.load(io.BytesIO(nested(str(marker), archive=archive)), weights_only=False)
        assert marker.exists()
        marker.unlink()


PERSISTENCE = ("torch_utils.persistence", "_reconstruct_persistent_obj")
MODULE_DICT = ("torch.nn.modules.container", "ModuleDict")
SLOTS = b"N}" + short("__init__") + b"K\x07s\x86b"  # BUILD with (None, {"__init__": 7})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (name("torch.nn.modules.container", "ModuleDict.__init__.__globals__"), "__globals__"),
        (name("collections", "OrderedDict.__class__"), "OrderedDict.__class__"),
        (name("odesolvers.models.edm.pickles", "_NAMES"), "_NAMES"),
        (name("builtins", "dict"), r"builtins\.dict"),
        (name(*PERSISTENCE) + SLOTS, "alter"),
        (name(*MODULE_DICT) + SLOTS, "alter"),
        (name("numpy", "dtype") + SLOTS, "alter"),
        (name("collections", "OrderedDict") + SLOTS, "alter"),
        (name(*MODULE_DICT) + b")\x81" + SLOTS, "no dict"),
        (name(*PERSISTENCE) + b"K\x07\x85R", "record of an unknown form"),
        (name(*PERSISTENCE) + b"}\x85R", "record of an unknown form"),
        (short("elsewhere") + b"Q", "outside itself, 'elsewhere'"),
        (b"\x82\x01", "damaged"),
        (b"\x97", "damaged"),
        (b"0", "damaged"),
        (b"K\x01", "no network under 'ema'"),
        (b"}", "no network under 'ema'"),
        (b"(" + short("G_ema") + b"K\x01d", "holds 'G_ema'"),
        (b"(" + short("ema") + b"Nd", "no network under 'ema'"),
    ],
)
def test_handmade_instructions(body: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(b"\x80\x04" + body + b".", tmp_path)
    # What a file was refused for leaves no trace in the reader.
    denoiser = tiny()
    assert same(load(published(denoiser), tmp_path), denoiser)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        b"<!DOCTYPE html><html>Not found</html>",
        b"\x00" * 100,
        b"version https://git-lfs",
    ],
)
def test_not_a_pickle(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="damaged or is not a pickle"):
        load(data, tmp_path)


def test_truncated_files(tmp_path: Path) -> None:
    data = published(tiny())
    for k in range(1, 40):
        with pytest.raises(CheckpointError, match=r"damaged|no network"):
            load(data[: len(data) * k // 40], tmp_path)


def test_damaged_storage(tmp_path: Path) -> None:
    data = published(tiny())
    middle = data.index(b"storage", len(data) // 2)
    with pytest.raises(CheckpointError, match="damaged"):
        load(data[:middle] + b"egarots" + data[middle + 7 :], tmp_path)


def test_archives_of_torch_save(tmp_path: Path) -> None:
    torch.save({"net": 1}, tmp_path / "training-state-000000.pt")
    with pytest.raises(CheckpointError, match=r"take the network-snapshot-\*\.pkl"):
        load_edm(tmp_path / "training-state-000000.pt")


def test_missing_file(tmp_path: Path) -> None:
    for suffix in ("pkl", "safetensors"):
        with pytest.raises(FileNotFoundError):
            load_edm(tmp_path / f"none.{suffix}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "VisionTransformer"}, "unknown network 'VisionTransformer'"),
        ({"surprise": 1}, "surprise"),
        ({"img_resolution": "8"}, "img_resolution must be made of whole numbers, got '8'"),
        ({"img_channels": None}, "in_channels must be"),
        ({"model_channels": 10**12}, "model_channels"),
        ({"channel_mult": 2}, "cannot be constructed"),
        ({"channel_mult": []}, "img_resolution"),
        ({"channel_mult": [1, 1, 1, 1, 1]}, "cannot be halved 4 times"),
        ({"encoder_type": "wide"}, "encoder_type must be one of"),
        ({"resample_filter": [1, 2, 1]}, "even number of weights"),
        ({"num_blocks": 2}, "the file lacks"),
        ({"attn_resolutions": []}, "the file has unknown .* tensors, such as model"),
        ({"model_channels": 32}, r"has shape .* ask for"),
        ({"augment_dim": 9}, r"the file lacks 1 tensors, such as model\.map_augment\.weight"),
    ],
)
def test_arguments_that_do_not_fit(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(published(tiny(), **changes), tmp_path)


@pytest.mark.parametrize("name", ["\0surprise", "\x1b[2J", "sur\u202eprise"])
def test_tracebacks_print_no_control_characters(name: str, tmp_path: Path) -> None:
    """Python's own errors, which are causes of ours, repeat the names of arguments as they are."""
    with pytest.raises(CheckpointError, match="cannot be constructed") as caught:
        load(published(tiny(), **{name: 1}), tmp_path)
    assert "".join(traceback.format_exception(caught.value)).replace("\n", "").isprintable()


def test_attributes_that_contradict_the_arguments(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has sigma_data = 0\.5, we make it 0\.51"):
        load(published(tiny(), sigma_data=0.51), tmp_path)
    net = record(denoiser := tiny("adm"), arguments(denoiser))
    model = net.meta["state"]["_modules"]["model"].meta["state"]
    block = model["_modules"]["enc"]._modules["4x4_block0"]
    block.meta["state"]["num_heads"] = 4
    with pytest.raises(CheckpointError, match=r"enc\.4x4_block0\.num_heads = 4, we make it 2"):
        load(dump({"ema": net}), tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.full((64,), float("nan")), r"map_layer0\.bias in the file is not finite"),
        (torch.zeros(64, dtype=torch.int64), "not a floating point tensor"),
        (torch.zeros(63), r"has shape \(63,\), its construction arguments ask for \(64,\)"),
        ("text", "not a floating point tensor"),
    ],
)
def test_bad_tensors(value: Any, message: str, tmp_path: Path) -> None:
    net = record(denoiser := tiny(), arguments(denoiser))
    layer = net.meta["state"]["_modules"]["model"].meta["state"]["_modules"]["map_layer0"]
    layer.meta["state"]["_parameters"]["bias"] = value
    with pytest.raises(CheckpointError, match=message):
        load(dump({"ema": net}), tmp_path)


class Window:
    """Pickles as a tensor that reaches beyond its storage."""

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, args = torch.zeros(64).__reduce_ex__(4)[:2]
        return rebuild, (args[0], 32, *args[2:])


def test_a_tensor_beyond_its_storage(tmp_path: Path) -> None:
    net = record(denoiser := tiny(), arguments(denoiser))
    layer = net.meta["state"]["_modules"]["model"].meta["state"]["_modules"]["map_layer0"]
    layer.meta["state"]["_parameters"]["bias"] = Window()
    with pytest.raises(CheckpointError, match="out of bounds"):
        load(dump({"ema": net}), tmp_path)


def test_a_module_that_contains_itself(tmp_path: Path) -> None:
    denoiser = tiny()
    net = record(denoiser, arguments(denoiser))
    enc = net.meta["state"]["_modules"]["model"].meta["state"]["_modules"]["enc"]
    enc._modules["loop"] = enc
    with pytest.raises(CheckpointError, match=r"no module .* at 'model\.enc\.loop"):
        load(dump({"ema": net}), tmp_path)


def test_a_record_without_arguments(tmp_path: Path) -> None:
    net = Persistent("EDMPrecond", {"_init_args": None, "_init_kwargs": None})
    with pytest.raises(CheckpointError, match="does not record how its EDMPrecond"):
        load(dump({"ema": net}), tmp_path)
