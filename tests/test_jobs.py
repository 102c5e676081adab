"""Jobs over data sets: whoever makes a shard, whenever, makes the same one."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import odesolvers as ode
from odesolvers import State
from odesolvers.jobs import Job, Output, Shards, report, run_workers, verify, work
from odesolvers.jobs.claims import Claims
from odesolvers.jobs.work import launched
from odesolvers.pictures import read_images

from .job_models import SHAPE, opened

FLOATING = "BDIA(Euler(), gamma=DampedStepRatio())"
FIXED = "BDIA(Euler(), gamma=DampedStepRatio(), arithmetic=FixedPoint())"
SIGMAS = tuple(ode.karras_sigmas(6).tolist())
MODEL = "tests.job_models:small"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """13 pictures of another size in two folders, some with a prompt."""
    folder, chance = tmp_path / "pictures", np.random.default_rng(0)
    for k in range(13):
        path = folder / f"{k % 2}" / f"{k:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chance.integers(0, 255, (7, 9, 3), dtype=np.uint8)).save(path)
        if k < 5:
            path.with_suffix(".cls").write_text(f"{k}\n")
    return folder


def job(folder: Path | str, kind: Any = "invert", **settings: Any) -> Job:
    known = {"solver": FIXED, "sigmas": SIGMAS, "batch": 2, "shard_size": 4}
    return Job(kind, MODEL, str(folder), **{**known, **settings})


def made(output: Path, job: Job) -> Path:
    job.prepare(output, opened())
    work(output)
    return output


def contents(output: Path) -> dict[str, Any]:
    """The names of all files below a folder; of shards with what is in them, bit for bit."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in output.rglob("*") if path.is_file()):
        name = str(path.relative_to(output))
        found[name] = None if path.name in ("log.jsonl", "report.json") else path.read_bytes()
        if path.suffix == ".safetensors":  # whose metadata are in no order
            state, notes = State.load_with_notes(path)
            found[name] = (state.current.numpy().tobytes(), state.sigmas, state.solver, notes)
            found[name] += (None if state.partner is None else state.partner.numpy().tobytes(),)
            parts = None if state.side is None else state.side.parts()
            if parts is not None:
                found[name] += (
                    repr(parts[0]),
                    {k: x.numpy().tobytes() for k, x in parts[1].items()},
                )
    return found


@pytest.mark.parametrize("kind", ["invert", "roundtrip", "sample"])
@pytest.mark.parametrize("solver", [FIXED, FLOATING, "EDICT()", "FixedPointInversion(DDIM())"])
def test_a_shard_holds_what_the_solver_makes_of_its_elements(
    kind: Any, solver: str, pictures: Path, tmp_path: Path
) -> None:
    sample = kind == "sample"
    described = job("seeds:13" if sample else pictures, kind, solver=solver)
    output = made(tmp_path / "out", described)
    assert report(output)["written"] == 13
    model, solved, n = opened(), ode.parse(solver), 0
    for names, array in Shards(output).arrays():
        if sample:
            seeds = [int(name.removeprefix("seed-")) for name in names]
            draws = [torch.Generator().manual_seed(seed) for seed in seeds]
            x = torch.stack([torch.randn(SHAPE, generator=g, dtype=torch.float64) for g in draws])
            labels = torch.full((len(names),), -1)
            expected = solved.sample(
                model.denoiser,
                (x * SIGMAS[0]).float(),
                SIGMAS,
                extra_args={"class_labels": labels},
            )
        else:
            x = torch.cat([read_images(pictures / name, SHAPE, "crop") for name in names])
            labels = torch.tensor([int(name[2:4]) if int(name[2:4]) < 5 else -1 for name in names])
            expected = solved.invert(model.denoiser, x, SIGMAS, extra_args={"class_labels": labels})
        torch.testing.assert_close(torch.from_numpy(array), expected.x, rtol=1e-4, atol=1e-3)
        n += len(names)
    assert n == 13


