"""EDM checkpoints: what is read, what is refused, and that nothing in a file is executed."""

from __future__ import annotations

import builtins
import functools
import importlib
import io
import json
import operator
import os
import pickle
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from odesolvers.models import load_edm, save_edm
from odesolvers.models.edm import CheckpointError, EDMPrecond, Preconditioner
from odesolvers.models.edm.pickles import read_pickle

from .edm_files import (
    ARCHITECTURES,
    PRECONDITIONERS,
    Persistent,
    arguments,
    dump,
    published,
    record,
    tiny,
)


def load(data: bytes, folder: Path, **options: Any) -> Preconditioner:
    path = folder / "network.pkl"
    path.write_bytes(data)
    return load_edm(path, **options)


def same(a: Preconditioner, b: Preconditioner) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return (
        type(a) is type(b)
        and a.arguments() == b.arguments()
        and a.model.config == b.model.config
        and ours.keys() == theirs.keys()
        and all(torch.equal(ours[name], theirs[name]) for name in ours)
    )


# --- What is read -----------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("precond", PRECONDITIONERS)
def test_pickle_to_safetensors_and_back_loses_nothing(
    architecture: str, precond: str, tmp_path: Path
) -> None:
    original = tiny(architecture, precond, classes=3, augment_dim=9, dropout=0.13)
    loaded = load(published(original), tmp_path)
    assert same(loaded, original)
    save_edm(loaded, tmp_path / "network.safetensors")
    again = load_edm(tmp_path / "network.safetensors")
    assert same(again, original)
    assert not again.training
    x = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)
    assert torch.equal(again(x, torch.ones(1)), original(x, torch.ones(1)))


def test_all_arguments_survive(tmp_path: Path) -> None:
    options = {"use_fp16": True, "sigma_min": 0.01, "sigma_max": 50.0, "sigma_data": 0.7}
    denoiser = EDMPrecond(tiny().model, **options)
    loaded = load(published(denoiser), tmp_path)
    assert loaded.arguments() == options
    save_edm(loaded, tmp_path / "a.safetensors")
    assert load_edm(tmp_path / "a.safetensors").arguments() == options


def test_arguments_by_position_and_defaults(tmp_path: Path) -> None:
    denoiser = tiny()
    pickled = record(denoiser, arguments(denoiser))
    kwargs = pickled.meta["state"]["_init_kwargs"]
    first = tuple(kwargs.pop(name) for name in ("img_resolution", "img_channels", "label_dim"))
    pickled.meta["state"]["_init_args"] = first
    del kwargs["embedding_type"], kwargs["sigma_data"], kwargs["use_fp16"]
    assert same(load(dump({"ema": pickled}), tmp_path), denoiser)
    # EDMPrecond holds an ADM network unless told otherwise.
    adm = tiny("adm")
    pickled = record(adm, arguments(adm))
    del pickled.meta["state"]["_init_kwargs"]["model_type"]
    assert same(load(dump({"ema": pickled}), tmp_path), adm)


def test_training_snapshots_and_bare_networks(tmp_path: Path) -> None:
    denoiser = tiny()
    net = record(denoiser, arguments(denoiser))
    snapshot = {
        "ema": net,
        "loss_fn": Persistent("EDMLoss", {"P_mean": -1.2, "_init_args": ()}),
        "augment_pipe": Persistent("AugmentPipe", {"p": 0.12, "_init_kwargs": {"p": 0.12}}),
        "dataset_kwargs": {"path": "data.zip", "use_labels": False, "max_size": None},
    }
    assert same(load(dump(snapshot), tmp_path), denoiser)
    assert same(load(dump(net), tmp_path), denoiser)
    assert same(load(dump(snapshot, protocol=5), tmp_path), denoiser)


def test_numpy_numbers_among_the_attributes(tmp_path: Path) -> None:
    denoiser = tiny()
    net = record(denoiser, arguments(denoiser) | {"sigma_data": np.float64(0.5)})
    net.meta["state"]["noted"] = [np.float32(1.5), np.int64(-3), np.bool_(True)]
    data = dump({"ema": net})
    assert same(load(data, tmp_path), denoiser)
    noted = read_pickle(io.BytesIO(data))["ema"].state["noted"]
    assert noted == [1.5, -3, True]
    assert [type(value) for value in noted] == [float, int, bool]


def test_the_range_is_that_of_the_levels_in_the_file(tmp_path: Path) -> None:
    denoiser = tiny(precond="iDDPMPrecond")
    for factor in (0.9995, 1.0005):  # as far as float32 arithmetic takes the published ones
        changed = tiny(precond="iDDPMPrecond")
        changed.get_buffer("u").mul_(factor)
        loaded = load(published(changed), tmp_path)
        assert loaded.sigma_min == pytest.approx(factor * denoiser.sigma_min)
        lowest = loaded.get_sigmas(18)[-2:-1]
        assert bool(loaded(torch.zeros(1, 3, 8, 8), lowest).isfinite().all())


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_numbers_of_either_numpy_and_byte_order(module: str, order: str) -> None:
    dtype = name("numpy", "dtype") + short("f8") + b"\x89\x88\x87R"
    dtype += b"(K\x03" + short(order) + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    value = b"C\x08" + struct.pack(order + "d", 0.7)
    body = name(module, "scalar") + dtype + value + b"\x86R."
    assert read_pickle(io.BytesIO(b"\x80\x04" + body)) == 0.7


