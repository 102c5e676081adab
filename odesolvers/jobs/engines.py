"""Jobs on clusters: a step of datatrove, which its executors run on Slurm and Ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .job import Output
from .work import work

try:
    from datatrove.pipeline.base import PipelineStep
except ImportError as error:
    raise ImportError(
        "jobs on Slurm and Ray need datatrove: pip install datatrove ray 'numpy>=2'",
        name="datatrove",
    ) from error


class MakeShards(PipelineStep):  # type: ignore[misc]
    """One worker of a prepared job as the only step of a pipeline of datatrove.

    The tasks of the executor are workers, not shards, so that each loads the model once; which of them
    makes which shard is settled by claims, see `work`. What is done is known by the shards: use
    ``skip_completed=False``, or executors will not run tasks again whose shards were removed.

    Args:
        folder: the folder of a job, seen by all machines under the same path.
    """

    name = "odesolvers"
    type = "Shards"

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        """Makes shards until all are written; passes `data` on."""
        self.stat_update("shards", value=work(self.folder, rank=rank, world=world_size))
        return data


def run_on(engine: str, output: Output, workers: int, options: Mapping[str, Any]) -> None:
    """Runs the job on Slurm or Ray with datatrove's executor, or starts it there.

    Slurm queues an array of jobs and returns; Ray, on this machine unless RAY_ADDRESS names a
    cluster, returns when all shards are written.

    Args:
        engine: "slurm" or "ray".
        output: a job that was prepared.
        workers: the number of tasks, all at the same time.
        options: further arguments of the executor, such as ``time`` and ``partition`` of Slurm.
    """
    folder, job = str(output.path.resolve()), output.job
    settings: dict[str, Any] = {"tasks": workers, "workers": workers, "skip_completed": False}
    settings |= {"logging_dir": f"{folder}/logs"}
    if job.device == "cuda":
        settings["gpus_per_task"] = 1
    if engine == "slurm":
        from datatrove.executor import SlurmPipelineExecutor

        settings |= {"job_name": "odesolvers", "slurm_logs_folder": f"{folder}/logs/slurm"}
        settings |= {"cpus_per_task": job.threads, **options}
        SlurmPipelineExecutor([MakeShards(folder)], **settings).run()
    else:
        import ray
        from datatrove.executor.ray import RayPipelineExecutor

        ray.init(ignore_reinit_error=True)
        try:
            settings |= {"cpus_per_task": job.threads, **options}
            RayPipelineExecutor([MakeShards(folder)], **settings).run()
        finally:
            ray.shutdown()