def test_round_trips_in_fixed_point_are_exact_and_reported(pictures: Path, tmp_path: Path) -> None:
    found = report(made(tmp_path / "out", job(pictures, "roundtrip")), write=True)
    assert found["errors"] == {"median": 0.0, "largest": 0.0, "exact": 13}
    assert json.loads((tmp_path / "out" / "report.json").read_text())["errors"]["exact"] == 13
    floating = report(made(tmp_path / "floats", job(pictures, "roundtrip", solver=FLOATING)))
    assert 0 < floating["errors"]["median"] <= floating["errors"]["largest"] < 1e-3


def test_every_call_of_the_denoiser_has_one_size(pictures: Path, tmp_path: Path) -> None:
    model = opened()
    job(pictures).prepare(tmp_path / "out", model)
    work(tmp_path / "out", model=model)
    assert set(model.denoiser.sizes) == {2}  # the last shard has one element


def test_two_workers_and_a_late_one_make_the_shards_of_one(pictures: Path, tmp_path: Path) -> None:
    one, described = made(tmp_path / "one", job(pictures)), job(pictures)
    output = described.prepare(tmp_path / "two", opened())
    assert run_workers(output, 2) == []
    assert contents(tmp_path / "two") == contents(one)
    for k in (0, 2):
        output.shard(k).unlink()
    assert work(output.path, rank=1, world=3) == 2
    assert contents(tmp_path / "two") == contents(one)
    assert work(output.path) == 0