def test_strided_tensors(tmp_path: Path) -> None:
    denoiser = tiny()
    net = record(denoiser, arguments(denoiser))
    mapping = net.meta["state"]["_modules"]["model"].meta["state"]["_modules"]["map_layer0"]
    weight = denoiser.model.get_parameter("map_layer0.weight")
    # One window of a larger storage, transposed.
    big = torch.zeros(weight.shape[1], weight.shape[0] + 5)
    big[:, 5:] = weight.T
    mapping.meta["state"]["_parameters"]["weight"] = big[:, 5:].T
    assert same(load(dump({"ema": net}), tmp_path), denoiser)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_and_device(dtype: torch.dtype, device: torch.device, tmp_path: Path) -> None:
    loaded = load(published(tiny("ncsnpp")), tmp_path, dtype=dtype, device=device)
    assert loaded.model.dtype == dtype
    assert all(t.device.type == device.type for t in loaded.state_dict().values())
    x = torch.randn(1, 3, 8, 8, device=device)
    out = loaded(x, torch.ones(1, device=device))
    assert out.dtype == torch.float32
    save_edm(loaded, tmp_path / "n.safetensors")
    assert same(load_edm(tmp_path / "n.safetensors", dtype=dtype, device=device), loaded)


def test_dtype_must_be_a_floating_point_dtype(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"floating point dtype, got torch\.int64"):
        load(published(tiny()), tmp_path, dtype=torch.int64)


# --- What is refused --------------------------------------------------------------------------


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
        r"weights.only(.|\n)*system",
    ),
    "storage archive": (
        lambda m: Call(torch.storage._load_from_bytes, nested(m, archive=True)),
        r"weights.only(.|\n)*system",
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
        r"the file holds a Evil; known are VPPrecond",
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


def short(text: str) -> bytes:
    """The instruction that pushes a short string."""
    return b"\x8c" + bytes([len(text)]) + text.encode()


def name(module: str, attribute: str) -> bytes:
    """The instructions that push a global."""
    return short(module) + short(attribute) + b"\x93"


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
        (name(*MODULE_DICT) + SLOTS, "damaged"),
        (name("numpy", "dtype") + SLOTS, "damaged"),
        (name("collections", "OrderedDict") + SLOTS, "damaged"),
        (name(*PERSISTENCE) + b"K\x07\x85R", "damaged"),
        (name(*PERSISTENCE) + b"}\x85R", "record of an unknown form"),
        (short("elsewhere") + b"Q", "outside itself, 'elsewhere'"),
        (b"\x82\x01", "damaged"),
        (b"\x97", "damaged"),
        (b"0", "damaged"),
        (b"K\x01", "no network under 'ema'"),
        (b"}", "no network under 'ema'"),
        (b"(" + short("G_ema") + b"K\x01d", r"holds \['G_ema'\]"),
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


# --- Safetensors ------------------------------------------------------------------------------


def test_save_wants_a_safetensors_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got 'network\.pkl'"):
        save_edm(tiny(), tmp_path / "network.pkl")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "was not written by save_edm"),
        ("{", "metadata of .* is damaged"),
        ("[]", "metadata of .* is damaged"),
        (json.dumps({"class_name": "EDMPrecond", "arguments": {}}), "cannot be constructed"),
        (json.dumps({"class_name": "X", "arguments": {}}), "the file holds a X"),
    ],
)
def test_safetensors_of_another_kind(metadata: str | None, message: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "a.safetensors"
    entries = None if metadata is None else {"odesolvers.edm": metadata}
    save_file({"a": torch.zeros(1)}, path, metadata=entries)
    with pytest.raises(CheckpointError, match=message):
        load_edm(path)


def test_damaged_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_edm(tiny(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"a\.safetensors is damaged"):
        load_edm(path)


def test_without_safetensors_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install 'odesolvers\[edm\]'"):
        save_edm(tiny(), tmp_path / "a.safetensors")


# --- Addresses --------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """A local server with two networks of one name, and a record of what was asked of it."""
    files = {"/a/net.pkl": published(tiny()), "/b/net.pkl": published(tiny(classes=3))}
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            data = files.get(self.path)
            self.send_response(404 if data is None else 200)
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, *_: Any) -> None:
            pass

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{web.server_port}", asked
    web.shutdown()
    web.server_close()


def test_an_address_is_downloaded_once(server: tuple[str, list[str]]) -> None:
    address, asked = server
    assert same(load_edm(f"{address}/a/net.pkl"), tiny())
    assert same(load_edm(f"{address}/b/net.pkl"), tiny(classes=3))
    assert same(load_edm(f"{address}/a/net.pkl"), tiny())
    assert asked == ["/a/net.pkl", "/b/net.pkl"]


def test_without_a_connection_the_error_says_what_to_do(server: tuple[str, list[str]]) -> None:
    address, _ = server
    for url in (f"{address}/missing.pkl", "http://127.0.0.1:1/net.pkl"):
        with pytest.raises(ConnectionError, match=r"bring the file here by other means"):
            load_edm(url)
