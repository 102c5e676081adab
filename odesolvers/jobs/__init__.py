"""Jobs over data sets: pictures are inverted and noise is sampled, shard by shard, on many workers."""

from .check import verify
from .job import Job, Output
from .reading import Shards, report
from .work import run_workers, work

__all__ = [
    "Job",
    "Output",
    "Shards",
    "report",
    "run_workers",
    "verify",
    "work",
]
