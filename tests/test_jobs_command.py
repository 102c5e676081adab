"""The command `odesolvers batch`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from odesolvers import State
from odesolvers.cli import main
from odesolvers.jobs import Output

MODEL, SMALL = "tests.job_models:small", "--steps 5 --batch 2 --shard-size 4"


def refused(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The line on stderr of a command that ends with the code 2."""
    with pytest.raises(SystemExit) as ended:
        main(["batch", *command.split()])
    assert ended.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_job_is_done_reported_gone_on_with_and_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    prompts = "--prompt 1 --prompt 2"
    command = f"sample --model {MODEL} --input seeds:9 {prompts} --solver exact --output {out}"
    main(["batch", *f"{command} {SMALL} --workers 2".split()])
    said = capsys.readouterr().out
    assert "9 of 9 elements in 3 shards" in said
    assert json.loads((out / "report.json").read_text())["written"] == 9
    before = Output(out).shard(1).read_bytes()
    Output(out).shard(2).unlink()
    main(["batch", *f"{command} {SMALL}".split()])
    assert Output(out).done() == {0, 1, 2}
    assert Output(out).shard(1).read_bytes() == before
    main(["batch", "verify", "--output", str(out), "--model", MODEL, "--per-shard", "4"])
    assert "9 elements lead back, with a relative error of at most 0" in capsys.readouterr().out
    line = refused(f"{command} {SMALL.replace('5', '6')}", capsys)
    assert "sigmas was 6 values and is 7 values" in line
    Output(out).shard(0).write_bytes(before)
    verified = f"verify --output {out} --model {MODEL} --per-shard 4"
    assert "shard 0: " in refused(verified, capsys)
    line = refused(verified.replace("small", "slow"), capsys)  # of the same weights
    assert "shard 0: " in line
    assert "another one here" in refused(verified.replace(MODEL, "digits"), capsys)
    assert f"give --model {MODEL}" in refused(f"verify --output {out}", capsys)


def test_under_a_launcher_the_command_is_one_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"sample --model {MODEL} --input seeds:9 {SMALL} --output {tmp_path / 'out'}"
    for rank, said in (("1", ""), ("0", "9 of 9 elements")):
        for name, value in {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(name, value)
        main(["batch", *command.split()])
        assert said in (found := capsys.readouterr().out)
        assert bool(found.strip()) == (rank == "0")


def test_a_worker_that_stops_is_named_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    model = MODEL.replace("small", "broken")
    line = refused(f"sample --model {model} --input seeds:9 {SMALL} --output {out}", capsys)
    assert "3 of 3 shards are not written: worker 0 stopped: FloatingPointError: " in line
    assert "nothing is white" in line
    assert not list((out / "shards").iterdir())


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("invert", "required: --input; see `odesolvers batch invert --help`"),
        ("draw", "invalid choice"),
        ("verify", "there is no file out/manifest.json"),
        ("verify --per-shard 0", "--per-shard: must be a whole number from 1"),
        ("verify --per-shard -1", "--per-shard: "),
        ("verify --prompt A", "odesolvers batch verify takes no '--prompt'"),
        ("sample --input seeds:9 --fit pad", "odesolvers batch sample takes no '--fit'"),
        ("sample --input seeds:9 --solver Euler", "--solver: 'Euler' is neither"),
        ("sample --input seeds:9 --threads 0", "--threads: must be a whole number from 1"),
        ("sample --input seeds:9 --guidance nan", "--guidance: must be a finite number"),
        ("sample --input seeds:9 --workers 0", "--workers: must be a whole number from 1"),
        ("sample --input seeds:9 --workers -1", "--workers: "),
        ("sample --input seeds:9 --batch 3", "shard_size must be a multiple of batch"),
        ("sample --input seeds:9 --network float16", "--network is for EDM files and pipelines"),
        ("sample --input seeds:9 --option partition", "--option must be NAME=VALUE"),
        ("sample --input seeds:9 --prompt cat", "subgroups of emoji such as cat-face"),
        ("sample --input prompts:nowhere@2", "there is no file nowhere"),
        (
            "sample --input prompts:words@2",
            "(none, light, medium-light, medium, medium-dark, dark), got 'a cat'",
        ),
        ("sample --input seeds:9 --device tpu", "--device: must be one of cpu, cuda"),
    ],
)
def test_commands_of_no_use_are_refused_before_anything_is_written(
    command: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words").write_text("cat-face\na cat\n")
    assert words in refused(f"{command} --output out", capsys).replace(f"{tmp_path}/", "")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("rank", [None, "0"])
def test_gpus_are_asked_for_before_the_model_is_loaded(
    rank: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    command = f"sample --model nowhere.pkl --input seeds:9 --device cuda --output {tmp_path / 'o'}"
    assert "torch finds no GPU here" in refused(command, capsys)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "options", ["--model digits --prompt 3", "--model emoji --prompt cat-face"]
)
def test_a_picture_has_the_code_that_invert_gives_it(
    options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit where as many elements are computed at once: 16 bits, cropped, by the defaults."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    deep = np.random.default_rng(0).integers(0, 2**16, (40, 50)).astype(np.uint16)
    Image.fromarray(deep).save("pictures/a.png")
    Image.fromarray((deep[:, ::-1] // 256).astype(np.uint8)).save("pictures/b.jpg")
    main(f"invert pictures {options} --steps 4".split())
    for size in (1, 2):
        out = f"--batch {size} --shard-size 2 --output batch{size}"
        main(f"batch invert --input pictures {options} --steps 4 {out}".split())
        found, notes = State.load_with_notes(Output(Path(f"batch{size}")).shard(0))
        for k, name in enumerate("ab"):
            expected = State.load(f"out/invert/{name}.safetensors")
            assert notes["entries"][k][0].startswith(name)
            assert found.solver == expected.solver
            assert found.partner is not None
            assert expected.partner is not None
            for x, y in ((found.current, expected.current), (found.partner, expected.partner)):
                if size == 1 and torch.get_num_threads() == 1:
                    assert torch.equal(x[k], y[0])
                torch.testing.assert_close(x[k], y[0], rtol=1e-3, atol=1e-3)


def test_samples_have_the_guidance_of_the_other_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = "--model emoji --prompt cat-face --prompt food-fruit --steps 3"
    main(f"sample {options} --count 2 --save".split())
    main(f"batch sample --input seeds:2 {options} --batch 1 --shard-size 2 --output job".split())
    found = State.load(Output(Path("job")).shard(0))
    for k in range(2):
        expected = State.load(f"out/sample/00000{k}.safetensors")
        torch.testing.assert_close(found.current[k], expected.current[0], rtol=1e-4, atol=1e-4)
