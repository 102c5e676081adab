"""Reading of NVlabs' pickles without executing code in them.

`torch_utils.persistence` of NVlabs stores each module as a record: the source code of its class, the
class name, the constructor arguments and the attributes. Python's `pickle.load` would execute this
source code and call any other function that the file names. Here records are read as data, source code
is ignored, and only the names listed below are supported; a file with any other name is refused.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from typing import IO, Any, final

import numpy as np
import torch
from torch import Tensor


class CheckpointError(ValueError):
    """Error for a file that is damaged, unsupported or refused as unsafe."""


@final
class Record:
    """A persistent object in a file, read as data.

    Attributes:
        class_name: name of its class.
        state: its attributes.
    """

    __slots__ = ("class_name", "state")

    def __init__(self, class_name: str, state: dict[str, Any]) -> None:
        self.class_name = class_name
        self.state = state

    @property
    def init(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and keyword arguments of its constructor."""
        args, kwargs = self.state.get("_init_args"), self.state.get("_init_kwargs")
        if not isinstance(args, tuple) or not isinstance(kwargs, dict):
            raise CheckpointError(
                f"the file does not record how its {self.class_name} was constructed"
            )
        return args, kwargs


@final
class _Function:
    """A function that a pickle can call but not modify."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: object) -> None:
        raise CheckpointError("refused: the file tries to alter a function of the reader")


@final
class _ModuleDict:
    """Represents ``torch.nn.ModuleDict``, which the files pickle without a record."""

    state: dict[str, Any]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.state = state


@final
class _NumpyDtype:
    """Represents a numpy dtype of numbers; other dtypes can contain Python objects."""

    def __init__(self, code: str, *_: object) -> None:
        if code not in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"):
            raise CheckpointError(f"refused: the file uses the numpy dtype {code!r}")
        self.code = code
        self.order = "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        if order not in ("<", ">", "|"):
            raise CheckpointError(f"refused: the file uses the numpy byte order {order!r}")
        self.order = order

    def number(self, data: bytes) -> bool | int | float:
        """Decode the number stored in `data`."""
        (value,) = np.frombuffer(data, np.dtype(self.order + self.code)).tolist()
        assert isinstance(value, (bool, int, float))
        return value


def _record(meta: dict[str, Any]) -> Record:
    """Convert the dictionary of a persistent object to a `Record`."""
    name, state = meta.get("class_name"), meta.get("state")
    if meta.get("type") != "class" or not isinstance(name, str) or not isinstance(state, dict):
        raise CheckpointError("the file holds a persistence record of an unknown form")
    return Record(name, state)


def _storage(data: bytes) -> Tensor:
    """Read a storage, in bytes of `torch.save` (themselves a pickle), as a flat tensor."""
    storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(storage, torch.storage.TypedStorage):
        raise CheckpointError(f"the file holds a {type(storage).__name__} in place of a storage")
    return torch.empty(0, dtype=storage.dtype).set_(storage)


def _tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> Tensor:
    """A strided view of a storage; torch checks its bounds."""
    return storage.as_strided(size, stride, offset)


_NAMES: dict[str, Any] = {
    "torch_utils.persistence._reconstruct_persistent_obj": _Function(_record),
    "torch.nn.modules.container.ModuleDict": _ModuleDict,
    "torch._utils._rebuild_parameter": _Function(lambda data, *_: data),
    "torch._utils._rebuild_tensor_v2": _Function(_tensor),
    "torch.storage._load_from_bytes": _Function(_storage),
    "collections.OrderedDict": dict,
    "numpy.dtype": _NumpyDtype,
    "numpy.core.multiarray.scalar": _Function(lambda dtype, data: dtype.number(data)),
    "numpy._core.multiarray.scalar": _Function(lambda dtype, data: dtype.number(data)),
}


@final
class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _NAMES[f"{module}.{name}"]
        except KeyError:
            raise CheckpointError(
                f"refused: the file asks for {module}.{name}, which no EDM checkpoint needs; "
                "loading it could run code of its author's choice"
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        raise CheckpointError(f"refused: the file refers to an object outside itself, {pid!r}")


def read_pickle(file: IO[bytes]) -> Any:
    """Read a pickle without executing code in it; persistent objects become `Record`.

    Raises:
        CheckpointError: if the file is damaged or is not a pickle, or if it uses a name that EDM
            checkpoints do not need.
    """
    try:
        return _Unpickler(file).load()
    except CheckpointError:
        raise
    except Exception as error:
        # A damaged stream can fail in any instruction, with many types of exceptions.
        raise CheckpointError(
            f"the file is damaged or is not a pickle: {type(error).__name__}: {error}"
        ) from error


def module_tensors(record: Any) -> dict[str, Tensor]:
    """The parameters and buffers of a pickled module, with the names of its state dict.

    Raises:
        CheckpointError: if the record is not a tree of modules.
    """
    return {
        f"{path}{name}": value
        for path, state in module_states(record)
        for kind in ("_parameters", "_buffers")
        for name, value in state.get(kind, {}).items()
        if value is not None
    }


def module_states(record: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Iterate over a pickled module and its submodules: paths ("", "model.", ...) and attributes.

    Raises:
        CheckpointError: if the record is not a tree of modules.
    """
    todo, seen = [("", record)], set()
    while todo:
        path, item = todo.pop()
        state = item.state if isinstance(item, (Record, _ModuleDict)) else None
        if id(item) in seen or not isinstance(state, dict) or "_modules" not in state:
            raise CheckpointError(f"the file has no module where one should be, at {path!r}")
        seen.add(id(item))
        yield path, state
        children = state["_modules"]
        todo += [(f"{path}{name}.", child) for name, child in children.items() if child is not None]
