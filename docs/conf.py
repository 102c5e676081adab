"""Sphinx configuration; `make docs` builds strictly."""

import odesolvers

project = "odesolvers"
author = "the odesolvers authors"
release = odesolvers.__version__
copyright = "2026, the odesolvers authors"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "tables"]
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
napoleon_numpy_docstring = False
napoleon_attr_annotations = False
nitpicky = False
html_theme = "furo"
html_title = "odesolvers"
