"""EDM checkpoints that hold very many of something cheap."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any


def alike(count: int) -> bytes:
    """A dictionary of so many numbers that have one hash."""

    def key(k: int) -> bytes:
        number = (k * (2**61 - 1)).to_bytes(12, "little")
        return b"\x8a" + bytes([len(number)]) + number + b"N"

    return b"\x80\x04" + b"}(" + b"".join(map(key, range(1, count))) + b"u."


def hollow(kind: str, count: int, *, named: bool, blocks: int = 999) -> bytes:
    """A network of 2 * `blocks` + 3 blocks, and `count` empty tensors, named as blocks or not."""
    stem = "model.enc.8x8_block{}.norm0.weight" if named else "t{}"
    empty = {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}
    header: dict[str, Any] = {stem.format(k): empty for k in range(count)}
    header["a"] = {"dtype": "F16", "shape": [64], "data_offsets": [0, 128]}
    settings = {"img_resolution": 8, "img_channels": 1, "label_dim": 0, "model_type": kind}
    settings |= {"model_channels": 32, "channel_mult": [1], "num_blocks": blocks}
    description = json.dumps({"class_name": "EDMPrecond", "arguments": settings})
    header["__metadata__"] = {"odesolvers.edm": description}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(128)


def floods() -> Iterator[tuple[str, str, Callable[[], bytes]]]:
    """Names, endings and contents of the files."""
    for count in (1000, 100_000):
        yield f"alike {count}", "pkl", partial(alike, count)
    for kind in ("SongUNet", "DhariwalUNet"):
        for named in (True, False):
            for blocks in (248, 999):
                make = partial(hollow, kind, 6000, named=named, blocks=blocks)
                yield f"hollow {kind} {named} {blocks}", "safetensors", make
