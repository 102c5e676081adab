"""Hostile files of every kind that the package reads, and what watches the loaders read them."""
