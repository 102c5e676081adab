"""Jobs over data sets: pictures are inverted and noise is sampled, shard by shard, on many workers."""

from .check import verify
from .job import Job, Output
from .models import Model, load_model
from .reading import Shards, report
from .work import run_workers, work

__all__ = [
    "Job",
    "Model",
    "Output",
    "Shards",
    "load_model",
    "report",
    "run_workers",
    "verify",
    "work",
]
