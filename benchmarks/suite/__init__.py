"""Samplers and inverters side by side: `python -m benchmarks.suite`."""
