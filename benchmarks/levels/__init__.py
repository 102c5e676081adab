"""Noise levels learned with the weights, and for other samplers: `python -m benchmarks.levels`."""
