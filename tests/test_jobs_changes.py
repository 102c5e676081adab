"""What changes behind the back of a job is found: inputs, models, shards and settings."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import odesolvers as ode
from odesolvers import State
from odesolvers.cli import main
from odesolvers.jobs import Output, Shards, report, work

from .job_models import SHAPE, opened
from .test_jobs import FLOATING, contents, job, made


def arrays(folder: Path, seed: int = 0) -> Path:
    """5 pictures that have the same names and sizes under every seed."""
    folder.mkdir(exist_ok=True)
    for k, array in enumerate(np.random.default_rng(seed).uniform(-1, 1, (5, *SHAPE))):
        np.save(folder / f"{k}.npy", array)
    return folder


def test_pictures_that_keep_their_names_and_sizes(tmp_path: Path) -> None:
    described = job(arrays(tmp_path / "in"))
    output = described.prepare(tmp_path / "out", opened())
    work(output.path)
    output.shard(1).unlink()
    arrays(tmp_path / "in", seed=1)
    with pytest.raises(
        ValueError, match=r"has changed since .*: 0\.npy is another picture\. Restor"
    ):
        described.prepare(tmp_path / "out", opened())
    arrays(tmp_path / "in")
    described.prepare(tmp_path / "out", opened())
    assert work(output.path) == 1


def test_shards_of_a_job_whose_manifest_is_gone(tmp_path: Path) -> None:
    arrays(tmp_path / "in")
    folder = made(tmp_path / "out", job(tmp_path / "in"))
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="results of a job whose manifest is gone"):
        job(tmp_path / "in", solver=FLOATING).prepare(folder, opened())
    assert not (folder / "manifest.json").exists()


def test_shards_of_another_job_are_not_taken_for_results(tmp_path: Path) -> None:
    arrays(tmp_path / "in")
    one = made(tmp_path / "one", job(tmp_path / "in"))
    two = made(tmp_path / "two", job(tmp_path / "in", solver=FLOATING))
    shutil.copy(Output(one).shard(0), Output(two).shard(0))
    for read in (report, lambda folder: len(Shards(folder)), lambda folder: Shards(folder)[0]):
        with pytest.raises(ValueError, match="is a shard of another job"):
            read(two)


def test_shards_that_were_removed_with_their_folder_are_made_again(tmp_path: Path) -> None:
    described = job(arrays(tmp_path / "in"))
    folder = made(tmp_path / "out", described)
    before = contents(folder)
    shutil.rmtree(folder / "shards")
    assert report(folder)["missing"] == [0, 1]
    made(folder, described)
    (folder / "shards" / "000001.safetensors.bak").write_bytes(b"")  # is none
    assert report(folder)["written"] == 5
    (folder / "shards" / "000001.safetensors.bak").unlink()
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": (3, 6, 6)}, r"shape\[1\] was 5 and is 6"),
        ({"guidance": 4.0}, "default_guidance was 1.0 and is 4.0"),
        ({"encode": torch.nn.Conv2d(3, 3, 1)}, "weights was"),
        ({"condition": torch.nn.Embedding(2, 2)}, "weights was"),
    ],
)
def test_what_a_job_takes_of_a_model(changes: Any, words: str, tmp_path: Path) -> None:
    described, model = job("seeds:4", "sample"), opened()
    described.prepare(tmp_path / "out", model)
    other = replace(model, **changes)
    with pytest.raises(ValueError, match=words):
        work(tmp_path / "out", model=other)
    if "condition" not in changes:
        with pytest.raises(ValueError, match=words):
            described.prepare(tmp_path / "out", other)


def test_libraries_of_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job("seeds:4", "sample").prepare(tmp_path / "out", opened())
    monkeypatch.setattr(torch, "__version__", "1.0")
    for run in (work, lambda folder: job("seeds:4", "sample").prepare(folder, opened())):
        with pytest.raises(ValueError, match=r"torch was .* and is 1\.0"):
            run(tmp_path / "out")


def test_ranks_above_the_number_of_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job("seeds:13", "sample").prepare(tmp_path / "out", opened())
    assert work(tmp_path / "out", rank=3, world=1) == 4
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(SystemExit):
        main(["batch", "sample", "--input", "seeds:3", "--output", "nowhere"])
    assert (
        "RANK, WORLD_SIZE, LOCAL_RANK must be whole numbers, got first" in capsys.readouterr().err
    )


def test_links_to_folders_are_followed_and_links_to_nothing_are_failures(tmp_path: Path) -> None:
    arrays(tmp_path / "elsewhere")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "gone.png").symlink_to("nowhere")
    found = report(made(tmp_path / "out", job(tmp_path / "in")))
    assert (found["elements"], found["written"]) == (6, 5)
    assert [name for name, _ in found["failed"]] == ["gone.png"]


def test_a_calibration_has_its_own_grid_as_in_the_other_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", np.random.default_rng(0).uniform(-1, 1, (1, 8, 8)))
    learned = "--steps 4 --runs 10 --count 2 --out rule.json"
    main(f"calibrate --model digits {learned}".split())
    options = ["--model", "digits", "--solver", "load('rule.json')"]
    main(["invert", "a.npy", *options])
    out = "--batch 1 --shard-size 1 --output o"
    main(["batch", "invert", "--input", ".", *options, *out.split()])
    found, expected = State.load(Output(Path("o")).shard(0)), State.load("out/invert/a.safetensors")
    assert found.sigmas == expected.sigmas
    assert len(found.sigmas) == 5
    assert json.loads(Path("o/manifest.json").read_text())["settings"]["solver"] == found.solver
    assert ode.parse(found.solver) == ode.parse(expected.solver)


def test_arrays_of_a_dtype_that_numpy_does_not_have(tmp_path: Path) -> None:
    described = job("seeds:3", "sample", solver=FLOATING, dtype="bfloat16")
    shards = Shards(made(tmp_path / "out", described))
    ((names, array),) = shards.arrays()
    assert array.dtype == np.float32
    assert len(names) == 3
    assert torch.equal(torch.from_numpy(array[1]), shards[1]["x"].float())
