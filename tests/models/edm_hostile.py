"""Files made by hand to attack the reader of EDM checkpoints."""

from __future__ import annotations

import json
import struct
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from odesolvers.models import save_edm

from .edm_files import (
    Persistent,
    arguments,
    dump,
    name,
    record,
    short,
    tiny as _tiny,
)

tiny = cache(_tiny)
PROTO = b"\x80\x04"
ARGUMENTS = (
    *("num_blocks", "model_channels", "channel_mult_emb", "channel_mult", "channel_mult_noise"),
    *("img_resolution", "img_channels", "label_dim", "augment_dim", "attn_resolutions", "dropout"),
    *(
        "resample_filter",
        "label_dropout",
        "embedding_type",
        "encoder_type",
        "model_type",
        "surprise",
    ),
    *("sigma_data", "sigma_min", "sigma_max", "use_fp16"),
)
OPENING = {"_init_args": (), "_init_kwargs": {}}


def _ema(body: bytes) -> bytes:
    """A pickle of ``{"ema": body}``."""
    return PROTO + b"}" + short("ema") + body + b"s."


def _storage(body: bytes, times: int) -> bytes:
    """So many calls that read the same bytes as a storage."""
    call = name("torch.storage", "_load_from_bytes") + b"\x940"
    content = b"B" + struct.pack("<I", len(body)) + body + b"\x940"
    return PROTO + call + content + b"h\x00h\x01\x85R" * times + b"."


def _module(**state: Any) -> Persistent:
    return Persistent("EDMPrecond", {"_modules": {}} | OPENING | state)


def _network(change: Callable[[dict[str, Any]], None], **options: Any) -> bytes:
    """A network of which the attributes of the first module below are changed."""
    denoiser = tiny(**options)
    net = record(denoiser, arguments(denoiser))
    change(net.meta["state"]["_modules"]["model"].meta["state"])
    return dump({"ema": net})


def _arguments(**changes: Any) -> bytes:
    precond = changes.pop("precond", "EDMPrecond")
    denoiser = tiny(precond=precond)
    return dump({"ema": record(denoiser, arguments(denoiser) | changes)})


def _chain(length: int, text: str) -> bytes:
    """Modules in modules, written by hand because the pickler recurses."""
    table = name("torch_utils.persistence", "_reconstruct_persistent_obj") + b"\x940"
    start = b"h\x00}(" + short("type") + short("class") + short("class_name") + short("EDMPrecond")
    start += short("state") + b"}(" + short("_init_args") + b")" + short("_init_kwargs") + b"}"
    start += short("_modules") + b"}" + short(text)
    return (
        PROTO + table + b"}" + short("ema") + start * length + b"N" + b"suu\x85R" * length + b"s."
    )


def _shared(records: int, entries: int) -> bytes:
    """Many modules that have one dictionary of parameters, which holds nothing."""
    empty = {f"p{k}": None for k in range(entries)}
    children = {f"m{k}": _module(_parameters=empty) for k in range(records)}
    return dump({"ema": _module(_modules=children)})


class _Shared:
    """Pickles as one storage for any number of tensors."""

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, args = torch.zeros(64 * 512 * 9).__reduce_ex__(4)[:2]
        assert rebuild is torch._utils._rebuild_tensor_v2
        reduced: tuple[Any, ...] = args[0].__reduce__()
        return reduced


class _View:
    """Pickles as a contiguous tensor at the beginning of a storage."""

    def __init__(self, storage: _Shared, like: torch.Tensor) -> None:
        self.args = storage, 0, tuple(like.shape), like.stride(), False, OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self.args


def amplified() -> bytes:
    """A network whose tensors are all views of one storage, itself in bytes."""
    denoiser, storage = _tiny(model_channels=64), _Shared()
    net = record(denoiser, arguments(denoiser))
    todo = [net]
    while todo:
        module = todo.pop()
        state = module.meta["state"] if isinstance(module, Persistent) else vars(module)
        for key, value in state["_parameters"].items():
            if value is not None:
                state["_parameters"][key] = _View(storage, value)
        todo += [child for child in state["_modules"].values() if child is not None]
    return dump({"ema": net})


