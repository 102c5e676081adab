"""Jobs that are killed, and outputs that are full or cannot be written: nothing lost, nothing twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import odesolvers as ode
from odesolvers.jobs import Job, Output, Shards, report, work

from .job_models import opened
from .test_jobs import FIXED, SIGMAS, contents

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and mounts of POSIX")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, chance = tmp_path_factory.mktemp("pictures"), np.random.default_rng(1)
    for k in range(2000):
        pixels = chance.integers(0, 255, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k:04d}.png")
    return folder


def job(pictures: Path, model: str = "slow", **settings: object) -> Job:
    name, known = f"tests.job_models:{model}", {"batch": 20, "shard_size": 20}
    return Job("invert", name, str(pictures), FIXED, SIGMAS, **{**known, **settings})  # type: ignore[arg-type]


def started(output: Path, workers: int = 2) -> subprocess.Popen[bytes]:
    """The parent of some workers, which runs until all shards are written."""
    code = (
        "import pathlib, odesolvers.jobs as jobs\n"
        f"output = jobs.Output(pathlib.Path({str(output)!r}))\n"
        f"faults = jobs.run_workers(output, {workers})\n"
        "print(faults); raise SystemExit(len(output.done()) < output.count)"
    )
    one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ | one)


def children(pid: int) -> list[int]:
    with suppress(OSError):
        pids = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return [pid for pid in pids if alive(pid)]
    return []


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended may still be listed."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="lists processes by /proc")
def test_twenty_kills_change_nothing(pictures: Path, tmp_path: Path) -> None:
    described, chance, kills = job(pictures), random.Random(0), Counter[str]()
    described.prepare(tmp_path / "undisturbed", opened())  # the same weights, at once
    work(tmp_path / "undisturbed", model=opened())
    output = described.prepare(tmp_path / "killed", opened())
    parent = started(output.path)
    while kills.total() < 20:
        before = len(output.done())
        while parent.poll() is None and len(output.done()) == before:
            time.sleep(0.01)  # until there is some work to lose
        time.sleep(chance.uniform(0, 0.5))
        workers = children(parent.pid)
        if parent.poll() is not None:
            assert len(output.done()) < output.count, f"it was over after {kills}"
        elif not workers or chance.random() < 0.4:
            os.kill(parent.pid, signal.SIGKILL)
            kills["parent"] += 1
        else:
            os.kill(chance.choice(workers), signal.SIGKILL)
            kills["worker"] += 1
            if len(workers) > 1:
                continue
        parent.wait()
        parent = started(output.path)
    if parent.wait(300):  # the last one lost both workers
        parent = started(output.path)
    assert parent.wait(300) == 0
    assert min(kills.values()) >= 5
    assert contents(output.path) == contents(tmp_path / "undisturbed")
    names = [name for names, _ in Shards(output.path).states() for name in names]
    assert names == sorted(path.name for path in pictures.iterdir())
    runs = Counter(record["shard"] for record in output.logged())
    assert max(runs.values()) == 1  # no shard was written twice


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed(pictures: Path, tmp_path: Path) -> None:
    output = job(pictures).prepare(tmp_path / "out", opened())
    parent = started(output.path)
    while not output.done():
        time.sleep(0.05)
    workers = children(parent.pid)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    end = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < end:
        time.sleep(0.05)
    assert len(workers) == 2
    assert not any(map(alive, workers))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        done = False
    if not done:
        pytest.skip("nothing can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


def test_a_full_disk_is_an_error_and_the_job_goes_on_from_there(
    pictures: Path, tmp_path: Path, disk: Path
) -> None:
    described = job(pictures, "small", batch=50, shard_size=250)
    described.prepare(tmp_path / "whole", opened())
    work(tmp_path / "whole")
    output = described.prepare(disk / "out", opened())
    with pytest.raises(OSError, match="No space left"):
        work(output.path)
    written = contents(output.path / "shards")
    assert 0 < len(written) < output.count
    assert (
        contents(tmp_path / "whole" / "shards").items() >= written.items()
    )  # whole, without rests
    remount(disk, "size=20m")
    assert work(output.path) == output.count - len(written)
    assert contents(output.path) == contents(tmp_path / "whole")


def test_an_output_that_cannot_be_written_is_an_error(
    pictures: Path, tmp_path: Path, disk: Path
) -> None:
    remount(disk, "size=20m")
    described = job(pictures, "small", batch=50, shard_size=250)
    output = described.prepare(disk / "out", opened())
    remount(disk, "ro")
    try:
        with pytest.raises(OSError, match="Read-only"):
            work(output.path)
        with pytest.raises(OSError, match="Read-only"):
            described.prepare(disk / "another", opened())
    finally:
        remount(disk, "rw")
    assert work(output.path) == output.count
    assert report(output.path)["written"] == 2000


def test_threads_of_other_numbers_are_set_for_the_job_alone(pictures: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    output = job(pictures, "small", batch=50, shard_size=1000, threads=2).prepare(
        tmp_path / "out", opened()
    )
    assert work(output.path) == 2
    assert torch.get_num_threads() == threads
    assert Output(output.path).job.threads == 2
    assert ode.__version__ == output.manifest["odesolvers"]