def test_other_settings_are_refused_by_name(pictures: Path, tmp_path: Path) -> None:
    described = job(pictures)
    output = made(tmp_path / "out", described)
    before = contents(output)
    for changes, words in (
        ({"solver": FLOATING}, "solver was BDIA"),
        ({"guidance": 2.0}, "guidance was None and is 2.0"),
        ({"dtype": "float64", "fit": "pad"}, "fit was crop and is pad; dtype was float32 and is"),
        ({"batch": 1}, "batch was 2 and is 1"),
        ({"sigmas": SIGMAS[1:]}, "sigmas was 7 values and is 6 values"),
        ({"sigmas": (90.0, *SIGMAS[1:])}, r"sigmas\[0\] was 80.0 and is 90.0"),
        ({"kind": "roundtrip"}, "kind was invert and is roundtrip"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(described, **changes).prepare(output, opened())
    other = opened()
    next(other.denoiser.parameters()).data[0] += 1
    with pytest.raises(ValueError, match=r"weights was .* and is"):
        described.prepare(output, other)
    with pytest.raises(ValueError, match=r"is another one here than that which .*: weights was"):
        work(output, model=other)
    with Image.open(pictures / "0" / "02.png") as old:
        old.resize((8, 8)).save(pictures / "0" / "02.png")
    with pytest.raises(ValueError, match=r"has changed since .*: 0/02\.png was replaced\. Restore"):
        described.prepare(output, opened())
    (pictures / "0" / "00.png").rename(pictures / "0" / "renamed.png")
    with pytest.raises(ValueError, match=r"where 0/00\.png was, there is 0/02\.png"):
        described.prepare(output, opened())
    assert contents(output) == before


def test_pictures_that_fail_are_recorded_and_the_others_are_not_touched(
    pictures: Path, tmp_path: Path
) -> None:
    whole = made(tmp_path / "whole", job(pictures, shard_size=2))
    (pictures / "0" / "00.png").write_bytes(b"no picture")
    (pictures / "0" / "02.png").write_bytes((pictures / "0" / "02.png").read_bytes()[:-60])
    (pictures / "0" / "08.cls").write_text("2")
    white = np.full((5, 5, 3), 255, dtype=np.uint8)
    Image.fromarray(white).save(pictures / "0" / "06.png")  # which the denoiser refuses
    described = job(pictures, shard_size=2)
    described.prepare(tmp_path / "out", opened())
    (pictures / "0" / "12.png").unlink()
    work(tmp_path / "out")
    found = report(tmp_path / "out")
    reasons = dict(found["failed"])
    assert sorted(reasons) == ["0/00.png", "0/02.png", "0/06.png", "0/12.png"]
    assert reasons["0/00.png"].startswith("cannot be read as an image: give a picture")
    assert reasons["0/02.png"].startswith("is a damaged picture (")
    assert "white picture" in reasons["0/06.png"]
    assert found["written"] == 9
    assert not found["missing"]  # of the first shard nothing is left, and that is settled
    assert not Output(tmp_path / "out").shard(0).exists()
    assert work(tmp_path / "out") == 0
    then = {
        name: x
        for names, array in Shards(whole).arrays()
        for name, x in zip(names, array, strict=True)
    }
    for names, array in Shards(tmp_path / "out").arrays():
        for name, x in zip(names, array, strict=True):
            if name.startswith("1/"):
                assert x.tobytes() == then[name].tobytes()


def test_what_fails_for_all_elements_is_an_error_and_no_list_of_failures(
    pictures: Path, tmp_path: Path
) -> None:
    model = opened()
    job(pictures).prepare(tmp_path / "out", model)
    model.denoiser.faults = True
    with pytest.raises(FloatingPointError, match="nothing is white"):
        work(tmp_path / "out", model=model)
    assert Output(tmp_path / "out").done() == set()


@pytest.mark.parametrize("kind", ["invert", "sample"])
def test_verify_finds_damage_other_inputs_and_what_is_missing(
    kind: Any, pictures: Path, tmp_path: Path
) -> None:
    folder = made(tmp_path / "out", job("seeds:13" if kind == "sample" else pictures, kind))
    output = Output(folder)
    assert verify(folder, pictures=4) == {"elements": 13, "largest": 0.0, "faults": []}
    assert verify(folder, pictures=1)["elements"] == 7  # whole batches, the last one of one
    content = bytearray(output.shard(1).read_bytes())
    content[-5] ^= 1
    output.shard(1).write_bytes(content)
    shutil.copy(output.shard(0), output.shard(2))
    output.shard(3).unlink()
    faults = verify(folder, pictures=4)["faults"]
    assert len(faults) == 3
    assert "damaged" in faults[0]
    assert "shard 2" in faults[1]
    assert "shard 3 is not written" in faults[2]


def test_verify_finds_another_picture_and_another_weight(pictures: Path, tmp_path: Path) -> None:
    folder = made(tmp_path / "out", job(pictures, solver=FLOATING))
    found = verify(folder, pictures=4)
    assert 0 < found["largest"] < 1e-3
    assert not found["faults"]
    assert verify(folder, pictures=4, tolerance=1e-9)["faults"]
    for settings in ({"pictures": 0}, {"pictures": -1}, {"tolerance": float("nan")}):
        with pytest.raises(ValueError, match="must be"):
            verify(folder, **settings)
    content = (pictures / "0" / "02.png").read_bytes()
    with Image.open(pictures / "0" / "02.png") as old:
        old.point(lambda value: value ^ 1).save(pictures / "0" / "02.png")
    other = (pictures / "0" / "02.png").read_bytes()
    (pictures / "0" / "02.png").write_bytes(other[: len(content)].ljust(len(content), b" "))
    (pictures / "0" / "10.png").write_bytes(content + b" ")
    (pictures / "1" / "07.png").unlink()
    first, second, third = verify(folder, pictures=4)["faults"]
    assert "shard 0: 0/02.png is another picture now than when the job ran" in first
    assert "shard 1: 0/10.png was replaced since the job was begun: it had" in second
    assert "shard 2: 1/07.png" in third
    assert "No such file" in third


def test_reading_back_as_a_data_set_and_as_arrays(pictures: Path, tmp_path: Path) -> None:
    output = made(tmp_path / "out", job(pictures))
    shards = Shards(output)
    by_array = [
        (n, x) for names, array in shards.arrays() for n, x in zip(names, array, strict=True)
    ]
    assert len(shards) == 13 == len(by_array)
    loader = torch.utils.data.DataLoader(shards, batch_size=4, num_workers=2)
    rows = [(n, x) for batch in loader for n, x in zip(batch["id"], batch["x"], strict=True)]
    for (name, x), (other, array) in zip(rows, by_array, strict=True):
        assert name == other
        assert x.numpy().tobytes() == array.tobytes()
    assert torch.equal(shards[-1]["x"], shards[12]["x"])
    with pytest.raises(IndexError, match="13 elements, got the index 13"):
        shards[13]
    Output(output).shard(1).unlink()
    assert Shards(output).missing == [1]
    assert len(Shards(output)) == 9


@pytest.mark.skipif(os.name == "nt", reason="locks of POSIX")
def test_a_claim_is_one_process_s_until_it_dies(tmp_path: Path) -> None:
    with Claims(tmp_path / "claims") as claims:
        read, write = os.pipe()
        child = os.fork()
        if not child:
            other = Claims(tmp_path / "claims")
            os.write(write, bytes([other.take(3), other.take(4)]))
            os.read(read, 0)
            signal_pause()
        taken = os.read(read, 2)
        assert taken == b"\1\1"
        assert not claims.take(3)
        assert claims.take(5)
        os.kill(child, 9)
        assert claims.take(3, wait=True)
        os.waitpid(child, 0)


def signal_pause() -> None:
    import signal

    signal.pause()
    os._exit(1)


def test_ranks_are_those_of_torchrun_and_of_steps_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    assert launched() is None
    for name, value in {"PROCID": 5, "NTASKS": 8, "LOCALID": 1}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    assert launched() is None  # in the script of a job these are set too, and there is one process
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert launched() == (5, 8, 1)
    for name, value in {"RANK": 2, "WORLD_SIZE": 4, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    assert launched() == (2, 4, 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "encode"}, "kind must be one of"),
        ({"shard_size": 5}, "shard_size must be a multiple of batch"),
        ({"shard_size": 40_000}, "from 1 to 20000"),
        ({"solver": "StepRatio(2)"}, "must name a solver"),
        ({"device": "tpu"}, "device must be one of"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"guidance": float("nan")}, "guidance must be finite"),
        ({"network": "int8"}, "network must be one of"),
        ({"fit": "squash"}, "fit must be one of"),
        ({"size": (5.5, 5)}, "size must be an integer"),
        ({"prompts": [3]}, "prompts must be texts"),
    ],
)
def test_settings_of_no_use_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        job("seeds:3", **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "sample"}, "sample takes seeds or prompts"),
        ({"input": "seeds:4"}, "invert takes pictures"),
        ({"prompts": ("x",)}, "invalid literal for int"),
        ({"sigmas": (1e6, 1.0, 0.0)}, "FixedPoint"),
        ({"input": "nowhere"}, "there is no input nowhere"),
        ({"negative": "1"}, "changes nothing without guidance"),
    ],
)
def test_nothing_is_written_of_a_job_that_cannot_be_done(
    changes: dict[str, Any], words: str, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, OSError), match=words):
        replace(job(pictures), **changes).prepare(tmp_path / "out", opened())
    assert not (tmp_path / "out").exists()


