"""Every number of README and docs: run `python -m benchmarks.NAME` from the root of the repository."""
