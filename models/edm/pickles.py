"""Reading of NVlabs' pickles as data.

`torch_utils.persistence` of NVlabs stores each module as a record: the source code of its class, the
class name, the constructor arguments and the attributes. Python's `pickle.load` would execute this
source code and call any other function that the file names. Here records are read by `Machine`, source
code is ignored, and only the names listed below are supported; a file with any other name is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, final

import numpy as np
import torch

from .checks import brief
from .machine import Budget, Handler, Machine, Stateful
from .stored import CheckpointError, Storage, StoredTensor

ENTRIES = 2**16
"""The most entries of all modules; the largest published file has about 900."""

MAGIC = 0x1950A86A20F9469CFC6C
"""The first number in files of `torch.save` that are no archives."""

PATH_LENGTH = 200
"""The most characters in the name of a tensor; the published ones have at most 44."""


@final
class Record:
    """A persistent object in a file, read as data.

    Attributes:
        class_name: name of its class.
        state: its attributes.
    """

    __slots__ = ("class_name", "state")

    def __init__(self, class_name: str, state: dict[Any, Any]) -> None:
        self.class_name = class_name
        self.state = state

    @property
    def init(self) -> tuple[tuple[Any, ...], dict[Any, Any]]:
        """The positional and keyword arguments of its constructor."""
        args, kwargs = self.state.get("_init_args"), self.state.get("_init_kwargs")
        if not isinstance(args, tuple) or not isinstance(kwargs, dict):
            raise CheckpointError(
                f"the file does not record how its {self.class_name[:60]} was constructed"
            )
        return args, kwargs


@final
class ModuleDict(Stateful):
    """Represents ``torch.nn.ModuleDict``, which the files pickle without a record."""

    def __init__(self) -> None:
        self.state: dict[Any, Any] = {}

    def build(self, state: Any) -> None:
        """Set the attributes."""
        if not isinstance(state, dict):
            raise CheckpointError("the file is damaged: the attributes of a ModuleDict are no dict")
        self.state = state


@final
class _NumpyDtype(Stateful):
    """Represents a numpy dtype of numbers; other dtypes can contain Python objects."""

    def __init__(self, code: str) -> None:
        self.code = code
        self.order = "<"

    def build(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order not in ("<", ">", "|"):
            raise CheckpointError(f"refused: the file uses the numpy byte order {brief(order)}")
        self.order = order


class Function(Handler):
    """A function that a pickle can call."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name, self._function = name, function

    def call(self, *args: Any) -> Any:
        return self._function(*args)


class Class(Handler):
    """A class of which a pickle can make objects, by any of three ways."""

    def __init__(self, name: str, make: Callable[[], Any]) -> None:
        self.name, self._make = name, make

    def call(self, *args: Any) -> Any:
        if args:
            raise CheckpointError(f"refused: the file passes arguments to {self.name}")
        return self._make()

    def new(self) -> Any:
        return self._make()


@final
class Marker(Handler):
    """A name that is only passed to others."""

    def __init__(self, name: str, value: Any = None) -> None:
        self.name, self.value = name, value


def _record(meta: Any) -> Record:
    """Convert the dictionary of a persistent object to a `Record`."""
    meta = meta if isinstance(meta, dict) else {}
    name, state = meta.get("class_name"), meta.get("state")
    known = isinstance(name, str) and isinstance(state, dict)
    if not known or not isinstance(meta.get("type"), str) or meta["type"] != "class":
        raise CheckpointError("the file holds a persistence record of an unknown form")
    return Record(name, state)


def _dtype(code: Any, *_: Any) -> _NumpyDtype:
    known = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
    if not isinstance(code, str) or code not in known:
        raise CheckpointError(f"refused: the file uses the numpy dtype {brief(code)}")
    return _NumpyDtype(code)


def _scalar(dtype: Any, data: Any) -> bool | int | float:
    """Decode one number."""
    if not isinstance(dtype, _NumpyDtype) or not isinstance(data, memoryview):
        raise CheckpointError("the file is damaged: it holds a numpy number of another form")
    form = np.dtype(dtype.order + dtype.code)
    if len(data) != form.itemsize:
        raise CheckpointError("the file is damaged: it holds a numpy number of another size")
    value = np.frombuffer(data, form)[0].item()
    assert isinstance(value, (bool, int, float))
    return value


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    return StoredTensor(storage, offset, shape, stride)


