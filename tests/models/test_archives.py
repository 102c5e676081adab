"""Files of `torch.save` read as data: equal to what `torch.load` reads, or refused."""

from __future__ import annotations

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from odesolvers.models.archives import read_archive

BASE = torch.arange(100.0).reshape(10, 10)
TENSORS = {
    "whole": BASE,
    "view": BASE[2:4].T,
    "number": torch.tensor(3),
    "half": torch.randn(3).half(),
    "bfloat16": torch.randn(3).bfloat16(),
    "bool": torch.tensor([True, False]),
    "empty": torch.zeros(0, 4),
    "parameter": torch.nn.Parameter(torch.ones(2)),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("form", ["plain", "ordered", "inner"])
def test_equal_to_torch(tmp_path: Path, zipped: bool, form: str) -> None:
    content: Any = collections.OrderedDict(TENSORS) if form == "ordered" else TENSORS
    content = {"state_dict": content, "epoch": 3, "note": "text"} if form == "inner" else content
    path = tmp_path / "a.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    theirs = torch.load(path, weights_only=True)
    theirs = theirs["state_dict"] if form == "inner" else theirs
    ours = read_archive(path).tensors
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name])
        assert tensor.dtype == theirs[name].dtype
        assert tensor.is_contiguous()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "no dictionary of tensors"),
        ({"a": 3}, "no dictionary of tensors"),
        ({1: torch.ones(2)}, "no dictionary of tensors"),
        ({"a": print}, r"objects of other libraries beside tensors \(\w+\.print\)"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "objects of other libraries"),
        ({"a": torch.ones(2).to_sparse()}, "objects of other libraries"),
        ({f"v{k}": BASE for k in range(100)}, "share their numbers"),
        ({"a": torch.ones(1).expand(10**6)}, "out of bounds"),
    ],
)
def test_anything_else_is_refused(tmp_path: Path, zipped: bool, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=message):
        read_archive(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:100], lambda data: data[:-100], lambda data: b"", lambda data: b"x" * 99],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files(tmp_path: Path, zipped: bool, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "a.ckpt"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError):
        read_archive(path)


def test_a_file_that_contains_itself(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["state_dict"] = content
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="no dictionary of tensors"):
        read_archive(tmp_path / "a.ckpt")
