"""Ways to bend genuine files: bytes, JSON, safetensors and the archives of torch.save."""

from __future__ import annotations

import copy
import io
import json
import random
import zipfile
from collections.abc import Iterator
from typing import Any

DEEP = "[" * 200_000
WILD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 2**31, 2**63, 10**18, 10**300, 0.5, -1e308, float("nan"), float("inf")),
    *("", "x", "../../x", "os", "a" * 10**5, "\x1b[2J\n", "\u202e", "\ud800"),
    *(
        [],
        {},
        [[]],
        [0],
        [1] * 10**5,
        ["evil", "Evil"],
        {"a": {"b": {}}},
        [10**9] * 4,
        {"__type": "x"},
    ),
)
"""Values that no file should have in most places."""

TEXTS = (
    *(
        b"",
        b"null",
        b"[]",
        b"7",
        b'"x"',
        b"{",
        b"\xff\xfe\x00",
        b"{}",
        b'{"a":' * 50_000,
        b"1" * 10**6,
    ),
    *(DEEP.encode(), b'{"a":1e999999}', b"\x00" * 1000, b"\xef\xbb\xbf{}", b"[[],[[]]" * 1000),
)
"""Contents of files of JSON."""


def places(value: Any, depth: int = 3) -> Iterator[tuple[Any, ...]]:
    """The paths to the values in JSON; of long lists the first value alone."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = list(enumerate(value))[:2]
    for key, inner in items:
        yield (key,)
        if depth > 1:
            yield from ((key, *rest) for rest in places(inner, depth - 1))


def changed(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of JSON with another value in one place; `Ellipsis` removes it."""
    content = copy.deepcopy(content)
    target = content
    for key in path[:-1]:
        target = target[key]
    if value is ...:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return content


def bent_json(content: Any, rng: random.Random, count: int) -> Iterator[tuple[str, Any]]:
    """So many copies of JSON with a wild value in a place, or without one."""
    paths = list(places(content))
    for _ in range(count):
        path, value = rng.choice(paths), rng.choice((*WILD, ...))
        label = "/".join(map(str, path))
        yield f"{label} = {ascii(value)[:30]}", changed(content, path, value)


def bent_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes with some changed, cut, repeated or moved; most of the changes near the beginning or end."""
    bent = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if not bent:
            break
        at = rng.randrange(min(len(bent), rng.choice((64, 4096, len(bent)))))
        at = len(bent) - 1 - at if rng.random() < 0.2 else at
        width = rng.choice((1, 1, 4, 30, 300))
        match rng.randrange(6):
            case 0:
                bent[at] = rng.randrange(256)
            case 1:
                bent[at] ^= 1 << rng.randrange(8)
            case 2:
                del bent[at : at + width]
            case 3:
                bent[at:at] = bent[at : at + width] * rng.choice((1, 2, 50))
            case 4:
                other = rng.randrange(len(bent))
                bent[at : at + width] = bent[other : other + width]
            case 5:
                bent[at : at + 8] = rng.choice((b"\xff", b"\x00", b"9")) * 8
    if rng.random() < 0.1:
        del bent[rng.randrange(len(bent) + 1) :]
    return bytes(bent)


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the numbers of safetensors."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header: Any, numbers: bytes) -> bytes:
    """Safetensors of a header, which may be text already."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + numbers


def bent_safetensors(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Safetensors with broken lengths, headers, entries and metadata."""
    header, numbers = split(data)
    first = next(key for key in header if key != "__metadata__")
    for length in (0, 1, 7, len(data), 2**31, 2**40, 2**63, 2**64 - 1):
        yield f"length {length}", length.to_bytes(8, "little") + data[8:]
    for cut in (0, 4, 8, 100, len(data) // 2, len(data) - 1):
        yield f"cut {cut}", data[:cut]
    yield "longer", data + b"\0"
    for text in TEXTS:
        yield f"header {text[:10]!r}", joined(text, numbers)
    for value in (*WILD, [0, 2**70], [4, 0], [-1, 4], [2**40] * 2, "F8_E4M3", "I64", "C64", "F4"):
        for key in ("dtype", "shape", "data_offsets"):
            entry = {**header[first], key: value}
            yield f"{key} {ascii(value)[:20]}", joined({**header, first: entry}, numbers)
        yield f"entry {ascii(value)[:20]}", joined({**header, first: value}, numbers)
        yield f"metadata {ascii(value)[:20]}", joined({**header, "__metadata__": value}, numbers)
    zero = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    yield "many tensors", joined({f"t{k}": zero for k in range(100_000)}, b"")
    yield "control", joined({"\x1b[2J\n" * 100: header[first]}, numbers)
    spans = {
        k: v if k == "__metadata__" else {**v, "data_offsets": [0, 4]} for k, v in header.items()
    }
    yield "overlapping", joined(spans, numbers)
    nothing = {
        k: v if k == "__metadata__" else {**v, "data_offsets": [0, 0]} for k, v in header.items()
    }
    yield "empty tensors", joined(nothing, b"")
    for kind, number in (("F32", b"\0\0\xc0\x7f"), ("F32", b"\0\0\x80\x7f"), ("F16", b"\0\x7e")):
        count = len(numbers) // len(number)
        entry = {"dtype": kind, "shape": [count], "data_offsets": [0, count * len(number)]}
        yield f"no numbers {number!r}", joined({first: entry}, number * count)


def bent_archive(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Archives of torch.save whose records are missing, packed, doubled, cut or longer than they say."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    pickled = next(name for name in records if name.endswith("data.pkl"))
    stored = next(name for name in records if "/data/" in name and len(records[name]) > 64)

    def packed(records: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as archive:
            for name, content in records.items():
                archive.writestr(name, content)
        return file.getvalue()

    yield "as it was", packed(records)
    for name in (pickled, stored):
        yield f"without {name[-12:]}", packed({k: v for k, v in records.items() if k != name})
        for part in (b"", records[name][: len(records[name]) // 2], records[name] * 2):
            yield f"{name[-12:]} of {len(part)}", packed({**records, name: part})
    yield "compressed", packed(records, zipfile.ZIP_DEFLATED)
    bomb = {**records, stored: bytes(10**8)}
    yield "bomb", packed(bomb, zipfile.ZIP_DEFLATED)
    yield "bomb of a pickle", packed({pickled: b"\x80\x02" + b"]" * 10**8}, zipfile.ZIP_DEFLATED)
    yield "two pickles", packed({**records, "b/data.pkl": records[pickled]})
    yield "big endian", packed({**records, pickled.replace("data.pkl", "byteorder"): b"big"})
    yield "many records", packed({**{f"r{k}": b"" for k in range(150_000)}})
    yield "outside", packed({**records, "../../evil.py": b"open('RAN', 'w')"})
    yield "nothing", packed({})
    for at in (-4, -10, -12, -18, -22, 10, 30):
        yield (
            f"field at {at}",
            data[:at] + b"\xff\xff\xff\xff" + (data[at + 4 :] if at != -4 else b""),
        )
