"""Tensors as they lie in a file: read without copying, checked before anything is built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from odesolvers.values import shown

from ..reading import header_length, open_regular, parse_header
from .checks import brief

LENGTH = 300
"""The most characters in the message of a `CheckpointError`."""


class CheckpointError(ValueError):
    """Error for a file that is damaged, unsupported or refused as unsafe.

    The message has one line of at most 300 printable characters, whatever the file contains.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shown(message, LENGTH))


@final
@dataclass(frozen=True)
class Storage:
    """A row of numbers in a file.

    Args:
        data: its bytes.
        dtype: the dtype of the numbers, which are little-endian.
    """

    data: memoryview
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.data) // self.dtype.itemsize


@final
@dataclass(frozen=True)
class StoredTensor:
    """A strided view of a `Storage`; all four numbers count elements.

    Raises:
        CheckpointError: if it reaches beyond its storage or has more elements than that.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.storage, Storage):
            raise CheckpointError("the file holds a tensor without a storage")
        rows = self.shape, self.stride, (self.offset,)
        if not all(isinstance(row, tuple) and len(row) <= 8 and _counts(row) for row in rows):
            raise CheckpointError("the file holds a tensor whose shape is not made of numbers")
        if len(self.shape) != len(self.stride):
            raise CheckpointError("the file holds a tensor of which shape and stride do not match")
        steps = zip(self.shape, self.stride, strict=True)
        last = self.offset + sum((n - 1) * step for n, step in steps)
        if 0 not in self.shape and max(last + 1, self.numel) > len(self.storage):
            raise CheckpointError(
                f"the file holds a tensor that is out of bounds: its storage has {len(self.storage)} "
                f"elements, it needs {brief(max(last + 1, self.numel))}"
            )

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return self.numel * self.storage.dtype.itemsize

    def load(self) -> Tensor:
        """A contiguous copy."""
        dtype, size = self.storage.dtype, self.storage.dtype.itemsize
        array: np.ndarray[Any, Any] = np.ndarray(
            self.shape,
            dtype={1: "i1", 2: "<i2", 4: "<i4", 8: "<i8"}[
                size
            ],  # the same bits, which numpy has no bfloat16 for
            buffer=self.storage.data,
            offset=size * self.offset if self.numel else 0,
            strides=tuple(size * step for step in self.stride),
        )
        return torch.from_numpy(array.astype(f"=i{size}", order="C")).view(dtype)


def _counts(row: tuple[Any, ...]) -> bool:
    return all(type(n) is int and 0 <= n < 2**48 for n in row)


FLOATING: Mapping[str, torch.dtype] = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""The dtypes of weights by their names in safetensors."""


def read_file(path: Path) -> memoryview:
    """The content of a file.

    Raises:
        OSError: if it cannot be read.
        CheckpointError: if it is a folder, a device or a pipe, which may have no end.
    """
    try:
        with open_regular(path) as file:
            return memoryview(file.read())
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def read_safetensors(data: memoryview) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    """The metadata and the tensors of safetensors, which are floating point.

    The format is eight bytes for the length of the header, the header in JSON, and the numbers.

    Raises:
        CheckpointError: if they are damaged or of other dtypes.
    """
    try:
        start = 8 + header_length(data, len(data))
        metadata, entries = parse_header(data[8:start], len(data) - start)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    tensors = {}
    for name, entry in entries.items():
        dtype, shape = FLOATING.get(entry.dtype), entry.shape
        if dtype is None:
            raise CheckpointError(
                f"the file holds a tensor of {entry.dtype}, not a floating point tensor"
            )
        storage = Storage(data[start + entry.begin : start + entry.end], dtype)
        stride = tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))
        tensors[name] = StoredTensor(storage, 0, shape, stride)
    return metadata, tensors
