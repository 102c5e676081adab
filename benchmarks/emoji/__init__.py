"""Emoji in two drawings: the data, the training of the network in the box, and its benchmarks."""
