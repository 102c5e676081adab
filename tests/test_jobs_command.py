"""The command `odesolvers batch`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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
    command = f"sample --model {MODEL} --input seeds:9 --prompts 1,2 --solver exact --output {out}"
    main(["batch", *f"{command} {SMALL} --workers 2".split()])
    said = capsys.readouterr().out
    assert "9 of 9 elements in 3 shards" in said
    assert json.loads((out / "report.json").read_text())["written"] == 9
    before = Output(out).shard(1).read_bytes()
    Output(out).shard(2).unlink()
    main(["batch", *f"{command} {SMALL}".split()])
    assert Output(out).done() == {0, 1, 2}
    assert Output(out).shard(1).read_bytes() == before
    main(["batch", "verify", "--output", str(out), "--pictures", "4"])
    assert "9 elements lead back, with a relative error of at most 0" in capsys.readouterr().out
    line = refused(f"{command} {SMALL.replace('5', '6')}", capsys)
    assert "sigmas was 6 values and is 7 values" in line
    Output(out).shard(0).write_bytes(before)
    assert "shard 0: " in refused(f"verify --output {out} --pictures 4", capsys)


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
    line = refused(
        f"sample --model {MODEL} --input seeds:9 --prompts x {SMALL} --output {out}", capsys
    )
    assert "3 of 3 shards are not written: worker 0 stopped: ValueError: " in line
    assert "invalid literal" in line
    assert not list((out / "shards").iterdir())


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("invert --output out", "a job needs --model"),
        ("draw --output out", "invalid choice"),
        ("invert --model letters", "required: --output"),
        ("verify --output nowhere", "there is no file nowhere"),
        (
            f"sample --model {MODEL} --input seeds:9 --output out --solver Euler",
            "--solver: 'Euler' is neither",
        ),
    ],
)
def test_commands_of_no_use_are_refused(
    command: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(command, capsys)
