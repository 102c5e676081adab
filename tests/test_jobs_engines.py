"""Jobs on datatrove's executors: the shards are those of one worker."""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from odesolvers.jobs import Job, Output, work

from .job_models import opened
from .test_jobs import FIXED, SIGMAS, contents

pytestmark = [
    pytest.mark.skipif(find_spec("datatrove") is None, reason="datatrove is not installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestWarning"),
]


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """The shards of one worker."""
    prepared(tmp_path / "one")
    work(tmp_path / "one")
    return tmp_path / "one" / "shards"


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets worker processes import the tests."""
    monkeypatch.setenv("PYTHONPATH", os.fspath(Path(__file__).parents[1]))


def prepared(folder: Path) -> Output:
    settings: dict[str, Any] = {"batch": 4, "shard_size": 8}
    job = Job("sample", "tests.job_models:small", "seeds:60", FIXED, SIGMAS, **settings)
    return job.prepare(folder, opened())


def test_the_local_executor_makes_the_same_shards(one: Path, tmp_path: Path) -> None:
    from datatrove.executor import LocalPipelineExecutor

    from odesolvers.jobs.engines import MakeShards

    output, logs = prepared(tmp_path / "two"), str(tmp_path / "logs")
    step, settings = MakeShards(str(output.path)), {"skip_completed": False, "logging_dir": logs}
    LocalPipelineExecutor([step], tasks=2, workers=2, **settings).run()
    assert contents(output.path / "shards") == contents(one)
    output.shard(3).unlink()  # what executors believe to be done is not asked
    LocalPipelineExecutor([step], tasks=2, workers=1, **settings).run()
    assert contents(output.path / "shards") == contents(one)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
def test_ray_makes_the_same_shards(one: Path, tmp_path: Path) -> None:
    from odesolvers.jobs.engines import run_on

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = prepared(tmp_path / "ray")
        run_on("ray", output, 2, {})
    assert contents(output.path / "shards") == contents(one)


def test_slurm_is_given_an_array_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script stands for `sbatch`: there is no Slurm in tests."""
    from odesolvers.jobs.engines import run_on

    submit = tmp_path / "bin" / "sbatch"
    submit.parent.mkdir()
    submit.write_text("#!/bin/sh\necho Submitted batch job 7\n")
    submit.chmod(0o755)
    monkeypatch.setenv("PATH", f"{submit.parent}:{os.environ['PATH']}")
    output = prepared(tmp_path / "out")
    run_on("slurm", output, 3, {"time": "01:00:00", "partition": "gpu"})
    script = (output.path / "logs" / "launch_script.slurm").read_text()
    assert "--array=0-2" in script
    assert "--partition=gpu" in script
    assert "--time=01:00:00" in script