def _strided(shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    class Window:
        def __reduce__(self) -> tuple[Any, ...]:
            rebuild, args = torch.zeros(64).__reduce_ex__(4)[:2]
            return rebuild, (args[0], offset, shape, stride, *args[4:])

    return _network(
        lambda state: (
            state["_modules"]["map_layer0"].meta["state"]["_parameters"].update(bias=Window())
        )
    )


def handmade() -> Iterator[tuple[str, str, bytes | Callable[[], bytes]]]:
    """Names, endings and contents of the files; those that take time to make are made by a call."""
    for kind, pair in {"tuple": b"h%ch%c\x86\x940", "frozenset": b"(h%ch%c\x91\x940"}.items():
        steps = b"".join(pair % (i, i) for i in range(60))
        tree = b")\x940" + steps + b"h\x3c"
        yield f"hash {kind}", "pkl", PROTO + b"}" + tree + b"Ns."
        yield f"ema {kind}", "pkl", _ema(tree)
        yield f"element {kind}", "pkl", PROTO + b"\x8f(" + tree + b"\x90."
        yield (
            f"record {kind}",
            "pkl",
            _ema(name("torch_utils.persistence", "_reconstruct_persistent_obj") + tree + b"\x85R"),
        )
        yield f"pid {kind}", "pkl", PROTO + tree + b"Q."
        yield f"dtype {kind}", "pkl", PROTO + name("numpy", "dtype") + tree + b"\x85R."
        yield f"new {kind}", "pkl", PROTO + name("collections", "OrderedDict") + tree + b"\x81."
    for count in (10**5, 10**6, 5 * 10**6):
        for code in (
            b"\x85",
            b"]",
            b"}",
            b"(",
            b")",
            b"N",
            b"\x8f",
            b"K\x01",
            b"]\x94",
            b"C\x00",
            b"C\x00\x94",
            b"\x8c\x00\x94",
        ):
            yield f"many {code!r} {count}", "pkl", PROTO + b"N" + code * count + b"."
        yield f"deep key {count}", "pkl", PROTO + b"}N" + b"\x85" * count + b"Ns."
        yield f"deep list {count}", "pkl", PROTO + b"]" * count + b"a" * (count - 1) + b"."
    for index in (2**26, 2**31, 2**32 - 1):
        yield f"memo {index}", "pkl", PROTO + b"Nr" + struct.pack("<I", index) + b"."
        yield f"get {index}", "pkl", PROTO + b"j" + struct.pack("<I", index) + b"."
    for code in (b"\x8d", b"\x8e", b"\x96", b"\x95"):
        for size in (2**31, 2**40, 2**62, 2**64 - 1):
            yield f"size {code!r} {size}", "pkl", PROTO + code + struct.pack("<Q", size) + b"x."
    for code in (b"X", b"B", b"\x8b", b"T"):
        for size in (2**30, 2**31 - 1, 2**32 - 1):
            yield f"size {code!r} {size}", "pkl", PROTO + code + struct.pack("<I", size) + b"x."
    for code in range(256):
        yield f"instruction {code}", "pkl", PROTO + bytes([code]) + b"\x01\x00\x00\x00."
        yield (
            f"instruction {code} of operands",
            "pkl",
            PROTO + b"}]N(K\x01" + bytes([code]) + b"\x01.",
        )
    for text in ("os\nCheckpoint OK", "\x1b[2J", "a" * 255, "é", "\u202e"):
        yield (
            f"name {text!r}",
            "pkl",
            PROTO
            + b"\x8d"
            + struct.pack("<Q", len(text.encode()))
            + text.encode()
            + short("system")
            + b"\x93.",
        )
        yield f"key {text!r}", "pkl", dump({text: 1})
        yield f"class {text!r}", "pkl", dump({"ema": Persistent(text, {"_modules": {}} | OPENING)})
        yield f"tensor {text!r}", "pkl", dump({"ema": _module(_parameters={text: torch.zeros(2)})})
    for value in ([], {}, None, 7, "x" * 10**6, (1,), 1.5, True):
        for kind in ("_parameters", "_buffers", "_modules", "_init_args", "_init_kwargs"):
            yield f"{kind} {type(value).__name__}", "pkl", dump({"ema": _module(**{kind: value})})
            yield (
                f"model {kind} {type(value).__name__}",
                "pkl",
                partial(_network, lambda state, k=kind, v=value: state.update({k: v})),
            )
        for kind in ("class_name", "type", "state"):
            bad = _module()
            bad.meta[kind] = value
            yield f"record {kind} {type(value).__name__}", "pkl", dump({"ema": bad})
        yield (
            f"parameter {type(value).__name__}",
            "pkl",
            dump({"ema": _module(_parameters={"a": value})}),
        )
        yield (
            f"names {type(value).__name__}",
            "pkl",
            dump({"ema": _module(_parameters={1: torch.zeros(2)})}),
        )
    huge: list[Any] = [
        10**9,
        2**19,
        10**150,
        -1,
        0,
        1.5,
        "x",
        None,
        [],
        True,
        float("nan"),
        float("inf"),
        [1] * 10**5,
    ]
    for argument in ARGUMENTS:
        for value in huge:
            yield f"{argument} = {str(value)[:20]}", "pkl", partial(_arguments, **{argument: value})
    for argument in ("M", "C_1", "C_2"):
        for value in (*huge, 10**5, 3 * 10**7):
            yield (
                f"{argument} = {str(value)[:20]}",
                "pkl",
                partial(_arguments, **{argument: value}, precond="iDDPMPrecond"),
            )
    for argument in ("beta_d", "beta_min", "epsilon_t", "M"):
        for value in huge:
            yield (
                f"VP {argument} = {str(value)[:20]}",
                "pkl",
                partial(_arguments, **{argument: value}, precond="VPPrecond"),
            )
    for length in (100, 20_000):
        yield f"chain {length}", "pkl", partial(_chain, length, "a" * 200)
    yield "shared parameters", "pkl", partial(_shared, 5000, 5000)
    yield "amplified", "pkl", amplified
    for shape, stride, offset in (
        ((64,), (0,), 0),
        ((64,), (1,), 1),
        ((64,), (-1,), 63),
        ((64,), (1,), -1),
        ((2**40, 0), (1, 1), 0),
        ((2**24, 2**24), (0, 0), 0),
        ((64,), (1, 1), 0),
        ((64,), (2**62,), 0),
        ((64.0,), (1,), 0),
        ([64], [1], 0),
        ((64,) * 20, (0,) * 20, 0),
        (("64",), (1,), 0),
        ((True,), (1,), 0),
    ):
        yield f"view {shape} {stride} {offset}", "pkl", partial(_strided, shape, stride, offset)  # type: ignore[arg-type]
    good = torch.zeros(64).untyped_storage().__reduce__()[1][0]
    yield "storages", "pkl", _storage(good, 20_000)
    for k in range(0, len(good), 3):
        yield f"storage cut {k}", "pkl", _storage(good[:k], 1)
        yield (
            f"storage bent {k}",
            "pkl",
            _storage(good[:k] + bytes([good[k] ^ 0x55]) + good[k + 1 :], 1),
        )
    text = b"X" + struct.pack("<I", 10**6) + b"a" * 10**6 + b"\x940"
    encode = name("_codecs", "encode") + b"\x940"
    yield (
        "copies",
        "pkl",
        PROTO + text + encode + short("latin1") + b"\x940" + b"h\x01h\x00h\x02\x86R" * 10**4 + b".",
    )
    yield "other code", "pkl", PROTO + encode + short("a") + short("rot13") + b"\x86R."
    yield "itself", "pkl", PROTO + b"}\x94" + short("ema") + b"h\x00s."
    yield "list of itself", "pkl", _ema(b"]\x94h\x00a")
    yield from ((label, "safetensors", data) for label, data in _safe())


def _safe() -> Iterator[tuple[str, bytes]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.safetensors")
        save_edm(tiny(precond="iDDPMPrecond"), path)
        data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, numbers = json.loads(data[8 : 8 + size]), data[8 + size :]
    first = next(key for key in header if key != "__metadata__")
    description = json.loads(header["__metadata__"]["odesolvers.edm"])

    def built(entries: Any, metadata: Any = None) -> bytes:
        if metadata is not None:
            entries = entries | {"__metadata__": {"odesolvers.edm": metadata}}
        text = json.dumps(entries).encode()
        return len(text).to_bytes(8, "little") + text + numbers

    for length in (0, 1, size - 1, size + 1, len(data), 2**31, 2**63, 2**64 - 1):
        yield f"header of {length}", length.to_bytes(8, "little") + data[8:]
    for text in (
        b"[" * 4_000_000,
        b'{"a":' * 500_000,
        b"1" * 10**6,
        b"null",
        b"[]",
        b"\xff\xfe",
        b'{"__metadata__":3}',
        b"{}",
    ):
        yield f"header {text[:8]!r}", len(text).to_bytes(8, "little") + text + numbers
    for value in (
        None,
        7,
        [],
        {},
        "x",
        [1],
        [0, 1, 2],
        [-1, 4],
        [4, 0],
        [0, 2**70],
        [0.0, 4.0],
        [0, None],
        "F8_E4M3",
        "I64",
        2**70,
        [2**40, 2**40],
        [-1],
        [1] * 10**5,
    ):
        for key in ("dtype", "shape", "data_offsets"):
            yield f"{key} {str(value)[:20]}", built(header | {first: header[first] | {key: value}})
        yield f"entry {str(value)[:20]}", built(header | {first: value})
        yield (
            f"class {str(value)[:20]}",
            built(header, json.dumps(description | {"class_name": value})),
        )
        yield (
            f"arguments {str(value)[:20]}",
            built(header, json.dumps(description | {"arguments": value})),
        )
        for key in (
            "M",
            "num_blocks",
            "model_channels",
            "dropout",
            "C_1",
            "resample_filter",
            "model_type",
        ):
            changed = description["arguments"] | {key: value}
            yield (
                f"{key} {str(value)[:20]}",
                built(header, json.dumps(description | {"arguments": changed})),
            )
    for text in ("[" * 10**6, '{"class_name":' * 10**5, "", "1" * 10**5, "NaN"):
        yield f"metadata {text[:10]}", built(header, text)
    yield (
        "overlapping",
        built(
            {
                key: entry
                if key == "__metadata__"
                else entry
                | {"data_offsets": [0, entry["data_offsets"][1] - entry["data_offsets"][0]]}
                for key, entry in header.items()
            }
        ),
    )
    yield (
        "many tensors",
        built(
            {
                f"t{k}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
                for k in range(50_000)
            },
            json.dumps(description),
        ),
    )
    yield "control", built({"\x1b[2J\n" * 100: header[first]}, json.dumps(description))
