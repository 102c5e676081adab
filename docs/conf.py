"""Sphinx configuration; `make docs` builds strictly."""

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

import odesolvers

project = "odesolvers"
author = "the odesolvers authors"
release = odesolvers.__version__
copyright = "2026, the odesolvers authors"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
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
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"


def inline_formula(translator: Any, node: nodes.math) -> None:
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def formula(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Formulas are MathML, which browsers show without a script from the network."""
    app.add_html_math_renderer("mathml", (inline_formula, None), (formula, None))
