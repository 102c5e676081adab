"""EDM checkpoints: published pickles, safetensors files and downloads."""

from __future__ import annotations

import json
import resource
import struct
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from odesolvers.models import load_edm, save_edm
from odesolvers.models.edm import CheckpointError, EDMPrecond
from odesolvers.models.edm.pickles import read_pickle

from .edm_files import (
    ARCHITECTURES,
    PRECONDITIONERS,
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


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_protocols_are_read_alike(architecture: str, protocol: int, tmp_path: Path) -> None:
    original = tiny(architecture, "iDDPMPrecond", classes=3)
    net = record(original, arguments(original) | {"C_2": np.float64(0.008)})
    net.meta["state"]["noted"] = {"empty": b"", "bytes": bytes(range(256)), "set": {1, "a"}}
    data = dump({"ema": net}, protocol=protocol)
    assert same(load(data, tmp_path), original)
    noted = read_pickle(data)["ema"].state["noted"]
    assert [bytes(noted["empty"]), bytes(noted["bytes"])] == [b"", bytes(range(256))]
    assert sorted(map(str, noted["set"])) == ["1", "a"]


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_attributes_of_parameters_and_buffers_are_left_out(protocol: int, tmp_path: Path) -> None:
    original, compiled = tiny("ncsnpp"), tiny("ncsnpp")
    for tensor in (*compiled.parameters(), *compiled.buffers()):
        tensor._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]
    data = dump({"ema": record(compiled, arguments(compiled))}, protocol=protocol)
    assert b"_rebuild_parameter_with_state" in data
    assert b"_rebuild_from_type_v2" in data
    assert same(load(data, tmp_path), original)


@pytest.mark.slow
def test_a_network_after_torch_compile(tmp_path: Path) -> None:
    original, compiled = tiny(), tiny()
    torch.compile(compiled, backend="eager")(torch.zeros(1, 3, 8, 8), torch.ones(1))
    data = dump({"ema": record(compiled, arguments(compiled))})
    assert b"_rebuild_parameter_with_state" in data
    assert same(load(data, tmp_path), original)


@pytest.mark.parametrize("python", [("copyreg", "builtins"), ("copy_reg", "__builtin__")])
def test_objects_of_the_first_protocols(python: tuple[str, str]) -> None:
    registry, builtins = python
    cls = name("torch.nn.modules.container", "ModuleDict")
    state = b"}" + short("_modules") + b"}sb"
    base = name(builtins, "object") + b"N\x87R"
    for made in (
        name(registry, "_reconstructor") + cls + base,
        name(registry, "__newobj__") + cls + b"\x85R",
    ):
        assert read_pickle(b"\x80\x02" + made + state + b".").state == {"_modules": {}}
    for body in (
        name(builtins, "set") + b"](K\x01K\x01e\x85R",
        b"\x8f(K\x01K\x01\x90",
        b"(K\x01K\x01\x91",
    ):
        assert read_pickle(b"\x80\x04" + body + b".") == [1, 1]


def test_numpy_numbers_among_the_attributes(tmp_path: Path) -> None:
    denoiser = tiny()
    net = record(denoiser, arguments(denoiser) | {"sigma_data": np.float64(0.5)})
    net.meta["state"]["noted"] = [np.float32(1.5), np.int64(-3), np.bool_(True)]
    data = dump({"ema": net})
    assert same(load(data, tmp_path), denoiser)
    noted = read_pickle(data)["ema"].state["noted"]
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
    assert read_pickle(b"\x80\x04" + body) == 0.7


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


# --- Safetensors ------------------------------------------------------------------------------


def test_save_wants_a_safetensors_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got 'network\.pkl'"):
        save_edm(tiny(), tmp_path / "network.pkl")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "was not written by save_edm"),
        ("{", "metadata is damaged"),
        ("[]", "metadata is damaged"),
        (json.dumps({"class_name": "EDMPrecond", "arguments": {}}), "cannot be constructed"),
        (json.dumps({"class_name": "X", "arguments": {}}), "the file holds a network 'X'"),
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
    with pytest.raises(CheckpointError, match=r"a\.safetensors: it is damaged: it ends"):
        load_edm(path)


def test_without_safetensors_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install safetensors"):
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


def test_a_download_of_any_length_ends(
    server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    address, _ = server
    monkeypatch.setattr("odesolvers.models.edm.checkpoint.DOWNLOAD", 1000)
    with pytest.raises(CheckpointError, match="has more than 1000 bytes"):
        load_edm(f"{address}/a/net.pkl")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_network_that_cannot_be_written_is_an_error_of_the_disk(tmp_path: Path) -> None:
    denoiser = tiny()
    with pytest.raises(FileNotFoundError):
        save_edm(denoiser, tmp_path / "missing" / "a.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(IsADirectoryError):
        save_edm(denoiser, tmp_path / "folder.safetensors")
    path = tmp_path / "full.safetensors"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # as on a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            save_edm(denoiser, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.safetensors", path.name]