def _construct(cls: Any, *_: Any) -> Any:
    """``copyreg._reconstructor`` and ``copyreg.__newobj__``: an object without attributes."""
    if not isinstance(cls, Handler):
        raise CheckpointError("refused: the file constructs what is no class of EDM checkpoints")
    return cls.new()


def handlers(*handlers: Handler) -> dict[str, Handler]:
    return {handler.name: handler for handler in handlers}


STORAGE_NAMES = handlers(
    *(
        Marker(f"torch.{kind}Storage", getattr(torch, dtype))
        for kind, dtype in {
            "Half": "float16",
            "BFloat16": "bfloat16",
            "Float": "float32",
            "Double": "float64",
            "Long": "int64",
            "Int": "int32",
            "Short": "int16",
            "Char": "int8",
            "Byte": "uint8",
            "Bool": "bool",
        }.items()
    )
)


@final
class _Reader:
    """Reads the pickles of one file."""

    def __init__(self, size: int) -> None:
        self._budget = Budget(size)
        table = "torch_utils.persistence._reconstruct_persistent_obj"
        rebuild = "torch._utils._rebuild_"
        tensor = Function(f"{rebuild}tensor_v2", _tensor)
        tensor_class = Marker("torch.Tensor")

        def from_type(function: Any, kind: Any, args: Any, _: Any) -> StoredTensor:
            """Read a tensor with attributes, as `torch.compile` leaves them."""
            if function is not tensor or kind is not tensor_class or not isinstance(args, tuple):
                raise CheckpointError("refused: the file holds a tensor of an unknown class")
            return _tensor(*args)

        self.names = handlers(
            Function(table, _record),
            tensor,
            tensor_class,
            Function("torch._tensor._rebuild_from_type_v2", from_type),
            Function(f"{rebuild}parameter", lambda data, *_: data),
            Function(f"{rebuild}parameter_with_state", lambda data, *_: data),
            Function("torch.storage._load_from_bytes", self.storage),
            Class("torch.nn.modules.container.ModuleDict", ModuleDict),
            Class("collections.OrderedDict", dict),
            Function("numpy.dtype", _dtype),
            *(Function(f"numpy.{core}.multiarray.scalar", _scalar) for core in ("core", "_core")),
            # Protocols 2 and 3, the first with the names of Python 2.
            Function("_codecs.encode", self.encode),
            *(
                Function(f"{module}.set", lambda items=(): items)
                for module in ("builtins", "__builtin__")
            ),
            *(Function(f"{m}.bytes", lambda: memoryview(b"")) for m in ("builtins", "__builtin__")),
            *(Marker(f"{module}.object") for module in ("builtins", "__builtin__")),
            *(
                Function(f"{module}.{name}", _construct)
                for module in ("copyreg", "copy_reg")
                for name in ("_reconstructor", "__newobj__")
            ),
        )

    def read(self, data: memoryview) -> Any:
        return Machine(data, self.names, self._budget).run()

    def encode(self, text: Any, code: Any) -> memoryview:
        """Bytes, which protocol 2 writes as text."""
        if not isinstance(text, str) or code not in ("latin1", "latin-1"):
            raise CheckpointError("refused: the file encodes text otherwise than bytes are")
        self._budget.copy(len(text))
        return memoryview(text.encode("latin-1"))

    def storage(self, data: Any) -> Storage:
        """Read a storage in bytes of `torch.save`, in its format from before archives.

        It has five pickles, namely a magic number, a version, the sizes of types, a reference to the
        storage and its key; then the number of elements, and the elements.
        """
        if not isinstance(data, memoryview):
            raise CheckpointError(f"the file holds {brief(data)} in place of a storage")
        if bytes(data[:2]) == b"PK":
            raise CheckpointError(
                "the file holds a storage in an archive, as no EDM checkpoint does"
            )
        machine = Machine(data, STORAGE_NAMES, self._budget, read_reference)
        magic, version, system, reference, keys = (machine.run() for _ in range(5))
        if magic != MAGIC or version != 1001 or not isinstance(system, dict):
            raise CheckpointError(
                "the file holds a storage that is damaged: it does not begin as one"
            )
        if system.get("little_endian") is not True:
            raise CheckpointError("the file holds a storage that is not little-endian")
        if not isinstance(reference, Reference) or not _only(keys, reference.key):
            raise CheckpointError("the file holds a storage that is damaged: its key is missing")
        content = data[machine.position + 8 :]
        count = int.from_bytes(data[machine.position :][:8], "little")
        size = count * reference.itemsize
        if count != reference.count or size != len(content):
            raise CheckpointError(
                f"the file holds a storage that is damaged: it has {len(content)} bytes, and should "
                f"have {brief(size)}"
            )
        return Storage(content, reference.dtype)


