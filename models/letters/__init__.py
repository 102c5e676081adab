"""A small trained network of letters, included so that no download is needed to try the solvers."""

from .data import LETTERS, Style, random_letters, render_letter
from .network import LettersDenoiser, load_letters

__all__ = ["LETTERS", "LettersDenoiser", "Style", "load_letters", "random_letters", "render_letter"]
