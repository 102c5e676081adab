"""Runs the code examples of README, docs and docstrings as tests."""

from importlib.util import find_spec

from sybil import Sybil
from sybil.document import PythonDocStringDocument
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser
from sybil.parsers.rest import DocTestParser

pages = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "CONTRIBUTING.md", "docs/*.md"],
    setup=lambda names: names.update(find_spec=find_spec),  # for conditions of `skip`
)
docstrings = Sybil(
    parsers=[DocTestParser()],
    patterns=["odesolvers/**/*.py", "models/**/*.py"],
    document_types={".py": PythonDocStringDocument},
)
pytest_collect_file = (pages + docstrings).pytest()