@final
class Reference:
    """The reference to a storage of `count` elements."""

    def __init__(self, dtype: torch.dtype, key: str, count: int) -> None:
        self.dtype, self.key, self.count = dtype, key, count
        self.itemsize = dtype.itemsize


def read_reference(pid: Any) -> Reference:
    # The last item, the part of a storage that is meant, is not written in archives.
    if isinstance(pid, tuple) and len(pid) in (5, 6) and pid[5:] in ((), (None,)):
        what, kind, key, _, count = pid[:5]
        named = isinstance(what, str) and what == "storage" and isinstance(kind, Marker)
        if named and isinstance(key, str) and type(count) is int and count >= 0:
            return Reference(kind.value, key, count)
    raise CheckpointError(
        "the file holds a storage that is damaged: its reference has another form"
    )


def _only(keys: Any, key: str) -> bool:
    return isinstance(keys, list) and len(keys) == 1 and isinstance(keys[0], str) and keys[0] == key


def read_pickle(data: bytes | memoryview) -> Any:
    """Read a pickle without executing code in it.

    Persistent objects become `Record`, tensors `StoredTensor`, bytes `memoryview`, and sets lists.

    Raises:
        CheckpointError: if the file is damaged or is not a pickle, or if it uses a name that EDM
            checkpoints do not need.
    """
    view = memoryview(data)
    try:
        return _Reader(len(view)).read(view)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged stream can fail in any instruction
        raise CheckpointError(
            f"the file is damaged or is not a pickle: {type(error).__name__}: {error}"
        ) from error


def module_tensors(record: Any) -> dict[str, StoredTensor]:
    """The parameters and buffers of a pickled module, with the names of its state dict.

    Raises:
        CheckpointError: if the record is not a tree of modules, or holds something else.
    """
    tensors, count = {}, itertools.count()
    for path, state in module_states(record):
        for kind in ("_parameters", "_buffers"):
            for name, value in _entries(state, kind, path, count):
                if value is not None and not isinstance(value, StoredTensor):
                    raise CheckpointError(
                        f"{path}{name} in the file is {brief(value)}, not a floating point tensor"
                    )
                if value is not None:
                    tensors[f"{path}{name}"] = value
    return tensors


def module_states(record: Any) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Iterate over a pickled module and its submodules: paths ("", "model.", ...) and attributes.

    Raises:
        CheckpointError: if the record is not a tree of modules.
    """
    todo, seen, count = [("", record)], set(), itertools.count()
    while todo:
        path, item = todo.pop()
        state = item.state if isinstance(item, (Record, ModuleDict)) else None
        if id(item) in seen or state is None or "_modules" not in state:
            raise CheckpointError(f"the file has no module where one should be, at {path!r}")
        seen.add(id(item))
        yield path, state
        children = _entries(state, "_modules", path, count)
        todo += [(f"{path}{name}.", child) for name, child in children if child is not None]


def _entries(
    state: dict[Any, Any], kind: str, path: str, count: Iterator[int]
) -> Iterator[tuple[str, Any]]:
    """The items of an attribute that is a dictionary by short names; `count` counts all of a walk.

    Records may share one dictionary, so that a walk can be longer than the file.
    """
    entries = state.get(kind, {})
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}{kind} in the file is {brief(entries)}, not a dict")
    for name, value in entries.items():
        if not isinstance(name, str) or len(path) + len(name) > PATH_LENGTH:
            raise CheckpointError(
                f"{path}{kind} in the file has a key that is no name, {brief(name)}"
            )
        if next(count) >= ENTRIES:
            raise CheckpointError(
                f"refused: the modules in the file have more than {ENTRIES} parts"
            )
        yield name, value