def test_prompts_in_turn_are_those_of_elements_without_their_own(
    pictures: Path, tmp_path: Path
) -> None:
    output = job(pictures, prompts=("7", "8")).prepare(tmp_path / "out", opened())
    found = {e.id: e.prompt for k in range(output.count) for e in output.entries(k)}
    assert [found[f"{k % 2}/{k:02d}.png"] for k in range(5)] == ["0", "1", "2", "3", "4"]
    later = [prompt for name, prompt in found.items() if int(name[2:4]) > 4]
    assert later == ["8", "7", "8", "7", "8", "7", "8", "7"]  # places 3 to 6, and 9 to 12


def test_all_elements_have_one_guidance_whoever_runs_beside_them(
    pictures: Path, tmp_path: Path
) -> None:
    """Some batches have no prompt: both ways back must be under the guidance of the way there."""
    model = replace(opened(), guidance=3.0)
    described = job(pictures, "roundtrip", negative="2")
    described.prepare(tmp_path / "out", model)
    work(tmp_path / "out", model=model)
    assert report(tmp_path / "out")["errors"]["exact"] == 13
    found = verify(tmp_path / "out", pictures=2, model=model)
    assert found == {"elements": 7, "largest": 0.0, "faults": []}


def test_a_model_on_another_kind_of_device_is_refused(tmp_path: Path) -> None:
    described = job("seeds:4", "sample", device="cuda")
    described.prepare(tmp_path / "out", opened())
    with pytest.raises(ValueError, match="one of the device cuda, the model is on cpu"):
        work(tmp_path / "out", model=opened())
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch finds no GPU here"):
            work(tmp_path / "out")
