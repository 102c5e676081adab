"""Reading of files of `torch.save` as data: ``.ckpt`` and ``.bin`` files of weights.

They are pickles, which `torch.load` runs. Here they are read by the interpreter of the EDM checkpoints,
which knows the names of tensors, storages and dictionaries and refuses any other. Both formats are read:
archives, and the one from before torch 1.6.
"""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, final

from torch import Tensor

from .edm.machine import Budget, Machine, UnknownName
from .edm.pickles import MAGIC, STORAGE_NAMES, Class, Function, Reference, read_reference
from .edm.stored import CheckpointError, Storage, StoredTensor
from .reading import open_regular

DIRECTORY = 2**23
"""The most bytes of the table of contents and of the pickle in an archive; those of the published files
have 0.4 million."""


@final
@dataclass(frozen=True)
class _View:
    """A tensor whose storage is not read yet."""

    storage: Reference
    geometry: tuple[Any, Any, Any]

    def of(self, data: memoryview) -> StoredTensor:
        """The tensor, by the bytes of its storage."""
        size = self.storage.count * self.storage.itemsize
        if len(data) != size:
            raise CheckpointError(
                f"the file holds a storage that is damaged: it has {len(data)} bytes, and should "
                f"have {size}"
            )
        return StoredTensor(Storage(data, self.storage.dtype), *self.geometry)


@final
@dataclass(frozen=True)
class Archive:
    """The content of a file of `torch.save`.

    Attributes:
        tensors: those of a dictionary, or of ``state_dict`` in one and beside it.
        notes: numbers and texts beside ``state_dict``, and of ``hyper_parameters`` there, as texts.
    """

    tensors: dict[str, Tensor]
    notes: dict[str, str]


def read_archive(path: Path) -> Archive:
    """Read a file of `torch.save` that holds tensors.

    Nothing in the file is executed. Each tensor has storage of its own, and all together have no more
    bytes than the file.

    Raises:
        ValueError: if the file is damaged, or holds anything but numbers, text, containers and tensors.
        OSError: if it cannot be read.
    """
    size = path.stat().st_size
    try:
        with open_regular(path) as file:
            zipped = zipfile.is_zipfile(file)
            file.seek(0)
            return _read_zip(file, size) if zipped else _read_legacy(memoryview(file.read()))
    except UnknownName as error:
        raise ValueError(
            f"it is a pickle that holds objects of other libraries beside tensors ({error.name}), as "
            "PyTorch Lightning writes them; loading these could run any code. If you trust its origin, "
            "convert it once: safetensors.torch.save_file(torch.load(path, weights_only=False)"
            "['state_dict'], 'model.safetensors')"
        ) from error
    except zipfile.BadZipFile as error:
        raise ValueError(f"it is a damaged archive: {error}") from error


def _machine(data: memoryview, persistent: Callable[[Any], Reference]) -> Machine:
    def view(storage: Any, *geometry: Any) -> _View:
        if not isinstance(storage, Reference) or len(geometry) < 3:
            raise CheckpointError("the file holds a tensor without a storage")
        return _View(storage, geometry[:3])

    handlers = (
        Function("torch._utils._rebuild_tensor_v2", view),
        Function("torch._utils._rebuild_parameter", lambda view, *_: view),
        Class("collections.OrderedDict", dict),
    )
    names = {**STORAGE_NAMES, **{handler.name: handler for handler in handlers}}
    return Machine(data, names, Budget(len(data)), persistent)


class _Front:
    """A file of which `zipfile` can read no table of contents that is longer than `DIRECTORY`."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.limit = file, float(DIRECTORY)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int = -1) -> bytes:
        if size > self.limit:
            raise ValueError(f"its table of contents has more than {DIRECTORY} bytes")
        return self._file.read(size)


def _read_zip(file: IO[bytes], size: int) -> Archive:
    """Read an archive: the pickle ``data.pkl``, and the bytes of each storage in ``data/KEY``."""
    front = _Front(file)
    with zipfile.ZipFile(front) as archive:
        front.limit = float("inf")
        records = {info.filename: info for info in archive.infolist()}
        found = [name for name in records if name.rpartition("/")[2] == "data.pkl"]
        if len(found) != 1:
            raise ValueError(f"it is an archive with {len(found)} data.pkl, so none of torch.save")
        folder = found[0].removesuffix("data.pkl")
        if sum(info.file_size for info in records.values()) > size:
            raise ValueError("refused: its records are compressed, or overlap")

        def read(name: str) -> memoryview:
            info = records.get(folder + name)
            if info is None or info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                raise ValueError(f"it is an archive without a plain record {name[:60]!r}")
            return memoryview(archive.read(info))

        if records[found[0]].file_size > DIRECTORY:
            raise ValueError(f"its data.pkl has more than {DIRECTORY} bytes")
        if folder + "byteorder" in records and bytes(read("byteorder")) != b"little":
            raise ValueError("its numbers are not little-endian")
        content = _machine(read("data.pkl"), read_reference).run()
        return _load(content, lambda key: read(f"data/{key}"), size)


def _read_legacy(data: memoryview) -> Archive:
    """Read the older format.

    It has five pickles, namely a magic number, a version, the sizes of types, the content and the keys
    of the storages; then of each storage the number of elements, and the elements.
    """
    references: dict[str, Reference] = {}

    def persistent(pid: Any) -> Reference:
        reference = read_reference(pid)
        return references.setdefault(reference.key, reference)

    machine = _machine(data, persistent)
    magic, version = machine.run(), machine.run()
    if magic != MAGIC or version != 1001:
        raise ValueError("it is damaged, or no file of torch.save")
    system, content, keys = (machine.run() for _ in range(3))
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("its numbers are not little-endian")
    position, storages = machine.position, {}
    for key in keys if isinstance(keys, list) else ():
        if not isinstance(key, str) or key not in references:
            raise ValueError("it is damaged: it has a storage that no tensor uses")
        start = position + 8
        position = start + references[key].count * references[key].itemsize
        storages[key] = data[start:position]
    return _load(content, lambda key: storages.get(key, data[:0]), len(data))


def _load(content: Any, read: Callable[[str], memoryview], size: int) -> Archive:
    """Copies of the tensors, by the bytes of each storage, which `read` reads once."""
    beside: dict[Any, Any] = {}
    for _ in range(2):
        if isinstance(content, dict) and "state_dict" in content:
            settings = content.get("hyper_parameters")  # of Lightning
            beside |= content | (settings if isinstance(settings, dict) else {})
            content = content["state_dict"]
    if isinstance(content, Mapping):
        content = {k: v for k, v in beside.items() if isinstance(v, _View)} | {**content}
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(view, _View) for name, view in content.items()
    ):
        raise ValueError("it holds no dictionary of tensors, so no checkpoint")
    tensors: dict[str, Tensor] = {}
    total = 0
    views = sorted(content.items(), key=lambda item: item[1].storage.key)
    for key, group in itertools.groupby(views, lambda item: item[1].storage.key):
        data = read(key)
        for name, view in group:
            stored = view.of(data)
            total += stored.nbytes
            if total > size:
                raise ValueError("refused: tensors in the file share their numbers with others")
            tensors[name] = stored.load()
    scalars = {k: v for k, v in beside.items() if isinstance(v, (str, int, float))}
    return Archive(tensors, {str(key): str(value)[:100] for key, value in scalars.items()})
