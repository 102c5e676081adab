"""Commands that meet closed pipes, full disks, strange files and Ctrl-C."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

import odesolvers_command
from odesolvers import BDIA, Calibrated, Euler, State, cli, karras_sigmas
from odesolvers.cli import choices
from odesolvers.models import IdealDenoiser, load_digits

from .shell import DIGITS, Shell

SAMPLE = f"sample --count 2 --steps 3 --save s.safetensors{DIGITS}"
WRITTEN = ["out/samples.png", "s.safetensors"]


def files() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


def ended(command: str) -> int:
    """The exit code of a command, 0 if it went well."""
    try:
        cli.main(shlex.split(command))
    except SystemExit as error:
        return int(str(error.code))
    return 0


# pipes and disks


@pytest.fixture(params=["pipe", "/dev/full"])
def broken(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A stream that nothing can be written to, though nobody knows before it is flushed."""
    if request.param == "pipe":
        read, write = os.pipe()
        os.close(read)
        stream = os.fdopen(write, "w")
    else:
        stream = open(request.param, "w")  # noqa: SIM115
    yield stream
    stream.close()  # raises if something of the output is still held back


@pytest.mark.parametrize("command", [SAMPLE, "list", "--help", "sample --help"])
def test_stdout_that_is_closed_costs_no_result(
    shell: Shell, broken: Any, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", broken)
    assert ended(command) == 2
    *_, message = shell.capsys.readouterr().err.splitlines()
    assert message.startswith("Error: printing failed ([Errno ")
    if command == SAMPLE:
        assert files() == WRITTEN
        assert "; wrote s.safetensors (state); wrote out/samples.png (contact sheet)" in message


def test_stderr_that_is_closed_ends_nothing(
    shell: Shell, broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stream in (broken, None):
        monkeypatch.setattr(sys, "stderr", stream)
        assert "evaluations" in shell.run(SAMPLE)
        assert ended("sample --steps none") == 2
    monkeypatch.undo()
    with pytest.raises(OSError, match="Errno"):
        broken.close()  # what is held back is lost


def test_an_encoding_without_greek_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding in ("ascii", "cp1252", "utf-8"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        assert ended("list") == 0
        assert b"DampedStepRatio" in stream.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("command", "outputs"),
    [
        (SAMPLE, WRITTEN),
        (f"roundtrip --count 2 --steps 3{DIGITS}", ["out/roundtrip.png"]),
        (f"edit --count 1 --labels 1 --to 2 --steps 3{DIGITS}", ["out/edit.png"]),
        (f"calibrate --count 1 --steps 3 --runs 2{DIGITS}", ["out/gamma.json"]),
    ],
)
def test_a_full_disk_leaves_the_old_files(shell: Shell, command: str, outputs: list[str]) -> None:
    Path("out").mkdir()
    for name in outputs:
        Path(name).write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        code = ended(command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    output, error = shell.capsys.readouterr()
    assert output == ""
    assert error.splitlines()[-1].startswith("Error: [Errno 27] File too large")
    assert [Path(name).read_bytes() for name in outputs] == [b"old"] * len(outputs)
    assert files() == sorted(outputs)


def test_places_that_cannot_be_written_to_are_named(shell: Shell) -> None:
    Path("file").write_text("")
    ends = {
        f"{SAMPLE} --out file/a/x.png": "file/a/x.png cannot be written: file",
        f"sample --count 1 --steps 3 --save file/s.safetensors{DIGITS}": "file is no folder",
        f"{SAMPLE} --out .": ".",
        f"{SAMPLE} --out x.xyz": "x.xyz does not end as an image file does: use .png",
        f"roundtrip --count 1 --steps 3 --out x.xyz{DIGITS}": "x.xyz does not end as an image file",
    }
    for command, words in ends.items():
        assert words in shell.refused(command), command


# errors


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RecursionError("too deep"), "too deep"),
        (MemoryError(), "MemoryError"),
        (OverflowError(34, "out of range"), "(34, 'out of range')"),
        (SafetensorError("no header"), "no header"),
        (KeyError("labels"), "KeyError: 'labels'"),
        (AssertionError(), "AssertionError"),
        (torch.OutOfMemoryError("two\n  lines"), "two lines"),
        (Image.DecompressionBombError("large"), "large"),
        (ValueError("clears\x1b[2J the\x00 screen"), r"clears\x1b[2J the\x00 screen"),
        (RuntimeError("long " * 10_000), "long " * 199 + "l ..."),
    ],
)
def test_errors_of_every_kind_are_one_line(
    shell: Shell, error: Exception, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Any:
        raise error

    failing = dataclasses.replace(choices.MODELS["digits"], load=fail)
    monkeypatch.setitem(choices.MODELS, "digits", failing)
    assert shell.refused("sample" + DIGITS) == f"Error: {line}"
    assert shell.error.count("\n") == 1


@pytest.mark.parametrize(
    ("notes", "words"),
    [
        ({"model": None}, "names no model"),
        ({"model": ["digits"]}, "names the model ['digits']"),
        ({"labels": []}, "it names no label"),
        ({"labels": "3"}, "must be of type list"),
        ({"labels": [1.5]}, "must be an integer from 0 to 9, got 1.5"),
        ({"labels": [10]}, "from 0 to 9, got 10"),
        ({"labels": [True]}, "got True"),
        ({"labels": {"a": 1}}, "must be of type list"),
        ({"guidance": None}, "must be a finite number, got None"),
        ({"guidance": "x"}, "must be a finite number, got 'x'"),
        ({"guidance": float("nan")}, "must be a finite number, got nan"),
        ({"guidance": [1] * 1000}, "must be a finite number, got [1, 1, 1"),
    ],
)
def test_notes_of_another_kind_are_refused(shell: Shell, notes: dict[str, Any], words: str) -> None:
    state = State(torch.zeros(1, 1, 8, 8), None, 0, (2.0, 1.0, 0.0), "BDIA(Euler(), gamma=1.0)")
    state.save("s.safetensors", {"model": "digits", **notes})
    assert words in shell.refused("invert s.safetensors")


def test_a_state_carries_the_weights_that_made_it(shell: Shell) -> None:
    sigmas = tuple(karras_sigmas(4).tolist())
    Calibrated("Euler()", sigmas, (0.5, 0.75, 0.625)).save("gamma.json")
    shell.run(f"sample --weights gamma.json --count 2 --steps 4 --save s.safetensors{DIGITS}")
    Path("gamma.json").unlink()
    shell.run("invert s.safetensors --save code.safetensors")
    state, notes = State.load_with_notes("s.safetensors")
    assert "gamma.json" not in json.dumps([state.solver, notes])
    rule = Calibrated("Euler()", sigmas, (0.5, 0.75, 0.625))
    right = BDIA(Euler(), rule).invert(IdealDenoiser(load_digits()[0]), state, sigmas)
    assert torch.allclose(State.load("code.safetensors").current, right.state.current, rtol=1e-4)


def test_a_state_does_not_choose_which_files_are_read(shell: Shell) -> None:
    Calibrated("Euler()", (2.0, 1.0, 0.0), (0.5,)).save("gamma.json")
    solver = "BDIA(Euler(), load('gamma.json'))"
    state = State(torch.zeros(1, 1, 8, 8), None, 0, (2.0, 1.0, 0.0), solver)
    state.save("s.safetensors", {"model": "digits"})
    assert "'load'" in shell.refused("invert s.safetensors")


# signals


@pytest.fixture
def _handlers() -> Iterator[None]:
    """Puts the handlers of signals back that the command replaces in its process."""
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", ["a run", "a picture", "a state"])
def test_a_signal_ends_a_command_with_one_line_and_no_half_file(
    shell: Shell, number: int, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in WRITTEN:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(b"old")

    def stop(*args: Any, **options: Any) -> Any:
        for stream in args:
            if hasattr(stream, "write"):
                stream.write(b"half")
        os.kill(os.getpid(), number)
        raise AssertionError("the signal was not heard")

    def again(*args: Any, **options: Any) -> None:
        for other in (signal.SIGINT, signal.SIGTERM) * 3:  # of someone who is impatient
            os.kill(os.getpid(), other)
        print(*args, **options)

    if place == "a run":
        stopping = dataclasses.replace(choices.MODELS["digits"], load=stop)
        monkeypatch.setitem(choices.MODELS, "digits", stopping)
    else:
        owner, method = (Image.Image, "save") if place == "a picture" else (os, "fsync")
        monkeypatch.setattr(owner, method, stop)
    monkeypatch.setattr(cli, "print", again, raising=False)
    monkeypatch.setattr(sys, "argv", ["odesolvers", *shlex.split(SAMPLE)])
    with pytest.raises(SystemExit) as caught:
        odesolvers_command.main()
    assert caught.value.code == 128 + number
    output, error = shell.capsys.readouterr()
    *_, line = error.splitlines()
    assert line == "Interrupted. No file is left half written; the same command starts again."
    assert "Traceback" not in error
    assert output == ""
    assert files() == WRITTEN
    assert Path("out/samples.png").read_bytes() == b"old"
    assert (Path("s.safetensors").read_bytes() == b"old") == (place != "a picture")
    os.kill(os.getpid(), signal.SIGINT)  # while Python ends: not heard any more


DURING_IMPORTS = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), int(sys.argv[2]))
sys.meta_path.insert(0, Finder())
import odesolvers_command
odesolvers_command.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_imports_is_one_line(number: int) -> None:
    command = [sys.executable, "-c", DURING_IMPORTS, "torch", str(int(number))]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.stderr == "Interrupted before the start; nothing is written.\n"
    assert (ended.stdout, ended.returncode) == ("", 128 + number)


def test_a_signal_that_the_caller_ignores_is_ignored() -> None:
    code = "import signal, odesolvers_command as o; print(o._is_heard(signal.SIGINT))"
    for handler, heard in ((signal.SIG_IGN, "False"), (signal.SIG_DFL, "True")):
        ended = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            preexec_fn=lambda handler=handler: signal.signal(signal.SIGINT, handler),  # type: ignore[misc]
        )
        assert ended.stdout.strip() == heard
