"""The inputs of jobs: folders, archives, data sets of Hugging Face, seeds and prompts."""

from __future__ import annotations

import tarfile
import tracemalloc
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from odesolvers.jobs import report, work
from odesolvers.jobs.inputs import open_input

from .job_models import opened
from .test_jobs import job, pictures

__all__ = ["pictures"]  # a fixture


def test_archives_hold_the_pictures_of_folders(pictures: Path, tmp_path: Path) -> None:
    """The layout of WebDataset: files of one element are neighbours, and have one name."""
    archives = tmp_path / "archives"
    archives.mkdir()
    for part in "01":
        with tarfile.open(archives / f"{part}.tar", "w") as archive:
            for path in sorted((pictures / part).iterdir()):
                archive.add(path, path.name)
    (archives / "notes.md").write_text("no picture")
    (pictures / "0" / "12.txt").write_text(" \n")  # is no prompt
    there, here = open_input(str(archives)), open_input(str(pictures))
    names = [entry.id for entry in there.entries()]
    assert names == [f"{k % 2}.tar/{k:02d}.png" for k in (*range(0, 13, 2), *range(1, 13, 2))]
    for a, b in zip(there.entries(), here.entries(), strict=True):
        assert a.prompt == b.prompt
        assert there.read(a) == here.read(b)
    assert [e.prompt for e in here.entries()][:4] == ["0", "2", "4", None]


def test_the_names_in_an_archive_are_not_held_in_memory(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        with tarfile.open(tmp_path / f"{count}.tar", "w") as archive:
            for k in range(count):
                archive.addfile(tarfile.TarInfo(f"{k:06d}.png"))
        tracemalloc.start()
        found = sum(1 for _ in open_input(str(tmp_path / f"{count}.tar")).entries())
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert found == count
        return memory

    peak(10)  # what is imported and cached once
    assert peak(4000) < 1.5 * peak(400)


def test_damaged_archives_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"x" * 3000)
    with pytest.raises(ValueError, match=r"a\.tar is not a whole tar archive"):
        list(open_input(str(path)).entries())


def test_pictures_are_read_as_by_the_other_commands(tmp_path: Path) -> None:
    """Also 16 bits and arrays; what these refuse is a failure with their reason."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    deep = np.random.default_rng(0).integers(0, 2**16, (9, 6)).astype(np.uint16)
    Image.fromarray(deep).save(folder / "deep.PNG")
    np.save(folder / "array.npy", np.random.default_rng(1).uniform(-1, 1, (3, 5, 5)))
    np.save(folder / "two.npy", np.zeros((2, 3, 5, 5), np.uint8))
    Image.fromarray(np.zeros((5, 5), np.float32)).save(folder / "float.tiff")
    described = job(folder, batch=1, shard_size=1)
    described.prepare(tmp_path / "out", opened())
    (folder / "later.png").write_bytes(b"")  # is not in the plan
    np.save(folder / "array.npy", np.zeros((3, 9, 9)))
    work(tmp_path / "out")
    found = report(tmp_path / "out")
    assert found["written"] == 1
    reasons = dict(found["failed"])
    assert reasons["array.npy"] == "was replaced since the job was begun: it had 728 bytes"
    assert reasons["two.npy"].startswith("holds 2 pictures")
    assert reasons["float.tiff"].startswith("holds numbers of unknown range")


@pytest.mark.skipif(find_spec("datasets") is None, reason="datasets is not installed")
@pytest.mark.filterwarnings("ignore")
def test_data_sets_of_hugging_face_are_read(pictures: Path, tmp_path: Path) -> None:
    import datasets

    files = sorted(str(path) for path in pictures.rglob("*.png"))
    columns = {"image": files, "label": [f"{k}" for k in range(13)]}
    data = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    data.save_to_disk(str(tmp_path / "stored"))
    source = open_input(f"hf:{tmp_path / 'stored'}")
    entries = list(source.entries())
    assert [entry.prompt for entry in entries] == columns["label"]
    for entry, file in zip(entries, files, strict=True):
        assert source.read(entry) == Path(file).read_bytes()
    nothing = datasets.Dataset.from_dict({"image": [files[0], None]})
    nothing.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "nothing"))
    source = open_input(f"hf:{tmp_path / 'nothing'}")
    with pytest.raises(ValueError, match="holds no picture"):
        source.read(list(source.entries())[1])
    described = job(f"hf:{tmp_path / 'stored'}")
    described.prepare(tmp_path / "out", opened())
    assert work(tmp_path / "out") == 4
    assert report(tmp_path / "out")["written"] == 13


def test_seeds_have_their_prompts_in_turn(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog: at 5\n")
    found = list(open_input(f"prompts:{tmp_path / 'prompts.txt'}@2").entries())
    assert [entry.prompt for entry in found] == ["a cat", "a dog: at 5"] * 2
    assert len({entry.place for entry in found}) == 4
    assert [entry.place for entry in open_input("seeds:3").entries()] == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nowhere", "there is no input nowhere"),
        ("seeds:0", "whole number N above 0"),
        ("seeds:many", "must be seeds:N"),
        ("prompts:file", "must be prompts:FILE@N"),
        ("prompts:nowhere@3", "there is no file nowhere"),
        ("prompts:.@3", "is not a regular file"),
        ("prompts:bytes@3", "must be a text in UTF-8"),
        ("prompts:empty@3", "must hold a prompt in each line"),
    ],
)
def test_inputs_that_are_none_are_refused(
    text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "empty").write_bytes(b" \n")
    with pytest.raises((ValueError, OSError), match=words):
        open_input(text)
